"""Write docs/reference/run-file.md and docs/reference/logs.md from the package: keys, log names, exit codes.

python -m tools.make_reference        # tests/test_run_file_reference.py compares the pages with its result
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from transformers import TrainingArguments

from allinone_ds import errors
from allinone_ds.balance.options import WEIGHTINGS, BalancerConfig
from allinone_ds.data.joint.sources import PairedSource
from allinone_ds.data.sources import SOURCE_CLASSES
from allinone_ds.reporting.logs import TaskLogs
from allinone_ds.reporting.meters import Pace
from allinone_ds.run_config.arguments import SET_ELSEWHERE, AllInOneArguments
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.strict import Strict
from allinone_ds.tasks import TASKS

PAGES = Path(__file__).resolve().parents[1] / "docs" / "reference"
COMMAND = "python -m tools.make_reference"
TITLES = {"JointConfig": "joint.NAME", "PairedSource": "Source of a joint group, format: joint",
          "RunConfig": "Top level", "ModelConfig": "model", "BackboneConfig": "model.backbone",
          "TaskConfig": "tasks.NAME", "TestTime": "tasks.NAME.test_time", "AugmentConfig": "tasks.NAME.augment",
          "Branch": "tasks.NAME.augment.branches.NAME", "EarlyStopping": "early_stopping", "Sampling": "sampling",
          "BalancerConfig": "balancer"}  # fmt: skip
"""Configuration class -> title of its section; other classes are titled by their names."""
SOURCES = "source"
"""Section of the page that a source's union stands for."""
EVENTS = {
    "begin": "training begins: `step`, `max_steps`",
    "log": "values of a training log or of an evaluation, see above",
    "warning": "a problem that does not end the run: `message`",
    "note": "what the run found at its start, such as class frequencies and loaded weights: `message`",
    "end": "training has ended: `step`",
    "stopped": "a signal ended training after a checkpoint: `step`, `signal`",
}
"""Events of log.jsonl; `EventLog` describes them."""
TRAINER_NAMES = {
    "loss": "sum of the losses of all tasks, without those that are not finite, mean over the steps since the last log",
    "grad_norm": "norm of the balanced gradient of the whole model in the last step",
    "learning_rate": "learning rate of the heads",
    "epoch": "completed fraction of the run",
    "skipped/TASK": "steps of the whole run without the task, because its loss, gradient or factor was not finite",
    "train_runtime": "seconds of training",
    "train_samples_per_second": "samples per second, as Trainer counts them",
    "train_steps_per_second": "optimizer steps per second",
    "train_loss": "mean of `loss` over the run",
    "total_flos": "always 0: Trainer's estimate is for language models",
}
EVALUATION_NAMES = {
    "eval_TASK_METRIC": "a metric of a task",
    "eval_TASK_class/CLASS/METRIC": "a metric of one class, in tasks of up to 20 classes",
    "eval_TASK_samples": "samples of the task that were evaluated",
    "eval_TASK_broken": "samples of the task that cannot be read, if there are any",
    "eval_score": "mean of the main metrics of the tasks",
    "eval_runtime": "seconds of the evaluation",
    "eval_ema_...": "the same for the averaged weights (`trainer.ema_decay`)",
}


def descriptions(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a class and of its base classes, as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("allinone_ds"):
            continue
        [node] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = node.body  # type: ignore[attr-defined]
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def show_type(annotation: Any) -> str:
    """Return an annotation in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return show_type(args[0]) + "".join(_bound(item) for item in args[1:])
    if annotation in (None, type(None)):
        return "null"
    if origin in (Union, types.UnionType):
        if all(isinstance(arg, type) and arg in SOURCE_CLASSES for arg in map(_plain, args)):
            return f"a [{SOURCES}](#sources)"
        if PairedSource in map(_plain, args):
            return f"a [{SOURCES} of a joint group](#source-of-a-joint-group-format-joint)"
        return " or ".join(dict.fromkeys(show_type(arg) for arg in args))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin and (origin is dict or origin.__name__ == "Mapping"):
        return f"mapping of {show_type(args[0])} to {show_type(args[1])}"
    if origin is tuple:
        return f"list of {len(args)}: {show_type(args[0])}"
    if origin and (origin is list or origin.__name__ == "Sequence"):
        return f"list of {show_type(args[0])}"
    if isinstance(annotation, type) and annotation.__name__ in TITLES:
        title = TITLES[annotation.__name__]
        return f"[{title}](#{re.sub(r'[^a-z0-9_-]', '', title.lower())})"
    if annotation is Any:
        return "any"
    name = {"str": "text", "Path": "path", "bool": "true or false", "int": "integer", "float": "number"}
    shown = getattr(annotation, "__name__", str(annotation))
    return name.get(shown, shown)


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _bound(item: Any) -> str:
    for kind, word in ((annotated_types.Ge, "at least"), (annotated_types.Gt, "above"), (annotated_types.Le, "at most"),
                       (annotated_types.Lt, "below"), (annotated_types.MultipleOf, "a multiple of")):  # fmt: skip
        if isinstance(item, kind):
            return f", {word} {dataclasses.astuple(item)[0]}"
    return ""


def show_default(value: Any) -> str:
    """Return a default as it is written in YAML."""
    if isinstance(value, BaseModel):
        return "see below"
    value = getattr(value, "value", value)
    words = {None: "null", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{shown}`" if shown else '`""`'


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows), ""]


def fields_of(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Return a row per field of a configuration class."""
    texts = descriptions(model)
    rows = []
    for name, field in model.model_fields.items():
        bounds = "".join(_bound(item) for item in field.metadata)
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else show_default(default)
        rows.append((f"`{name}`", show_type(field.annotation) + bounds, shown, texts.get(name, "")))
    return rows


def nested(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the configuration classes below a class that need a section of their own, in order."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in SOURCE_CLASSES and annotation not in found:
                found[annotation] = None
                for field in annotation.model_fields.values():
                    visit(field.annotation)
        for argument in get_args(annotation):
            visit(argument)

    visit(model)
    return list(found)


def own_options(cls: type) -> list[tuple[str, str, str, str]]:
    """Return a row per option of a weighting, described in the `Args` of its docstring."""
    text = inspect.getdoc(cls) or ""
    block = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    described = (
        dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", block[1], re.DOTALL | re.MULTILINE)) if block else {}
    )
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:
        hints = {}
    rows = []
    for name, parameter in inspect.signature(cls).parameters.items():
        default = "required" if parameter.default is parameter.empty else show_default(parameter.default)
        kind = show_type(hints.get(name, parameter.annotation))
        rows.append((f"`{name}`", kind, default, " ".join(described.get(name, "").split())))
    return rows


def arguments(own: bool) -> list[tuple[str, str, str, str]]:
    """Return a row per argument of the Trainer: those of this package (or with its default), or all others."""
    inherited = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    hints = get_type_hints(AllInOneArguments)
    rows = []
    for field in dataclasses.fields(AllInOneArguments):
        changed = field.name not in inherited or inherited[field.name] != field.default
        if not field.init or field.name in SET_ELSEWHERE or changed != own:
            continue
        made = field.default_factory() if callable(field.default_factory) else field.default  # type: ignore[misc]
        help_text = " ".join(str(field.metadata.get("help", "")).split())
        meaning = help_text if own else re.split(r"(?<=[a-z)`])\. ", help_text)[0]
        rows.append((f"`{field.name}`", show_type(hints[field.name]) if own else "", show_default(made), meaning))
    return rows


def run_file_page() -> str:
    """Return the page of all keys of a run's file."""
    lines = [
        "# Keys of a run's file",
        "",
        "After reading this page you know every key of the YAML file of a run, its type and its default.",
        f"The page is generated (`{COMMAND}`). [Training](../training.md) explains how",
        "the keys work together.",
        "",
        "A value is written `PART.KEY=VALUE` as an override. `base: FILE`, or a list of files, is read",
        "first.",
        "",
    ]
    for model in nested(RunConfig):
        if model is BalancerConfig or model.__name__ == "Expect":
            continue
        lines += [f"## {TITLES.get(model.__name__, model.__name__)}", "", *table(fields_of(model))]
    lines += ["## balancer", "", *table(fields_of(BalancerConfig))]
    for name, weighting in WEIGHTINGS.items():
        if rows := own_options(weighting):
            lines += [f"### balancer.name: {name}", "", *table(rows)]
    lines += ["## Sources", "", "`tasks.NAME.train` and `tasks.NAME.test` are one of these, selected by `format`.", ""]
    below: dict[type[BaseModel], None] = {}
    for source in SOURCE_CLASSES:
        [kind] = get_args(source.model_fields["format"].annotation)
        rows = [row for row in fields_of(source) if row[0] != "`format`"]
        lines += [f"### format: {kind}", "", *table(rows)]
        for field in source.model_fields.values():
            for argument in (field.annotation, *get_args(field.annotation)):
                if isinstance(argument, type) and issubclass(argument, Strict):
                    below[argument] = None
    for model in below:
        lines += [f"### {model.__name__}", "", *table(fields_of(model))]
    lines += ["## Options of heads", "", "`tasks.NAME.options` of the head that `tasks.NAME.head` names.", ""]
    for kind, task in TASKS.items():
        for head, options in task.HEADS.items():
            lines += [f"### {kind}: {head}", "", *table(fields_of(options))]
    lines += ["## trainer", "", "Arguments of this package, and those with a default of its own:", ""]
    lines += table(arguments(own=True))
    lines += ["These values are set by a different key, and are refused here:", ""]
    lines += [f"- `{name}`: by `{key}`".replace("' or '", "` or `") for name, key in sorted(SET_ELSEWHERE.items())]
    lines += ["", "All other arguments are those of `transformers.TrainingArguments`:", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    for key, _, default, meaning in arguments(own=False):
        lines.append(f"| {key} | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def log_names() -> dict[str, str]:
    """Return the names in training logs, from the docstrings of the classes that write them."""
    found = {}
    for cls in (TaskLogs, Pace):
        for name, meaning in re.findall(r"^ {4,}([a-z_/A-Z]+) {2,}(\S.*)$", cls.__doc__ or "", re.MULTILINE):
            found[name] = meaning
    return found


def logs_page() -> str:
    """Return the page of log names, events and exit codes."""

    def rows(head: str, values: dict[str, str]) -> list[str]:
        return [f"| {head} | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in values.items()), ""]

    codes = {str(code): text for code, text in errors.EXIT_CODES.items()}
    return "\n".join(
        [
            "# Log names and exit codes",
            "",
            "After reading this page you can read `RUN/log.jsonl` and `RUN/metrics.json`, and tell from its exit",
            f"code how a command ended. The page is generated (`{COMMAND}`). Trackers put",
            "`train/` before the names of training and `eval/` before those of evaluations, see",
            "[Watching a run](../tracking.md).",
            "",
            "## Training",
            "",
            *rows("name", {**TRAINER_NAMES, **log_names()}),
            "## Evaluation",
            "",
            *rows("name", EVALUATION_NAMES),
            "`metrics.json` has the last evaluation, the values of the whole training, `steps`, `world_size`",
            "(ranks), `details` (tables per class, confusion matrix, worst images) and, with",
            "`trainer.load_best_model_at_end`, `best_step`.",
            "",
            "## Events of log.jsonl",
            "",
            "Every line has `event`, `time` (seconds since 1970) and `step`.",
            "",
            *rows("event", EVENTS),
            "## Exit codes",
            "",
            *rows("code", codes),
        ]
    )


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    return {PAGES / "run-file.md": run_file_page(), PAGES / "logs.md": logs_page()}


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text)
        print(file)
