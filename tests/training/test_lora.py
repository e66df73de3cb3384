"""A run that trains LoRA adapters: the backbone's weights stay, stages agree, it resumes, and its exports load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from allinone_ds import load
from allinone_ds.errors import ConfigError
from allinone_ds.export.folders import export_run
from allinone_ds.models.lora import is_adapter, name_without_lora
from allinone_ds.run_config.schema import load_config
from tests.export.untrained import untrained_run
from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_train.py")
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def earlier(home: Path) -> Path:
    """A run without adapters, and with weights as of a trained one."""
    untrained_run(home / "earlier", home=home)
    return home / "earlier"


@pytest.fixture(scope="module")
def options(earlier: Path) -> list[str]:
    options = [f"model.start_from={earlier}", "model.backbone.stem=patch", "model.lora={rank: 4}", "trainer.seed=2"]
    return [*options, "trainer.eval_strategy=no", "balancer.max_norm=0.01", "trainer.learning_rate=0.01"]


@pytest.fixture(scope="module")
def train(home: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    def run(name: str, *more: str, ranks: int = 2) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(SCRIPT, ranks, folder, str(home / "tiny.yaml"), f"output_dir={home / name}", *options, *more)
        return home / name

    return run


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def test_only_adapters_and_heads_move_and_all_stages_agree(train: Train, earlier: Path) -> None:
    before, first = weights(earlier), train("first", "trainer.max_steps=1")  # adapters to start from
    stages = (f"deepspeed.zero_optimization.stage={stage}" for stage in (2, 3))
    runs = [
        weights(train(stage[-5:], stage, f"model.start_from={first}", "trainer.learning_rate=1e-4")) for stage in stages
    ]
    adapters = [name for name in runs[0] if is_adapter(name)]
    assert len(adapters) == 2 * 12  # A and B of the 6 linear layers of 2 blocks
    for name, value in runs[0].items():
        if name.startswith("backbone.") and name not in adapters:
            assert torch.equal(value, before[name_without_lora(name)]), name
        torch.testing.assert_close(value, runs[1][name], rtol=0, atol=1e-6, msg=name)
    assert all(not torch.equal(runs[0][name], weights(first)[name]) for name in adapters)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_with_adapters_resumes_bit_for_bit(train: Train, stage: int) -> None:
    options = [f"deepspeed.zero_optimization.stage={stage}", "trainer.gradient_checkpointing=true"]
    whole = train(f"whole{stage}", *options)
    again = train(f"again{stage}", *options, f"trainer.resume_from_checkpoint={whole / 'checkpoint-2'}")
    expected, got = weights(whole), weights(again)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)


@torch.no_grad()
def test_exports_load_without_adapters_and_the_adapters_load_alone(train: Train, home: Path, earlier: Path) -> None:
    run = train("exported", ranks=1)
    done = export_run(run)
    assert {folder.name for folder in done.folders} >= {"adapter", "backbone", "model", "det"}
    pixels = torch.randn(2, 3, 32, 32)
    trained, exported, before = (
        load(folder).model.backbone.eval() for folder in (run, run / "export" / "model", earlier)
    )
    expected = trained(pixels).feature_maps
    assert not any(is_adapter(name) for name in exported.state_dict())
    for got, value in zip(exported(pixels).feature_maps, expected, strict=True):
        torch.testing.assert_close(got, value)
    assert not torch.allclose(before(pixels).feature_maps[-1], expected[-1], atol=1e-3)
    before.net = PeftModel.from_pretrained(before.net, run / "export" / "adapter").base_model.model
    for got, value in zip(before(pixels).feature_maps, expected, strict=True):
        torch.testing.assert_close(got, value)
    hub = AutoModel.from_pretrained(run / "export" / "backbone").eval()
    assert sum(p.numel() for p in hub.parameters()) > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["model.start_from=null"], "would adapt a backbone of random weights"),
        (["model.freeze=1"], "'freeze' and 'lora' are both set"),
        (["model.lora.rank=0"], "model.lora.rank"),
        (["model.lora.ranks=4"], "rank"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_read(
    home: Path, options: list[str], changes: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(home / "tiny.yaml", [*options, *changes])


def test_modules_that_do_not_exist_are_refused(train: Train) -> None:
    with pytest.raises(RuntimeError, match=r"model\.lora\.target_modules = \['nowhere'\]"):
        train("nowhere", "model.lora.target_modules=[nowhere]", ranks=1)


def test_a_run_cannot_start_from_adapters_that_it_lacks(train: Train, home: Path) -> None:
    source = home / "adapted"
    train("adapted", "trainer.max_steps=1", ranks=1)
    with pytest.raises(RuntimeError, match="has LoRA adapters, which this run's model.lora lacks"):
        train("plain", "model.lora=null", f"model.start_from={source}", ranks=1)
    started = train("more", f"model.start_from={source}", "trainer.max_steps=1", "trainer.learning_rate=0", ranks=1)
    assert all(torch.equal(value, weights(source)[name]) for name, value in weights(started).items())
