"""Freeze a part of the backbone (its embeddings, its first layers, or all of it), and thaw it in later steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeInt

from allinone_ds.errors import ConfigError

Freeze = NonNegativeInt | Literal["embeddings", "backbone"]
"""What is frozen: "embeddings", N (the embeddings and the first N layers), or "backbone" (all of it)."""


def frozen_names(backbone: Any, freeze: Freeze | None) -> set[str]:
    """Return the names of the backbone's parameters that keep their weights.

    Args:
        backbone: what `build_backbone` returned.
        freeze: the part; None: nothing.

    Raises:
        ConfigError: the backbone has fewer layers.
    """
    if freeze is None:
        return set()
    names = {name for name, _ in backbone.named_parameters()}
    if freeze == "backbone":
        return names
    if isinstance(freeze, int) and freeze > backbone.depth:
        raise ConfigError(
            f"model.freeze = {freeze}: the backbone has {backbone.depth} layers; give at most {backbone.depth}, or "
            "'backbone' to freeze all of it"
        )
    last = 0 if freeze == "embeddings" else freeze
    numbers = backbone.layer_numbers()
    return {name for name in names if numbers[name] <= last}


def freeze_backbone(backbone: Any, freeze: Freeze | None) -> None:
    """Exclude a part of the backbone from training.

    Args:
        backbone: what `build_backbone` returned.
        freeze: the part; None: nothing.

    Raises:
        ConfigError: the backbone has fewer layers.
    """
    frozen = frozen_names(backbone, freeze)
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def check_stages(stages: Mapping[int, Freeze | None]) -> None:
    """Raise unless every stage freezes less than the one before.

    Args:
        stages: optimizer step -> what is frozen from it on; the first is step 0.

    Raises:
        ConfigError: names the stage.

    Example:
        >>> check_stages({0: "backbone", 500: 6, 1000: "embeddings", 2000: None})
    """
    sizes: dict[Any, float] = {None: -1, "embeddings": 0, "backbone": math.inf}
    before = math.inf
    for number, step in enumerate(sorted(stages)):
        freeze: Any = stages[step]
        size = sizes[freeze] if freeze in sizes else freeze
        if number and not size < before:
            raise ConfigError(
                f"model.thaw: from step {step} on {freeze!r} is frozen, which is not less than before; each step must "
                "freeze less: 'backbone', then a number of layers, a smaller one, 'embeddings', null"
            )
        before = size


class FreezeSchedule:
    """What of a backbone is frozen in which optimizer step.

    All of it that trains in the last stage is a parameter of the optimizer from the start, and stands still without a
    gradient until it is thawed.

    Args:
        backbone: what `build_backbone` returned; what does not train now never does.
        stages: optimizer step -> what is frozen from it on; the first is step 0. Empty: nothing ever changes.

    Raises:
        ConfigError: a stage does not freeze less than the one before, or more layers than there are.
    """

    def __init__(self, backbone: Any, stages: Mapping[int, Freeze | None]) -> None:
        check_stages(stages)
        self.stages = {step: stages[step] for step in sorted(stages)}
        self._backbone = backbone
        self._frozen = {step: frozen_names(backbone, freeze) for step, freeze in self.stages.items()}
        self._trainable = {name for name, p in backbone.named_parameters() if p.requires_grad} if self.stages else set()
        self._current: int | None = None

    @property
    def last(self) -> int:
        """The step of the last stage; 0 if nothing ever changes."""
        return max(self.stages, default=0)

    def stage_numbers(self) -> dict[str, int]:
        """Return {parameter: number of the stage that thaws it}, from 1; without those that never change."""
        found: dict[str, int] = {}
        steps = list(self._frozen)
        for number, (before, step) in enumerate(zip(steps, steps[1:], strict=False), 1):
            found |= dict.fromkeys((self._frozen[before] - self._frozen[step]) & self._trainable, number)
        return found

    def apply(self, step: int) -> bool:
        """Freeze and thaw as the stage of an optimizer step says; return whether it is another stage than before."""
        stage = max((begin for begin in self.stages if begin <= step), default=None)
        if stage is None:
            return False
        changing = self.stage_numbers()
        for name, parameter in self._backbone.named_parameters():
            if name in changing:
                parameter.requires_grad_(name not in self._frozen[stage])
        changed, self._current = stage != self._current, stage
        return changed

    def thaw(self) -> None:
        """Thaw all that is ever thawed, until the next `apply`: for checkpoints, which hold it as trained."""
        for name, parameter in self._backbone.named_parameters():
            if name in self.stage_numbers():
                parameter.requires_grad_(True)

    def message(self, step: int) -> str | None:
        """Return what a step thaws, as a text for the user; None if it thaws nothing."""
        if step not in self.stages or step == min(self.stages):
            return None
        number = list(self.stages).index(step)
        thawed = sum(own == number for own in self.stage_numbers().values())
        rest = len(self._frozen[step])
        left = f"{rest} stay frozen (model.freeze: {self.stages[step]})" if rest else "all of it trains now"
        return f"model.thaw: step {step} thaws {thawed} parameters of the backbone; {left}"
