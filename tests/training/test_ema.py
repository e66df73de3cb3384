"""Averaged weights on every engine kind; large and compiled models on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

HERE = Path(__file__).parent
EMA_KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload",
             "zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16", "zero1 bf16 fp32-accumulation")  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(HERE / "ranks_ema.py", 2, tmp_path_factory.mktemp("strength"))


@pytest.mark.parametrize("kind", EMA_KINDS)
def test_averaged_weights_are_applied_and_removed_on_every_engine(ranks: dict[str, str], kind: str) -> None:
    assert ranks[f"check_average {kind}"] == ""


def test_under_zero_3_no_rank_holds_the_complete_backbone(ranks: dict[str, str]) -> None:
    assert ranks["check_no_rank_holds_the_whole_backbone"] == ""


@pytest.mark.parametrize("what", ["layers", "whole"])
@pytest.mark.parametrize("case", ["zero2 fp32", "zero3 fp32"])
def test_a_compiled_forward_trains_to_the_same_weights(ranks: dict[str, str], case: str, what: str) -> None:
    assert ranks[f"check_compiled {case} {what}"] == ""
