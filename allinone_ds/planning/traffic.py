"""Bytes that one GPU sends in an optimizer step, by purpose."""

from __future__ import annotations

from collections.abc import Mapping

from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.planning.memory import Passes, Sizes, kept_elements
from allinone_ds.run_config.engine_settings import Engine


def moved_parts(
    engine: Engine, sizes: Sizes, gpus: int, norm: str, sketch: int, groups: TaskGroups | None = None
) -> dict[str, int]:
    """Return the bytes that one GPU sends in an optimizer step, by purpose; on average, where tasks are sampled.

    In a ring of R ranks a reduce-scatter or an all-gather sends (R - 1) / R of the elements, an all-reduce twice that.
    What all GPUs of a node send to other nodes is as much as one GPU sends, as one link of the ring leaves the node,
    but for what is gathered within nodes (`between_nodes`).

    Args:
        engine: settings of the engine.
        sizes: sizes of the model.
        gpus: number of ranks R.
        norm: "exact", "sketch", "delayed" or "features"; "plain" is DeepSpeed's accumulation of the same micro-steps
            without a balancer.
        sketch: elements of a sketch.
        groups: ranks of each task; None: every rank runs every task. The result is that of the GPU that sends most.
    """
    sent = (gpus - 1) / gpus
    w, P = engine.weight_bytes, sizes.trained
    of_task = {name: sizes.backbone + sizes.of_heads([name]) for name in sizes.heads}
    reduced: float
    every = [(passes, elements) for passes in sizes.passes for elements in passes.backwards]
    if groups or norm in ("sketch", "delayed") or (norm in ("plain", "features") and engine.stage < 2):
        reduced = P  # once per step
    elif engine.stage == 0 or engine.wraps_bf16:  # DeepSpeed reduces zeros for the other heads
        reduced = P * sum(p.chance * (p.micro_steps if p.joint else 1) for p, _ in every)
    else:
        reduced = sum(p.chance * n * (p.micro_steps if p.joint or engine.stage > 1 else 1) for p, n in every)
    factor = 2 if engine.stage == 0 or engine.wraps_bf16 or engine.all_reduces else 1
    moved = {"gradients": round(sent * factor * reduced * w)}
    if engine.stage in (1, 2):
        moved["new weights"] = round(sent * P * w)
    if engine.stage == 3:
        moved |= _weights(engine, sizes, gpus, norm)
    chance = {name: sizes.chance.get(name, 1.0) for name in of_task}
    message = {"plain": 0, "exact": 3 * 8}.get(norm, (2 * sketch + 1) * 4) * sum(chance.values())
    if norm == "features":  # the norm and the loss of each micro-step
        message = 2 * 8 * sum(chance[name] * count for name, count in sizes.micro_steps.items())
    moved["norms"] = round(sent * 2 * message)
    if groups and norm == "exact":  # a reduce-scatter in float32 within each task's group
        within = {task: (len(ranks) - 1) / len(ranks) * 4 * of_task[task] for task, ranks in groups.ranks.items()}
        moved["norms"] += round(max(sum(within[task] for task in groups.of(rank)) for rank in range(gpus)))
    return moved


def _weights(engine: Engine, sizes: Sizes, gpus: int, norm: str) -> dict[str, int]:
    """Return the bytes of the weights that one GPU sends for the forwards and backwards of a ZeRO-3 step.

    Weights that are kept are gathered once per step. The others are gathered for the forward of every micro-step, and
    for its backward where they were released in between. With copies within nodes, the first gather in a step of what
    is trained comes from all GPUs, and every other one from the node.
    """
    kept = kept_elements(engine, sizes, norm)
    gathered = kept + sizes.trained_in_step - sizes.trained if kept == sizes.whole else kept
    if kept < sizes.whole:
        gathered += sum(_gathers(engine, sizes, p, kept) * p.micro_steps * p.chance for p in sizes.passes)
    w, within = engine.weight_bytes, min(engine.copied_within, gpus)
    if within == 1:
        return {"weights": round((gpus - 1) / gpus * gathered * w)}
    first = min(gathered, sizes.trained_in_step)
    inside = round((within - 1) / within * (gathered - first) * w)
    return {"weights": round((gpus - 1) / gpus * first * w), "weights within a node": inside}


def _gathers(engine: Engine, sizes: Sizes, passes: Passes, kept: int) -> int:
    """Return the elements of weights that ZeRO-3 gathers in one micro-step; a backward releases what it used."""
    stays = max(engine.retained, kept + min(passes.forward - sizes.backbone, engine.retained))
    first, *others = (elements + sizes.frozen - sizes.frozen_below for elements in passes.backwards)
    return passes.forward + sizes.frozen - kept + max(first - stays, 0) + sum(max(n - kept, 0) for n in others)


def between_nodes(moved: Mapping[str, int], gpus: int, per_node: int, within: int) -> int:
    """Return the bytes that the GPUs of one node together send to other nodes in an optimizer step.

    Args:
        moved: what `moved_parts` returned.
        gpus: number of ranks R.
        per_node: GPUs of a node.
        within: GPUs that share a copy of the weights; more than `per_node` are no longer within a node.

    Example:
        >>> between_nodes({"gradients": 30, "weights": 10, "weights within a node": 50}, 64, 8, 8)
        40
    """
    if gpus <= per_node:
        return 0
    stays = moved.get("weights within a node", 0) if within <= per_node else 0
    return sum(moved.values()) - stays
