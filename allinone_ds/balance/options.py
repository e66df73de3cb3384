"""The `balancer:` block of a run: a weighting by name, the options of `TaskBalancer`, and what combines with what.

The rules of `combination_error` are the only ones: reading a run's file, `allinone-ds plan`, `TaskBalancer` and the
table in docs/balancer.md all use them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from allinone_ds.balance.joint.block import feature_weighting
from allinone_ds.balance.weightings.adaptive import DBMTL, DWA, FAMO, GradNorm, RandomWeights, Uncertainty
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.clipping import TBGC, GlobalClip, Static, Sum, TaskClip
from allinone_ds.balance.weightings.gram import GramWeighting
from allinone_ds.balance.weightings.per_task import OfJacobians
from allinone_ds.errors import ConfigError, UnsupportedEngine
from allinone_ds.strict import Strict, did_you_mean
from allinone_ds.zero.releases import COALESCES, MANAGES_ACCUMULATION, RELEASE

WEIGHTINGS: dict[str, type[Weighting]] = {
    "sum": Sum, "global_clip": GlobalClip, "task_clip": TaskClip, "tbgc": TBGC, "db_mtl": DBMTL, "gradnorm": GradNorm,
    "uncertainty": Uncertainty, "dwa": DWA, "famo": FAMO, "random": RandomWeights, "static": Static,
}  # fmt: skip
"""Weightings of this package by the name that a run's file gives them."""

TORCHJD: dict[str, str] = {
    "mgda": "MGDAWeighting", "pcgrad": "PCGradWeighting", "cagrad": "CAGradWeighting", "imtl_g": "IMTLGWeighting",
    "aligned_mtl": "AlignedMTLWeighting", "upgrad": "UPGradWeighting", "dualproj": "DualProjWeighting",
    "fairgrad": "FairGradWeighting", "gradvac": "GradVacWeighting", "nash_mtl": "NashMTL",
}  # fmt: skip
"""Names of gradient-balancing methods that `torchjd` (the extra `gram`) computes from the tasks' Gram matrix."""

NORMS = ("exact", "sketch", "delayed", "features")
PARALLEL = ("data", "tasks")
NONFINITE = ("skip_task", "skip_step", "stop")


class BalancerConfig(Strict):
    """The `balancer:` block of a run's file. Further keys are the options of the weighting that `name` names.

    Raises:
        pydantic.ValidationError: an unknown name or option, an option out of range, or options that exclude each other;
            `load_config` turns it into a `ConfigError`.

    Example:
        >>> config = BalancerConfig(name="tbgc", max_norm=0.2, norm="sketch")
        >>> config.weighting()
        TBGC(max_norm=0.2, target='constant', rescale='clip', heads='same')
        >>> config.options()
        {'norm': 'sketch'}
    """

    model_config = ConfigDict(extra="allow")

    name: str = "tbgc"
    """Name of the weighting: a key of `WEIGHTINGS` or of `TORCHJD`."""
    norm: str = "exact"
    """Where norms come from: "exact", "sketch", "delayed" or "features"; see `TaskBalancer`."""
    sketch_size: int | None = None
    """Elements of a sketch; None: 65,536, or more for large models."""
    parallel: str = "data"
    """"data": every rank runs every task. "tasks": ranks are divided among the tasks."""
    groups: dict[str, int | list[int]] | None = None
    """With parallel="tasks": task -> number of its ranks, or task -> list of its ranks; None: evenly."""
    task_traces: bool = True
    """Under ZeRO-3: one parameter trace per task, and weights gathered once per step where they fit."""
    cosines_every: int = 0
    """Steps between two measurements of the cosines between the tasks' gradients; 0: never."""
    self_test: bool | None = None
    """Whether to compare a toy model's balanced steps with float64 at the start; None: where nobody has checked."""

    @model_validator(mode="after")
    def _check(self) -> BalancerConfig:
        check_options(self.norm, self.sketch_size, self.parallel, self.cosines_every)
        if self.groups is not None and self.parallel != "tasks":
            raise ConfigError(f"groups = {self.groups!r} with parallel = 'data'; groups are for parallel='tasks'")
        error = combination_error(self.norm, self.parallel, self.weighting())
        if error is not None:
            raise error
        return self

    def weighting(self) -> Weighting:
        """Return a new weighting as `name` and its options say."""
        return weighting_from_config({"name": self.name, **(self.model_extra or {})})

    def options(self) -> dict[str, Any]:
        """Return the options of `TaskBalancer` that the block sets."""
        names = [name for name in type(self).model_fields if name != "name" and name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}


def weighting_from_config(config: Mapping[str, Any]) -> Weighting:
    """Return the weighting that a mapping names.

    Args:
        config: `name` and the weighting's own options, such as {"name": "tbgc", "max_norm": 0.1}.

    Raises:
        ConfigError: an unknown name or option, an option out of range, or a method whose packages are not installed.

    Example:
        >>> from allinone_ds import weighting_from_config
        >>> weighting_from_config({"name": "task_clip", "max_norm": 0.5})
        TaskClip(max_norm=0.5)
    """
    options = dict(config)
    name = str(options.pop("name", "tbgc"))
    make: Any = WEIGHTINGS.get(name) or _torchjd_class(name)
    parameters = inspect.signature(make.__init__).parameters
    allowed = [p for p in parameters if p not in ("self", "args", "kwargs", "projector")]  # an object of torchjd
    for key in options:
        if key not in allowed:
            known = [*allowed, *(field for field in BalancerConfig.model_fields if field != "name")]
            raise ConfigError(f"balancer.{key}: '{name}' has no such option; {did_you_mean(key, known)}")
    missing = [key for key in allowed if parameters[key].default is inspect.Parameter.empty and key not in options]
    if missing:
        raise ConfigError(f"balancer: '{name}' needs the option {', '.join(missing)}, which has no default")
    try:
        made = make(**{key: _typed(make, key, value) for key, value in options.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"balancer: {error}") from error
    except ImportError as error:
        raise ConfigError(f"balancer.name: '{name}' needs further packages: {error}") from error
    if isinstance(made, Weighting):
        return made
    return GramWeighting(OfJacobians(made.weighting) if name == "nash_mtl" else made)


def config_from_weighting(weighting: Any) -> dict[str, Any] | None:
    """Return the mapping from which `weighting_from_config` makes a weighting; None if it makes none like it.

    Example:
        >>> config_from_weighting(TBGC(max_norm=0.2))
        {'name': 'tbgc', 'max_norm': 0.2, 'target': 'constant', 'rescale': 'clip', 'heads': 'same'}
    """
    names = [name for name, cls in WEIGHTINGS.items() if type(weighting) is cls]
    if not names:
        return None
    options = [key for key in inspect.signature(type(weighting).__init__).parameters if key != "self"]
    config = {"name": names[0], **{key: getattr(weighting, key, None) for key in options}}
    try:
        made = weighting_from_config(config)
    except ConfigError:
        return None
    return config if repr(made) == repr(weighting) else None


def check_options(
    norm: str, sketch_size: int | None, parallel: str, cosines_every: int = 0, nonfinite: str = "skip_task"
) -> None:
    """Raise unless each option of the balancer has a value that is allowed.

    Raises:
        ConfigError: names the option, its value and what is allowed.
    """
    if nonfinite not in NONFINITE:
        raise ConfigError(f"nonfinite = {nonfinite!r}; {did_you_mean(str(nonfinite), NONFINITE)}")
    if parallel not in PARALLEL:
        raise ConfigError(f"parallel = {parallel!r}; {did_you_mean(str(parallel), PARALLEL)}")
    if nonfinite not in NONFINITE:
        raise ConfigError(f"nonfinite = {nonfinite!r}; {did_you_mean(str(nonfinite), NONFINITE)}")
    if norm not in NORMS:
        raise ConfigError(f"norm = {norm!r}; {did_you_mean(str(norm), NORMS)}")
    sketches = norm in ("sketch", "delayed")
    if sketch_size is not None and (not sketches or not isinstance(sketch_size, int) or sketch_size < 1):
        raise ConfigError(
            f"sketch_size = {sketch_size!r} with norm = {norm!r}; allowed: None, or an integer of 1 or more with "
            "norm='sketch' or norm='delayed'"
        )
    if not isinstance(cosines_every, int) or cosines_every < 0:
        raise ConfigError(f"cosines_every = {cosines_every!r}; allowed: an integer of 0 (never) or more")
    if cosines_every and norm == "features":
        raise ConfigError(
            f"cosines_every = {cosines_every} with norm='features', where the tasks have one gradient; use another norm"
        )


def combination_error(
    norm: str,
    parallel: str,
    weighting: Weighting | None = None,
    stage: int | None = None,
    keeps_local_gradients: bool | None = None,
) -> ConfigError | None:
    """Return the error of options that cannot run together; None when they can.

    Args:
        norm: "exact", "sketch", "delayed" or "features".
        parallel: "data" or "tasks".
        weighting: None leaves it out of the rules.
        stage: ZeRO stage; None leaves the engine out of the rules.
        keeps_local_gradients: whether the engine can keep gradients on the rank over several backwards: ZeRO 1 to 3
            with DeepSpeed's ZeRO optimizers. ZeRO-1 in bf16 with fp32 accumulation runs `BF16_Optimizer`, which cannot.
    """
    if norm == "delayed" and parallel == "tasks":
        return ConfigError(
            "norm='delayed' with parallel='tasks': tasks on different ranks reduce once per step in any case; use "
            "norm='exact' or norm='sketch'"
        )
    if norm == "features":
        return _features_error(parallel, weighting, stage)
    if norm == "sketch" and parallel == "data" and weighting is not None and not weighting.streams:
        return ConfigError(
            f"norm='sketch' cannot serve {weighting!r}, which must see every task before it scales one: T "
            "gradients of the whole model would stay on every rank; use norm='delayed' or norm='exact'"
        )
    if parallel == "tasks" and stage == 3:
        return UnsupportedEngine(
            "parallel='tasks' cannot run on ZeRO-3: every forward gathers parameters from all ranks, so ranks in "
            "different tasks would wait for each other forever; use ZeRO-1 or ZeRO-2, or parallel='data'"
        )
    if (norm != "exact" or parallel == "tasks") and stage is not None and not keeps_local_gradients:
        option = "parallel='tasks'" if parallel == "tasks" else f"norm='{norm}'"
        return UnsupportedEngine(
            f"{option} cannot run on this engine (ZeRO stage {stage}), which cannot keep gradients on the rank over a "
            "step; use norm='exact' with parallel='data', or ZeRO 1, 2 or 3 (ZeRO-1 in bf16 without fp32 accumulation)"
        )
    return None


def sampling_error(norm: str, parallel: str, weighting: Weighting | Any) -> ConfigError | None:
    """Return the error of options that cannot serve steps of some of the tasks only; None when they can.

    Args:
        norm: "exact", "sketch", "delayed" or "features".
        parallel: "data" or "tasks".
        weighting: a weighting, or a function of Gram matrices.
    """
    if parallel == "tasks":
        return ConfigError(
            "sampling with parallel='tasks': the ranks of the tasks that a step leaves out would wait for the others; "
            "use parallel='data'"
        )
    if norm == "delayed" and not getattr(weighting, "streams", False):
        return ConfigError(
            f"sampling with norm='delayed' and {weighting!r}: its factors depend on which tasks are in a step, so "
            "those of the step before do not serve the next one; use norm='exact'"
        )
    return None


def _features_error(parallel: str, weighting: Weighting | None, stage: int | None) -> ConfigError | None:
    if parallel == "tasks":
        return ConfigError(
            "norm='features' with parallel='tasks': norms at the features need a message within each backward, and "
            "ranks that run different tasks send nothing before the step. They reduce once per step with norm='exact' "
            "too: use that (or 'sketch'), or parallel='data'"
        )
    if weighting is not None and not weighting.streams:
        return ConfigError(
            f"norm='features' cannot serve {weighting!r}, which must see every task before it scales one; use "
            "balancer.joint(..., at='features') with norm='exact', or a different norm"
        )
    if weighting is not None:
        try:
            feature_weighting(weighting)
        except ConfigError as error:
            return error
    if stage and not (MANAGES_ACCUMULATION if stage > 1 else COALESCES):
        return UnsupportedEngine(
            f"DeepSpeed {RELEASE} cannot finish an accumulation in the step (ZeRO stage {stage}), which norm='features'"
            " needs; use norm='exact', or DeepSpeed 0.19.4 or newer"
        )
    return None


def _typed(make: Any, key: str, value: Any) -> Any:
    """Convert an option to the type that the constructor's signature names, where it names one."""
    try:
        hint = get_type_hints(make.__init__)[key]
        adapter = TypeAdapter(list[float] if hint == Tensor | None else hint)
    except Exception:  # a signature of another package without types, or with types that pydantic does not know
        return value
    try:
        typed = adapter.validate_python(value)
        return torch.tensor(typed, dtype=torch.float64) if hint == Tensor | None else typed
    except ValidationError as error:
        raise ConfigError(f"balancer.{key} = {value!r}: {error.errors()[0]['msg']}") from error


def _torchjd_class(name: str) -> type:
    if name not in TORCHJD:
        raise ConfigError(f"balancer.name: unknown weighting '{name}'; {did_you_mean(name, [*WEIGHTINGS, *TORCHJD])}")
    try:
        import torchjd.aggregation
    except ImportError:
        raise ConfigError(
            f"balancer.name: '{name}' is computed by torchjd, which is not installed; pip install 'allinone_ds[gram]'"
        ) from None
    return getattr(torchjd.aggregation, TORCHJD[name])
