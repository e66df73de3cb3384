"""Runs that train parts of their parameters, or train them differently: thawed backbones, adapters, schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.models.lora import LoraOptions, add_lora
from allinone_ds.run_config.schema import load_config
from allinone_ds.training.start.run_check import check_run
from tests.launcher import run_ranks
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def ranks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_parameters.py"), 2, tmp_path_factory.mktemp("ranks"), str(home))


CHECKS = (
    "check_thaw 0",
    "check_thaw 1",
    "check_thaw 2",
    "check_thaw 3",
    "check_thaw_across_stages",
    "check_adapters_equal_the_reference",
    "check_own_adapters_in_a_run",
    "check_schedules_of_heads",
    "check_tied_weights",
    "check_checkpoints_without_frozen_weights 1",
    "check_checkpoints_without_frozen_weights 3",
    "check_copies_of_weights_change_nothing",
)


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(ranks: dict[str, str], check: str) -> None:
    assert ranks[check] == ""


SHARED = ["model.lora={rank: 4}", "model.start_from=x"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["tasks.det.lora={}"], "tasks.det.lora: adapters need a backbone whose weights are frozen"),
        (["tasks.det.lora={}", "model.freeze=backbone", "model.thaw={2: null}"], "whose weights are frozen"),
        ([*SHARED, "tasks.det.lora={}", "balancer.norm=features"], "tasks.det.lora with balancer.norm: features"),
        ([*SHARED, "tasks.det.lora={ranks: 4}"], "rank"),
        (["tasks.det.schedule={type: cosin}"], "did you mean 'cosine'"),
        (["tasks.det.schedule={type: reduce_lr_on_plateau}"], "follows a metric"),
        (["tasks.det.schedule={type: cosine, options: {foo: 1}}"], "with options"),
        ([*SHARED, "model.freeze=1", "model.thaw={2: null}"], "'freeze' and 'lora' are both set"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_read(home: Path, changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(home / "tiny.yaml", changes)


def test_adapters_without_a_place_or_a_name_are_refused_by_check(home: Path) -> None:
    lora = ["model.freeze=backbone", f"output_dir={home / 'none'}", "tasks.det.lora.target_modules=[nowhere]"]
    assert "tasks.det.lora.target_modules = ['nowhere']" in "\n".join(check_run(home / "tiny.yaml", lora, ranks=1)[1])
    assert check_run(home / "tiny.yaml", [*lora[:2], "tasks.det.lora={}"], ranks=1)[1] == []
    for name in ("default", "base_layer", "keys"):
        with pytest.raises(ConfigError, match=f"tasks.{name}.lora: '{name}' cannot name adapters"):
            add_lora(tiny_model().backbone, LoraOptions(), name)


def test_tasks_with_adapters_of_their_own_share_no_forward() -> None:
    model = tiny_model()
    add_lora(model.backbone, LoraOptions(), "seg")
    with pytest.raises(ConfigError, match="task 'seg' has adapters of its own"):
        model(("cls", "seg"), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert set(model(("cls", "det"), torch.zeros(1, 3, 32, 32))) == {"cls", "det"}
