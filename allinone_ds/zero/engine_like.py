"""A small engine of the same kind as another, and its weights, for the start-up self-test."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from allinone_ds.zero.engines.loss_scale import grad_scaler

_KEPT_SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type")


def engine_like(engine: Any, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Any:
    """Return an engine with the ZeRO, precision and offload settings of `engine`, plain SGD and small buffers.

    Args:
        engine: what `deepspeed.initialize` returned.
        model: of the new engine.
        groups: parameter groups of the optimizer.
        lr: learning rate.
    """
    config = {k: copy.deepcopy(v) for k, v in engine.config.items() if k in _KEPT_SECTIONS}
    zero = config.setdefault("zero_optimization", {})
    zero.update({"reduce_bucket_size": 4096, "allgather_bucket_size": 4096})
    if config.get("fp16", {}).get("enabled"):
        config["fp16"].update({"loss_scale": 0, "initial_scale_power": 2})
    config |= {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    like = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=lr), config=config)[0]
    scaler = grad_scaler(like)
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})
    return like


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Return the trainable parameters of an engine's module by name, whole, in float64 on the CPU. Collective."""
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                found[name] = param.detach().double().cpu()
    return found
