"""What an engine multiplies losses by in `backward`, and divides gradients by in `step`. Checked on DeepSpeed 0.19.8.

The fp16 section scales by the optimizer's `loss_scale`, static or dynamic. `optimizer.override_loss_scale` sets a scale
of the user's own, in any type. `torch_autocast` in fp16 scales by torch's GradScaler: one of the ZeRO optimizer, or of
the engine without ZeRO.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_NEVER = 2**31 - 1


def grad_scaler(engine: Any) -> Any:
    """Return torch's GradScaler of an engine with `torch_autocast` in fp16; None for all others."""
    scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return getattr(engine, "torch_autocast_z0_gradscaler", None) if scaler is None else scaler


def loss_scale(engine: Any) -> float | Tensor:
    """Return the factor that the engine's step divides gradients by; that of a GradScaler stays on the device, 0-dim.

    Private method of torch 2.11 to 2.14: `get_scale` would wait for the device.
    """
    scale, scaler = float(getattr(engine.optimizer, "loss_scale", 1.0)), grad_scaler(engine)
    if scaler is None:
        return scale
    on_device = scaler._get_scale_async()  # None before the first loss
    return scale * (scaler.get_scale() if on_device is None else on_device)


@contextlib.contextmanager
def scale_changes_after_step(engine: Any) -> Iterator[None]:
    """Let the GradScaler of a ZeRO optimizer change its scale after the engine's step, and after an overflow.

    DeepSpeed updates it after every parameter group, so that the groups after a growth would be divided by twice the
    scale that their gradients carry. And it does not lower the scale when it skips a step, so that a task that
    overflows once would overflow for ever.
    """
    scaler: Any = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if scaler is None:
        yield
        return
    interval = scaler.get_growth_interval()
    scaler.set_growth_interval(_NEVER)
    on_device = scaler._scale, scaler._growth_tracker
    if any(getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")):
        # torch would copy the scale to offloaded gradients without waiting until it has arrived
        scaler._scale, scaler._growth_tracker = (value.cpu() for value in on_device)
    try:
        yield
    finally:
        for target, value in zip(on_device, (scaler._scale, scaler._growth_tracker), strict=True):
            target.copy_(value)
        scaler._scale, scaler._growth_tracker = on_device
        scaler.set_growth_interval(interval)
    scale, steps = scaler._scale, scaler._growth_tracker  # changed on the device
    if engine.optimizer.overflow:
        scale.mul_(scaler.get_backoff_factor())
        steps.zero_()
    else:
        grows = steps >= interval
        scale.copy_(torch.where(grows, scale * scaler.get_growth_factor(), scale))
        steps.masked_fill_(grows, 0)
