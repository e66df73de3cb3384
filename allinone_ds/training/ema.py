"""Exponential moving average of the weights, sharded like the fp32 master weights of the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from allinone_ds.run_folder.weights import shards_of
from allinone_ds.zero.checkpoint.layout import Segments, read_file
from allinone_ds.zero.checkpoint.reshard import reshard_flats
from allinone_ds.zero.engines.choose import open_engine


class ShardEMA:
    """Exponential moving average of the weights over optimizer steps.

    Each rank averages its shard of the fp32 master weights, which takes S more elements of memory. After step t = 1, 2,
    ... the average is `d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`, so that the initial
    weights soon lose their influence.

        ema = ShardEMA(engine, decay=0.9998)
        for batch in loader:
            ...                     # one optimizer step of the engine
            ema.update()
        with ema.applied():         # on every rank
            evaluate(engine)

    Args:
        engine: the engine that `deepspeed.initialize` returned; the average starts at its weights.
        decay: d, from 0 (the current weights) to below 1.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self._adapter = open_engine(engine)
        self.decay = decay
        self.steps = 0
        self.shards: list[Tensor] = [master.detach().clone() for master in self._adapter.masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights of one more step. Needs no communication."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        masters = [master.detach() for master in self._adapter.masters()]
        torch._foreach_lerp_(self.shards, masters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Return a context in which the weights of the model are the average. Do not train inside it. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.shards, self._adapter.masters(), strict=True):
            weights = master.detach().clone()
            master.data.copy_(average)
            average.copy_(weights)
        self._adapter.publish_masters()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shards of the average. The tensors are not copies: `update` changes them."""
        return {"steps": self.steps, "shards": self.shards}

    @torch.no_grad()
    def load(self, checkpoint: str | Path, segments: Segments | None = None) -> bool:
        """Load the average of a checkpoint.

        Args:
            checkpoint: folder of a checkpoint of any number of ranks and any ZeRO stage that the engine can resume.
            segments: where tensors are that have other names, or other rows, in the checkpoint; the average of the
                others starts at their weights.

        Returns:
            False if the checkpoint holds no average; nothing changes then.
        """
        files = sorted(Path(checkpoint).glob("ema_rank_*_of_*.pt"))
        if not files:
            return False
        saved = [read_file(file) for file in files]
        shards = shards_of(Path(checkpoint))
        if shards is None:  # without ZeRO every rank holds the full average
            for average, loaded in zip(self.shards, saved[0]["shards"], strict=True):
                average.copy_(loaded)
        else:
            reshard_flats(self.engine, shards, [state["shards"] for state in saved], self.shards, segments)
        self.steps = saved[0]["steps"]
        return True


class AverageWeights(TrainerCallback):
    """Creates `trainer.ema`, updates it after each step, and loads it when a run is resumed.

    Args:
        trainer: an AllInOneTrainer with `ema_decay`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ema = self.trainer.ema = ShardEMA(self.trainer.deepspeed, args.ema_decay)
        folder = self.trainer.resumed_from
        changes = self.trainer.changes
        if folder is not None and not ema.load(folder, None if changes is None else changes.segments):
            self.trainer.warn(
                state.global_step,
                f"{folder} holds no average of the weights (ema_decay): the average starts from the current weights",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.ema.update()


def ema_file(folder: Path, rank: int, world_size: int) -> Path:
    """Return the path of a rank's shards of the average in a checkpoint."""
    return folder / f"ema_rank_{rank:05}_of_{world_size:05}.pt"
