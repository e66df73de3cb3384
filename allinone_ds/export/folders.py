"""A run's weights as folders: every task alone, the whole model, and the backbone for `transformers`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from transformers import ViTImageProcessor

from allinone_ds.data.augmentation.transforms import MEAN, STD
from allinone_ds.export.card import CARD_FILE, RunFacts, backbone_card, model_card, run_facts
from allinone_ds.export.facts import ExportedTask, ExportFacts
from allinone_ds.export.loading import build_exported
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.run_files import ModelFacts, read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.names import EXPORT, WEIGHTS_FILE
from allinone_ds.run_folder.weights import read_weights

ONNX_FILE = "model.onnx"


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        source: file or folder of shards that the weights came from.
        folders: the folders written.
        notes: what could not be written, and why.
    """

    source: Path
    folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_run(run: str | Path, output: str | Path | None = None, onnx: bool = False) -> Exported:
    """Write a run's model so that it loads without the run: OUTPUT/tasks/NAME, OUTPUT/model and OUTPUT/backbone.

    The first two hold float32 weights (safetensors), allinone.json (what they are weights of, preprocessing, class
    names) and README.md, and load with `allinone_ds.load`. backbone is a folder of `transformers`; a backbone with a
    convolutional stem gets none, since no class of `transformers` has such a stem.

    Args:
        run: folder of a run (its final weights) or of a checkpoint (the float32 masters in its ZeRO shards, whatever
            its stage and number of ranks were, put together on the CPU).
        output: folder to write to; None is "export" in `run`. What an earlier export left there is replaced.
        onnx: also write tasks/NAME/model.onnx.

    Raises:
        ConfigError: no run, no weights, or the packages of the extra `onnx` are missing.
    """
    run = Path(run)
    config, found = read_run_files(run)
    if onnx:
        from allinone_ds.export.onnx import need_onnx, write_onnx

        need_onnx()
    state, source = read_weights(run, prefer_shards=True)
    facts = _facts(config, found)
    model = build_exported(facts)
    model.load_state_dict(state)
    del state
    model.eval()
    about = run_facts(source.parent, config)  # of a run that has not ended it is the last checkpoint
    output = run / EXPORT if output is None else Path(output)
    done = Exported(source)
    for name, task in facts.tasks.items():
        part = facts.model_copy(update={"tasks": {name: task}})
        folder = _write_folder(model, part, about, output / "tasks" / name, done)
        if onnx:
            write_onnx(model, name, folder / ONNX_FILE)
    _write_folder(model, facts, about, output / "model", done)
    _write_backbone(model, facts, about, output / "backbone", done)
    return done


def _facts(config: RunConfig, found: ModelFacts) -> ExportFacts:
    tasks = {
        name: ExportedTask(
            type=task.type,
            head=task.head,
            options=task.options,
            image_size=task.image_size,
            classes=found.classes[name],
        )
        for name, task in config.tasks.items()
    }
    return ExportFacts(backbone=found.backbone, tasks=tasks)


def _write_folder(model: AllInOneModel, facts: ExportFacts, about: RunFacts, folder: Path, done: Exported) -> Path:
    """Backbone and the heads that `facts` names."""
    _clear(folder)
    kept = ("backbone.", *(f"tasks.{name}." for name in facts.tasks))
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith(kept)}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    facts.save(folder)
    (folder / CARD_FILE).write_text(model_card(facts, about, model))
    done.folders.append(folder)
    return folder


def _write_backbone(model: AllInOneModel, facts: ExportFacts, about: RunFacts, folder: Path, done: Exported) -> None:
    if facts.backbone.stem == "conv":
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier export
        done.notes.append(
            f"no {folder}: the backbone has a convolutional stem (model.backbone.stem: conv), which no class of "
            "transformers has, so AutoBackbone could not load it; take "
            f"allinone_ds.load('{folder.parent / 'model'}').backbone"
        )
        return
    _clear(folder)
    net = model.backbone.net
    net.save_pretrained(folder)
    # pixels as all tasks normalised them; each task has a size of its own, so the backbone states none of them
    ViTImageProcessor(do_resize=False, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    (folder / CARD_FILE).write_text(backbone_card(about, type(net).__name__, model.backbone))
    done.folders.append(folder)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
