"""Training arguments: those of transformers with the defaults and checks that balanced training needs."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from accelerate.utils import DynamoBackend
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from allinone_ds.balance.options import NONFINITE
from allinone_ds.errors import ConfigError
from allinone_ds.run_config.optimizer_settings import MUON, default_optim, muon_mistakes
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_config.yaml_files import read_deepspeed
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.config_keys import checkpointing_problems
from allinone_ds.zero.kernels import spare_cpu_kernel
from allinone_ds.zero.support import config_problems

SET_ELSEWHERE = {
    "output_dir": "output_dir",
    "run_name": "name",
    "deepspeed": "deepspeed",
    "per_device_train_batch_size": "tasks.NAME.batch_size",
    "per_device_eval_batch_size": "tasks.NAME.eval_batch_size",
    "gradient_accumulation_steps": "tasks.NAME.micro_steps",
    "num_train_epochs": "trainer.max_steps' or 'epochs",
    "label_smoothing_factor": "tasks.NAME.options",
    "head_lr_factor": "tasks.NAME.lr_factor",
    "head_weight_decay": "tasks.NAME.weight_decay",
    "head_schedule": "tasks.NAME.schedule",
    "freeze_schedule": "model.freeze' and 'model.thaw",
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
    head_lr_factor: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Learning rate of a task's head divided by `learning_rate`; 1 for tasks that are not named."},
    )
    head_weight_decay: dict[str, float] | None = field(
        default=None, metadata={"help": "Weight decay of a task's head; `weight_decay` for tasks that are not named."}
    )
    head_schedule: dict[str, Any] | None = field(
        default=None, metadata={"help": "Task -> keys of a `HeadSchedule`, for tasks with a schedule of their own."}
    )
    freeze_schedule: dict[int, Any] | None = field(
        default=None,
        metadata={
            "help": "Step -> what of the backbone is frozen from it on, from step 0: `backbone`, a number of layers, "
            "`embeddings` or None."
        },
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
    save_frozen: bool = field(
        default=True,
        metadata={
            "help": "Save frozen weights in every checkpoint; false: once per run, in RUN/frozen.safetensors, which a "
            "checkpoint then needs beside it."
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
    optim: str = field(
        default="auto",
        metadata={
            "help": "`auto`: AdamW of torch, fused on a GPU unless the optimizer is offloaded to the CPU. `muon`: "
            "DeepSpeed's Muon for the matrices of the backbone, AdamW for all else."
        },
    )

    def __post_init__(self) -> None:
        mistakes = [f"trainer.{message}" for wrong, message in self._rules() if wrong]
        if self.deepspeed is None:
            mistakes.append("deepspeed is missing: set a DeepSpeed config, e.g. configs/deepspeed/zero2.json")
        else:
            self.deepspeed, wrong = _checked_deepspeed(self.deepspeed)
            mistakes += wrong
            if (self.deepspeed.get("bf16") or {}).get("enabled") is True:
                self.bf16 = True  # Trainer requires that both agree
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            self.use_cpu = True
        if self.optim == "auto":
            self.optim = default_optim(bool(self.use_cpu), self.deepspeed)
        chosen = self.optim
        if chosen == MUON:
            mistakes += muon_mistakes(self.deepspeed, self.optim_args)
            self.optim = "adamw_torch"  # until TrainingArguments, which does not know it, has checked the others
        if self.use_cpu:
            spare_cpu_kernel()
        self.chosen_direction = self.greater_is_better  # Trainer's guess from the metric's name replaces None
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        try:
            super().__post_init__()
        except ConfigError:
            raise
        except Exception as error:  # transformers, accelerate and pydantic raise many types
            unevaluated = self._unevaluated() if "--load_best_model_at_end requires the saving" in str(error) else None
            mistakes.append(unevaluated or name_arguments(str(error) or repr(error), given))
        else:
            if self.torch_compile:  # accelerate reads it; the whole of a model takes 20 times as long to compile
                os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
            self.optim = chosen if chosen == MUON else self.optim
            for mismatch in self.hf_deepspeed_config.mismatches if self.deepspeed else []:
                if not any(key in mismatch for key in _BATCH_KEYS):
                    mistakes.append(f"deepspeed and trainer differ: {mismatch.strip('- ')}; set it in only one of them")
        if mistakes:
            raise ConfigError("\n".join(mistakes))

    @property
    def optim_name(self) -> str:
        """Value of `optim`: "adamw_torch", "muon" or another name that transformers gives an optimizer."""
        return str(getattr(self.optim, "value", self.optim))

    def _unevaluated(self) -> str:
        """Return what is wrong with a run that is to keep its best checkpoint, but saves some that it did not score."""
        every, save = self.eval_steps or self.logging_steps, self.save_steps
        fits = max(round(save / every), 1) * every
        return (
            f"trainer.save_steps = {save:g}, trainer.eval_steps = {every:g} with load_best_model_at_end: a checkpoint "
            "is kept by its evaluation, so save_steps must be a multiple of eval_steps: set both, for example "
            f"trainer.eval_steps={every:g} trainer.save_steps={fits:g}"
        )

    def _rules(self) -> list[tuple[bool, str]]:
        """(whether it is wrong, message) of every argument with which training would be wrong or fail later."""
        strategies = ("eval_strategy", "save_strategy", "logging_strategy")
        epochs = [name for name in strategies if getattr(self, name) == "epoch"]
        low = {
            name: least
            for name, least in _LEAST.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        }
        return [
            (self.gradient_accumulation_steps != 1,
             f"gradient_accumulation_steps = {self.gradient_accumulation_steps}: must be 1, because one Trainer "
             "step is one optimizer step; set the micro_steps of the tasks instead"),
            (self.max_grad_norm != 0,
             f"max_grad_norm = {self.max_grad_norm}: must be 0, because it would clip the balanced gradient a "
             "second time; set max_norm of the balancer instead"),
            (self.max_steps <= 0,
             f"max_steps = {self.max_steps}: set the length of the run in optimizer steps, e.g. 1000"),
            (self.label_smoothing_factor != 0,
             f"label_smoothing_factor = {self.label_smoothing_factor}: heads compute their own losses; set the "
             "option label_smoothing of a head that has it"),
            *((True, f"{name} = epoch: the tasks have epochs of different lengths; use steps") for name in epochs),
            *((True, f"{name} = {getattr(self, name)}: allowed are values of {least} or more")
              for name, least in low.items()),
            (self.nonfinite not in NONFINITE,
             f"nonfinite = {self.nonfinite!r}; {did_you_mean(str(self.nonfinite), NONFINITE)}"),
            (self.nonfinite_limit < 1 or self.stall_timeout < 0,
             f"nonfinite_limit = {self.nonfinite_limit}, stall_timeout = {self.stall_timeout}: allowed are 1 or "
             "more steps, and 0 (never) or more seconds"),
            (self.async_save and self.save_only_model,
             "async_save with save_only_model: async_save builds the weights from the ranks' shards, which "
             "save_only_model does not save; use only one of them"),
            (self.load_best_model_at_end and self.save_only_model,
             "load_best_model_at_end with save_only_model: the engine loads the best weights from its shards, which "
             "save_only_model does not save; use only one of them"),
            (not self.ignore_data_skip,
             "ignore_data_skip = False: must be true, because the data loader starts at the resumed step by itself; a "
             "second skip would lose data"),
            (bool(self.hub_token),
             "hub_token: the token would be written to the run's files; set HF_TOKEN in the environment"),
            (not 0 < self.layer_lr_decay <= 1,
             f"layer_lr_decay = {self.layer_lr_decay}: allowed are values above 0 up to 1, e.g. 0.8"),
            (self.ema_decay is not None and not 0 <= self.ema_decay < 1,
             f"ema_decay = {self.ema_decay}: allowed are values from 0 to below 1, e.g. 0.9998"),
            (self.auto_find_batch_size, "auto_find_batch_size is not supported: set batch_size per task"),
            (self.neftune_noise_alpha is not None,
             "neftune_noise_alpha: it adds noise to word embeddings, which the model does not have; remove it"),
            (self.torch_compile_backend is not None and self.torch_compile_backend.upper() not in DynamoBackend.list(),
             f"torch_compile_backend = {self.torch_compile_backend!r}; "
             f"{did_you_mean(str(self.torch_compile_backend), map(str.lower, DynamoBackend.list()))}"),
            (self.use_liger_kernel, "use_liger_kernel: its kernels are for language models; remove it"),
        ]  # fmt: skip


_LEAST = {"learning_rate": 0, "weight_decay": 0, "backbone_lr_factor": 0, "dataloader_num_workers": 0, "seed": 0,
          "data_seed": 0, "save_total_limit": 0, "max_broken_images": 0, "eval_delay": 0}  # fmt: skip
"""Argument -> its least value."""


def name_arguments(message: str, given: Mapping[str, Any]) -> str:
    """Return a message of transformers with the keys of the run's file that it is about.

    These are the arguments that it names, of them those that are set; else set ones whose values it contains.

    Args:
        message: for example "--logging_steps must be an integer if bigger than 1: 1.5".
        given: argument -> value.

    Example:
        >>> name_arguments("foo is not a valid HubStrategy", {"hub_strategy": "foo", "seed": 1})
        "trainer.hub_strategy = 'foo': foo is not a valid HubStrategy"
    """
    default = {f.name: f.default for f in dataclasses.fields(AllInOneArguments)}
    message = " ".join(message.split())
    words = set(re.findall(r"\w+", message.lower()))
    changed = [name for name, value in given.items() if value != default.get(name)]
    choices = (
        [name for name in changed if name in words],
        [name for name in changed if set(name.split("_")) <= words],
        [name for name in given if name in words],
        [name for name in changed if words & set(re.findall(r"\w+", str(given[name]).lower()))],
    )
    named = next(filter(None, choices), [])
    settings = ", ".join(f"trainer.{name} = {getattr(given[name], 'value', given[name])!r}" for name in named)
    return f"{settings or 'trainer'}: {message}"


def _checked_deepspeed(given: str | dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of the DeepSpeed config that does not clip gradients and saves gathered weights; and mistakes."""
    content = copy.deepcopy(given) if isinstance(given, dict) else read_deepspeed(given)
    mistakes = []
    content.setdefault("timers", {"throughput": {"enabled": False}})  # its timer waits for the device in every step
    clip = content.setdefault("gradient_clipping", 0.0)  # the default of DeepSpeed is 1.0
    if clip == "auto":
        content["gradient_clipping"] = clip = 0.0
    if clip != 0:
        mistakes.append(
            f"deepspeed.gradient_clipping = {clip}: must be 0.0, because it would clip the balanced gradient a second "
            "time; set max_norm of the balancer instead"
        )
    for key, instead in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if key in content:
            mistakes.append(
                f"deepspeed.{key}: it would ignore backbone_lr_factor and layer_lr_decay; remove it and set "
                f"trainer.{instead} instead"
            )
    for key, instead in _BATCH_KEYS.items():
        if content.get(key, "auto") != "auto" and (key, content[key]) != ("gradient_accumulation_steps", 1):
            mistakes.append(f"deepspeed.{key} = {content[key]}: this value is set by {instead}; remove it")
    content.setdefault("train_micro_batch_size_per_gpu", "auto")  # DeepSpeed fails without any batch size
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict):
        mistakes.append('deepspeed.zero_optimization is missing: add it, for example {"stage": 2}')
    elif zero.get("stage") == 3:  # else checkpoints would hold no weights that load without DeepSpeed
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    problems = [*checkpointing_problems(content), *config_problems(content)]
    return content, mistakes + [f"deepspeed{problem}" for problem in problems]


_BATCH_KEYS = {
    "train_batch_size": "tasks.NAME.batch_size and the number of ranks",
    "train_micro_batch_size_per_gpu": "tasks.NAME.batch_size",
    "gradient_accumulation_steps": "tasks.NAME.micro_steps",
}


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
                if value is None:  # as without the key, for overrides that take a key away
                    continue
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
    if config.epochs is not None:
        if "max_steps" in trainer:
            raise ConfigError(
                f"trainer.max_steps with epochs = {config.epochs}: both set the length of the run; set one to null"
            )
        trainer["max_steps"] = 1  # until the sizes of the data are known, see `length.steps_of_epochs`
    return AllInOneArguments(
        output_dir=str(config.run_dir),
        run_name=config.name,
        deepspeed=json.loads(json.dumps(deepspeed)) if isinstance(deepspeed, dict) else deepspeed,
        per_device_train_batch_size=config.step_images,  # read by DeepSpeed and for samples per second
        max_broken_images=config.max_broken_images,
        head_lr_factor={name: task.lr_factor for name, task in config.tasks.items() if task.lr_factor != 1} or None,
        head_weight_decay={n: t.weight_decay for n, t in config.tasks.items() if t.weight_decay is not None} or None,
        head_schedule={n: t.schedule.model_dump() for n, t in config.tasks.items() if t.schedule is not None} or None,
        freeze_schedule=config.model.freeze_stages or None,
        **trainer,
    )
