"""Model card (README.md) of an exported folder: use, results, data, classes, preprocessing and configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.evaluation.metrics import Evaluation, nest
from allinone_ds.export.description import ModelDescription, Preprocessing
from allinone_ds.model import AllInOneModel
from allinone_ds.models.architectures import MODELS
from allinone_ds.models.backbone import Backbone
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.names import METRICS_FILE, TRAINER_STATE

CARD_FILE = "README.md"


@dataclass
class Origin:
    """Run that an exported model comes from.

    Attributes:
        config: the run's configuration.
        step: number of optimizer steps; None if unknown.
        evaluation: metrics of exactly these weights; empty if they were not evaluated.
    """

    config: RunConfig
    step: int | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)


def read_origin(folder: Path, config: RunConfig) -> Origin:
    """Read the steps and metrics of a run's final weights, or of a checkpoint.

    Args:
        folder: folder with the weights.
        config: the run's configuration.
    """
    if (folder / METRICS_FILE).is_file():
        metrics = json.loads((folder / METRICS_FILE).read_text())
        return Origin(config, metrics.get("best_step", metrics.get("steps")), nest(metrics, config.tasks))
    if (folder / TRAINER_STATE).is_file():
        state = json.loads((folder / TRAINER_STATE).read_text())
        step = state["global_step"]
        logged = [e for e in state["log_history"] if e.get("step") == step and "eval_score" in e]
        return Origin(config, step, nest(logged[-1] if logged else {}, config.tasks))
    return Origin(config)


def model_card(description: ModelDescription, origin: Origin, model: AllInOneModel) -> str:
    """Return the card of a folder that `allinone_ds.load` reads.

    Args:
        description: the folder's tasks.
        origin: the run it comes from.
        model: the model with all tasks of the run, for its sizes.
    """
    names = list(description.tasks)
    tasks = tasks_of(model)
    one = names[0] if len(names) == 1 else None
    front: dict[str, Any] = {"library_name": "allinone_ds", "tags": ["vision", "multi-task", "deepspeed"]}
    if one and tasks[one].pipeline_tag:
        front["pipeline_tag"] = tasks[one].pipeline_tag
    heads = ", ".join(
        f"`{name}` ({tasks[name].kind}, head {tasks[name].head_name or 'built in'}, {_millions(tasks[name])})"
        for name in names
    )
    others = [name for name in origin.config.tasks if name not in names]
    together = f", together with {', '.join(others)}" if others else ""
    argument = "" if one else f', task="{names[0]}"'
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {origin.config.name}" + (f": {one}" if one else ""),
        f"{_backbone(model.backbone)} and {heads}, trained{_steps(origin)} on one shared backbone{together}. "
        "allinone_ds balanced the tasks' gradients.",
        "## Use",
        "```python\nimport allinone_ds\n\n"
        f'model = allinone_ds.load("PATH/OF/THIS/FOLDER")\nmodel.predict("photo.jpg"{argument})\n```',
        _results(origin, names),
        _data(origin, names),
        *_classes(description),
        _preprocessing({name: task.image_size for name, task in description.tasks.items()}),
        _configuration(origin, names),
    ]
    return "\n\n".join(parts) + "\n"


def _classes(description: ModelDescription) -> list[str]:
    """Return the section of the class names, nothing if no task has classes."""
    listed = [
        f"- `{name}` ({len(task.classes)}): {', '.join(task.classes)}"
        for name, task in description.tasks.items()
        if task.classes
    ]
    return ["## Classes", "\n".join(listed)] if listed else []


def backbone_card(origin: Origin, backbone: Backbone) -> str:
    """Return the card of a backbone's folder.

    Args:
        origin: the run it comes from.
        backbone: the backbone, for its class and sizes.
    """
    names = list(origin.config.tasks)
    front = {"library_name": "transformers", "pipeline_tag": "image-feature-extraction", "tags": ["backbone"]}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {origin.config.name}: backbone",
        f"{_backbone(backbone)}, trained{_steps(origin)} on {', '.join(names)}. allinone_ds balanced the tasks' "
        "gradients.",
        "## Use",
        *_backbone_use(backbone),
        _results(origin, names),
        _data(origin, names),
        _preprocessing({}),
        _configuration(origin, names),
    ]
    return "\n\n".join(parts) + "\n"


def _backbone_use(backbone: Backbone) -> list[str]:
    """Return how to load the backbone's folder: in transformers where a class of it can, else in this package."""
    model_type, folder = backbone.config.model_type, "PATH/OF/THIS/FOLDER"
    if model_type == "timm_backbone":  # TimmBackbone.from_pretrained takes names of timm only
        return [
            "From this folder:\n\n```python\nfrom allinone_ds.models.backbone import BackboneConfig, build_backbone\n\n"
            f'backbone = build_backbone(BackboneConfig(name="{folder}"))\nbackbone(pixel_values).feature_maps\n```'
        ]
    cls = type(backbone.net).__name__
    maps = "backbone(pixel_values)" + (".last_hidden_state" if model_type in MODELS else ".feature_maps")
    use = (
        f"From this folder:\n\n```python\nfrom transformers import {cls}\n\n"
        f'backbone = {cls}.from_pretrained("{folder}")\n{maps}\n```'
    )
    if model_type in MODELS:  # no backbone class
        return [use]
    return [
        use,
        "`type(AutoBackbone.from_config(AutoConfig.from_pretrained(FOLDER)))` is this class. "
        '`AutoBackbone.from_pretrained("OWNER/NAME")` loads the folder once it is a repository on the hub. '
        "`AutoBackbone.from_pretrained(FOLDER)` of transformers 5 fails, because it asks the hub first.",
    ]


def _backbone(backbone: Backbone) -> str:
    config = backbone.config
    name = config.backbone if config.model_type == "timm_backbone" else config.model_type
    return f"A {name} of {backbone.depth} blocks with {backbone.channels} channels ({_millions(backbone)})"


def _steps(origin: Origin) -> str:
    return "" if origin.step is None else f" for {origin.step:,} steps"


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"


def _results(origin: Origin, names: list[str]) -> str:
    evaluation = origin.evaluation
    rows = [
        f"| {name} | {metric} | {value:.4f} | {evaluation.tasks[name].get('samples', '')} |"
        for name in names
        if name in evaluation.tasks
        for metric, value in evaluation.metrics(name).items()
    ]
    if not rows:
        return "## Results\n\nThese weights were not evaluated."
    return (
        "## Results\n\nOn the test data below.\n\n| task | metric | value | samples |\n|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _data(origin: Origin, names: list[str]) -> str:
    rows = []
    for name in names:
        task = origin.config.tasks[name]
        for split, sources in (("train", task.train), ("test", task.test)):
            for source in sources if isinstance(sources, list) else [sources]:
                if source is None:
                    continue
                options = source.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
                data_format = options.pop("format", source.format)
                listed = ", ".join(f"{key} `{value}`" for key, value in options.items() if key != "classes")
                rows.append(f"| {name} | {split} | {data_format} | {listed} |")
        if task.split is not None:
            listed = f"{task.split.test:.0%} of the train data, seed {task.split.seed}"
            rows.append(f"| {name} | test | split | {listed} |")
    return "## Data\n\n| task | split | format | source |\n|---|---|---|---|\n" + "\n".join(rows)


def _preprocessing(sizes: dict[str, tuple[int, int]]) -> str:
    steps = Preprocessing()
    lines = [f"- `{name}`: {h} x {w} pixels (height x width)" for name, (h, w) in sizes.items()]
    text = f"RGB, resized ({steps.resize}), scaled to 0..1, minus {list(steps.mean)}, divided by {list(steps.std)}."
    return "\n\n".join(["## Preprocessing", text, *(["\n".join(lines)] if lines else [])])


def _configuration(origin: Origin, names: list[str]) -> str:
    content = origin.config.model_dump(mode="json", exclude={"output_dir", "data_root", "name"})
    content["tasks"] = {name: task for name, task in content["tasks"].items() if name in names}
    text = yaml.safe_dump(content, sort_keys=False, width=110)
    return f"## Configuration\n\n```yaml\n{text}```"
