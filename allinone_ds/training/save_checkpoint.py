"""Save a checkpoint of a trainer: everything that a run needs to resume exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from safetensors.torch import save_file
from transformers.trainer_callback import ExportableState

from allinone_ds.atomic_file import atomic_path
from allinone_ds.distributed import broadcast_object, rank
from allinone_ds.run_folder.atomic_checkpoint import CheckpointWriter
from allinone_ds.run_folder.checkpoints import prune
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.run_folder.manifest import file_entry
from allinone_ds.run_folder.names import FROZEN_ENTRY, FROZEN_FILE, TRAINER_STATE, WEIGHTS_FILE
from allinone_ds.run_folder.weights import frozen_file, without_ties
from allinone_ds.training.ema import ema_file
from allinone_ds.zero.checkpoint.consolidate import trained_weights
from allinone_ds.zero.checkpoint.write import save_engine
from allinone_ds.zero.params import whole_on_rank_0

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
    frozen = None if trainer.args.save_frozen else frozen_entry(trainer, writer)
    if frozen is not None and weights is not None:
        weights = {name: value for name, value in weights.items() if name not in frozen_parameters(trainer)}
    _locate_best(trainer.state, writer.target)
    if not trainer.args.save_only_model:
        _write_rank_state(trainer, writer, loop_state, frozen is None)
    if trainer.args.should_save:
        if frozen is not None:
            with writer.recording(FROZEN_ENTRY):
                (writer.folder / FROZEN_ENTRY).write_text(json.dumps(frozen))
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


def frozen_parameters(trainer: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of the model that no step changes, by name."""
    return {name: p for name, p in trainer.deepspeed.module.named_parameters() if not p.requires_grad}


@torch.no_grad()
def frozen_entry(trainer: Any, writer: CheckpointWriter) -> dict[str, Any] | None:
    """Return size and checksum of RUN/frozen.safetensors, written before the first checkpoint. Collective.

    Where earlier checkpoints of the run need that file with other names, as of a base without adapters, it is
    RUN/frozen-2.safetensors, which the entry names.

    Args:
        trainer: an AllInOneTrainer.
        writer: of the checkpoint.

    Returns:
        None if no parameter is frozen.
    """
    frozen = frozen_parameters(trainer)
    if frozen and not trainer.frozen_entry:
        weights = {}
        for name, parameter in frozen.items():
            with whole_on_rank_0(parameter):
                if rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        if rank() == 0:
            with writer.recording(FROZEN_FILE):
                file = frozen_file(writer.run, weights.keys())
                with atomic_path(file) as temporary:
                    save_file(without_ties(weights), temporary, metadata={"format": "pt"})
                named = {} if file.name == FROZEN_FILE else {"file": file.name}
                trainer.frozen_entry = {**file_entry(file), **named}
        trainer.frozen_entry = broadcast_object(trainer.frozen_entry)
    return trainer.frozen_entry if frozen else None


def _write_rank_state(trainer: Any, writer: CheckpointWriter, loop_state: dict[str, Any], frozen: bool) -> None:
    """Write what every rank saves: engine shards, random state, loop state and averaged weights. Collective."""
    args, saver = trainer.args, trainer.saver
    writer.record(*save_engine(trainer.deepspeed, writer.folder, saver and saver.stage, frozen))
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
