"""Export of a run's weights: one folder per task, one with all tasks, and the backbone for `transformers`."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from transformers import ViTImageProcessor

from allinone_ds.data.augmentation.transforms import MEAN, STD
from allinone_ds.export.card import CARD_FILE, Origin, backbone_card, model_card, read_origin
from allinone_ds.export.description import ExportedTask, ModelDescription
from allinone_ds.export.loading import build_exported
from allinone_ds.model import AllInOneModel
from allinone_ds.models.lora import SHARED, adapters_of, merge_lora, save_adapter
from allinone_ds.run_config.run_files import ModelFacts, read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.names import EXPORT, WEIGHTS_FILE
from allinone_ds.run_folder.weights import read_weights, without_ties

ONNX_FILE = "model.onnx"
ADAPTER = "adapter"


@dataclass
class Exported:
    """Result of an export.

    Attributes:
        source: file, or folder of ZeRO shards, that the weights were read from.
        folders: the folders written.
        notes: folders that were not written, and why.
    """

    source: Path
    folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_run(run: str | Path, output: str | Path | None = None, onnx: bool = False) -> Exported:
    """Write a run's model to folders that load without the run: OUTPUT/tasks/NAME, OUTPUT/model and OUTPUT/backbone.

    OUTPUT/tasks/NAME and OUTPUT/model have float32 weights (safetensors), a description (allinone.json) and a model
    card (README.md), and load with `allinone_ds.load`. OUTPUT/backbone is in the format of `transformers`. It is not
    written for a backbone with a convolutional stem, since no class of `transformers` has such a stem. LoRA adapters
    are merged into the weights of all of these, and also written alone, in the format of `peft`: to OUTPUT/adapter, and
    those of one task to OUTPUT/adapter/NAME. Where tasks have adapters of their own, OUTPUT/model keeps all adapters
    apart and needs `peft` to load, and OUTPUT/backbone has the shared ones merged.

    Args:
        run: folder of a run (its final weights) or of a checkpoint (the float32 masters in its ZeRO shards, of any
            stage and number of ranks, which are merged on the CPU).
        output: folder to write to; None is "export" in `run`. Files of an earlier export are replaced.
        onnx: whether to write tasks/NAME/model.onnx too.

    Raises:
        ConfigError: `run` is not the folder of a run, has no weights, or the packages of the extra `onnx` are missing.

    Example::

        export_run("runs/demo").folders    # runs/demo/export/tasks/detection, ..., runs/demo/export/model
    """
    run = Path(run)
    config, model_facts = read_run_files(run)
    if onnx:
        from allinone_ds.export.onnx import need_onnx, write_onnx

        need_onnx()
    state, source = read_weights(run, prefer_shards=True)
    description = _describe(config, model_facts)
    model = build_exported(description)
    model.load_state_dict(state)
    del state
    model.eval()
    origin = read_origin(source.parent, config)  # the last checkpoint, if the run has not ended
    output = run / EXPORT if output is None else Path(output)
    done = Exported(source)
    own = {name: task.lora for name, task in description.tasks.items() if task.lora is not None}
    _write_adapters(model, description, output / ADAPTER, done)
    if description.lora is not None and not own:
        merge_lora(model.backbone)
        description = description.model_copy(update={"lora": None})
    for name, task in description.tasks.items():
        part = description.model_copy(update={"tasks": {name: _plain(task)}, "joint": {}, "lora": None})
        merged = _merged(model, SHARED, name)
        folder = _write_folder(merged, part, origin, output / "tasks" / name, done)
        if onnx:
            write_onnx(merged, name, folder / ONNX_FILE)
    _write_folder(model, description, origin, output / "model", done)
    _write_backbone(_merged(model, SHARED), origin, output / "backbone", done)
    return done


def _plain(task: ExportedTask) -> ExportedTask:
    return task.model_copy(update={"lora": None})


def _merged(model: AllInOneModel, *adapters: str) -> AllInOneModel:
    """Return the model with some of its adapters merged and no others: a copy of it, or itself if it has none."""
    if not adapters_of(model.backbone):
        return model
    model = copy.deepcopy(model)
    merge_lora(model.backbone, adapters)
    return model


def _write_adapters(model: AllInOneModel, description: ModelDescription, folder: Path, done: Exported) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier export
    if description.lora is not None:
        save_adapter(model.backbone, description.lora, folder)
        done.folders.append(folder)
    for name, task in description.tasks.items():
        if task.lora is not None:
            save_adapter(model.backbone, task.lora, folder / name, name)
            done.folders.append(folder / name)


def _describe(config: RunConfig, facts: ModelFacts) -> ModelDescription:
    tasks = {
        name: ExportedTask(
            type=task.type,
            head=task.head,
            options=task.options,
            image_size=task.image_size,
            classes=facts.classes[name],
            lora=task.lora,
        )
        for name, task in config.tasks.items()
    }
    joint = {name: list(group.tasks) for name, group in config.joint.items()}
    return ModelDescription(backbone=facts.backbone, tasks=tasks, joint=joint, lora=config.model.lora)


def _write_folder(
    model: AllInOneModel, description: ModelDescription, origin: Origin, folder: Path, done: Exported
) -> Path:
    """Write the backbone and the heads of the described tasks."""
    _clear(folder)
    kept = ("backbone.", *(f"tasks.{name}." for name in description.tasks))
    weights = {name: value for name, value in model.state_dict().items() if name.startswith(kept)}
    save_file(without_ties(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    description.save(folder)
    (folder / CARD_FILE).write_text(model_card(description, origin, model))
    done.folders.append(folder)
    return folder


def _write_backbone(model: AllInOneModel, origin: Origin, folder: Path, done: Exported) -> None:
    if origin.config.model.backbone.stem == "conv":
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier export
        done.notes.append(
            f"{folder} was not written: no class of transformers has a convolutional stem (model.backbone.stem: conv). "
            f"Use allinone_ds.load('{folder.parent / 'model'}').backbone"
        )
        return
    _clear(folder)
    net = model.backbone.net
    net.save_pretrained(folder)
    # the normalisation of all tasks; no size, since it differs between tasks
    ViTImageProcessor(do_resize=False, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    (folder / CARD_FILE).write_text(backbone_card(origin, model.backbone))
    done.folders.append(folder)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
