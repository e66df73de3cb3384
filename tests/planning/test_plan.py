"""The plan of a run before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.planning.plan import plan_run
from allinone_ds.run_config.schema import load_config
from tests.tiny_run import tiny_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    content: dict[str, Any] = tiny_run(tmp_path)
    content["model"] = {"backbone": {"name": "vit_l"}}
    for task in content["tasks"].values():
        task["image_size"] = 224
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "big.yaml"


def test_a_large_run_is_planned_without_its_data_or_weights(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(file), "--gpus", "8", "--json", "--classes", "det:45"]) == 0
    plan = json.loads(capsys.readouterr().out)
    P = sum(count for name, count in plan["parameters"].items() if name != "frozen")
    assert P == pytest.approx(0.31e9, rel=0.05)
    assert plan["memory"]["optimizer"] == pytest.approx(12 * P / 8, rel=1e-6)
    assert plan["memory_total"] == sum(plan["memory"].values())
    assert any(note.startswith("seg: its data cannot be read") for note in plan["notes"])
    assert not any(note.startswith("det: its data") for note in plan["notes"])
    chosen = [c for c in plan["choices"] if (c["stage"], c["norm"]) == (2, "exact")]
    assert [c["memory"] for c in chosen] == [plan["memory_total"]]
    assert cli.main(["plan", str(file), "--gpus", "8"]) == 0
    assert "the same run with other settings" in capsys.readouterr().out


def test_classes_that_the_file_expects_are_taken_where_the_data_is_not(file: Path) -> None:
    expects = ["tasks.seg.train.expect.classes=19", "tasks.cls.train.expect.classes=196"]
    notes = plan_run(load_config(file, expects), 8, {"det": 45}).notes
    assert not any("cannot be read" in note for note in notes)
    kernels = {
        count: plan_run(load_config(file, expects), 8, {"cls": count}).parameters["head cls"] for count in (196, 197)
    }
    listed = plan_run(load_config(file, ["tasks.cls.classes=[a,b,c]"]), 8, {"det": 45, "seg": 2})
    assert listed.notes == notes and listed.parameters["head cls"] < kernels[196]
    plain = plan_run(load_config(file, expects), 8).parameters["head cls"]
    assert plain == kernels[196] != kernels[197]


def test_a_colon_in_what_was_given_stays_as_it_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(file), "--gpus", "8", "--classes", "det:x:"]) == 2  # rich would draw a cross
    assert "--classes det:x:: write TASK:N" in capsys.readouterr().err


def test_options_change_the_plan_as_they_should(file: Path) -> None:
    def memory(*overrides: str) -> dict[str, int]:
        return plan_run(load_config(file, overrides), 8).memory

    plain = memory()
    on, more = "trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs"
    checkpointed = [memory(on, *given) for given in ([], [f"{more}.every_n_layers=2"], [f"{more}.offload=true"])]
    least, half, offloaded = (parts["activations"] for parts in checkpointed)
    assert offloaded < least < 0.3 * plain["activations"] < half < 0.7 * plain["activations"]
    assert memory("trainer.ema_decay=0.99")["average of the weights"] * 3 == pytest.approx(plain["optimizer"], rel=1e-6)
    assert memory("deepspeed=configs/deepspeed/zero3.json")["weights"] < 0.2 * plain["weights"]
    assert memory("balancer.name=db_mtl")["balancer"] == 3 * plain["balancer"]  # a shard a task
    apart = memory("balancer.parallel=tasks", "balancer.groups={det: 6, seg: 1, cls: 1}")
    assert apart["balancer"] == plain["balancer"]
    assert apart["gradients"] == pytest.approx(8 * plain["gradients"], rel=1e-6)
    states = memory("trainer.optim=muon")["optimizer"]  # one state for the matrices of the layers, of three with AdamW
    assert 2 / 3 * plain["optimizer"] < states < 0.7 * plain["optimizer"]
    adamw, muon = (
        plan_run(load_config(file, ["deepspeed=configs/deepspeed/zero3.json", f"trainer.optim={optim}"]), 8)
        for optim in ("adamw_torch", "muon")
    )
    assert muon.moved["gradients"] == pytest.approx(2 * adamw.moved["gradients"])
    sampled = plan_run(load_config(file, ["sampling={tasks_per_step: 1}", "trainer.max_steps=300"]), 8)
    assert any("an average step, which runs 1 of 3 tasks" in note for note in sampled.notes)
    every = plan_run(load_config(file), 8)
    assert sampled.memory == every.memory
    assert sampled.moved["gradients"] == pytest.approx(every.moved["gradients"] / 3, rel=0.05)
    with pytest.raises(ConfigError, match="add up to the 8 ranks"):
        memory("balancer.parallel=tasks", "balancer.groups={det: 1, seg: 1, cls: 1}")
    with pytest.raises(ConfigError, match="ZeRO-1 or ZeRO-2"):
        memory("balancer.parallel=tasks", "deepspeed=configs/deepspeed/zero3.json")
    with pytest.raises(ConfigError, match="norm='sketch'.*DBMTL"):  # sees all tasks before it scales one
        memory("balancer.norm=sketch", "balancer.name=db_mtl")


def test_copies_within_nodes_are_planned_and_recommended(file: Path) -> None:
    zero = "deepspeed.zero_optimization"
    none = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    stage3 = [f"{zero}.stage=3", *(f"{zero}.stage3_{key}=0" for key in none)]
    copied = f"{zero}.zero_hpz_partition_size=8"
    plain = plan_run(load_config(file, stage3), 16)
    assert [dict(row.keys) for row in plain.savings if row.recommended] == [{"zero_hpz_partition_size": 8}]
    again = plan_run(load_config(file, [*stage3, copied]), 16)
    recommended = next(row for row in plain.savings if row.recommended)
    assert (sum(again.memory.values()), again.between) == (recommended.memory, recommended.between)
    assert again.memory["weights within a node"] == pytest.approx(2 * again.memory["weights"], rel=0.01)
    assert again.between < 0.6 * plain.between
    with pytest.raises(ConfigError, match="zero_hpz_partition_size = 8: 12 GPUs cannot be divided"):
        plan_run(load_config(file, [*stage3, copied]), 12)


def test_saving_in_the_background_needs_a_copy_on_the_host(file: Path) -> None:
    for stage, weights in ((2, True), (3, False)):
        overrides = [f"deepspeed=configs/deepspeed/zero{stage}.json", "trainer.async_save=true"]
        plan = plan_run(load_config(file, overrides), 8)
        copied = plan.memory["optimizer"] + (plan.memory["weights"] if weights else 0)  # rank 0 writes whole weights
        assert plan.host == {"copy of a checkpoint": copied}
        frozen = [*overrides, "model.freeze=backbone"]
        kept, left_out = (
            plan_run(load_config(file, [*frozen, f"trainer.save_frozen={s}"]), 8) for s in ("true", "false")
        )
        base = 4 * kept.parameters["frozen"] // (1 if weights else 8)  # of ZeRO-3 each rank copies its shard
        assert kept.host["copy of a checkpoint"] - left_out.host["copy of a checkpoint"] == pytest.approx(base, abs=4)
