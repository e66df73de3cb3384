"""Part `waits`: where the host waits for the device in a balanced step and in one micro-step of every head."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.part import Run
from benchmarks.gpu.vit import Vit, middle

OWNERS = ("allinone_ds", "deepspeed", "transformers", "torchvision", "scipy", "torch")
"""Packages of the stack; a wait belongs to the first of them, from the inside, other than torch."""


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per place that waits."""
    from benchmarks.gpu.heads import first_batches, open_heads

    run.join()
    steps = ((2, "exact"), (3, "exact"), (2, "sketch"), (2, "delayed"))
    for stage, norm in steps[: run.pick(4, 1)]:
        vit = Vit(run, middle(run), run.pick(224, 32), run.pick(8, 2), stage, norm)
        vit.open()
        for _ in range(3):
            vit.step()
        yield from rows(f"step, ZeRO-{stage}, {norm}", waits_of(run, vit.step))
        vit.close()
    for name, model, task in open_heads(run, first_batches(run)):
        batch = task.batch(run.device)
        model(task=task.name, **batch).loss.backward()

        def micro_step(model: Any = model, batch: Any = batch, task: Any = task) -> None:
            model(task=task.name, **batch).loss.backward()

        yield from rows(f"micro-step, {name}", waits_of(run, micro_step))


def rows(where: str, found: Counter[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield one row per place, ours first, and one that counts them."""
    ours = sum(count for (owner, _), count in found.items() if owner == "allinone_ds")
    yield {"where": where, "ours": ours, "all": sum(found.values())}
    for (owner, place), count in sorted(found.items(), key=lambda item: (item[0][0] != "allinone_ds", -item[1])):
        yield {"where": where, "owner": owner, "place": place, "count": count}


def waits_of(run: Run, call: Any) -> Counter[tuple[str, str]]:
    """Return (package, file:line) -> how often it waits in a call; empty in a trial, as the CPU waits nowhere."""
    found: Counter[tuple[str, str]] = Counter()
    with _waits_shown(run, found):
        call()
    return found


@contextlib.contextmanager
def _waits_shown(run: Run, found: Counter[tuple[str, str]]) -> Iterator[None]:
    if not run.on_gpu:
        yield
        return
    show = warnings.showwarning
    with contextlib.ExitStack() as restore:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):  # CUDA's debug mode does not see these
            restore.enter_context(_counted(owner, found))
        torch.cuda.set_sync_debug_mode("warn")
        restore.callback(torch.cuda.set_sync_debug_mode, "default")
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: found.update([_place()] * ("synchronizing" in str(message)))
        restore.callback(setattr, warnings, "showwarning", show)
        yield


@contextlib.contextmanager
def _counted(owner: Any, found: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count the calls of `synchronize` of a module or class inside this block."""
    original = owner.synchronize

    def synchronize(*arguments: Any) -> None:
        found[_place()] += 1
        original(*arguments)

    owner.synchronize = synchronize
    try:
        yield
    finally:
        owner.synchronize = original


def _place() -> tuple[str, str]:
    """Return the package and the line that the running call belongs to."""
    frame, inner = sys._getframe(2), ("", "")
    while frame is not None:
        file = frame.f_code.co_filename
        for owner in OWNERS:
            if f"/{owner}/" in file:
                place = owner, f"{file[file.rindex(f'/{owner}/') + 1 :]}:{frame.f_lineno}"
                if owner != "torch":
                    return place
                inner = inner if inner[0] else place
        frame = frame.f_back  # type: ignore[assignment]
    return inner
