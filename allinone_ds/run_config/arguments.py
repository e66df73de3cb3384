"""Training arguments: those of transformers, with the defaults and checks that balanced training needs."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from allinone_ds.balance.balancer import NONFINITE
from allinone_ds.errors import ConfigError
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_config.yaml_files import read_deepspeed
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.kernels import spare_cpu_kernel

# Keys of TrainingArguments that other parts of a run's file decide, and where.
ELSEWHERE = {
    "output_dir": "output_dir",
    "run_name": "name",
    "deepspeed": "deepspeed",
    "per_device_train_batch_size": "tasks.NAME.batch_size",
    "per_device_eval_batch_size": "tasks.NAME.eval_batch_size",
    "gradient_accumulation_steps": "tasks.NAME.micro_steps",
    "num_train_epochs": "trainer.max_steps",
    "label_smoothing_factor": "tasks.NAME.options",
    "max_broken_images": "max_broken_images",
}


@dataclass
class AllInOneArguments(TrainingArguments):
    """`transformers.TrainingArguments` for balanced multi-task training.

    One Trainer step is one optimizer step. Its length is `max_steps`: tasks have datasets of different lengths, so
    there is no epoch that all of them share.
    """

    backbone_lr_factor: float = field(
        default=0.1, metadata={"help": "Learning rate of the backbone as a part of `learning_rate`."}
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Learning rate of a backbone layer as a part of that of the layer above it; 1: all alike."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Keep an exponential moving average of the weights, of this decay a step, e.g. 0.9998."},
    )
    max_broken_images: int = field(
        default=100, metadata={"help": "Images of a run, over all ranks, that may be unreadable before it stops."}
    )
    nonfinite: str = field(
        default="skip_task",
        metadata={
            "help": "A task whose loss or gradient is not finite: `skip_task` leaves it out of the step, `skip_step` "
            "takes no step, `stop` ends the run."
        },
    )
    nonfinite_limit: int = field(
        default=50, metadata={"help": "Steps in a row in which one task is not finite, after which the run ends."}
    )
    stall_timeout: float = field(
        default=900.0,
        metadata={
            "help": "Seconds without progress of a rank after which the run ends and names it. 0: never. Longer "
            "than any save, and than computing the metrics of an evaluation."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Write checkpoints while training goes on: the step only copies this rank's part to host memory, "
            "as much as its part of a checkpoint."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "0: the balancer alone decides the gradient's size, nothing clips it again."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: it would wait for the device in every step."}
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "On: the data loader itself starts at the step that is resumed."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: batches are not tables."})
    metric_for_best_model: str | None = field(
        default="score", metadata={"help": "`score` is the mean of the tasks' main metrics."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "On: higher scores are better."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers to report to, for example `wandb` or `tensorboard`."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "On: progress is one line of text at every log."})
    optim: str = field(default="adamw_torch", metadata={"help": "torch's own optimizer, nothing to compile."})

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"gradient_accumulation_steps = {self.gradient_accumulation_steps}: must stay 1, one Trainer step is "
                "one optimizer step; accumulate with the task's micro_steps"
            )
        if self.max_grad_norm != 0:
            raise ConfigError(
                f"max_grad_norm = {self.max_grad_norm}: must stay 0, it would clip the balanced gradient a second "
                "time; limits belong to the balancer (max_norm)"
            )
        if self.max_steps <= 0:
            raise ConfigError(f"max_steps = {self.max_steps}: give the length of the run in optimizer steps, e.g. 1000")
        if self.label_smoothing_factor != 0:
            raise ConfigError(
                f"label_smoothing_factor = {self.label_smoothing_factor}: heads compute their own losses; give a head "
                "that has it the option label_smoothing"
            )
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if str(getattr(getattr(self, name), "value", getattr(self, name))) == "epoch":
                raise ConfigError(
                    f"{name} = epoch: every task has epochs of its own, so it would happen once, at the end; use steps"
                )
        if self.nonfinite not in NONFINITE:
            raise ConfigError(f"nonfinite = {self.nonfinite!r}; {did_you_mean(self.nonfinite, NONFINITE)}")
        if self.nonfinite_limit < 1 or self.stall_timeout < 0:
            raise ConfigError(
                f"nonfinite_limit = {self.nonfinite_limit}, stall_timeout = {self.stall_timeout}: the first must be 1 "
                "step or more, the second 0 (never) or more seconds"
            )
        if self.async_save and self.save_only_model:
            raise ConfigError(
                "async_save with save_only_model: the weights are put together from the ranks' shards, which "
                "save_only_model leaves out; use one of the two"
            )
        if self.hub_token:
            raise ConfigError("hub_token: a token does not belong into a run's files; set HF_TOKEN in the environment")
        if not 0 < self.layer_lr_decay <= 1:
            raise ConfigError(f"layer_lr_decay = {self.layer_lr_decay}: allowed are values above 0 up to 1, e.g. 0.8")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay}: allowed are values from 0 to below 1, e.g. 0.9998")
        if self.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size: not possible here, batch sizes belong to the tasks")
        if self.deepspeed is None:
            raise ConfigError("deepspeed is missing: give a DeepSpeed config, e.g. configs/deepspeed/zero2.json")
        self.deepspeed = _own_deepspeed(self.deepspeed)
        if self.deepspeed.get("bf16", {}).get("enabled") is True:
            self.bf16 = True  # the DeepSpeed file has decided
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            self.use_cpu = True
        if self.use_cpu:
            spare_cpu_kernel()
        super().__post_init__()


def _own_deepspeed(given: str | dict[str, Any]) -> dict[str, Any]:
    """A copy of the DeepSpeed config in which nothing clips the balanced gradient again and weights can be saved."""
    content = copy.deepcopy(given) if isinstance(given, dict) else read_deepspeed(given)
    clip = content.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default is 1.0
    if clip == "auto":
        content["gradient_clipping"] = clip = 0.0
    if clip != 0:
        raise ConfigError(
            f"deepspeed.gradient_clipping = {clip}: must be 0.0, it would clip the balanced gradient a second time; "
            "limits belong to the balancer (max_norm)"
        )
    for part, instead in (("optimizer", "optim, learning_rate and weight_decay"), ("scheduler", "lr_scheduler_type")):
        if part in content:  # it would put all parameters into one group, or give all groups one rate
            raise ConfigError(
                f"deepspeed.{part}: DeepSpeed's own knows neither backbone_lr_factor nor layer_lr_decay; remove it, "
                f"and set the trainer's {instead}"
            )
    zero = content.get("zero_optimization", {})
    if zero.get("stage") == 3:  # else checkpoints hold no weights that load without DeepSpeed
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return content


def check_trainer_keys(given: Mapping[str, Any], where: str = "trainer") -> dict[str, Any]:
    """Check names and types of the `trainer` part of a run's file.

    Args:
        given: what the file says.
        where: how the part is called in messages.

    Returns:
        The same keys, with values of the right types.

    Raises:
        ConfigError: with one line a mistake.
    """
    names = {f.name for f in dataclasses.fields(AllInOneArguments) if f.init} - set(ELSEWHERE)
    hints = {**get_type_hints(AllInOneArguments), "resume_from_checkpoint": bool | str | None}
    checked, mistakes = {}, []
    for key, value in given.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # what YAML makes of the word
        if key in ELSEWHERE:
            mistakes.append(f"{where}.{key}: is decided by '{ELSEWHERE[key]}' of the run, not here")
        elif key not in names:
            near = did_you_mean(key, names).split(" allowed:")[0].rstrip()
            hint = near if near.startswith("did") else "see transformers.TrainingArguments"
            mistakes.append(f"{where}: unknown key '{where}.{key}'; {hint}")
        else:
            try:
                adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
                checked[key] = adapter.validate_python(value)
            except ValidationError as error:
                mistakes.append(f"{where}.{key} = {value!r}: {error.errors()[0]['msg']}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return checked


def arguments_from_config(config: RunConfig) -> AllInOneArguments:
    """The arguments of a run; under ZeRO-3 they must exist (and stay alive) before the model is built."""
    trainer = check_trainer_keys(config.trainer)
    deepspeed = config.deepspeed
    return AllInOneArguments(
        output_dir=str(config.run_dir),
        run_name=config.name,
        deepspeed=json.loads(json.dumps(deepspeed)) if isinstance(deepspeed, dict) else deepspeed,
        per_device_train_batch_size=config.step_images,  # DeepSpeed and the samples-a-second figures read it
        max_broken_images=config.max_broken_images,
        **trainer,
    )
