"""What a checkpoint of a trainer holds, and how a run goes on from it exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_callback import ExportableState

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.atomic_checkpoint import CheckpointWriter, choose_checkpoint
from allinone_ds.run_folder.atomic_file import atomic_path
from allinone_ds.run_folder.checkpoints import prune
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.run_folder.manifest import read_manifest
from allinone_ds.run_folder.names import CONFIG_FILE, TRAINER_STATE, WEIGHTS_FILE
from allinone_ds.run_folder.weights import shards_of
from allinone_ds.training.ema import ema_file
from allinone_ds.zero.checkpoint.consolidate import trained_weights
from allinone_ds.zero.checkpoint.reshard import load_resharded
from allinone_ds.zero.checkpoint.write import Take, own_checkpoint_files, save_engine
from allinone_ds.zero.params import whole_shape

SCHEDULER_FILE = "scheduler.pt"


def loop_file(rank: int) -> str:
    """Name of a rank's file for what its loop knows between two logs."""
    return f"loop_state_{rank}.pt"


def save_checkpoint(trainer: Any, loop_state: dict[str, Any]) -> None:
    """Write RUN/checkpoint-STEP, whole or not at all, then delete older ones by `save_total_limit`. Collective.

    It holds what `Trainer._save_checkpoint` would have written (but training_args.bin, a pickle), the files of
    `RunCallback`s, `loop_state` of every rank, and the manifest. With a `trainer.saver` the large files are copied
    here and written by its thread, which also publishes the checkpoint.

    Args:
        trainer: an AllInOneTrainer.
        loop_state: what this rank's loop knows, tensors and plain values.

    Raises:
        RunError: a rank could not write this checkpoint, or the one before it in the background; nothing of that
            checkpoint is left, earlier ones are untouched.
    """
    args, state, saver = trainer.args, trainer.state, trainer.saver
    run = Path(args.output_dir)
    take: Take = torch.save
    group = None
    if saver is not None:
        saver.finish()
        take, group = saver.take, saver.group
    trainer.store_flos()
    writer = CheckpointWriter(run, state.global_step, group)
    weights = None if saver is not None else whole_weights(trainer)
    if state.best_global_step:
        best = run / f"checkpoint-{state.best_global_step}"
        if best.exists() or best == writer.target:
            state.best_model_checkpoint = str(best)
    if not args.save_only_model:
        writer.note(*save_engine(trainer.deepspeed, writer.folder, None if saver is None else take))
        with writer.noting("the random state"):
            trainer._save_rng_state(str(writer.folder))
        with writer.noting("the state of the loop"):
            torch.save(loop_state, writer.folder / loop_file(args.process_index))
        if trainer.ema is not None:
            with writer.noting("the averaged weights"):
                take(trainer.ema.state_dict(), ema_file(writer.folder, args.process_index, args.world_size))
    if args.should_save:
        with writer.noting("weights and trainer state"):
            save_weights(weights, writer.folder)
            if not args.save_only_model and not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper):
                torch.save(trainer.lr_scheduler.state_dict(), writer.folder / SCHEDULER_FILE)
            _note_callbacks(trainer)
            state.save_to_json(str(writer.folder / TRAINER_STATE))
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.on_checkpoint(writer.folder)
    stage, best_kept = int(trainer.deepspeed.zero_optimization_stage()), state.best_model_checkpoint

    def publish() -> None:
        writer.publish(zero_stage=stage)
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(writer.target))
        if args.should_save:
            prune(run, args.save_total_limit, best_kept)

    if saver is None:
        publish()
        return
    gathers = stage != 3 or trainer.deepspeed.zero_gather_16bit_weights_on_model_save()
    dtype = next(trainer.deepspeed.module.parameters()).dtype

    def write_and_publish() -> None:
        for path, content in saver.taken:
            with writer.noting(path.name):
                torch.save(content, path)
        writer.agree()
        if args.should_save and gathers:
            # gathering them in the run would hold up the step: they are put together from the files of all ranks
            with writer.noting(WEIGHTS_FILE):
                shards = writer.folder / (writer.folder / "latest").read_text()
                save_weights(trained_weights(shards, dtype), writer.folder)
        publish()

    saver.start(state.global_step, write_and_publish)


def whole_weights(trainer: Any) -> Mapping[str, torch.Tensor] | None:
    """The model's weights on rank 0; None where the DeepSpeed config says not to gather them. Collective."""
    try:
        return trainer.accelerator.get_state_dict(trainer.deepspeed)
    except ValueError:  # ZeRO-3 with stage3_gather_16bit_weights_on_model_save false
        return None


def save_weights(weights: Mapping[str, torch.Tensor] | None, folder: str | Path) -> None:
    """Write model.safetensors, whole or not at all."""
    if weights is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS_FILE) as scratch:
        save_file({name: value.contiguous() for name, value in weights.items()}, scratch, metadata={"format": "pt"})


def _note_callbacks(trainer: Any) -> None:
    """What Trainer does before it saves its state: callbacks that can be resumed put theirs into it."""
    saved = trainer.state.stateful_callbacks
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            if isinstance(saved[name], list):
                saved[name].append(callback.state())
            else:
                saved[name] = callback.state()


def pick_checkpoint(trainer: Any, asked: Any) -> Path | None:
    """The checkpoint to go on from; tells of broken ones that were passed over. Collective.

    Args:
        trainer: an AllInOneTrainer.
        asked: true is the last good one of the run's folder, or a checkpoint's folder.

    Raises:
        ConfigError: there is none that is whole.
    """
    found, warnings = choose_checkpoint(asked, Path(trainer.args.output_dir))
    if found is None:
        return None
    for message in warnings:
        trainer.warn(int(found.name.rpartition("-")[2]), message)
    return found


def best_beside(checkpoint: Path) -> str | None:
    """The best checkpoint that a checkpoint's state names, as it lies beside it; None when there is none.

    The state knows it by the path that it had then, and a run's folder may be moved or copied.
    """
    best = json.loads((checkpoint / TRAINER_STATE).read_text()).get("best_model_checkpoint")
    beside = checkpoint.with_name(Path(best).name) if best else checkpoint
    return str(beside) if best and beside.is_dir() else None


def load_engine(trainer: Any, checkpoint: Path) -> None:
    """Weights, optimizer, loss scale and schedule of a checkpoint, into the engine. Collective.

    A checkpoint of another number of ranks or another ZeRO stage is resharded.

    Raises:
        ConfigError: it cannot be: one of the two is without ZeRO, it is of another model, or its optimizer's state is
            not as large as the weights.
    """
    engine = trainer.deepspeed
    check_model(engine.module, checkpoint)
    own_checkpoint_files(engine)
    written = read_manifest(checkpoint)
    stage, stage_then = int(engine.zero_optimization_stage()), written["zero_stage"]
    if stage == stage_then and (stage == 0 or written["world_size"] == trainer.args.world_size):
        deepspeed_load_checkpoint(engine, str(checkpoint))
    elif 0 in (stage, stage_then):
        raise ConfigError(
            f"{checkpoint} was written with ZeRO stage {stage_then}, this run has stage {stage}: between stage 0 and "
            f"the others nothing can be converted; use a DeepSpeed config of stage {stage_then}"
        )
    else:
        shards = shards_of(checkpoint)
        if shards is None:
            raise ConfigError(f"{checkpoint} holds no ZeRO shards, only weights (save_only_model); give another one")
        try:
            load_resharded(engine, shards)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{checkpoint} cannot be resharded: {error.args[0]}") from error
    asked = trainer.lr_scheduler.state_dict().get("base_lrs")
    trainer._load_optimizer_and_scheduler(str(checkpoint))
    kept = trainer.lr_scheduler.state_dict().get("base_lrs")
    if asked != kept:
        trainer.warn(
            trainer.state.global_step,
            f"learning rates of {checkpoint.name} are kept: their peak is {max(kept):g}, this run asks for "
            f"{max(asked):g}; to begin with other ones use another output_dir and model.start_from={checkpoint}",
        )
    for group, rate in zip(engine.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def check_model(model: torch.nn.Module, checkpoint: Path) -> None:
    """Refuse a checkpoint of another model, as far as its model.safetensors tells.

    Raises:
        ConfigError: names the tasks whose heads differ.
    """
    file = checkpoint / WEIGHTS_FILE
    if not file.is_file():
        return
    with safe_open(file, "pt") as weights:
        there = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    ours: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    here = {name: tuple(whole_shape(ours[name])) for name in model.state_dict()}
    if here == there:
        return
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for side, shapes in enumerate((there, here)):
        for name, shape in shapes.items():
            first, _, rest = name.partition(".")
            part = f"task '{rest.partition('.')[0]}'" if first == "tasks" else f"the {first}"
            parts.setdefault(part, ({}, {}))[side][name] = shape
    words = []
    for part, (then, now) in parts.items():
        if not now:
            words.append(f"{part} is in it, but not in this run")
        elif not then:
            words.append(f"{part} is not in it")
        elif then != now:
            name = min(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            differ = f"{then.get(name, 'absent')} there, {now.get(name, 'absent')} here"
            words.append(f"{part} is another: {name} is {differ}")
    raise ConfigError(
        f"{checkpoint} is of another model: {'; '.join(words)}. A resume goes on with the model that was saved: give "
        f"the configuration it had ({checkpoint / CONFIG_FILE}), or begin a run of its own (another output_dir) with "
        f"model.start_from={checkpoint}, which takes the backbone and the heads that stayed the same"
    )


def read_loop_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """What `save_checkpoint` was given as this rank's `loop_state`; rank 0's for a rank that was not there then."""
    new = not (checkpoint / loop_file(rank)).exists()
    state = torch.load(checkpoint / loop_file(0 if new else rank), map_location="cpu", weights_only=True)
    if new:
        state["logs"]["broken"] = []  # counted on rank 0
    return state
