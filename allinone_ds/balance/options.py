"""Weightings by name: what a run's `balancer:` block may say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.arguments import norm_kind
from allinone_ds.balance.weightings.adaptive import DBMTL, DWA, FAMO, GradNorm, RandomWeights, Uncertainty
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.clipping import TBGC, GlobalClip, Static, Sum, TaskClip
from allinone_ds.balance.weightings.gram import GramWeighting
from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean

WEIGHTINGS: dict[str, type[Weighting]] = {
    "sum": Sum, "global_clip": GlobalClip, "task_clip": TaskClip, "tbgc": TBGC, "db_mtl": DBMTL, "gradnorm": GradNorm,
    "uncertainty": Uncertainty, "dwa": DWA, "famo": FAMO, "random": RandomWeights, "static": Static,
}  # fmt: skip

TORCHJD: dict[str, str] = {
    "mgda": "MGDAWeighting", "pcgrad": "PCGradWeighting", "cagrad": "CAGradWeighting", "imtl_g": "IMTLGWeighting",
    "aligned_mtl": "AlignedMTLWeighting", "upgrad": "UPGradWeighting", "dualproj": "DualProjWeighting",
    "fairgrad": "FairGradWeighting", "gradvac": "GradVacWeighting", "nash_mtl": "NashMTL",
}  # fmt: skip
"""Names of gradient-balancing methods that `torchjd` (the extra `gram`) computes from the tasks' Gram matrix."""

OPTIONS = ("norm", "sketch_size", "task_traces", "cosines_every", "parallel", "groups")
"""Keys of a `balancer:` block that are options of `TaskBalancer`, not of the weighting."""


def balancer_from_config(config: Mapping[str, Any]) -> tuple[Weighting, dict[str, Any]]:
    """The weighting and the further options of `TaskBalancer` that a run's `balancer:` block names.

    Args:
        config: for example {"name": "tbgc", "max_norm": 0.1, "norm": "sketch"}.

    Raises:
        ConfigError: an unknown name or option, or an option out of range.
    """
    options = {key: value for key, value in config.items() if key in OPTIONS}
    norm_kind(options.get("norm", "exact"), options.get("sketch_size"), options.get("parallel", "data"))
    return weighting_from_config({k: v for k, v in config.items() if k not in OPTIONS}), options


def weighting_from_config(config: Mapping[str, Any]) -> Weighting:
    """The weighting a run's `balancer:` block names, such as {"name": "tbgc", "max_norm": 0.1}.

    Raises:
        ConfigError: an unknown name or option, an option out of range, or a method whose packages are not installed.
    """
    options = dict(config)
    name = str(options.pop("name", "tbgc"))
    make: Any = WEIGHTINGS.get(name) or _torchjd_class(name)
    allowed = [p for p in inspect.signature(make.__init__).parameters if p not in ("self", "args", "kwargs")]
    for key in options:
        if key not in allowed:
            raise ConfigError(f"balancer.{key}: '{name}' has no such option; {did_you_mean(key, [*allowed, *OPTIONS])}")
    try:
        made = make(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"balancer: {error}") from error
    except ImportError as error:
        raise ConfigError(f"balancer.name: '{name}' needs further packages: {error}") from error
    if isinstance(made, Weighting):
        return made
    return GramWeighting(_from_factor(made.weighting) if name == "nash_mtl" else made)


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


def _from_factor(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A weighting of Jacobians as one of Gram matrices, for methods that see only J J^T: J is the square root of it."""

    def from_gram(gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return weighting(vectors * values.clamp(min=0).sqrt() @ vectors.T)

    return from_gram
