"""README.md of an exported folder: what the model is, how to load it, how good it is, on what data, from which run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.export.facts import ExportFacts, Preprocessing
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import Backbone
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_folder.names import METRICS_FILE, TRAINER_STATE

CARD_FILE = "README.md"


@dataclass
class RunFacts:
    """Where an exported model comes from.

    Attributes:
        config: of the run.
        step: optimizer steps trained, when known.
        metrics: evaluation of exactly these weights, named eval_TASK_METRIC; empty when there was none.
    """

    config: RunConfig
    step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def run_facts(folder: Path, config: RunConfig) -> RunFacts:
    """Steps and metrics of a run's final weights, or of a checkpoint.

    Args:
        folder: in which the weights lie.
        config: of the run.
    """
    if (folder / METRICS_FILE).is_file():
        metrics = json.loads((folder / METRICS_FILE).read_text())
        return RunFacts(config, metrics.get("best_step", metrics.get("steps")), metrics)
    if (folder / TRAINER_STATE).is_file():
        state = json.loads((folder / TRAINER_STATE).read_text())
        step = state["global_step"]
        here = [e for e in state["log_history"] if e.get("step") == step and "eval_score" in e]
        return RunFacts(config, step, here[-1] if here else {})
    return RunFacts(config)


def model_card(facts: ExportFacts, about: RunFacts, model: AllInOneModel) -> str:
    """The card of a folder that `allinone_ds.load` reads.

    Args:
        facts: its tasks.
        about: where it comes from.
        model: the whole model, for its sizes.
    """
    names = list(facts.tasks)
    tasks = tasks_of(model)
    one = names[0] if len(names) == 1 else None
    front: dict[str, Any] = {"library_name": "allinone_ds", "tags": ["vision", "multi-task", "deepspeed"]}
    if one and tasks[one].pipeline_tag:
        front["pipeline_tag"] = tasks[one].pipeline_tag
    heads = ", ".join(
        f"`{name}` ({tasks[name].kind}, head {tasks[name].head_name or 'of its own'}, {_millions(tasks[name])})"
        for name in names
    )
    others = [name for name in about.config.tasks if name not in names]
    together = f", together with {', '.join(others)}" if others else ""
    argument = "" if one else f', task="{names[0]}"'
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {about.config.name}" + (f": {one}" if one else ""),
        f"{_backbone(model.backbone)} and {heads}, trained{_steps(about)} on one shared backbone{together}, the tasks' "
        "gradients balanced with allinone_ds.",
        "## Use",
        "```python\nimport allinone_ds\n\n"
        f'model = allinone_ds.load("PATH/OF/THIS/FOLDER")\nmodel.predict("photo.jpg"{argument})\n```',
        _results(about, names),
        _data(about, names),
        "## Classes",
        "\n".join(f"- `{name}` ({len(task.classes)}): {', '.join(task.classes)}" for name, task in facts.tasks.items()),
        _preprocessing({name: task.image_size for name, task in facts.tasks.items()}),
        _configuration(about, names),
    ]
    return "\n\n".join(parts) + "\n"


def backbone_card(about: RunFacts, cls: str, backbone: Backbone) -> str:
    """The card of a backbone's folder.

    Args:
        about: where it comes from.
        cls: its class in `transformers`.
        backbone: for its size.
    """
    names = list(about.config.tasks)
    front = {"library_name": "transformers", "pipeline_tag": "image-feature-extraction", "tags": ["backbone"]}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {about.config.name}: backbone",
        f"{_backbone(backbone)}, trained{_steps(about)} on {', '.join(names)}, the tasks' gradients balanced with "
        "allinone_ds.",
        "## Use",
        f"From this folder:\n\n```python\nfrom transformers import {cls}\n\n"
        f'backbone = {cls}.from_pretrained("PATH/OF/THIS/FOLDER")\nbackbone(pixel_values).feature_maps\n```',
        "Without naming the class: `type(AutoBackbone.from_config(AutoConfig.from_pretrained(FOLDER)))` is it. "
        '`AutoBackbone.from_pretrained("OWNER/NAME")` loads the folder once it is a repository on the hub; of a plain '
        "folder AutoBackbone of transformers 5 asks the hub first and fails.",
        _results(about, names),
        _data(about, names),
        _preprocessing({}),
        _configuration(about, names),
    ]
    return "\n\n".join(parts) + "\n"


def _backbone(backbone: Backbone) -> str:
    config = backbone.config
    return f"A {config.model_type} of {config.num_hidden_layers} layers x {config.hidden_size} ({_millions(backbone)})"


def _steps(about: RunFacts) -> str:
    return "" if about.step is None else f" for {about.step:,} steps"


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"


def _results(about: RunFacts, names: list[str]) -> str:
    rows = []
    for name in names:
        start = f"eval_{name}_"
        samples = about.metrics.get(f"{start}samples", "")
        for key, value in about.metrics.items():
            if key.startswith(start) and isinstance(value, float):
                rows.append(f"| {name} | {key.removeprefix(start)} | {value:.4f} | {samples} |")
    if not rows:
        return "## Results\n\nThese weights were not evaluated."
    return (
        "## Results\n\nOn the test data below.\n\n| task | metric | value | samples |\n|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _data(about: RunFacts, names: list[str]) -> str:
    rows = []
    for name in names:
        task = about.config.tasks[name]
        for split, source in (("train", task.train), ("test", task.test)):
            if source is not None:
                given = source.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
                form = given.pop("format", source.format)
                where = ", ".join(f"{key} `{value}`" for key, value in given.items() if key != "classes")
                rows.append(f"| {name} | {split} | {form} | {where} |")
    return "## Data\n\n| task | split | format | where |\n|---|---|---|---|\n" + "\n".join(rows)


def _preprocessing(sizes: dict[str, tuple[int, int]]) -> str:
    did = Preprocessing()
    lines = [f"- `{name}`: {h} x {w} pixels (height x width)" for name, (h, w) in sizes.items()]
    text = f"RGB, resized ({did.resize}), scaled to 0..1, minus {list(did.mean)}, divided by {list(did.std)}."
    return "\n\n".join(["## Preprocessing", text, *(["\n".join(lines)] if lines else [])])


def _configuration(about: RunFacts, names: list[str]) -> str:
    content = about.config.model_dump(mode="json", exclude={"output_dir", "data_root", "name"})
    content["tasks"] = {name: task for name, task in content["tasks"].items() if name in names}
    text = yaml.safe_dump(content, sort_keys=False, width=110)
    return f"## Configuration\n\n```yaml\n{text}```"
