"""Save a checkpoint of a trainer: everything that a run needs to resume exactly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from safetensors.torch import save_file
from transformers.trainer_callback import ExportableState

from allinone_ds.atomic_file import atomic_path
from allinone_ds.run_folder.atomic_checkpoint import CheckpointWriter
from allinone_ds.run_folder.checkpoints import prune
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.run_folder.names import TRAINER_STATE, WEIGHTS_FILE
from allinone_ds.run_folder.weights import without_ties
from allinone_ds.training.ema import ema_file
from allinone_ds.zero.checkpoint.consolidate import trained_weights
from allinone_ds.zero.checkpoint.write import save_engine

SCHEDULER_FILE = "scheduler.pt"


def loop_file(rank: int) -> str:
    """Return the name of a rank's file for the state of its training loop."""
    return f"loop_state_{rank}.pt"


def save_checkpoint(trainer: Any, loop_state: dict[str, Any]) -> None:
    """Write RUN/checkpoint-STEP atomically, then delete older checkpoints beyond `save_total_limit`. Collective.

    The checkpoint holds the files that `Trainer._save_checkpoint` writes (except training_args.bin, which is a
    pickle), the files of each `RunCallback`, the loop state of every rank and the manifest. With a `trainer.saver` the
    large files are only copied here; its thread writes them and publishes the checkpoint.

    Args:
        trainer: an AllInOneTrainer.
        loop_state: state of this rank's training loop: tensors and plain values.

    Raises:
        RunError: a rank could not write this checkpoint, or the previous one in the background. Nothing of the failed
            checkpoint remains; earlier ones are unchanged.
    """
    saver = trainer.saver
    if saver is not None:
        saver.finish()
    trainer.store_flos()
    trainer.freezing.thaw()
    writer = CheckpointWriter(Path(trainer.args.output_dir), trainer.state.global_step, saver and saver.group)
    weights = None if saver is not None else gathered_weights(trainer)
    _locate_best(trainer.state, writer.target)
    if not trainer.args.save_only_model:
        _write_rank_state(trainer, writer, loop_state)
    if trainer.args.should_save:
        _write_shared_state(trainer, writer, weights)
    publish = partial(
        _publish, trainer, writer, trainer.deepspeed.zero_optimization_stage(), trainer.state.best_model_checkpoint
    )
    if saver is None:
        publish()
    else:
        saver.start(trainer.state.global_step, partial(_write_staged, trainer, writer, publish))


def _locate_best(state: Any, target: Path) -> None:
    """Set the path of the best checkpoint, if it exists or is the one that is being written."""
    if state.best_global_step:
        best = target.with_name(f"checkpoint-{state.best_global_step}")
        if best.exists() or best == target:
            state.best_model_checkpoint = str(best)


def _write_rank_state(trainer: Any, writer: CheckpointWriter, loop_state: dict[str, Any]) -> None:
    """Write what every rank saves: engine shards, random state, loop state and averaged weights. Collective."""
    args, saver = trainer.args, trainer.saver
    writer.record(*save_engine(trainer.deepspeed, writer.folder, saver and saver.stage))
    with writer.recording("the random state"):
        trainer._save_rng_state(str(writer.folder))
    with writer.recording("the state of the training loop"):
        torch.save(loop_state, writer.folder / loop_file(args.process_index))
    if trainer.ema is not None:
        write = torch.save if saver is None else saver.stage
        with writer.recording("the averaged weights"):
            write(trainer.ema.state_dict(), ema_file(writer.folder, args.process_index, args.world_size))


def _write_shared_state(trainer: Any, writer: CheckpointWriter, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Write what only rank 0 saves: weights, scheduler, Trainer's state and the files of callbacks."""
    with writer.recording("weights and trainer state"):
        save_weights(weights, writer.folder)
        if not trainer.args.save_only_model and not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(trainer.lr_scheduler.state_dict(), writer.folder / SCHEDULER_FILE)
        _store_callback_states(trainer)
        trainer.state.save_to_json(str(writer.folder / TRAINER_STATE))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RunCallback):
                callback.on_checkpoint(writer.folder)


def _publish(trainer: Any, writer: CheckpointWriter, zero_stage: int, best: str | None) -> None:
    args = trainer.args
    writer.publish(zero_stage=int(zero_stage))
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(writer.target))
    if args.should_save:
        prune(writer.run, args.save_total_limit, best)


def _write_staged(trainer: Any, writer: CheckpointWriter, publish: partial[None]) -> None:
    """Write what the saver has copied, and publish the checkpoint. Runs in the saver's thread of every rank."""
    for path, content in trainer.saver.staged:
        with writer.recording(path.name):
            torch.save(content, path)
    writer.raise_recorded()
    engine = trainer.deepspeed
    gathers = engine.zero_optimization_stage() != 3 or engine.zero_gather_16bit_weights_on_model_save()
    if trainer.args.should_save and gathers:
        # gathering the weights would block the step; they are read back from the shards of all ranks instead
        with writer.recording(WEIGHTS_FILE):
            shards = writer.folder / (writer.folder / "latest").read_text()
            save_weights(trained_weights(shards, next(engine.module.parameters()).dtype), writer.folder)
    publish()


def gathered_weights(trainer: Any) -> Mapping[str, torch.Tensor] | None:
    """Return the full weights of the model on rank 0; None if the DeepSpeed config disables it. Collective."""
    try:
        return trainer.accelerator.get_state_dict(trainer.deepspeed)
    except ValueError:  # ZeRO-3 with stage3_gather_16bit_weights_on_model_save = false
        return None


def save_weights(weights: Mapping[str, torch.Tensor] | None, folder: str | Path) -> None:
    """Write model.safetensors atomically; do nothing if `weights` is None."""
    if weights is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(without_ties(weights), temporary, metadata={"format": "pt"})


def _store_callback_states(trainer: Any) -> None:
    """Store the state of resumable callbacks in Trainer's state, as `Trainer._save_checkpoint` does."""
    saved = trainer.state.stateful_callbacks
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            if isinstance(saved[name], list):
                saved[name].append(callback.state())
            else:
                saved[name] = callback.state()
