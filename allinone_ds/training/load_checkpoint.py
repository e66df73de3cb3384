"""Load a checkpoint into a trainer, also one of a different number of ranks or ZeRO stage."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from allinone_ds.balance.renaming import by_new_name
from allinone_ds.distributed import rank
from allinone_ds.errors import ConfigError
from allinone_ds.models.lora import name_without_lora, task_of
from allinone_ds.run_folder.manifest import read_manifest
from allinone_ds.run_folder.names import CONFIG_FILE, MODEL_FILE, TRAINER_STATE, WEIGHTS_FILE
from allinone_ds.run_folder.weights import SavedWeights, frozen_files, shards_of
from allinone_ds.training.optimizer import continue_schedule, group_settings
from allinone_ds.training.save_checkpoint import loop_file
from allinone_ds.training.start.changed_tasks import Continues, SavedTasks, TaskChanges, task_changes
from allinone_ds.zero.checkpoint.layout import Segments, frozen_shapes, read_file, trained_shapes
from allinone_ds.zero.checkpoint.reshard import copy_segments, load_resharded, same_place
from allinone_ds.zero.checkpoint.whole import load_whole
from allinone_ds.zero.checkpoint.write import own_checkpoint_files
from allinone_ds.zero.params import forget_copies, is_partitioned, whole_on_rank_0, whole_shape


def best_checkpoint(checkpoint: Path) -> str | None:
    """Return the best checkpoint of a run, which the state of a later checkpoint names; None if there is none.

    The state holds the path at the time of the save. The folder of the run may have been moved or copied since, so
    the best checkpoint is looked for beside `checkpoint`.
    """
    saved = json.loads((checkpoint / TRAINER_STATE).read_text()).get("best_model_checkpoint")
    best = checkpoint.with_name(Path(saved).name) if saved else None
    return str(best) if best and best.is_dir() else None


def load_engine(trainer: Any, checkpoint: Path, resume: bool = True) -> None:
    """Load weights, optimizer state and loss scale into the engine, and continue its schedule. Collective.

    A checkpoint of a different number of ranks or a different ZeRO stage is resharded.

    Args:
        trainer: an AllInOneTrainer with an engine.
        checkpoint: folder of the checkpoint.
        resume: whether training continues; False: only the weights are needed.

    Raises:
        ConfigError: the checkpoint cannot be resharded: only one of the two is without ZeRO, the models differ, or the
            optimizer's state does not have the shape of the weights.
    """
    engine = trainer.deepspeed
    trainer.freezing.thaw()
    settings = group_settings(engine.optimizer)
    changes = trainer.changes if resume else None
    if changes is None:
        check_model(engine.module, checkpoint)
    own_checkpoint_files(engine)
    manifest = read_manifest(checkpoint)
    stage, saved_stage = int(engine.zero_optimization_stage()), manifest["zero_stage"]
    if changes is None and stage == saved_stage and (stage == 0 or manifest["world_size"] == trainer.args.world_size):
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=not frozen_files(checkpoint))
        forget_copies(engine)
    elif changes is not None and stage == saved_stage == 0:
        folder = checkpoint / (checkpoint / "latest").read_text().strip()
        load_whole(engine, folder, changes.parameters or (), changes.segments)
    elif 0 in (stage, saved_stage):
        raise ConfigError(
            f"{checkpoint} was saved with ZeRO stage {saved_stage}, this run uses stage {stage}: checkpoints "
            f"cannot be converted between stage 0 and the other stages; use a DeepSpeed config of stage {saved_stage}"
        )
    else:
        shards = shards_of(checkpoint)
        if shards is None:
            raise ConfigError(f"{checkpoint} holds no ZeRO shards; choose a different checkpoint")
        try:
            load_resharded(engine, shards, None if changes is None else changes.segments)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{checkpoint} cannot be resharded: {error.args[0]}") from error
    _load_frozen(engine.module, checkpoint, {} if changes is None else changes.segments)
    if resume:
        continue_schedule(trainer, checkpoint, settings)


@torch.no_grad()
def _load_frozen(module: torch.nn.Module, checkpoint: Path, segments: Segments) -> None:
    """Load the frozen weights that a checkpoint does not hold, from the file beside it. Collective."""
    saved = SavedWeights(*frozen_files(checkpoint))
    for name, parameter in module.named_parameters() if saved else ():
        if not parameter.requires_grad:
            with whole_on_rank_0(parameter):
                if rank() == 0 or not is_partitioned(parameter):
                    copy_segments(parameter, saved, segments.get(name, same_place(name, parameter)))


def check_resumable(checkpoint: Path) -> None:
    """Refuse a checkpoint that holds only weights.

    Raises:
        ConfigError: says what to do instead.
    """
    if not (checkpoint / "latest").is_file():
        raise ConfigError(
            f"{checkpoint} holds only weights (trainer.save_only_model), from which training cannot resume; choose a "
            f"different checkpoint, or start a new run with a different output_dir and model.start_from={checkpoint}"
        )


def check_model(model: torch.nn.Module, checkpoint: Path) -> None:
    """Refuse a checkpoint of a different model, as its model.safetensors or its ZeRO shards show.

    Args:
        model: the model of the run; it may be on the meta device.
        checkpoint: folder of the checkpoint.

    Raises:
        ConfigError: names the tasks whose heads differ.
    """
    shapes = _shapes(model, checkpoint)
    if shapes is not None:
        _refuse_difference(shapes, checkpoint)


def changes_since(model: Any, checkpoint: Path, continues: Continues) -> TaskChanges | None:
    """Return how the tasks of a run differ from those of a checkpoint that it resumes; None: they do not.

    Args:
        model: the AllInOneModel of the run; it may be on the meta device.
        checkpoint: folder of the checkpoint.
        continues: task -> the task of the checkpoint with which it goes on, or False.

    Raises:
        ConfigError: the backbones differ, or see `task_changes`.
    """
    shapes = _shapes(model, checkpoint)
    if shapes is None:
        return None
    _refuse_difference(shapes.without_tasks(), checkpoint)
    changes = task_changes(
        model.tasks, shapes.own, shapes.saved, _saved_tasks(checkpoint, model), continues, checkpoint
    )
    if changes is None:
        _refuse_difference(shapes, checkpoint)
        return None
    changes = replace(changes, parameters=read_file(checkpoint / loop_file(0)).get("parameters"))
    if read_manifest(checkpoint)["zero_stage"] == 0 and changes.parameters is None:
        raise ConfigError(
            f"{checkpoint} was saved with ZeRO stage 0 in 16 bit, or by an earlier release; a run with other tasks "
            f"cannot resume from it ({'; '.join(changes.lines)}): use the same tasks, or start a new run with a "
            f"different output_dir and model.start_from={checkpoint}"
        )
    return changes


@dataclass(frozen=True)
class _Shapes:
    """Shapes of the tensors of a model and of a checkpoint, as far as the checkpoint knows them."""

    own: dict[str, tuple[int, ...]]
    saved: dict[str, tuple[int, ...]]
    trained: set[str]
    saved_trained: set[str] | None

    def without_tasks(self) -> _Shapes:
        """What all tasks share; names do not show where a task has adapters of its own beside it."""

        def rest(names: Any) -> Any:
            kept = {name: name_without_lora(name) for name in names if task_of(name) is None}
            return {new: names[old] for old, new in kept.items()} if isinstance(names, dict) else set(kept.values())

        trained = None if self.saved_trained is None else rest(self.saved_trained)
        return _Shapes(rest(self.own), rest(self.saved), rest(self.trained), trained)


def _shapes(model: torch.nn.Module, checkpoint: Path) -> _Shapes | None:
    named = dict(model.named_parameters(remove_duplicate=False))  # a file has tied parameters under each name
    tensors: dict[str, Any] = {**named, **dict(model.named_buffers())}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    shards = shards_of(checkpoint)
    saved_trained = None if shards is None else trained_shapes(shards)
    names = set(model.state_dict())
    if (checkpoint / WEIGHTS_FILE).is_file():
        saved = SavedWeights(checkpoint / WEIGHTS_FILE, *frozen_files(checkpoint)).shapes
    elif shards is not None and saved_trained is not None:  # ZeRO-3 that did not gather its weights
        frozen = {**frozen_shapes(shards), **SavedWeights(*frozen_files(checkpoint)).shapes}
        saved, names = {**saved_trained, **frozen}, {name for name, _ in model.named_parameters()}
    else:
        return None
    own = {name: tuple(whole_shape(tensors[name])) for name in tensors if name in names}
    return _Shapes(own, saved, trained, None if saved_trained is None else set(saved_trained))


def _saved_tasks(checkpoint: Path, model: Any) -> SavedTasks:
    """Return what a checkpoint says of its tasks; one of an earlier release says it in model.json, or not at all."""
    state = read_file(checkpoint / loop_file(0))
    if "classes" in state:
        return SavedTasks(state["classes"], state["continues"])
    if (checkpoint / MODEL_FILE).is_file():
        return SavedTasks(json.loads((checkpoint / MODEL_FILE).read_text())["classes"], {})
    return SavedTasks({name: list(task.classes) for name, task in model.tasks.items()}, {})


def _refuse_difference(shapes: _Shapes, checkpoint: Path) -> None:
    own, saved, trained, saved_trained = shapes.own, shapes.saved, shapes.trained, shapes.saved_trained
    if own == saved and saved_trained is not None and trained != saved_trained:
        changed = sorted(trained ^ saved_trained)
        was, now = ("frozen", "trained") if changed[0] in trained else ("trained", "frozen")
        raise ConfigError(
            f"{checkpoint} cannot be resumed: {len(changed)} parameters were {was} there and are {now} in this run, "
            f"the first is {changed[0]}; use the same model.freeze, or start a new run with a different output_dir and "
            f"model.start_from={checkpoint}"
        )
    if own == saved:
        return
    raise ConfigError(
        f"{checkpoint} is of a different model: {'; '.join(_differences(saved, own))}. To resume, use the "
        f"configuration of the saved run ({checkpoint / CONFIG_FILE}). Or start a new run with a different output_dir "
        f"and model.start_from={checkpoint}, which loads the backbone and the heads that are the same"
    )


def _differences(saved: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> list[str]:
    """Return one phrase per part of the model (backbone or task) whose shapes differ."""
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for side, shapes in enumerate((saved, own)):
        for name, shape in shapes.items():
            first, _, rest = name.partition(".")
            part = f"task '{rest.partition('.')[0]}'" if first == "tasks" else f"the {first}"
            parts.setdefault(part, ({}, {}))[side][name] = shape
    phrases = []
    for part, (before, now) in parts.items():
        if not now:
            phrases.append(f"{part} is in the checkpoint, but not in this run")
        elif not before:
            phrases.append(f"{part} is not in the checkpoint")
        elif before != now:
            name = min(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            sizes = f"{before.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} in this run"
            phrases.append(f"{part} differs: {name} is {sizes}")
    return phrases


def read_loop_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Return the loop state of a rank; for a rank that did not exist when the checkpoint was saved, that of rank 0."""
    new = not (checkpoint / loop_file(rank)).exists()
    state = read_file(checkpoint / loop_file(0 if new else rank), mmap=False)
    if new:
        state["logs"]["broken"] = []  # counted on rank 0
    return state


def saved_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text())["global_step"])


def saved_frequencies(checkpoint: Path, changes: TaskChanges | None) -> dict[str, list[float]]:
    """Return the class frequencies by task that the run was started with; none of a checkpoint that has none.

    Args:
        checkpoint: folder of the checkpoint.
        changes: of the tasks since then; those with other classes are counted again.
    """
    saved = read_file(checkpoint / loop_file(0)).get("frequencies", {})
    if changes is None:
        return saved
    return {task: own for task, own in by_new_name(saved, changes.names).items() if task not in changes.reclassed}


def check_optimizer(checkpoint: Path, optim: str) -> None:
    """Refuse a checkpoint of a different optimizer, whose state would not fit.

    Args:
        checkpoint: folder of the checkpoint.
        optim: `trainer.optim` of this run.

    Raises:
        ConfigError: says what to do instead.
    """
    saved = read_file(checkpoint / loop_file(0)).get("optim", optim)
    if saved.removesuffix("_fused") != optim.removesuffix("_fused"):
        raise ConfigError(
            f"trainer.optim = '{optim}': {checkpoint} was saved with '{saved}', whose state does not fit; use "
            f"that, or start a new run with a different output_dir and model.start_from={checkpoint}"
        )


def check_freezing(checkpoint: Path, stages: list[Any]) -> None:
    """Refuse a checkpoint of a run that thaws the backbone in other stages, in whatever steps: its groups differ.

    Args:
        checkpoint: folder of the checkpoint.
        stages: what is frozen in each stage of this run.

    Raises:
        ConfigError: says what to do instead.
    """
    saved = read_file(checkpoint / loop_file(0)).get("freezing", [])
    if saved != stages:
        raise ConfigError(
            f"model.thaw: {checkpoint} was saved with the stages {saved}, this run has {stages} (freeze, then the "
            "values of thaw); use the same, of which only the steps may differ, or start a new run with a different "
            f"output_dir and model.start_from={checkpoint}"
        )
