"""The module that DeepSpeed and the Trainer receive: one backbone and many tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allinone_ds.balance.joint.block import task_features
from allinone_ds.data.augmentation.transforms import normalize
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone
from allinone_ds.models.lora import SHARED, adapters_in_use, adapters_of, checkpoint_contexts
from allinone_ds.strict import check_task_name, did_you_mean

if TYPE_CHECKING:
    from allinone_ds.tasks import Task


class AllInOneModel(nn.Module):
    """A shared backbone and one `Task` per task name; a forward runs the backbone and ONE head, or those of a group.

    The heads are cast to the dtype of the backbone. Under ZeRO-3 with bf16 the backbone is created in bfloat16, and
    DeepSpeed requires a single dtype.

    Args:
        backbone: what `build_backbone` returned.
        tasks: tasks by name; balancer and logs use the same names.

    Attributes:
        config: configuration of the backbone's ViT, from which integrations of DeepSpeed read `hidden_size`.

    Raises:
        ConfigError: there are no tasks, or one has a name that files or modules cannot have.

    Example:
        >>> import torch
        >>> from allinone_ds.models.backbone import BackboneConfig, build_backbone
        >>> from allinone_ds.tasks import build_task
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        >>> backbone = build_backbone(BackboneConfig(config=sizes))
        >>> tasks = {
        ...     "seg": build_task("segmentation", "seg", ["road", "sky"], backbone, (32, 32)),
        ...     "cls": build_task("classification", "cls", ["day", "night"], backbone, (32, 32)),
        ... }
        >>> model = AllInOneModel(backbone, tasks)
        >>> model("cls", torch.zeros(4, 3, 32, 32, dtype=torch.uint8)).logits.shape
        torch.Size([4, 2])
        >>> model("seg", torch.randn(1, 3, 32, 32), labels=torch.zeros(1, 32, 32).long()).loss.shape
        torch.Size([])
    """

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        if not tasks:
            raise ConfigError("tasks: the model has no task; give at least one")
        self.tasks = nn.ModuleDict()
        for name, task in tasks.items():
            check_task_name(name)
            try:
                self.tasks[name] = task
            except KeyError as error:
                raise ConfigError(
                    f"tasks: '{name}' cannot name a task ({error.args[0]}); choose a different name"
                ) from error
        self.tasks.to(next(backbone.parameters()).dtype)

    def forward(
        self,
        task: str | Sequence[str],
        pixel_values: Tensor,
        labels: Any = None,
        rows: Mapping[str, Tensor | None] | None = None,
        **_: Any,
    ) -> Any:
        """Run the backbone, once, and the head of one task or those of several.

        Args:
            task: name of the task, or names of several.
            pixel_values: (B, 3, H, W), uint8 images or normalised images of any floating dtype.
            labels: targets in the form of the task's `collate`; without them there is no loss. Of several tasks: task
                -> targets.
            rows: of several tasks, task -> positions (n,) of the images that the task's head gets; None: all images.

        Returns:
            The task's `ModelOutput`; its `loss` is a float32 scalar if labels were given. Of several tasks: task ->
            `ModelOutput`.

        Raises:
            KeyError: the model has no task of this name.
            ConfigError: several tasks, of which one has adapters of its own.
        """
        names = (task,) if isinstance(task, str) else tuple(task)
        for name in names:
            if name not in self.tasks:
                raise KeyError(f"unknown task '{name}'; {did_you_mean(str(name), self.tasks.keys())}")
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values)
        adapted = [name for name in names if name in adapters_of(self.backbone)]
        if adapted and len(names) > 1:
            first = adapted[0]
            raise ConfigError(
                f"task '{first}' has adapters of its own (tasks.{first}.lora), so it cannot share one forward with "
                f"{', '.join(name for name in names if name != first)}; run it alone"
            )
        with adapters_in_use(self.backbone, names[0]):
            features = self.backbone(pixel_values).feature_maps
        if isinstance(task, str):
            return self.tasks[task](task_features(features, task), pixel_values, labels)
        outputs = {}
        for name in names:
            own, pixels = task_features(features, name), pixel_values
            chosen = None if rows is None else rows[name]
            if chosen is not None:
                own, pixels = tuple(level[chosen] for level in own), pixel_values[chosen]
            outputs[name] = self.tasks[name](own, pixels, None if labels is None else labels[name])
        return outputs

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers of the backbone are recomputed in the backward pass; the Trainer reads it."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.net.modules())

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Recompute the backbone's layers in the backward pass.

        Args:
            activation_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False
                by default.
            more: further arguments of the installed `transformers` (`every_n_layers`, `offload`).
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if more.get("offload") and not torch.accelerator.is_available():
            raise ConfigError(
                "trainer.activation_checkpointing_kwargs: offload moves activations from a GPU to the host, and this "
                "machine has no GPU; remove it"
            )
        if set(adapters_of(self.backbone)) - {SHARED}:
            if options["use_reentrant"]:
                raise ConfigError(
                    "gradient_checkpointing_kwargs: use_reentrant cannot recompute with the adapters of a task "
                    "(tasks.NAME.lora); remove it"
                )
            options["context_fn"] = partial(checkpoint_contexts, self.backbone)
        self._switch("enable", options, **more)

    def activation_checkpointing_disable(self) -> None:
        """Keep the backbone's activations for the backward pass instead of recomputing them."""
        self._switch("disable")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Call `activation_checkpointing_enable`; earlier releases of `transformers` use this name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        """Call `activation_checkpointing_disable`; earlier releases of `transformers` use this name."""
        self.activation_checkpointing_disable()

    def _switch(self, verb: str, *args: Any, **kwargs: Any) -> None:
        net: Any = self.backbone.net
        if not net.supports_gradient_checkpointing:
            raise ConfigError(
                f"trainer.gradient_checkpointing: {self.config.model_type} does not support it; remove it"
            )
        earlier = getattr(net, f"gradient_checkpointing_{verb}")
        getattr(net, f"activation_checkpointing_{verb}", earlier)(*args, **kwargs)
