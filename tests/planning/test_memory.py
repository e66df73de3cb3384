"""Planned memory and traffic against what ranks hold and what the collectives move."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from torch import nn

from allinone_ds.balance.assignment import task_groups
from allinone_ds.models.lora import LoraOptions, add_lora, shared_parameters
from allinone_ds.planning.memory import JointTasks, Sizes, memory_parts, sizes_of
from allinone_ds.planning.savings import traffic_savings
from allinone_ds.planning.traffic import between_nodes, moved_parts
from allinone_ds.run_config.engine_settings import Engine
from allinone_ds.training.optimizer import parameter_groups
from tests.launcher import run_ranks
from tests.planning.ranks_memory import CASES, JOINT, name_of
from tests.tiny import tiny_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(HERE / "ranks_memory.py", 2, tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_part_is_within_15_percent_of_the_memory_of_a_rank(ranks: dict[str, str], case: tuple) -> None:
    assert ranks[name_of(case)] == ""


def test_weights_that_are_kept_or_copied_are_gathered_less_often() -> None:
    sizes = Sizes(backbone=900, heads={"a": 60, "b": 40}, micro_steps={"a": 1, "b": 3})
    engine = Engine(3, weight_bytes=2, retained=500, live=600, prefetched=100, all_reduces=False)

    def weights(engine: Engine, sizes: Sizes = sizes) -> dict[str, int]:
        parts = moved_parts(engine, sizes, 4, "exact", sketch=8)
        return {key: value for key, value in parts.items() if key.startswith("weights")}

    # 500 once; of a 460 for its forward and 400 for its backward, which keeps the head; of b 3 x (440 + 400)
    assert weights(engine) == {"weights": 0.75 * 2 * (500 + 860 + 3 * 840)}
    copied = dataclasses.replace(engine, copied_within=2)
    # what is trained once among all four, the rest among two
    assert weights(copied) == {"weights": 0.75 * 2 * 1000, "weights within a node": 0.5 * 2 * (3880 - 1000)}
    moved = moved_parts(copied, sizes, 4, "exact", sketch=8)
    assert between_nodes(moved, 4, 2, 2) == moved["gradients"] + moved["weights"] + moved["norms"]
    assert between_nodes(moved, 4, 1, 2) == sum(moved.values()) and between_nodes(moved, 4, 4, 2) == 0
    frozen = dataclasses.replace(sizes, backbone=100, frozen=800, frozen_below=300)
    small = dataclasses.replace(engine, retained=0)
    # forwards take all that is frozen, backwards what is above the first trained parameter
    assert weights(small, frozen) == {"weights": 0.75 * 2 * (960 + 660 + 3 * (940 + 640))}
    # copies of frozen weights are never renewed
    once = weights(dataclasses.replace(small, copied_within=2), frozen)
    assert once["weights"] == 0.75 * 2 * 200


def test_sampled_tasks_send_what_they_send_on_average() -> None:
    sizes = Sizes(900, {"a": 60, "b": 40}, {"a": 1, "b": 3}, chance={"a": 0.5, "b": 0.5})
    engine = Engine(3, weight_bytes=2, all_reduces=False)
    moved = moved_parts(engine, sizes, 4, "exact", sketch=8)
    assert moved["gradients"] == 0.75 * 2 * 0.5 * (960 + 3 * 940)
    assert moved["weights"] == 2 * moved["gradients"] and moved["norms"] == 0.75 * 2 * 3 * 8
    kept = dataclasses.replace(engine, retained=10_000)
    assert moved_parts(kept, sizes, 4, "exact", sketch=8)["weights"] == 0.75 * 2 * (900 + 30 + 20)
    joint = dataclasses.replace(sizes, joint=[JointTasks(("a", "b"), "backbone")])
    assert moved_parts(engine, joint, 4, "exact", sketch=8)["gradients"] == 0.75 * 2 * 0.5 * (960 + 940)


def test_a_parameter_of_several_heads_or_of_the_backbone_counts_once() -> None:
    model = tiny_model()
    add_lora(model.backbone, LoraOptions(rank=2))
    add_lora(model.backbone, LoraOptions(rank=2), "seg")
    seg, det, cls = (model.tasks[name] for name in ("seg", "det", "cls"))
    before = sizes_of(model, dict.fromkeys(model.tasks, 1))
    assert not before.tied
    seg.same = det.same = nn.Linear(8, 8)  # 72 elements of two heads
    seg.every = det.every = cls.every = nn.Linear(4, 4)  # 20 of three
    cls.of_backbone = next(p for p in shared_parameters(model.backbone) if p.requires_grad)
    cls.norm.weight.requires_grad_(False)
    seg.frozen = det.frozen = nn.Linear(4, 4).requires_grad_(False)
    sizes = sizes_of(model, dict.fromkeys(model.tasks, 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sizes.trained == sum(p.numel() for p in trained)
    assert sizes.trained == sum(p.numel() for g in parameter_groups(model, 1.0, 0.0, 1.0) for p in g["params"])
    assert sizes.whole == sum(p.numel() for p in model.parameters())
    assert sizes.tied == {("det", "seg"): 72, ("det", "seg", "cls"): 20} and sizes.backbone == before.backbone
    assert sizes.heads["det"] == before.heads["det"] and sizes.heads["seg"] == before.heads["seg"]
    alone = {p.backwards[0] for p in sizes.passes}
    assert alone == {sizes.backbone + sizes.heads[t] + n for t, n in (("det", 92), ("seg", 92), ("cls", 20))}
    group = dataclasses.replace(sizes, joint=[JointTasks(("det", "seg"), "features")])
    assert group.passes[0].backwards == [sizes.backbone + sizes.heads["det"] + sizes.heads["seg"] + 92]
    halves = dataclasses.replace(sizes, chance=dict.fromkeys(model.tasks, 0.5))
    assert halves.trained_in_step == sizes.backbone + 0.5 * sum(sizes.heads.values()) + 92


def test_the_least_traffic_that_fits_is_recommended() -> None:
    sizes = Sizes(backbone=10**9, heads={"a": 10**6, "b": 10**6}, micro_steps={"a": 1, "b": 1})
    engine = Engine(3, weight_bytes=2, retained=10**8, live=2 * 10**8, prefetched=10**7, all_reduces=False)

    def best(gpus: int, gib: int, engine: Engine = engine) -> list[dict[str, int]]:
        def cost(changed: Engine) -> tuple[int, dict[str, int]]:
            memory = memory_parts(changed, sizes, gpus, "exact", 2, 1, 8)[0]
            return sum(memory.values()), moved_parts(changed, sizes, gpus, "exact", 8)

        rows = traffic_savings(engine, sizes, "exact", gpus, 8, gib * 2**30, cost)
        return [dict(row.keys) for row in rows if row.recommended]

    whole = {"stage3_max_live_parameters": 1002 * 10**6, "stage3_max_reuse_distance": 2004 * 10**6}
    assert best(64, 80) == [{"zero_hpz_partition_size": 8}]  # as little between nodes as with all weights kept
    assert best(8, 80) == [whole]
    assert best(8, 5) == [{"stage3_max_live_parameters": 521 * 10**6, "stage3_max_reuse_distance": 1002 * 10**6}]
    assert best(64, 80, dataclasses.replace(engine, copied_within=8)) == [{}]
    assert best(64, 1) == [] and best(64, 80, Engine(2)) == []


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
