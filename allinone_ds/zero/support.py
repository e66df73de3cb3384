"""Which engines are served: the adapter of each kind, and a clear refusal of every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim import Optimizer

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.engines.base import GradientShards
from allinone_ds.zero.engines.bf16 import BF16Shards
from allinone_ds.zero.engines.stage0 import Stage0Shards
from allinone_ds.zero.engines.stage3 import Stage3OffloadShards, Stage3Shards
from allinone_ds.zero.engines.stage12 import Stage12OffloadShards, Stage12Shards
from allinone_ds.zero.releases import MANAGES_ACCUMULATION, RELEASE

CHECKED_RELEASES = ("0.19.8",)
"""DeepSpeed releases whose private fields were read and whose exactness table was run."""


def checked_release() -> bool:
    """True when the installed DeepSpeed is one of `CHECKED_RELEASES`."""
    return str(RELEASE) in CHECKED_RELEASES


def release_name() -> str:
    """Return the installed release of DeepSpeed, such as "0.19.8"."""
    return str(RELEASE)


def refuse_unsupported(engine: Any, allow_gradient_clipping: bool) -> None:
    """Raise unless gradients of `engine` can be balanced exactly.

    Raises:
        TypeError: not what `deepspeed.initialize` returns.
        UnsupportedEngine: a kind or setting that is not served; says what to do.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine is {type(engine).__name__}; pass the engine that deepspeed.initialize returned "
            "(with accelerate: what accelerator.prepare returned for the model)"
        )
    for reason, advice in _refusals(engine):
        raise UnsupportedEngine(f"{reason} cannot be balanced; {advice}")
    clip = float(engine.gradient_clipping())
    if clip and (isinstance(engine.optimizer, BF16_Optimizer) or not allow_gradient_clipping):
        raise UnsupportedEngine(
            f"gradient_clipping is {clip} in the DeepSpeed config (1.0 when the key is absent, and Hugging Face fills "
            "'auto' from max_grad_norm): the balanced sum would be clipped a second time; "
            'set "gradient_clipping": 0.0'
            + ("" if isinstance(engine.optimizer, BF16_Optimizer) else ", or pass allow_gradient_clipping=True")
        )


def _refusals(engine: Any) -> list[tuple[str, str]]:
    zero = engine._config.zero_config
    offload = [c for c in (zero.offload_optimizer, zero.offload_param) if c is not None]
    nvme = any(str(getattr(c.device, "value", c.device)) == "nvme" for c in offload)
    optimizer_name = type(getattr(engine, "basic_optimizer", None)).__name__
    rows: list[tuple[bool, str, str]] = [
        (isinstance(engine, PipelineEngine), "a pipeline engine", "use ZeRO without PipelineModule"),
        (not isinstance(engine.optimizer, (Optimizer, *_KINDS)), "an engine without an optimizer of its own",
         "give deepspeed.initialize an optimizer or an optimizer section"),
        (bool(getattr(engine, "zenflow", False)), "ZenFlow", "remove the zenflow section"),
        (bool(engine.super_offload()), "SuperOffload", "set super_offload to false"),
        (nvme, "NVMe offload", "offload to cpu or not at all"),
        (bool(engine.has_moe_layers), "mixture-of-experts layers", "their gradients are averaged over other ranks"),
        (engine.mpu is not None or engine.autotp_size() > 1, "tensor or model parallelism", "use ZeRO alone"),
        (getattr(zero, "mics_shard_size", -1) > 0, "MiCS", "remove mics_shard_size"),
        (bool(engine.zero_quantized_gradients()), "quantized gradients (ZeRO++)", "set zero_quantized_gradients false"),
        (bool(engine.is_deepcompile_enabled()), "DeepCompile", "set compile.deepcompile to false"),
        (MANAGES_ACCUMULATION and not engine.managed_gradient_accumulation(),
         "managed_gradient_accumulation = false", "remove the key"),
        (bool(getattr(engine, "torch_autocast_z0_gradscaler", None)), "torch_autocast in fp16 without ZeRO",
         "use bf16, or ZeRO"),
        ("Muon" in optimizer_name or "Bit" in optimizer_name, f"the optimizer {optimizer_name}",
         "it changes gradients itself; use an element-wise one such as AdamW or SGD"),
    ]  # fmt: skip
    return [(reason, advice) for wrong, reason, advice in rows if wrong]


_KINDS: dict[type, Callable[[bool], type[GradientShards]]] = {
    BF16_Optimizer: lambda offload: BF16Shards,
    DeepSpeedZeroOptimizer_Stage3: lambda offload: Stage3OffloadShards if offload else Stage3Shards,
    DeepSpeedZeroOptimizer: lambda offload: Stage12OffloadShards if offload else Stage12Shards,
    FP16_Optimizer: lambda offload: Stage0Shards,
    FP16_UnfusedOptimizer: lambda offload: Stage0Shards,
}


def open_shards(engine: Any, shared: set[int]) -> GradientShards:
    """The adapter for an engine that `refuse_unsupported` let pass.

    Args:
        engine: what `deepspeed.initialize` returned.
        shared: `id` of every parameter of the shared backbone.
    """
    optimizer = engine.optimizer
    offload = bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
    for kind, choose in _KINDS.items():
        if type(optimizer) is kind:
            return choose(offload)(engine, shared)
    if isinstance(optimizer, Optimizer) and engine.zero_optimization_stage() == 0:
        return Stage0Shards(engine, shared)
    raise UnsupportedEngine(
        f"the engine's optimizer is {type(optimizer).__name__}; served are ZeRO stages 0 to 3: "
        + ", ".join(k.__name__ for k in _KINDS)
    )
