"""Metrics and ZeRO-3 on two ranks."""

from pathlib import Path

import pytest

from tests.launcher import run_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {script: run_ranks(HERE / f"{script}.py", 2, folder) for script in ("ranks_metrics", "ranks_zero3")}


@pytest.mark.parametrize("check", ["check_unequal", "check_a_rank_without_images", "check_dense_kinds"])
def test_metrics_of_unequal_ranks_equal_those_of_one_process(results, check):
    assert results["ranks_metrics"][check] == ""


@pytest.mark.parametrize("check", ["check_float32", "check_bfloat16", "check_dense_kinds"])
def test_all_heads_train_with_a_partitioned_backbone(results, check):
    assert results["ranks_zero3"][check] == ""


def test_pretrained_weights_reach_a_partitioned_backbone(results):
    assert results["ranks_zero3"]["check_pretrained"] == ""
