"""Settings of ZeRO-3 under which less is sent between nodes, and what they take of a GPU's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from allinone_ds.planning.memory import Sizes, kept_elements
from allinone_ds.planning.traffic import between_nodes
from allinone_ds.run_config.engine_settings import Engine

_SHARES = (0.25, 0.5, 1.0)
"""Shares of the model that are tried as weights that stay gathered."""
_ROOM = 0.9
"""Share of a GPU's memory that a recommended plan may fill."""


@dataclass(frozen=True)
class Saving:
    """Memory and traffic of a run with other keys of `zero_optimization`.

    Attributes:
        keys: keys and values; none for the run as it is.
        within: GPUs that share a copy of the weights; 1: no copies.
        kept: elements of weights that stay gathered over a step.
        memory: bytes on the GPU.
        moved: bytes that a GPU sends in an optimizer step.
        between: bytes of them that a node sends to other nodes.
        recommended: whether it sends the least of all that fit.
    """

    keys: Mapping[str, int]
    within: int
    kept: int
    memory: int
    moved: int
    between: int
    recommended: bool = False


def traffic_savings(
    engine: Engine,
    sizes: Sizes,
    norm: str,
    gpus: int,
    per_node: int,
    gpu_memory: int,
    cost: Callable[[Engine], tuple[int, Mapping[str, int]]],
) -> list[Saving]:
    """Return the run as it is and with other keys of ZeRO-3; none for other stages.

    Of those that fit, the one is recommended that sends the least between nodes, or on one node in all; among equals
    (within 1 %) the one with the least memory.

    Args:
        engine: settings of the engine.
        sizes: sizes of the model.
        norm: "exact", "sketch", "delayed" or "features".
        gpus: number of ranks R.
        per_node: GPUs of a node.
        gpu_memory: bytes of a GPU's memory.
        cost: engine -> (bytes of memory, bytes sent by purpose).
    """
    if engine.stage < 3:
        return []

    def saving(keys: dict[str, Any], changed: Engine) -> Saving:
        memory, moved = cost(changed)
        between = between_nodes(moved, gpus, per_node, changed.copied_within)
        kept = kept_elements(changed, sizes, norm)
        return Saving(keys, changed.copied_within, kept, memory, sum(moved.values()), between)

    found = [saving({}, engine)]
    copied = gpus > per_node > 1 and gpus % per_node == 0 and engine.copied_within != per_node
    within = [(engine.copied_within, {}), *([(per_node, {"zero_hpz_partition_size": per_node})] if copied else [])]
    for ranks, keys in within:
        if keys:
            found.append(saving(keys, dataclasses.replace(engine, copied_within=ranks)))
        for share in _SHARES if engine.task_traces else ():
            kept = -(-round(sizes.whole * share) // 10**6) * 10**6
            live = kept + (2 * engine.prefetched if share < 1 else 0)  # room for prefetches
            if kept <= kept_elements(engine, sizes, norm) or (kept >= sizes.whole and keys):
                continue  # nothing new, or copies that nobody reads
            limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": 2 * kept}
            changed = dataclasses.replace(engine, copied_within=ranks, live=live, retained=kept)
            found.append(saving({**keys, **limits}, changed))
    sent = [row.between if gpus > per_node else row.moved for row in found]
    fits = [k for k, row in enumerate(found) if row.memory <= _ROOM * gpu_memory]
    if fits:
        least = min(sent[k] for k in fits)
        best = min((k for k in fits if sent[k] <= 1.01 * least), key=lambda k: found[k].memory)
        found[best] = dataclasses.replace(found[best], recommended=True)
    return found
