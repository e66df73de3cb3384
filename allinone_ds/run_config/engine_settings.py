"""What of a DeepSpeed configuration decides memory and messages of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allinone_ds.errors import ConfigError


@dataclass(frozen=True)
class Engine:
    """What of a DeepSpeed configuration decides memory and messages.

    Attributes:
        stage: ZeRO stage.
        weight_bytes: of one element of the model's weights.
        fp32_accumulation: gradients of 16-bit weights accumulate in float32.
        offload: the optimizer lives in the host's memory.
        bucket: elements of a reduce bucket.
        buckets: how many there are.
        prefetched: elements of weights that ZeRO-3 gathers ahead of their use.
        retained: elements of weights that ZeRO-3 keeps gathered from a forward to its backward.
        task_traces: as of TaskBalancer; a model of at most `retained` elements stays gathered over the whole step.
        all_reduces: gradients go to every rank, not to their owner alone: DeepSpeed's default below ZeRO-3.
    """

    stage: int
    weight_bytes: int = 4
    fp32_accumulation: bool = False
    offload: bool = False
    bucket: int = 500_000_000
    buckets: int = 1
    prefetched: int = 0
    retained: int = 0
    task_traces: bool = True
    all_reduces: bool = True

    @property
    def gradient_bytes(self) -> int:
        """Of one element of an accumulated gradient."""
        return 4 if self.fp32_accumulation else self.weight_bytes

    @property
    def wraps_bf16(self) -> bool:
        """DeepSpeed's `BF16_Optimizer`: ZeRO-1 whose every rank keeps the whole fp32 gradient."""
        return self.stage == 1 and self.weight_bytes == 2 and self.fp32_accumulation and not self.offload

    @property
    def keeps_local_gradients(self) -> bool:
        """Whether gradients can stay on a rank over several backwards, as of `EngineAdapter`."""
        return self.stage > 0 and not self.wraps_bf16


def read_engine(deepspeed: Mapping[str, Any] | str, bf16: bool = False, fp16: bool = False) -> Engine:
    """What of a DeepSpeed configuration counts here.

    Args:
        deepspeed: content of the file.
        bf16: what the trainer's arguments say, for "auto" in the file.
        fp16: likewise.
    """
    if isinstance(deepspeed, str):
        raise ConfigError("deepspeed: give the content of the file; load_config reads it")
    zero = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    half = any(
        deepspeed.get(kind, {}).get("enabled") is True or (deepspeed.get(kind, {}).get("enabled") == "auto" and asked)
        for kind, asked in (("bf16", bf16), ("fp16", fp16))
    )
    offload = str((zero.get("offload_optimizer") or {}).get("device", "none")) == "cpu"
    accumulation = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    live = _number(zero.get("stage3_max_live_parameters"), 10**9)
    reuse = _number(zero.get("stage3_max_reuse_distance"), 10**9)  # there and back: half of it each way
    overlap = bool(zero.get("overlap_comm", stage == 3))
    return Engine(
        stage=stage,
        weight_bytes=2 if half else 4,
        fp32_accumulation=half and accumulation == "fp32",
        offload=offload,
        bucket=_number(zero.get("reduce_bucket_size"), 500_000_000),
        buckets=2 if overlap and stage in (1, 2) else 1,
        all_reduces=stage < 3
        and (zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True)),
        prefetched=_number(zero.get("stage3_prefetch_bucket_size"), 50_000_000) if stage == 3 else 0,
        retained=min(live, reuse // 2) if stage == 3 else 0,
    )


def _number(value: Any, default: int) -> int:
    return default if value is None or value == "auto" else int(value)
