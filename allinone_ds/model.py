"""One backbone, many tasks: the module that is handed to DeepSpeed and to the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import normalize
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone
from allinone_ds.strict import did_you_mean

if TYPE_CHECKING:
    from allinone_ds.tasks.base import Task


class AllInOneModel(nn.Module):
    """A shared backbone and one head (a `Task`) a task; a forward runs the backbone and ONE head.

    The heads take the backbone's dtype: under ZeRO-3 with bf16 it is born in bfloat16, and DeepSpeed wants one dtype.

    Args:
        backbone: what `build_backbone` returned.
        tasks: tasks by name; the names are those of the balancer and of the logs.

    Attributes:
        config: configuration of the backbone's ViT, where DeepSpeed integrations look up `hidden_size`.
    """

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        if not tasks:
            raise ConfigError("tasks: none given; name at least one")
        self.tasks = nn.ModuleDict()
        for name, task in tasks.items():
            try:
                self.tasks[name] = task
            except KeyError as error:
                raise ConfigError(f"tasks: '{name}' cannot name a task: {error.args[0]}") from error
        self.tasks.to(next(backbone.parameters()).dtype)

    def forward(self, task: str, pixel_values: Tensor, labels: Any = None, **_: Any) -> ModelOutput:
        """Run the backbone and the head of one task.

        Args:
            task: name of the task.
            pixel_values: (B, 3, H, W), uint8 images, or normalised ones of any floating dtype.
            labels: targets as the task's `collate` makes them; without them there is no loss.

        Returns:
            The task's `ModelOutput`, `loss` in it (a scalar in float32) when labels were given.
        """
        if task not in self.tasks:
            raise KeyError(f"unknown task '{task}'; {did_you_mean(str(task), self.tasks.keys())}")
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values)
        features = self.backbone(pixel_values).feature_maps
        return self.tasks[task](features, pixel_values, labels)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.net.modules())

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Recompute the backbone's layers in backward; non-reentrant unless told otherwise.

        Args:
            activation_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.
            more: what else the installed `transformers` takes (`every_n_layers`, `offload`).
        """
        self._switch("enable", {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}, **more)

    def activation_checkpointing_disable(self) -> None:
        """Keep the backbone's activations again."""
        self._switch("disable")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """The same under the name that earlier releases of `transformers` call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        """The same under the name that earlier releases of `transformers` call."""
        self.activation_checkpointing_disable()

    def _switch(self, verb: str, *args: Any, **kwargs: Any) -> None:
        net: Any = self.backbone.net
        earlier = getattr(net, f"gradient_checkpointing_{verb}")
        getattr(net, f"activation_checkpointing_{verb}", earlier)(*args, **kwargs)
