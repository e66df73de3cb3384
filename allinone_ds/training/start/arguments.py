"""Arguments that the Trainer would refuse later: in its constructor, in the first step or in the first evaluation."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_config.optimizer_settings import MUON
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks.base import Task
from allinone_ds.zero.config_keys import ignored_keys

_REFUSED = ("Muon", "Bit")  # optimizers that change gradients themselves; see `zero.support`


def argument_problems(args: AllInOneArguments, evaluated: Mapping[str, Task] | None) -> list[str]:
    """Return what is wrong with the arguments of a run.

    Args:
        args: arguments that were created without an error.
        evaluated: task -> task, for those with evaluation data; None: unknown, nothing is said about evaluations.

    Returns:
        One line per problem, each naming the key.
    """
    return [
        *(_evaluation_problems(args, evaluated) if evaluated is not None else []),
        *_schedule_problems(args),
        *_tracker_problems(args),
    ]


def require_launcher() -> None:
    """Refuse a process that no launcher has started, for which DeepSpeed would look for MPI.

    Raises:
        ConfigError: says how to start the script.
    """
    if torch.distributed.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return
    try:
        import mpi4py  # noqa: F401  # DeepSpeed then asks MPI for the ranks
    except ImportError:
        raise ConfigError(
            "no launcher has started this process (RANK, WORLD_SIZE and MASTER_ADDR are not set): start a script with "
            "`deepspeed SCRIPT.py` or `torchrun --nproc_per_node N SCRIPT.py`, and the file of a run with `allinone-ds "
            "train FILE.yaml`"
        ) from None


def _evaluation_problems(args: AllInOneArguments, evaluated: Mapping[str, Task]) -> list[str]:
    strategy = str(IntervalStrategy(args.eval_strategy).value)
    if strategy != "no" and not evaluated:
        return [
            f"trainer.eval_strategy = '{strategy}' without test data: set tasks.NAME.test (eval_dataset of "
            "AllInOneTrainer), or trainer.eval_strategy to 'no'"
        ]
    metric = args.metric_for_best_model
    if strategy == "no" or metric is None:
        return []
    names = metric_names(evaluated, args.device)
    if names is None or metric.removeprefix("eval_") in names:
        return []
    return [f"trainer.metric_for_best_model = '{metric}': no such metric; {did_you_mean(metric, names)}"]


def metric_names(evaluated: Mapping[str, Task], device: torch.device) -> set[str] | None:
    """Return the names of the score and all metrics of these tasks in logs, without "eval_". Collective.

    Args:
        evaluated: task -> task.
        device: device that the ranks exchange metrics on.

    Returns:
        The names; None if the metric of a task cannot compute without data.
    """
    names = {"score"}
    for name, task in evaluated.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchmetrics: compute was called before update
                values = task.metric().to(device).compute()
        except Exception:  # a metric of the user that cannot compute without data
            return None
        names |= {f"{name}_{key}" for key in values}
    return names


def _schedule_problems(args: AllInOneArguments) -> list[str]:
    """Build the optimizer and its schedule for one weight."""
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optim, kind = args.optim_name, SchedulerType(args.lr_scheduler_type)
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    problems = []
    try:  # of Muon, the arguments have checked the settings
        cls, options = (torch.optim.SGD, {}) if optim == MUON else Trainer.get_optimizer_cls_and_kwargs(args)
        if any(word in cls.__name__ for word in _REFUSED):
            problems.append(
                f"trainer.optim = '{optim}': {cls.__name__} cannot be balanced, it changes gradients "
                "itself; use muon (DeepSpeed's), or an element-wise one such as adamw_torch or sgd"
            )
        else:
            optimizer = cls([weight], **options)
    except Exception as error:  # packages that are not installed, and values that the optimizer refuses
        given = f", trainer.optim_args = {args.optim_args!r}" if args.optim_args else ""
        problems.append(f"trainer.optim = '{optim}'{given}: {' '.join(str(error).split())}")
    settings: Any = args.lr_scheduler_kwargs or {}
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    where = f"trainer.lr_scheduler_kwargs = {settings!r} with lr_scheduler_type = '{kind.value}'"
    make = inspect.signature(schedule)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in make.parameters.values())
    allowed = set(make.parameters) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    unknown = [key for key in settings if key not in allowed and not takes_any]
    problems += [f"{where}: it has no argument '{key}'; {did_you_mean(key, allowed)}" for key in unknown]
    if not unknown:
        try:
            warmup = args.get_warmup_steps(args.max_steps)
            get_scheduler(kind, optimizer, warmup, args.max_steps, scheduler_specific_kwargs=settings or None)
        except Exception as error:
            problems.append(f"{where}: {error}; its arguments: {', '.join(sorted(allowed)) or 'none'}")
    return problems


def _tracker_problems(args: AllInOneArguments) -> list[str]:
    problems = []
    installed = {*get_available_reporting_integrations(), "flyte"}
    trackers: Any = args.report_to or []
    for name in trackers:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            problems.append(f"trainer.report_to = '{name}': {error}")
        else:
            if name not in installed:
                problems.append(f"trainer.report_to = '{name}': its package is not installed; pip install {name}")
    return problems


def settings_to_warn_of(args: AllInOneArguments) -> list[str]:
    """Return warnings of settings that are allowed, and hardly meant.

    They are: float32 matrices on a GPU without TF32, and keys of the DeepSpeed config that have no effect on the run.

    Args:
        args: arguments of the run.
    """
    deepspeed: Any = args.deepspeed or {}
    found = []
    half = args.bf16 or args.fp16 or (deepspeed.get("torch_autocast") or {}).get("enabled")
    if args.device.type == "cuda" and not half and not torch.backends.cuda.matmul.allow_tf32:
        found.append(
            "the run computes in float32 on a GPU, several times slower than in bfloat16: set trainer.bf16: true "
            "(deepspeed with bf16 enabled or 'auto'), or trainer.tf32: true"
        )
    keys = ignored_keys(deepspeed)
    if keys:
        found.append(f"keys of the DeepSpeed config that have no effect on the run: {'; '.join(keys)}")
    return found


def raise_all(problems: Sequence[str]) -> None:
    """Raise a ConfigError of all problems, one per line, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))
