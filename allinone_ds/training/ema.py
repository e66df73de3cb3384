"""An exponential moving average of the weights, kept in shards like the optimizer's own copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from allinone_ds.run_folder.weights import shards_of
from allinone_ds.zero.checkpoint.reshard import reshard_flats
from allinone_ds.zero.engines.choose import open_engine


class ShardEMA:
    """Average of the weights over optimizer steps: each rank averages its shard of the fp32 masters, S elements more.

    After step t (from 1 on) average = d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)), so
    that the first weights are soon forgotten.

    Args:
        engine: what `deepspeed.initialize` returned; the average starts from its weights.
        decay: d, from 0 (the weights themselves) to below 1.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self._adapter = open_engine(engine)
        self.decay = decay
        self.steps = 0
        self.shards: list[Tensor] = [master.detach().clone() for master in self._adapter.masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step into the average; local to this rank."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        masters = [master.detach() for master in self._adapter.masters()]
        torch._foreach_lerp_(self.shards, masters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model's weights are the average; every rank must enter it. Train not in there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, master in zip(self.shards, self._adapter.masters(), strict=True):
            kept = master.detach().clone()
            master.data.copy_(mine)
            mine.copy_(kept)
        self._adapter.publish_masters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the average, for `ema_file`; its tensors are the ones that `update` changes."""
        return {"steps": self.steps, "shards": self.shards}

    @torch.no_grad()
    def load(self, checkpoint: str | Path) -> bool:
        """Go on from a checkpoint's average; False, and nothing changes, when it has none.

        Args:
            checkpoint: of any number of ranks and any ZeRO stage that the engine itself can go on from.
        """
        files = sorted(Path(checkpoint).glob("ema_rank_*_of_*.pt"))
        if not files:
            return False
        written = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        shards = shards_of(Path(checkpoint))
        if shards is None:  # without ZeRO every rank keeps the whole average
            for mine, saved in zip(self.shards, written[0]["shards"], strict=True):
                mine.copy_(saved)
        else:
            reshard_flats(self.engine, shards, [state["shards"] for state in written], self.shards)
        self.steps = written[0]["steps"]
        return True


class AverageWeights(TrainerCallback):
    """Keeps `trainer.ema` up to date over a run, and goes on from a checkpoint's.

    Args:
        trainer: an AllInOneTrainer whose `ema_decay` is set.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ema = self.trainer.ema = ShardEMA(self.trainer.deepspeed, args.ema_decay)
        folder = self.trainer.resumed_from
        if folder is not None and not ema.load(folder):
            self.trainer.warn(
                state.global_step, f"{folder} holds no average of the weights (ema_decay): it begins anew from them"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.ema.update()


def ema_file(folder: Path, rank: int, world_size: int) -> Path:
    """Where a rank's part of the average lies in a checkpoint."""
    return folder / f"ema_rank_{rank:05}_of_{world_size:05}.pt"
