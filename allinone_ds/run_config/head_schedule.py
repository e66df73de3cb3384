"""A learning-rate schedule of one task's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, did_you_mean


class HeadSchedule(Strict):
    """Schedule of one head, which the rest of the run's schedule does not change.

    Example:
        >>> HeadSchedule(type="constant_with_warmup", warmup_steps=4).factor(100)(1)
        0.25
    """

    type: str
    """A value of `trainer.lr_scheduler_type` that follows the step, such as cosine, linear or constant_with_warmup."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the rate rises from 0."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What `trainer.lr_scheduler_kwargs` has for this type."""

    @model_validator(mode="after")
    def _can_be_built(self) -> HeadSchedule:
        names = [kind.value for kind in SchedulerType]
        if self.type not in names:
            raise ConfigError(f"type: '{self.type}'; {did_you_mean(self.type, names)}")
        self.factor(max(2 * self.warmup_steps, 2))
        return self

    def factor(self, steps: int) -> Callable[[int], float]:
        """Return the function from a step to the factor of the rate.

        Args:
            steps: length of the run.

        Raises:
            ConfigError: `options` do not fit the type, or the type follows a metric.
        """
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            scheduler: Any = get_scheduler(self.type, nothing, self.warmup_steps, steps, self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"type: {self.type} with options {self.options}: {error}") from error
        if not isinstance(scheduler, LambdaLR):
            raise ConfigError(f"type: '{self.type}' follows a metric; choose a type such as cosine")
        return scheduler.lr_lambdas[0]
