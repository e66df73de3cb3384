"""The choice of the adapter that serves an engine."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.bf16 import BF16Adapter
from allinone_ds.zero.engines.stage0 import FusedHalfAdapter, Stage0Adapter, UnfusedHalfAdapter
from allinone_ds.zero.engines.stage3 import Stage3Adapter, Stage3OffloadAdapter
from allinone_ds.zero.engines.stage12 import Stage2FlatOffloadAdapter, Stage12Adapter, Stage12OffloadAdapter

ADAPTERS: tuple[type[EngineAdapter], ...] = (
    BF16Adapter, Stage3OffloadAdapter, Stage3Adapter, Stage2FlatOffloadAdapter, Stage12OffloadAdapter,
    Stage12Adapter, FusedHalfAdapter, UnfusedHalfAdapter, Stage0Adapter,
)  # fmt: skip
"""The first adapter that serves an engine is taken."""


def adapter_class(engine: Any) -> type[EngineAdapter] | None:
    """Return the adapter class that serves an engine; None when no class does."""
    return next((adapter for adapter in ADAPTERS if adapter.serves(engine)), None)


def open_engine(engine: Any, shared: AbstractSet[int] = frozenset()) -> EngineAdapter:
    """Return the adapter of an engine.

    Args:
        engine: what `deepspeed.initialize` returned.
        shared: `id` of every parameter of the shared backbone; empty where only weights are of interest.

    Raises:
        UnsupportedEngine: no adapter serves the engine.
    """
    adapter = adapter_class(engine)
    if adapter is None:
        raise UnsupportedEngine(
            f"the engine's optimizer is {type(engine.optimizer).__name__}; served are ZeRO stages 0 to 3 of DeepSpeed"
        )
    return adapter(engine, shared)
