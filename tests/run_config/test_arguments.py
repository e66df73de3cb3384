"""Invalid arguments of the Trainer are refused, and the message names the key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.arguments import AllInOneArguments, check_trainer_keys, default_optim
from allinone_ds.training.start.arguments import settings_to_warn_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nonfinite": "skip"}, "did you mean 'skip_task'"),
        ({"nonfinite_limit": 0}, "nonfinite_limit = 0"),
        ({"stall_timeout": -1.0}, "stall_timeout"),
        ({"hub_token": "hf_123"}, "HF_TOKEN"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, given: dict, message: str) -> None:
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    with pytest.raises(ConfigError, match=message):
        AllInOneArguments(**{**usual, **given})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lerning_rate", 1, "did you mean 'learning_rate'"),
        ("max_steps", "many", "trainer.max_steps = 'many'"),
        ("per_device_train_batch_size", 4, "tasks.NAME.batch_size"),
        ("deepspeed", "x.json", "set by 'deepspeed'"),
        ("num_train_epochs", 3, "set by 'trainer.max_steps'"),
        ("label_smoothing_factor", 0.1, "set by 'tasks.NAME.options'"),
    ],
)
def test_trainer_keys_are_checked_the_same_way(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_trainer_keys({key: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"gradient_accumulation_steps": 2}, "micro_steps"),
        ({"max_steps": -1}, "max_steps"),
        ({"deepspeed": None}, "deepspeed is missing"),
        ({"deepspeed": {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}}, "gradient_clipping = 1.0"),
        ({"deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}}, "optimizer: .*backbone_lr_factor"),
        ({"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {}}}}, "scheduler: .*lr_scheduler_type"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}, "activation_checkpointing": {"cpu_checkpointing": True}}},
            r"deepspeed.activation_checkpointing \(cpu_checkpointing\) would have no effect.*kwargs: {offload: true}",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"eval_strategy": "epoch"}, "eval_strategy = epoch: the tasks have epochs of different lengths"),
        ({"save_strategy": "epoch"}, "save_strategy = epoch"),
        ({"logging_strategy": "epoch"}, "logging_strategy = epoch"),
    ],
)
def test_arguments_that_would_spoil_the_balance_are_refused(tmp_path: Path, given: dict, message: str) -> None:
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    with pytest.raises(ConfigError, match=message):
        AllInOneArguments(**{**usual, **given})


def test_shards_are_needed(tmp_path: Path) -> None:
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    with pytest.raises(ConfigError, match="async_save with save_only_model"):
        AllInOneArguments(**usual, async_save=True, save_only_model=True)


@pytest.mark.parametrize(("key", "value"), [("layer_lr_decay", 0), ("layer_lr_decay", 1.1), ("ema_decay", 1.0)])
def test_rates_outside_their_range_are_refused(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        AllInOneArguments(str(tmp_path), max_steps=1, deepspeed="configs/deepspeed/zero2.json", **{key: value})


def test_adamw_is_fused_on_a_gpu_that_keeps_the_optimizer() -> None:
    for stage in range(4):
        zero: dict = {"stage": stage}
        assert default_optim(False, {"zero_optimization": zero}) == "adamw_torch_fused"
        assert default_optim(True, {"zero_optimization": zero}) == "adamw_torch"
        offloaded = {**zero, "offload_optimizer": {"device": "cpu"}}
        assert default_optim(False, {"zero_optimization": offloaded}) == "adamw_torch"


def test_deepspeeds_throughput_timer_is_off(tmp_path: Path) -> None:
    """It waits for the device in every forward and step."""
    for file in sorted(Path("configs/deepspeed").glob("*.json")):
        assert json.loads(file.read_text())["timers"] == {"throughput": {"enabled": False}}, file
    usual = {"output_dir": str(tmp_path), "max_steps": 1}
    made = AllInOneArguments(**usual, deepspeed={"zero_optimization": {"stage": 2}})
    assert made.deepspeed["timers"] == {"throughput": {"enabled": False}} and made.optim == "adamw_torch"
    chosen = {"throughput": {"enabled": True}}
    made = AllInOneArguments(**usual, deepspeed={"zero_optimization": {"stage": 2}, "timers": chosen})
    assert made.deepspeed["timers"] == chosen


def test_a_deepspeed_config_needs_no_batch_size(tmp_path: Path) -> None:
    made = AllInOneArguments(str(tmp_path), max_steps=1, deepspeed={"zero_optimization": {"stage": 2}})
    assert made.deepspeed["train_micro_batch_size_per_gpu"] == "auto"  # DeepSpeed fails without any
    given = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu = 4: this value is set by tasks.NAME"):
        AllInOneArguments(str(tmp_path), max_steps=1, deepspeed=given)


def test_float32_on_a_gpu_is_warned_of() -> None:
    """And keys that have no effect."""

    def said(device: str = "cuda", bf16: bool = False, tf32: bool = False, **deepspeed) -> list[str]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            args = SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False, deepspeed=deepspeed)
            return settings_to_warn_of(args)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    assert "trainer.bf16: true" in said()[0]
    assert not said("cpu") and not said(bf16=True) and not said(tf32=True)
    assert not said(torch_autocast={"enabled": True, "dtype": "bfloat16"})
    (warning,) = said("cpu", zero_optimization={"stage": 2, "elastic_checkpoint": True, "overlap_comm": True})
    assert warning.endswith(
        "zero_optimization.elastic_checkpoint (checkpoints of this package fit any number of ranks)"
    )


def test_layers_are_compiled_and_not_whole_forwards_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    for before, trainer, after in ((None, {}, None), (None, {"torch_compile": True}, "true"),
                                   ("false", {"torch_compile_backend": "aot_eager"}, "false")):  # fmt: skip
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
                patch.delenv(name)
            for name in (variable, "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
                patch.setenv(name, before or "")  # so that it is put back
                if name != variable or before is None:
                    patch.delenv(name)
            AllInOneArguments(**usual, **trainer)
            assert os.environ.get(variable) == after
