"""A ViT with one linear head per task, and a DeepSpeed engine on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TASKS = ("det", "seg", "cls")
CLASSES = 100


def build_model(width: int, layers: int, size: int, tasks: Iterable[str] = TASKS, head_width: int = 64) -> Any:
    """Return a model with the same weights on every call; `forward(task, x, y)` returns the task's loss.

    Args:
        width: channels of the backbone.
        layers: of the backbone.
        size: of the images, in pixels.
        tasks: one linear head per name.
        head_width: channels per attention head.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = Dinov2Config(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // head_width,
                image_size=size,
                patch_size=16,
            )
            self.backbone = Dinov2Model(config)
            self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(width, CLASSES) for task in tasks})

        def forward(self, task, x, y):
            features = self.backbone(x).last_hidden_state.mean(1)  # (B, C)
            return torch.nn.functional.cross_entropy(self.heads[task](features).float(), y)

    torch.manual_seed(0)
    return Model()


def build_engine(
    model: Any,
    stage: int,
    accumulation: int = 1,
    batch: int = 8,
    bucket: int = 10**7,
    zero: Mapping[str, Any] | None = None,
) -> Any:
    """Return a DeepSpeed engine with AdamW on a model of `build_model`.

    Args:
        model: the model.
        stage: ZeRO stage.
        accumulation: micro-steps per optimizer step.
        batch: images per rank and micro-step.
        bucket: elements that ZeRO reduces at once.
        zero: further keys of `zero_optimization`.
    """
    import deepspeed
    import torch

    groups = [{"params": list(part.parameters())} for part in (model.backbone, *model.heads.values())]
    config = {
        "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": False,
                              "stage3_param_persistence_threshold": 10**4, **(zero or {})},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def count_parameters(module: Any) -> int:
    """Return the number of elements of a module's parameters, including those sharded over other ranks."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def random_batch(batch: int, size: int, seed: int) -> Any:
    """Return images (B, 3, H, W) and labels (B,)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x, torch.randint(CLASSES, (batch,), generator=generator)


def plain_step(engine: Any, tasks: Iterable[str], x: Any, y: Any) -> None:
    """Take one optimizer step of DeepSpeed's gradient accumulation: one micro-step per task."""
    for task in tasks:
        engine.backward(engine(task, x, y))
        engine.step()


def balanced_step(balancer: Any, x: Any, y: Any) -> None:
    """Take one optimizer step of the balancer: one micro-step per task."""
    for task in balancer.tasks:
        with balancer.task(task):
            balancer.backward(balancer.engine(task, x, y))
    balancer.step()
