"""Parameter groups of the optimizer, each of one component, weight decay and learning rate; and its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from allinone_ds.errors import ConfigError
from allinone_ds.models.freezing import FreezeSchedule
from allinone_ds.models.lora import SHARED, adapter_of
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_config.optimizer_settings import MUON, MuonSettings
from allinone_ds.strict import did_you_mean
from allinone_ds.training.save_checkpoint import SCHEDULER_FILE
from allinone_ds.training.start.muon_groups import groups_for_muon
from allinone_ds.training.start.saved_groups import saved_groups_of, schedule_for_groups
from allinone_ds.zero.engines.muon import make_muon
from allinone_ds.zero.params import whole_shape

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
TOKENS = ("cls_token", "mask_token", "register_tokens", "position_embedding", "pos_embed", "query")


def without_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: norms, biases, embeddings and vectors.

    Args:
        model: any module; under ZeRO-3 its parameters may be partitioned.

    Example:
        >>> sorted(without_decay(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        ['0.bias', '1.bias', '1.weight']
    """
    names = set()
    for prefix, module in model.named_modules():
        exempt = isinstance(module, (*NORMS, nn.Embedding)) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            full = f"{prefix}.{name}" if prefix else name
            if exempt or len(shape) <= 1 or name.endswith("bias") or any(token in name for token in TOKENS):
                names.add(full)
    return names


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_factor: float,
    layer_lr_decay: float = 1.0,
    head_lr_factor: Mapping[str, float] | None = None,
    head_weight_decay: Mapping[str, float] | None = None,
    thaw_stages: Mapping[str, int] | None = None,
    head_schedule: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the optimizer groups of an AllInOneModel.

    A group holds parameters of either the backbone or one head, because ZeRO partitions each group separately. Adapters
    of a task's own belong to its head. A parameter that is tied between backbone and heads is the backbone's; one that
    is tied between heads is in a group of these heads together.

    With layer-wise decay d, layer i of a backbone with L layers has d ** (L + 1 - i) times the learning rate of the
    backbone. The embeddings (i = 0) have the lowest rate (BEiT, https://arxiv.org/abs/2106.08254).

    Args:
        model: a model with `backbone` and `tasks`.
        learning_rate: learning rate of the heads.
        weight_decay: weight decay of matrices and kernels.
        backbone_lr_factor: learning rate of the backbone divided by that of the heads.
        layer_lr_decay: learning rate of a backbone layer divided by that of the next layer; 1: no layer-wise decay.
        head_lr_factor: task -> learning rate of its head divided by `learning_rate`; 1 for all others.
        head_weight_decay: task -> weight decay of its head; `weight_decay` for all others.
        thaw_stages: parameter of the backbone -> number of the stage that thaws it, for those that are frozen at first.
        head_schedule: task -> schedule of its head, for tasks with one of their own.

    Returns:
        Groups with `name` ("head/NAME/decay", "backbone/no_decay", "backbone/layer03/decay" with layer-wise decay,
        "backbone/thaw1/decay" for what is thawed first, "head/A+B/decay" for what is tied), `params`, `lr` and
        `weight_decay`. Heads come first. The order does not depend on the rates, so that a resume may change them.

    Raises:
        ConfigError: a trainable parameter belongs to neither the backbone nor a task, or to heads with different rates,
            decays or schedules; or a factor is given for a task that the model does not have.
    """
    schedules = head_schedule or {}
    factors, decays = dict(head_lr_factor or {}), dict(head_weight_decay or {})
    heads = [name for name, _ in model.tasks.named_children()]  # type: ignore[union-attr]
    for name in (*factors, *decays):
        if name not in heads:
            raise ConfigError(f"head_lr_factor or head_weight_decay of '{name}': {did_you_mean(name, heads)}")
    exempt = without_decay(model)
    backbone: Any = model.backbone
    depth = backbone.depth if layer_lr_decay != 1.0 else 0
    layers = backbone.layer_numbers() if layer_lr_decay != 1.0 else {}
    groups: dict[str, dict[str, Any]] = {}
    owner: dict[torch.nn.Parameter, str] = {}
    settings: dict[torch.nn.Parameter, tuple[str, float, float]] = {}
    named = model.named_parameters(remove_duplicate=False)
    for name, parameter in sorted(named, key=lambda pair: not pair[0].startswith("backbone.")):
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        adapter = adapter_of(name) if parts[0] == "backbone" else None
        task = parts[1] if parts[0] == "tasks" and len(parts) > 2 else adapter if adapter != SHARED else None
        if task is not None:
            component, lr = f"head/{task}", learning_rate * factors.get(task, 1.0)
        elif parts[0] == "backbone":
            stage = (thaw_stages or {}).get(name.removeprefix("backbone."))
            component, lr = f"backbone/thaw{stage}" if stage else "backbone", learning_rate * backbone_lr_factor
            if layer_lr_decay != 1.0:
                layer = layers[name.removeprefix("backbone.")]
                component, lr = f"backbone/layer{layer:02}", lr * layer_lr_decay ** (depth + 1 - layer)
        else:
            raise ConfigError(
                f"parameter '{name}' is neither in model.backbone nor in model.tasks; move it into one, or freeze it"
            )
        if parameter in owner:  # tied: named under the backbone before, or under other heads
            if not owner[parameter].startswith("backbone"):
                owner[parameter] = _joined(name, owner[parameter], component, factors, decays, schedules)
            continue
        owner[parameter] = component
        decay = 0.0 if name in exempt else decays.get(component.removeprefix("head/"), weight_decay)
        settings[parameter] = ("no_decay" if name in exempt else "decay", lr, decay)
    for parameter, (kind, lr, decay) in settings.items():
        key = f"{owner[parameter]}/{kind}"
        group = groups.setdefault(key, {"name": key, "params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"].startswith("backbone"))


def _joined(
    name: str,
    owner: str,
    other: str,
    factors: Mapping[str, float],
    decays: Mapping[str, float],
    schedules: Mapping[str, Any],
) -> str:
    """Return the component of a parameter of several heads, if these have the same settings."""
    tasks = owner.removeprefix("head/").split("+")
    task = other.removeprefix("head/")
    if task in tasks:
        return owner
    for key, values in (("lr_factor", factors), ("weight_decay", decays), ("schedule", schedules)):
        if values.get(tasks[0]) != values.get(task):
            raise ConfigError(
                f"parameter '{name}' is tied between the heads of '{tasks[0]}' and '{task}', which differ in {key}; "
                "give both the same, or each its own parameter"
            )
    return f"head/{'+'.join([*tasks, task])}"


def groups_of_run(model: nn.Module, args: AllInOneArguments) -> list[dict[str, Any]]:
    """Return the `parameter_groups` of a model with the settings of a run, divided for Muon where it is chosen.

    Args:
        model: an AllInOneModel.
        args: arguments of the run.

    Raises:
        ConfigError: as of `parameter_groups`, `FreezeSchedule` and `groups_for_muon`.
    """
    groups = parameter_groups(
        model,
        args.learning_rate,
        args.weight_decay,
        args.backbone_lr_factor,
        args.layer_lr_decay,
        args.head_lr_factor,
        args.head_weight_decay,
        FreezeSchedule(model.backbone, args.freeze_schedule or {}).stage_numbers(),
        args.head_schedule,
    )
    if args.optim_name != MUON:
        return groups
    rate = MuonSettings.parse(args.optim_args).muon_lr or args.learning_rate
    return groups_for_muon(model, groups, rate / args.learning_rate)


def optimizer_of_run(model: nn.Module, args: AllInOneArguments) -> torch.optim.Optimizer:
    """Return the optimizer that the arguments of a run name, with `groups_of_run`.

    Args:
        model: an AllInOneModel.
        args: arguments of the run.
    """
    groups = groups_of_run(model, args)
    if args.optim_name == MUON:
        settings, betas = MuonSettings.parse(args.optim_args), (args.adam_beta1, args.adam_beta2)
        return make_muon(groups, settings.momentum, settings.ns_method, betas, args.adam_epsilon)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    return cls(groups, **kwargs)


_SETTINGS = ("weight_decay", "betas", "eps", "momentum")
"""Keys of optimizer groups that are settings, not state."""
_ADAPTIVE = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps", "min_lrs", "max_lrs",
             "warmup", "smooth", "window_size")  # fmt: skip
"""Settings of the schedules that follow a metric."""


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings of an optimizer's groups, which loading a checkpoint replaces by those of the checkpoint."""
    return [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]


def settings_by_name(optimizer: Any) -> dict[str, dict[str, Any]]:
    """Return {name of a group: its settings}, in the order of the groups, for a checkpoint."""
    names = [group.get("name", str(number)) for number, group in enumerate(optimizer.param_groups)]
    return dict(zip(names, group_settings(optimizer), strict=True))


def continue_schedule(trainer: Any, checkpoint: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """Continue the schedule of a checkpoint with the learning rates and settings of this run; warn of what differs.

    At step s a group has its configured rate times the configured schedule's factor at s. Of a schedule that follows a
    metric, the reductions so far are kept.

    Args:
        trainer: an AllInOneTrainer whose engine has loaded the checkpoint.
        checkpoint: folder of the checkpoint.
        settings: `group_settings` of the optimizer before the checkpoint was loaded.

    Raises:
        ConfigError: the schedule of the checkpoint is of a different kind.
    """
    scheduler, groups = trainer.lr_scheduler, trainer.deepspeed.optimizer.param_groups
    fresh = scheduler.state_dict()
    saved = torch.load(checkpoint / SCHEDULER_FILE, weights_only=True)
    if ("lr_lambdas" in saved) != ("lr_lambdas" in fresh) or ("max_lrs" in saved) != ("max_lrs" in fresh):
        raise ConfigError(
            f"trainer.lr_scheduler_type = '{getattr(trainer.args.lr_scheduler_type, 'value', '')}': {checkpoint} was "
            "saved with a schedule of a different kind (one follows a metric, the other the step), whose state does "
            f"not fit; use the same, or start a new run with a different output_dir and model.start_from={checkpoint}"
        )
    rates = fresh["base_lrs"]
    if trainer.changes is not None:
        saved = schedule_for_groups(
            saved, trainer.changes.names, checkpoint, [group["name"] for group in groups], rates
        )
    scheduler.load_state_dict(saved)
    before = saved.get("base_lrs", rates)
    scheduler.base_lrs = list(rates)
    if isinstance(scheduler, LambdaLR):
        factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
        now = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    else:
        vars(scheduler).update({key: fresh[key] for key in _ADAPTIVE if key in fresh})
        now = [
            rate if old == new else rate * new / old if old else new
            for rate, old, new in zip(scheduler.get_last_lr(), before, rates, strict=True)
        ]
    scheduler._last_lr = now
    changes: dict[str, list[str]] = {}
    saved_groups = saved_groups_of(checkpoint)
    for group, old, rate, new, wanted in zip(groups, before, rates, now, settings, strict=True):
        group["lr"] = new
        if "initial_lr" in group:
            group["initial_lr"] = rate
        different = {"learning rate": (old, rate)} if old != rate else {}
        was_set = {**group, **saved_groups.get(group.get("name", ""), {})}  # loading other shards leaves the new ones
        different |= {key: (was_set[key], value) for key, value in wanted.items() if not _equal(was_set[key], value)}
        group.update(wanted)
        for key, (was, value) in different.items():
            changes.setdefault(key, []).append(
                f"of {group.get('name', 'a group')} {_shown(value)} (before: {_shown(was)})"
            )
    if changes:
        step = trainer.state.global_step
        named = "; ".join(
            f"{key} {texts[0]}" + (f" and of {len(texts) - 1} further groups" if len(texts) > 1 else "")
            for key, texts in changes.items()
        )
        trainer.warn(step, f"this run continues {checkpoint.name} with other settings from step {step} on: {named}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _equal(one: Any, other: Any) -> bool:
    return tuple(one) == tuple(other) if isinstance(one, list | tuple) else one == other
