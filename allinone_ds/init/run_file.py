"""The text of the YAML file that `init` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from allinone_ds.data.formats.maps.values import DENSE_KINDS
from allinone_ds.init.found_task import FoundTask
from allinone_ds.init.settings import Machine

SPLIT: dict[str, Any] = {"test": 0.2, "seed": 0}
"""How training data is split if there is no test data."""

_WIDTH = 100
_WORDS = {"attributes": ("attribute", "attributes"), "regression": ("number", "numbers"),
          "retrieval": ("identity", "identities")}  # fmt: skip
_SPLIT_LINE = "    split: {test: 0.2, seed: 0}  # there is no test data: this fraction is tested on, not trained on"
_AUGMENT_LINE = "    augment: [RandomHorizontalFlip]  # remove it if left and right differ in meaning (text, arrows)"
_SMALL = {
    **dict.fromkeys(("detection", "instances", "keypoints"), {"width": 64, "num_convs": 2}),
    **dict.fromkeys(("segmentation", *DENSE_KINDS), {"width": 96}),
}
"""Options of heads that train on a CPU."""


@dataclass
class PlannedTask:
    """A task with the numbers that were read from its data.

    Example:
        >>> task = FoundTask("classification", "csv", {"format": "image_table", "images": ".", "table": "a.csv"})
        >>> PlannedTask(task, ["cat", "dog"], (8, 2), (480, 640), (48, 64), batch_size=16).classes
        ['cat', 'dog']
    """

    found: FoundTask
    classes: list[str]
    """Class names in the order of the labels."""
    samples: tuple[int, int]
    """Number of train and test samples."""
    typical: tuple[int, int]
    """Median (H, W) of the images in pixels."""
    image_size: tuple[int, int]
    """(H, W) that images are resized to."""
    batch_size: int
    """Images per rank and micro-step."""

    @property
    def counted(self) -> str:
        """Number of its classes as text: ", 3 classes"; "" if it has none."""
        word = _WORDS.get(self.found.kind, ("class", "classes"))[len(self.classes) != 1]
        return f", {len(self.classes)} {word}" if self.classes else ""


@dataclass
class PlannedGroup:
    """A joint group of tasks.

    Example:
        >>> PlannedGroup(["seg", "depth"], {"format": "joint"}, None, (80, 20), (64, 64), 8, []).test is None
        True
    """

    tasks: list[str]
    """Names of its tasks."""
    train: dict[str, Any]
    """Source of the training data, keys as in the YAML file."""
    test: dict[str, Any] | None
    """Source of the test data; None: the training data is split."""
    samples: tuple[int, int]
    """Number of train and test images."""
    image_size: tuple[int, int]
    """(H, W) that images are resized to."""
    batch_size: int
    """Images per rank and micro-step."""
    notes: list[str]
    """What was assumed, one sentence each."""


def run_file(
    name: str,
    data_root: str,
    tasks: Mapping[str, PlannedTask],
    groups: Mapping[str, PlannedGroup],
    machine: Machine,
    gpu: bool,
    max_steps: int,
    command: str,
    file: str,
) -> str:
    """Return the text of the file.

    Args:
        name: name of the run.
        data_root: folder that the paths of the sources are relative to.
        tasks: {name: task}
        groups: {name: joint group}
        machine: settings of the machine.
        gpu: whether the machine has a GPU.
        max_steps: optimizer steps.
        command: the command that wrote the file.
        file: name of the file.
    """
    grouped = {task for group in groups.values() for task in group.tasks}
    sizes = [*(task.image_size for task in tasks.values()), *(group.image_size for group in groups.values())]
    longest = max(max(size) for size in sizes)
    lines = [
        f"# Written by `{command}`",
        "# Everything may be changed; docs/data-formats.md, docs/training.md and docs/recipes.md say how.",
        "#",
        f"#   allinone-ds check {file}      # read all data once, list every fault",
        f"#   allinone-ds preview {file}    # draw training samples as the model sees them",
        f"#   allinone-ds train {file}      # train, evaluate, and write runs/{name}",
        *_block({"name": name, "data_root": data_root}),
        *(_gpu_model() if gpu else _cpu_model(longest, machine.patch)),
        "tasks:",
    ]
    for task_name, task in tasks.items():
        lines += _task(task_name, task, gpu, task_name in grouped)
    lines += ["joint:"] if groups else []
    for group_name, group in groups.items():
        lines += _group(group_name, group)
    every = max(max_steps // 4, 1)
    trainer = {"max_steps": max_steps, "learning_rate": 5e-4 if gpu else 1.5e-3,
               "backbone_lr_factor": 0.1 if gpu else 1.0, "weight_decay": 0.05, "warmup_steps": 0.1,
               "lr_scheduler_type": "cosine", "logging_steps": 10, "save_strategy": "steps", "save_steps": every,
               "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": every,
               "load_best_model_at_end": True}  # fmt: skip
    if gpu:
        trainer["dataloader_num_workers"] = 4
    comments = {
        "max_steps": "optimizer steps; each runs one micro-batch of every task",
        "backbone_lr_factor": "0.1 suits a pretrained backbone" if gpu else "0.1 with a pretrained backbone",
        "warmup_steps": "a value below 1 is a fraction of the run",
        "load_best_model_at_end": "the checkpoint with the best mean of the tasks' main metrics",
    }
    lines += [
        "# Gradients of all tasks on the backbone are clipped to one norm, so that none drowns the others.",
        "balancer: {name: tbgc, max_norm: 0.1}",
        f"deepspeed: configs/deepspeed/zero2{'_bf16' if gpu else ''}.json",
        "trainer:",
        *(_with_comment(f"  {line}", comments.get(line.partition(":")[0])) for line in _block(trainer)),
    ]
    return "\n".join(lines) + "\n"


def _cpu_model(longest: int, patch: int) -> list[str]:
    return [
        "model:",
        "  backbone:",
        "    # A small ViT that trains from scratch on a CPU: no GPU was found. On a GPU, replace the lines below by",
        "    #   checkpoint: facebook/dinov2-small     # a hub name or a folder; its patches have 14 pixels",
        "    # set image_size of each task to larger multiples of 14, and trainer.backbone_lr_factor to 0.1.",
        "    stem: conv",
        "    out_indices: [3]",
        f"    config: {{hidden_size: 128, num_hidden_layers: 3, num_attention_heads: 4, patch_size: {patch}, "
        f"image_size: {longest}}}",
    ]


def _gpu_model() -> list[str]:
    return [
        "model:",
        "  backbone:",
        "    # Downloaded at the first start; a folder works too. Larger: facebook/dinov2-base, facebook/dinov2-large.",
        "    # Its patches have 14 pixels: both sides of image_size are multiples of 14.",
        "    checkpoint: facebook/dinov2-small",
    ]


def _group(name: str, group: PlannedGroup) -> list[str]:
    """Return the lines of a joint group."""
    h, w = group.image_size
    lines = [
        f"  {_flow(name)}:",
        "    # These tasks read the same images: one forward serves them all. A task with images of its own leaves",
        "    # this list and `labels`, and gets train, test, image_size and batch_size in `tasks`.",
    ]
    for note in group.notes:
        lines += _comment(f"NOT SURE: {note}")
    lines += [f"    {line}" for line in _block({"tasks": group.tasks})]
    lines += [
        f"    image_size: [{h}, {w}]",
        f"    batch_size: {group.batch_size}  # images per rank and step",
        f"    eval_batch_size: {4 * group.batch_size}",
        *(f"    {line}" for line in _block({"train": group.train})),
    ]
    if group.test is None:
        lines.append(_SPLIT_LINE)
    else:
        lines += [f"    {line}" for line in _block({"test": group.test})]
    lines.append(_AUGMENT_LINE)
    return lines


def _task(name: str, task: PlannedTask, gpu: bool, in_group: bool) -> list[str]:
    found = task.found
    split = found.test is None
    train, test = task.samples
    counts = f"{train} train and {test} test images{' after the split' if split else ''}"
    lines = [f"  {_flow(name)}:", f"    # {found.layout}: {counts}{task.counted}"]
    if found.classes is None and task.classes:
        lines += _comment(f"{_WORDS.get(found.kind, ('', 'classes'))[1]}: " + _shown(task.classes))
    for note in found.notes:
        lines += _comment(f"NOT SURE: {note}")
    lines.append(f"    type: {found.kind}")
    options = {**found.options, **({} if gpu else _SMALL.get(found.kind, {}))}
    if options:
        small = "" if gpu or found.kind not in _SMALL else "a small head; remove its sizes on a GPU"
        lines += [f"    {_with_comment(line, small)}" for line in _block({"options": options})]
    H, W = task.typical
    h, w = task.image_size
    if found.classes is not None:
        lines += [f"    {line}" for line in _block({"classes": found.classes})]
    if in_group:
        return lines
    lines += [
        f"    image_size: [{h}, {w}]  # height, width; the images have {H} x {W} (median)",
        f"    batch_size: {task.batch_size}  # images per rank and step",
        f"    eval_batch_size: {4 * task.batch_size}",
        *(f"    {line}" for line in _block({"train": found.train})),
    ]
    if split:
        lines.append(_SPLIT_LINE)
    else:
        lines += [f"    {line}" for line in _block({"test": found.test})]
    lines.append(_AUGMENT_LINE)
    return lines


def _comment(text: str) -> list[str]:
    """Return a comment in lines of limited length."""
    lines, line = [], "    #"
    for word in text.split():
        if len(line) + len(word) + 1 > _WIDTH and line.strip(" #"):
            lines.append(line)
            line = "    #  "
        line += f" {word}"
    return [*lines, line]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names) - 20} more)" if len(names) > 20 else "")


def _with_comment(line: str, comment: str | None) -> str:
    return f"{line}  # {comment}" if comment else line


def _flow(value: Any) -> str:
    """Return a value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _block(content: Mapping[str, Any]) -> list[str]:
    """Return a mapping in lines of YAML: a mapping or list in one line if it is short."""
    lines = []
    for key, value in content.items():
        line = f"{_flow(key)}: {_flow(value)}" if isinstance(value, dict | list) else _flow({key: value})[1:-1]
        if len(line) <= _WIDTH or not isinstance(value, dict | list):
            lines.append(line)
        elif isinstance(value, dict):
            lines += [f"{key}:", *(f"  {inner}" for inner in _block(value))]
        else:
            lines += [f"{key}:", *(f"  - {_flow(item)}" for item in value)]
    return lines
