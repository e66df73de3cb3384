"""Training arguments: those of transformers with the defaults and checks that balanced training needs."""

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

from allinone_ds.balance.options import NONFINITE
from allinone_ds.errors import ConfigError
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_config.yaml_files import read_deepspeed
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.kernels import spare_cpu_kernel

SET_ELSEWHERE = {
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
"""Training argument -> the key of the YAML file that sets it instead of `trainer`."""


@dataclass
class AllInOneArguments(TrainingArguments):
    """`transformers.TrainingArguments` for balanced multi-task training.

    One Trainer step is one optimizer step. The length of a run is given by `max_steps`, because the datasets of
    different tasks have epochs of different lengths.

    Example:
        >>> args = AllInOneArguments(output_dir="runs/mine", max_steps=100, deepspeed="configs/deepspeed/zero2.json")
        >>> args.max_grad_norm, args.deepspeed["zero_optimization"]["stage"]
        (0.0, 2)

    Raises:
        ConfigError: an argument, or a combination of arguments, with which training would be wrong.
    """

    backbone_lr_factor: float = field(
        default=0.1, metadata={"help": "Learning rate of the backbone divided by `learning_rate`."}
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Learning rate of a backbone layer divided by that of the next layer; 1: all equal."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay per step of an exponential moving average of the weights, e.g. 0.9998."},
    )
    max_broken_images: int = field(
        default=100, metadata={"help": "Unreadable images, over all ranks, that a run skips before it stops."}
    )
    nonfinite: str = field(
        default="skip_task",
        metadata={
            "help": "If loss, gradient or factor of a task is not finite: `skip_task` omits the task from the step, "
            "`skip_step` omits the step, `stop` ends the run."
        },
    )
    nonfinite_limit: int = field(
        default=50, metadata={"help": "Consecutive steps in which a task is not finite, after which the run ends."}
    )
    stall_timeout: float = field(
        default=900.0,
        metadata={
            "help": "Seconds without progress of a rank after which the run ends with an error that names the rank; 0: "
            "never. It must be longer than a save and than computing the metrics of an evaluation."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Write checkpoints while training continues. Each rank copies its part of the checkpoint to host "
            "memory, which needs as much memory."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Must be 0: the balancer alone scales and clips the gradient."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: it would synchronize with the device in every step."}
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "On: the data loader starts at the resumed step by itself."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: batches are not tables with columns."})
    metric_for_best_model: str | None = field(
        default="score", metadata={"help": "`score` is the mean of the tasks' main metrics."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Follows from the declaration of `metric_for_best_model`; set it for a metric without one."},
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers, for example `wandb` or `tensorboard`."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "On: progress is one line of text per log."})
    optim: str = field(default="adamw_torch", metadata={"help": "An optimizer of torch, which needs no compiler."})

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"gradient_accumulation_steps = {self.gradient_accumulation_steps}: must be 1, because one Trainer "
                "step is one optimizer step; set the micro_steps of the tasks instead"
            )
        if self.max_grad_norm != 0:
            raise ConfigError(
                f"max_grad_norm = {self.max_grad_norm}: must be 0, because it would clip the balanced gradient a "
                "second time; set max_norm of the balancer instead"
            )
        if self.max_steps <= 0:
            raise ConfigError(f"max_steps = {self.max_steps}: set the length of the run in optimizer steps, e.g. 1000")
        if self.label_smoothing_factor != 0:
            raise ConfigError(
                f"label_smoothing_factor = {self.label_smoothing_factor}: heads compute their own losses; set the "
                "option label_smoothing of a head that has it"
            )
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if str(getattr(getattr(self, name), "value", getattr(self, name))) == "epoch":
                raise ConfigError(f"{name} = epoch: the tasks have epochs of different lengths; use steps")
        if self.nonfinite not in NONFINITE:
            raise ConfigError(f"nonfinite = {self.nonfinite!r}; {did_you_mean(self.nonfinite, NONFINITE)}")
        if self.nonfinite_limit < 1 or self.stall_timeout < 0:
            raise ConfigError(
                f"nonfinite_limit = {self.nonfinite_limit}, stall_timeout = {self.stall_timeout}: allowed are 1 or "
                "more steps, and 0 (never) or more seconds"
            )
        if self.async_save and self.save_only_model:
            raise ConfigError(
                "async_save with save_only_model: async_save builds the weights from the ranks' shards, which "
                "save_only_model does not save; use only one of them"
            )
        if self.hub_token:
            raise ConfigError(
                "hub_token: the token would be written to the run's files; set HF_TOKEN in the environment"
            )
        if not 0 < self.layer_lr_decay <= 1:
            raise ConfigError(f"layer_lr_decay = {self.layer_lr_decay}: allowed are values above 0 up to 1, e.g. 0.8")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay}: allowed are values from 0 to below 1, e.g. 0.9998")
        if self.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size is not supported: set batch_size per task")
        if self.deepspeed is None:
            raise ConfigError("deepspeed is missing: set a DeepSpeed config, e.g. configs/deepspeed/zero2.json")
        self.deepspeed = _checked_deepspeed(self.deepspeed)
        if self.deepspeed.get("bf16", {}).get("enabled") is True:
            self.bf16 = True  # Trainer requires that both agree
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            self.use_cpu = True
        if self.use_cpu:
            spare_cpu_kernel()
        self.chosen_direction = self.greater_is_better  # Trainer's guess from the metric's name replaces None
        super().__post_init__()


def _checked_deepspeed(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the DeepSpeed config that does not clip gradients and that saves gathered weights."""
    content = copy.deepcopy(given) if isinstance(given, dict) else read_deepspeed(given)
    clip = content.setdefault("gradient_clipping", 0.0)  # the default of DeepSpeed is 1.0
    if clip == "auto":
        content["gradient_clipping"] = clip = 0.0
    if clip != 0:
        raise ConfigError(
            f"deepspeed.gradient_clipping = {clip}: must be 0.0, because it would clip the balanced gradient a second "
            "time; set max_norm of the balancer instead"
        )
    for key, instead in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if key in content:
            raise ConfigError(
                f"deepspeed.{key}: it would ignore backbone_lr_factor and layer_lr_decay; remove it and set "
                f"trainer.{instead} instead"
            )
    zero = content.get("zero_optimization", {})
    if zero.get("stage") == 3:  # else checkpoints would hold no weights that load without DeepSpeed
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return content


def check_trainer_keys(given: Mapping[str, Any], where: str = "trainer") -> dict[str, Any]:
    """Check the names and types of the `trainer` section of a run's YAML file.

    Args:
        given: content of the section.
        where: name of the section in messages.

    Returns:
        The same keys with values of the declared types.

    Raises:
        ConfigError: one line per mistake.

    Example:
        >>> check_trainer_keys({"max_steps": "50", "save_strategy": False})
        {'max_steps': 50, 'save_strategy': 'no'}
    """
    names = {f.name for f in dataclasses.fields(AllInOneArguments) if f.init} - set(SET_ELSEWHERE)
    hints = {**get_type_hints(AllInOneArguments), "resume_from_checkpoint": bool | str | None}
    checked, mistakes = {}, []
    for key, value in given.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads the word no as False
        if key in SET_ELSEWHERE:
            mistakes.append(f"{where}.{key}: this value is set by '{SET_ELSEWHERE[key]}'; remove it here")
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
    """Return the training arguments of a run.

    Under ZeRO-3, create them before the model and keep a reference to them: the model is partitioned while it is built.
    """
    trainer = check_trainer_keys(config.trainer)
    deepspeed = config.deepspeed
    return AllInOneArguments(
        output_dir=str(config.run_dir),
        run_name=config.name,
        deepspeed=json.loads(json.dumps(deepspeed)) if isinstance(deepspeed, dict) else deepspeed,
        per_device_train_batch_size=config.step_images,  # read by DeepSpeed and for samples per second
        max_broken_images=config.max_broken_images,
        **trainer,
    )
