"""The plan against what is measured: part by part on two ranks, activations against real forwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from allinone_ds import cli
from allinone_ds.balance.assignment import task_groups
from allinone_ds.errors import ConfigError
from allinone_ds.planning.activations import SavedBytes, activation_bytes
from allinone_ds.planning.memory import Sizes, moved_parts
from allinone_ds.planning.plan import plan_run
from allinone_ds.run_config.engine_settings import Engine, read_engine
from allinone_ds.run_config.schema import load_config
from tests.launcher import run_ranks
from tests.planning.ranks_memory import CASES, name_of
from tests.tasks.heads import HEADS
from tests.tiny import samples, tiny_model
from tests.tiny_run import tiny_run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(HERE / "ranks_memory.py", 2, tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_part_is_within_15_percent_of_what_a_rank_holds(ranks: dict[str, str], case: tuple) -> None:
    assert ranks[name_of(case)] == ""


BACKBONE = {"hidden_size": 64, "num_hidden_layers": 4}


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("head", "dtype", "model_type"),
    [
        ("fcos", BF16, "dinov2"),
        ("rf_detr", F32, "dinov2"),
        ("light", BF16, "dinov2"),
        ("upernet", F32, "dinov2"),
        ("mask2former", BF16, "dinov2"),
        ("linear", F32, "dinov3_vit"),
        ("arcface", BF16, "vitdet"),
    ],
)
def test_activations_are_within_15_percent_of_a_real_forward(head: str, dtype: torch.dtype, model_type: str) -> None:
    name, kind, options = HEADS[head]
    model = tiny_model({name: (kind, options)}, model_type=model_type, **BACKBONE).to(dtype)
    with SavedBytes(model) as real:
        model(name, **model.tasks[name].collate(samples(4)))
    with torch.device("meta"):
        empty = tiny_model({name: (kind, options)}, model_type=model_type, **BACKBONE)
    planned = activation_bytes(empty, {name: 4}, dtype, False, [])
    assert planned[name] == pytest.approx(real.bytes, rel=0.15)


def test_checkpointing_leaves_the_layers_inputs_and_one_layer() -> None:
    pixels = torch.randn(4, 3, 32, 32)
    model = tiny_model(**BACKBONE)
    with SavedBytes(model, checkpointing=True) as planned:
        model("cls", pixels)
    with SavedBytes(model) as whole:
        model("cls", pixels)
    layer = model.backbone.net.get_submodule("layer.0" if hasattr(model.backbone.net, "layer") else "encoder.layer.0")
    tokens = torch.randn(4, 65, 64, requires_grad=True)
    with SavedBytes(model) as one:
        layer(tokens)
    inputs = 4 * tokens.nbytes
    outside = whole.bytes - 4 * one.bytes
    assert planned.bytes == pytest.approx(outside + inputs + one.bytes, rel=0.15)
    assert planned.bytes < 0.6 * whole.bytes


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
    for norm in ("sketch", "delayed"):
        assert moved(1, norm)["gradients"] == 2 * 0.75 * 1000 * 2  # once a step
    assert set(moved(3, gpus=1).values()) == {0}
    groups = task_groups({"a": 3, "b": 1}, ("a", "b"), 4)
    apart = moved_parts(Engine(2, weight_bytes=2), sizes, 4, "exact", 8, groups)
    assert apart["gradients"] == moved(2, "sketch")["gradients"]
    assert apart["norms"] == 0.75 * 2 * 3 * 8 * 2 + 2 / 3 * 960 * 4  # a reduce-scatter among three ranks, in float32


def test_the_deepspeed_file_decides() -> None:
    bf16 = read_engine(
        {
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 10},
        },
        bf16=True,
    )
    assert (bf16.stage, bf16.weight_bytes, bf16.fp32_accumulation, bf16.offload, bf16.bucket) == (2, 2, True, True, 10)
    assert read_engine({"bf16": {"enabled": "auto"}}).weight_bytes == 4


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
    plain = plan_run(load_config(file, expects), 8).parameters["head cls"]
    assert plain == kernels[196] != kernels[197]


def test_a_colon_in_what_was_given_stays_as_it_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(file), "--gpus", "8", "--classes", "det:x:"]) == 2  # rich would draw a cross
    assert "--classes det:x:: write TASK:N" in capsys.readouterr().err


def test_options_change_the_plan_as_they_should(file: Path) -> None:
    def memory(*overrides: str) -> dict[str, int]:
        return plan_run(load_config(file, overrides), 8).memory

    plain = memory()
    assert memory("trainer.gradient_checkpointing=true")["activations"] < 0.3 * plain["activations"]
    assert memory("trainer.ema_decay=0.99")["average of the weights"] * 3 == pytest.approx(plain["optimizer"], rel=1e-6)
    assert memory("deepspeed=configs/deepspeed/zero3.json")["weights"] < 0.2 * plain["weights"]
    assert memory("balancer.name=db_mtl")["balancer"] == 3 * plain["balancer"]  # a shard a task
    apart = memory("balancer.parallel=tasks", "balancer.groups={det: 6, seg: 1, cls: 1}")
    assert apart["balancer"] == plain["balancer"]
    assert apart["gradients"] == pytest.approx(8 * plain["gradients"], rel=1e-6)
    with pytest.raises(ConfigError, match="add up to the 8 ranks"):
        memory("balancer.parallel=tasks", "balancer.groups={det: 1, seg: 1, cls: 1}")
    with pytest.raises(ConfigError, match="ZeRO-1 or ZeRO-2"):
        memory("balancer.parallel=tasks", "deepspeed=configs/deepspeed/zero3.json")
    with pytest.raises(ConfigError, match="norm='sketch'.*DBMTL"):  # sees all tasks before it scales one
        memory("balancer.norm=sketch", "balancer.name=db_mtl")


def test_saving_in_the_background_needs_a_copy_on_the_host(file: Path) -> None:
    for stage, weights in ((2, True), (3, False)):
        overrides = [f"deepspeed=configs/deepspeed/zero{stage}.json", "trainer.async_save=true"]
        plan = plan_run(load_config(file, overrides), 8)
        copied = plan.memory["optimizer"] + (plan.memory["weights"] if weights else 0)  # rank 0 writes whole weights
        assert plan.host == {"copy of a checkpoint": copied}
