"""Planned memory and traffic against what ranks hold and what the collectives move."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from allinone_ds.balance.assignment import task_groups
from allinone_ds.planning.memory import Sizes, moved_parts
from allinone_ds.run_config.engine_settings import Engine
from tests.launcher import run_ranks
from tests.planning.ranks_memory import CASES, JOINT, name_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(HERE / "ranks_memory.py", 2, tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_part_is_within_15_percent_of_the_memory_of_a_rank(ranks: dict[str, str], case: tuple) -> None:
    assert ranks[name_of(case)] == ""


@pytest.mark.parametrize("case", JOINT, ids=name_of)
def test_a_joint_group_holds_averages_and_gathers_what_is_planned(ranks: dict[str, str], case: tuple) -> None:
    assert ranks[name_of(case)] == ""


def test_bytes_moved_follow_the_collectives() -> None:
    sizes = Sizes(backbone=900, heads={"a": 60, "b": 40}, micro_steps={"a": 1, "b": 3})

    def moved(stage: int, norm: str = "exact", gpus: int = 4) -> dict[str, int]:
        parts = moved_parts(Engine(stage, weight_bytes=2, all_reduces=stage < 3), sizes, gpus, norm, sketch=8)
        return {key: value for key, value in parts.items() if key != "norms"}

    # a ring of 4: 3/4 of the elements a pass, two bytes each; tasks have 960 and 940 parameters
    assert moved(0) == {"gradients": 0.75 * 2 * 2 * 1000 * 2}  # an all-reduce of everything a task
    assert moved(1) == {"gradients": 2 * 0.75 * (960 + 940) * 2, "new weights": 0.75 * 1000 * 2}
    assert moved(2) == {"gradients": 2 * 0.75 * (960 + 3 * 940) * 2, "new weights": 0.75 * 1000 * 2}
    assert moved(3)["gradients"] == 0.75 * (960 + 3 * 940) * 2  # a reduce-scatter
    assert moved(3)["weights"] == 2 * 0.75 * (960 + 3 * 940) * 2  # forward and backward
    small = Engine(3, weight_bytes=2, retained=10_000, task_traces=False, all_reduces=False)
    kept = moved_parts(small, sizes, 4, "exact", sketch=8)
    assert kept["weights"] == 0.75 * (960 + 3 * 940) * 2  # small models stay gathered from forward to backward
    small = dataclasses.replace(small, task_traces=True)
    assert moved_parts(small, sizes, 4, "exact", sketch=8)["weights"] == 0.75 * 1000 * 2  # and over the whole step
    assert moved(2, "features") == moved(2) and moved(3, "features") == moved(3)
    for norm in ("sketch", "delayed", "features"):
        assert moved(1, norm)["gradients"] == 2 * 0.75 * 1000 * 2  # once a step
    assert set(moved(3, gpus=1).values()) == {0}
    groups = task_groups({"a": 3, "b": 1}, ("a", "b"), 4)
    apart = moved_parts(Engine(2, weight_bytes=2), sizes, 4, "exact", 8, groups)
    assert apart["gradients"] == moved(2, "sketch")["gradients"]
    assert apart["norms"] == 0.75 * 2 * 3 * 8 * 2 + 2 / 3 * 960 * 4  # a reduce-scatter among three ranks, in float32
