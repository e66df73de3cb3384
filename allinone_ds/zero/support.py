"""Which releases and settings of DeepSpeed are served, and a clear refusal of every other."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.engines.choose import adapter_class
from allinone_ds.zero.engines.loss_scale import grad_scaler
from allinone_ds.zero.releases import MANAGES_ACCUMULATION, RELEASE

_CHANGES_GRADIENTS = ("muon", "onebit", "zeroone")
_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)
CHECKED_RELEASES = ("0.19.8",)
"""DeepSpeed releases whose private fields were read and whose exactness table was run."""


def checked_release() -> bool:
    """Return whether the installed DeepSpeed is one of `CHECKED_RELEASES`."""
    return str(RELEASE) in CHECKED_RELEASES


def release_name() -> str:
    """Return the installed release of DeepSpeed, such as "0.19.8"."""
    return str(RELEASE)


def refuse_unsupported(engine: Any, allow_gradient_clipping: bool) -> None:
    """Raise unless gradients of `engine` can be balanced exactly.

    Args:
        engine: what `deepspeed.initialize` returned.
        allow_gradient_clipping: accept that DeepSpeed clips the balanced gradient a second time.

    Raises:
        TypeError: `engine` is not what `deepspeed.initialize` returns.
        UnsupportedEngine: a kind or setting that is not served; the message says what to do.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine is {type(engine).__name__}; pass the engine that deepspeed.initialize returned "
            "(with accelerate: what accelerator.prepare returned for the model)"
        )
    for reason, advice in _refusals(engine):
        raise UnsupportedEngine(f"{reason} cannot be balanced; {advice}")
    clip = float(engine.gradient_clipping())
    adapter = adapter_class(engine)
    may_clip = adapter is not None and adapter.allows_clipping
    if clip and not (allow_gradient_clipping and may_clip):
        raise UnsupportedEngine(
            f"gradient_clipping is {clip} in the DeepSpeed config (1.0 when the key is absent, and Hugging Face fills "
            "'auto' from max_grad_norm): the balanced sum would be clipped a second time; "
            'set "gradient_clipping": 0.0' + (", or pass allow_gradient_clipping=True" if may_clip else "")
        )


def _refusals(engine: Any) -> list[tuple[str, str]]:
    """(what is not served, what to do instead) of everything that applies to the engine."""
    zero = engine._config.zero_config
    offload = [c for c in (zero.offload_optimizer, zero.offload_param) if c is not None]
    nvme = any(str(getattr(c.device, "value", c.device)) == "nvme" for c in offload)
    scaled = grad_scaler(engine) is not None
    optimizer_name = type(getattr(engine, "basic_optimizer", None)).__name__
    rows: list[tuple[bool, str, str]] = [
        (isinstance(engine, PipelineEngine), "a pipeline engine", "use ZeRO without PipelineModule"),
        (adapter_class(engine) is None, "an engine without an optimizer of its own",
         "give deepspeed.initialize an optimizer or an optimizer section"),
        (bool(getattr(engine, "zenflow", False)), "ZenFlow", "remove the zenflow section"),
        (bool(engine.super_offload()), "SuperOffload", "set super_offload to false"),
        (nvme, "NVMe offload", "offload to cpu or not at all"),
        (bool(engine.has_moe_layers), "mixture-of-experts layers", "their gradients are averaged over other ranks"),
        (engine.mpu is not None or engine.autotp_size() > 1, "tensor or model parallelism", "use ZeRO alone"),
        (engine.mesh_device is not None or engine.sequence_parallel_size > 1, "sequence parallelism (a device mesh)",
         "ranks of a sequence would count as ranks of different data; remove mesh_param and sequence_parallel_size"),
        (isinstance(engine, DeepSpeedHybridEngine), "the hybrid engine", "remove the hybrid_engine section"),
        (getattr(zero, "mics_shard_size", -1) > 0, "MiCS", "remove mics_shard_size"),
        (bool(engine.zero_quantized_gradients()), "quantized gradients (ZeRO++)", "set zero_quantized_gradients false"),
        (bool(engine.is_deepcompile_enabled()), "DeepCompile", "set compile.deepcompile to false"),
        (MANAGES_ACCUMULATION and not engine.managed_gradient_accumulation(),
         "managed_gradient_accumulation = false", "remove the key"),
        (scaled and engine.fp16_enabled(), "torch_autocast in fp16 beside the fp16 section",
         "DeepSpeed scales the loss once and divides its gradient by both scales; remove one of the two sections"),
        (scaled and getattr(engine.optimizer, "custom_loss_scaler", False), "override_loss_scale with torch_autocast",
         "DeepSpeed would multiply by one scale and divide by both; do not call it"),
        (scaled and not getattr(zero, "compute_grad_norm", True),
         "torch_autocast in fp16 with compute_grad_norm = false",
         "DeepSpeed would not see an overflow; remove the key compute_grad_norm"),
        (any(getattr(m, "sparse", False) for m in engine.module.modules() if isinstance(m, _EMBEDDINGS)),
         "an embedding with sparse gradients", "construct it with sparse=False"),
        (not engine.gradient_average, 'gradient_allreduce_op = "sum"',
         "a task's gradient is its mean over ranks; remove the key, and multiply the loss by the number of ranks"),
        (engine.zero_optimization_stage() == 3 and engine.gradient_predivide_factor() != 1.0,
         "gradient_predivide_factor on ZeRO-3", "DeepSpeed divides by it and may not multiply again; remove the key"),
        (any(word in optimizer_name.lower() for word in _CHANGES_GRADIENTS), f"the optimizer {optimizer_name}",
         "it changes gradients itself; use an element-wise one such as AdamW or SGD"),
    ]  # fmt: skip
    return [(reason, advice) for wrong, reason, advice in rows if wrong]
