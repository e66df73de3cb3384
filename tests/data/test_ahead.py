"""Batches are copied to the device one ahead of the model."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from allinone_ds.data.loading import ahead as module
from allinone_ds.data.loading.ahead import ahead


def test_on_the_cpu_batches_come_when_they_are_asked_for() -> None:
    read: list[int] = []
    batches = ahead(({"x": torch.tensor(k)} for k in range(3) if not read.append(k)), torch.device("cpu"))
    assert int(next(batches)["x"]) == 0 and read == [0]
    assert [int(batch["x"]) for batch in batches] == [1, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_on_a_gpu_the_next_copy_starts_before_the_model_gets_a_batch(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    done: list[str] = []

    class OnGpu(torch.Tensor):
        def record_stream(self, stream):
            done.append(f"{int(self)} is kept for {stream.name}")

    current = SimpleNamespace(name="the model", wait_stream=lambda stream: done.append(f"wait for {stream.name}"))
    copies = SimpleNamespace(name="copies")

    def copy(batch, device):
        done.append(f"copy {int(batch['x'])}")
        return {"x": [batch["x"].as_subclass(OnGpu)]}

    monkeypatch.setattr(module, "to_device", copy)
    monkeypatch.setattr(module, "_copy_stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    for batch in ahead([{"x": torch.tensor(k)} for k in range(count)], torch.device("cuda")):
        done.append(f"use {int(batch['x'][0])}")
    order = [line for line in done if line.startswith(("copy", "use"))]
    assert order == {0: [], 1: ["copy 0", "use 0"],
                     3: ["copy 0", "copy 1", "use 0", "copy 2", "use 1", "use 2"]}[count]  # fmt: skip
    for k in range(count):
        at = done.index(f"use {k}")
        assert done[at - 2 : at] == ["wait for copies", f"{k} is kept for the model"]
