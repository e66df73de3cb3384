"""The settings of a DeepSpeed configuration on which memory and traffic of a step depend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allinone_ds.errors import ConfigError


@dataclass(frozen=True)
class Engine:
    """Settings of a DeepSpeed engine.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        weight_bytes: bytes per element of the model's weights.
        fp32_accumulation: whether gradients of 16-bit weights accumulate in float32.
        offload: whether the optimizer is in the host's memory.
        bucket: elements of a reduce bucket.
        buckets: number of reduce buckets.
        prefetched: elements of weights that ZeRO-3 gathers before they are used.
        retained: elements of weights that ZeRO-3 keeps gathered from a forward to its backward.
        live: `stage3_max_live_parameters`.
        task_traces: option of `TaskBalancer`: ZeRO-3 keeps min(`retained`, `live`) gathered over the whole step.
        copied_within: ranks that share a copy of all weights under ZeRO-3 (`zero_hpz_partition_size`); 1: no copies.
        master_bytes: bytes per element of the weights that the optimizer steps on, and of balanced gradients.
        state_bytes: bytes per element of the optimizer's moments.
        all_reduces: whether DeepSpeed all-reduces gradients to every rank, its default below ZeRO-3, instead of
            reducing each to its owner.
    """

    stage: int
    weight_bytes: int = 4
    fp32_accumulation: bool = False
    offload: bool = False
    bucket: int = 500_000_000
    buckets: int = 1
    prefetched: int = 0
    retained: int = 0
    live: int = 10**9
    task_traces: bool = True
    all_reduces: bool = True
    copied_within: int = 1
    master_bytes: int = 4
    state_bytes: int = 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes per element of an accumulated gradient."""
        return 4 if self.fp32_accumulation else self.weight_bytes

    @property
    def wraps_bf16(self) -> bool:
        """Whether DeepSpeed uses `BF16_Optimizer`: ZeRO-1 in which every rank keeps the whole fp32 gradient."""
        return self.stage == 1 and self.weight_bytes == 2 and self.fp32_accumulation and not self.offload

    @property
    def keeps_local_gradients(self) -> bool:
        """Whether gradients can stay on a rank over several backwards, as of `EngineAdapter`."""
        return self.stage > 0 and not self.wraps_bf16


def read_engine(deepspeed: Mapping[str, Any] | str, bf16: bool = False, fp16: bool = False) -> Engine:
    """Read the settings of a DeepSpeed configuration.

    Args:
        deepspeed: content of the configuration file.
        bf16: value of the trainer's argument, which "auto" in the file means.
        fp16: value of the trainer's argument, which "auto" in the file means.

    Raises:
        ConfigError: `deepspeed` is the name of a file.

    Example:
        >>> engine = read_engine({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
        >>> engine.stage, engine.weight_bytes
        (2, 2)
    """
    if isinstance(deepspeed, str):
        raise ConfigError(f"deepspeed = {deepspeed!r} is a name; give the content of the file, which load_config reads")
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage = {stage!r}; allowed: 0, 1, 2 and 3")
    half = any(
        deepspeed.get(kind, {}).get("enabled") is True
        or (deepspeed.get(kind, {}).get("enabled") == "auto" and argument)
        for kind, argument in (("bf16", bf16), ("fp16", fp16))
    )
    offload = str((zero.get("offload_optimizer") or {}).get("device", "none")) == "cpu"
    accumulation = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    reuse = _number(zero.get("stage3_max_reuse_distance"), 10**9)  # it spans forward and backward: half of it each
    overlap = bool(zero.get("overlap_comm", stage == 3))
    return Engine(
        stage=stage,
        weight_bytes=2 if half else 4,
        fp32_accumulation=half and accumulation == "fp32",
        offload=offload,
        bucket=_number(zero.get("reduce_bucket_size"), 500_000_000),
        buckets=2 if overlap and stage in (1, 2) else 1,
        all_reduces=not zero.get("reduce_scatter", True)
        or (stage < 3 and zero.get("use_multi_rank_bucket_allreduce", True)),
        prefetched=_number(zero.get("stage3_prefetch_bucket_size"), 50_000_000) if stage == 3 else 0,
        retained=reuse // 2 if stage == 3 else 0,
        live=_number(zero.get("stage3_max_live_parameters"), 10**9),
        copied_within=_number(zero.get("zero_hpz_partition_size"), 1) if stage == 3 else 1,
        master_bytes=2 if deepspeed.get("bf16", {}).get("bf16_master_weights_and_grads") else 4,
        state_bytes=2 if deepspeed.get("bf16", {}).get("bf16_optimizer_states") else 4,
    )


def _number(value: Any, default: int) -> int:
    return default if value is None or value == "auto" else int(value)
