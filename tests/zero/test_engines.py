"""Pieces of a rank's shard, and the order of what an engine does on several streams."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.choose import ADAPTERS
from allinone_ds.zero.engines.pieces import Span, merge_spans
from allinone_ds.zero.engines.stage3 import Stage3Adapter
from allinone_ds.zero.params import move_buffers
from allinone_ds.zero.support import config_problems


def test_pieces_cover_every_group_including_one_of_padding_only() -> None:
    backbone, head = (torch.nn.Parameter(torch.zeros(6)) for _ in range(2))
    spans = [Span(backbone, 0, 0, 6), Span(head, 0, 6, 3), Span(head, 2, 0, 3)]
    pieces = merge_spans(spans, [10, 4, 3], {id(backbone)})
    assert [(p.group, p.start, p.length, p.shared) for p in pieces] == [
        (0, 0, 6, True), (0, 6, 4, False), (1, 0, 4, False), (2, 0, 3, False),
    ]  # fmt: skip


def test_every_engine_waits_for_its_reductions_before_it_drops_gradients() -> None:
    """After a backward that raised they still run on other streams."""
    done: list[str] = []
    EngineAdapter.discard(
        SimpleNamespace(synchronize=lambda: done.append("wait"), _discard=lambda: done.append("drop"))
    )
    assert done == ["wait", "drop"]
    assert all(adapter.discard is EngineAdapter.discard for adapter in ADAPTERS)


def zero3(**attributes) -> Any:
    adapter = object.__new__(Stage3Adapter)
    adapter.optimizer = SimpleNamespace(**attributes)
    return adapter


def test_zero3_looks_for_an_overflow_after_it_was_written() -> None:
    """On a stream of its own."""
    buffer = torch.zeros(3)
    seen: list[float] = []
    stream = SimpleNamespace(wait_stream=lambda _: seen.append(float(buffer[0])))
    zero3(grad_partitions_flat_buffer=buffer, reduce_and_partition_stream=stream)._show_overflow(True)
    assert seen == [float("inf")]
    zero3(grad_partitions_flat_buffer=buffer, reduce_and_partition_stream=None)._show_overflow(False)


def test_zero3_gathers_changed_weights_in_order_and_no_copies_of_the_old() -> None:
    """The stream that gathers waits for the one that has changed them; the host does not."""
    done: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda _: done.append("wait"))
    adapter = zero3(parameter_offload=SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=stream))
    module = torch.nn.Linear(1, 1)
    module.weight.ds_secondary_tensor = torch.zeros(1)  # a copy within a host
    adapter.engine = SimpleNamespace(module=module)
    adapter._partitions_changed([module.weight])  # none is gathered
    assert done == ["wait"] and module.weight.ds_secondary_tensor is None


def test_buffers_move_and_parameters_stay() -> None:
    """Under ZeRO-3 parameters are on the accelerator already, and DeepSpeed leaves the buffers on the CPU."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Module())
    model[2].register_buffer("none", None)
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {param.device.type for param in model.parameters()} == {"cpu"}


def test_a_partial_offload_is_refused() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    assert "offload_optimizer.ratio below 1" in config_problems({"zero_optimization": zero})[0]
    assert config_problems({"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}) == []
