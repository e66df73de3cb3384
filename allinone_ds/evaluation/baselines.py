"""The single-task runs that a multi-task run is compared with: their files, and the comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from allinone_ds.atomic_file import write_atomically
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.evaluation.metrics import nest
from allinone_ds.evaluation.transfer import MetricGain, Transfer
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_config.yaml_files import read_yaml
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.names import BASELINES, CONFIG_FILE, EVENTS_FILE, METRICS_FILE, TRANSFER_FILE
from allinone_ds.strict import dotted_values


@dataclass(frozen=True)
class Baseline:
    """The run of one task alone.

    Example:
        >>> folder = Path("runs/demo/baselines/detection")
        >>> Baseline("detection", folder.with_suffix(".yaml"), folder, done=False, begun=True).file.name
        'detection.yaml'
    """

    task: str
    """Name of the task."""
    file: Path
    """Its YAML file."""
    folder: Path
    """Folder of the run."""
    done: bool
    """Whether it has been trained and evaluated."""
    begun: bool
    """Whether it has a checkpoint to resume."""


def plan_baselines(folder: Path) -> list[Baseline]:
    """Write the YAML file of the single-task run of every evaluated task to RUN/baselines/, and say what is trained.

    A baseline has the run's data, head, sizes, steps, seed and optimizer, and no balancing.

    Args:
        folder: folder of a multi-task run that has ended.

    Raises:
        ConfigError: the run has not ended or has one task only, no task is evaluated, or a baseline was trained with
            other settings.
    """
    config, _ = read_run_files(folder)
    metrics = read_metrics(folder)
    if len(config.tasks) == 1:
        raise ConfigError(f"{folder}: has one task only, so there is nothing to compare; give a multi-task run")
    evaluated = nest(metrics, config.tasks).tasks
    if not evaluated:
        raise ConfigError(f"{folder}: no task was evaluated; set `test` or `split` of its tasks")
    return [_plan(config, folder, task) for task in config.tasks if task in evaluated]


def _plan(config: RunConfig, folder: Path, task: str) -> Baseline:
    content = config.model_dump(mode="json")
    content["tasks"] = {task: content["tasks"][task]}
    content["joint"] = {n: _group_of_one(g, task) for n, g in content["joint"].items() if task in g["tasks"]}
    trainer = {**content["trainer"], "max_steps": _length(folder)}
    if "metric_for_best_model" in trainer:
        trainer["metric_for_best_model"] = "score"  # the run's may be that of another task
    trainer.pop("greater_is_better", None)
    trainer.pop("run_name", None)
    own = folder / BASELINES / task
    content |= {"name": f"{config.name}, {task} alone", "output_dir": str(own), "trainer": trainer, "epochs": None}
    content |= {"balancer": {"name": "sum"}}
    wanted = RunConfig.model_validate(content)
    if (own / CONFIG_FILE).is_file():
        _refuse_other(own, wanted)
    own.parent.mkdir(parents=True, exist_ok=True)
    file = own.parent / f"{task}.yaml"
    write_atomically(file, yaml.safe_dump(wanted.model_dump(mode="json"), sort_keys=False, width=110))
    return Baseline(task, file, own, (own / METRICS_FILE).is_file(), bool(checkpoints(own)))


def _group_of_one(group: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the keys of a joint group with one of its tasks, on the images that have labels of it."""

    def reduced(sources: Any) -> Any:
        if isinstance(sources, list):
            return [reduced(source) for source in sources]
        if not sources or "labels" not in sources:
            return sources
        return {**sources, "labels": {task: sources["labels"][task]}, "partial": True}

    return {**group, "tasks": [task], "train": reduced(group["train"]), "test": reduced(group["test"])}


def _length(folder: Path) -> int:
    """Return the number of optimizer steps that a run was to make, also where it stopped early."""
    lines = (folder / EVENTS_FILE).read_text().splitlines() if (folder / EVENTS_FILE).is_file() else []
    begun = [json.loads(line) for line in lines if '"begin"' in line]
    if not begun:
        raise ConfigError(f"{folder}: its {EVENTS_FILE} does not say how many steps it makes; give the folder of a run")
    return int(begun[-1]["max_steps"])


def _refuse_other(folder: Path, wanted: RunConfig) -> None:
    """Raise if a baseline was trained with settings that are not the run's."""
    found, expected = (
        dotted_values(content)
        for content in (read_yaml(folder / CONFIG_FILE), json.loads(json.dumps(wanted.model_dump(mode="json"))))
    )
    different = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if different:
        key = different[0]
        raise ConfigError(
            f"{folder}: was trained with {key} = {found.get(key)}, the run has {expected.get(key)}"
            f"{f' (and {len(different) - 1} more differ)' if len(different) > 1 else ''}; delete this folder to train "
            "it again"
        )


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json.

    Raises:
        ConfigError: the run has not ended.
    """
    file = folder / METRICS_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {METRICS_FILE}: the run has not ended; train it to its end first")
    return json.loads(file.read_text())


def compare_runs(folders: Sequence[Path]) -> Transfer:
    """Compare multi-task runs with the single-task baselines of the first one, and write its transfer.json.

    Args:
        folders: folders of runs with the same tasks; the baselines of the first one are trained.

    Raises:
        ConfigError: a run has not ended or lacks a task.
    """
    config, facts = read_run_files(folders[0])
    tasks = tasks_of(build_model(config, facts))
    found = [
        {task: _known(values) for task, values in nest(read_metrics(folder), tasks).tasks.items()} for folder in folders
    ]
    rows, notes = [], []
    for task in (name for name in config.tasks if name in found[0]):
        alone = _known(nest(read_metrics(folders[0] / BASELINES / task), [task]).tasks[task])
        for folder, of_run in zip(folders, found, strict=True):
            if task not in of_run:
                raise ConfigError(
                    f"{folder}: has no evaluated task '{task}' as {folders[0]}; compare runs of the same tasks"
                )
        for metric in tasks[task].known_metrics():
            values = [of_run[task].get(metric, math.nan) for of_run in found]
            direction = tasks[task].better_is_greater(metric)
            if direction is not None and metric in alone and not all(map(math.isnan, values)):
                rows.append(MetricGain(task, metric, direction, alone[metric], values))
                notes += _note(rows[-1])
    names = [str(read_yaml(folder / CONFIG_FILE).get("name", folder.name)) for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    transfer = Transfer(labels, rows, notes)
    record = {
        **asdict(transfer), "mean_gains": transfer.mean_gains, "mean_ranks": transfer.mean_ranks,
        "task_gains": [{task: transfer.task_gain(task, run) for task in transfer.tasks} for run in range(len(labels))],
        "worse": [transfer.worse(run) for run in range(len(labels))],
    }  # fmt: skip
    write_atomically(folders[0] / TRANSFER_FILE, json.dumps(record, indent=1) + "\n")
    return transfer


def _known(values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with NaN for torchmetrics' -1, which means that there was nothing to measure."""
    return {name: math.nan if value == -1 else value for name, value in values.items()}


def _note(row: MetricGain) -> list[str]:
    if None not in row.gains:
        return []
    why = "the baseline is 0" if row.baseline == 0 else "a value is missing"
    return [f"{row.task} {row.metric}: no gain in percent, {why}; it is left out of the mean gain"]
