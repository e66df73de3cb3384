"""ONNX graphs of single tasks: from normalised pixels to raw predictions, any batch size."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.model import AllInOneModel
from allinone_ds.models.mask2former import Mask2FormerSegmenter
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.segmentation import SegmentationTask

PACKAGES = ("onnx", "onnxscript")
INPUT = "pixel_values"


class TaskGraph(nn.Module):
    """One task as a function of pixels.

    Args:
        model: in evaluation mode.
        task: its name.

    Attributes:
        names: of the outputs, in their order. Detection: "boxes" (B, A, 4) XYXY in pixels of the network's input and
            "scores" (B, A, K), before threshold and NMS. Mask2Former: "scores" (B, K, h, w). Other tasks: the tensors
            of their `ModelOutput`, "logits" for segmentation (B, K, h, w) and classification (B, K).
    """

    def __init__(self, model: AllInOneModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.names: list[str] = []

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(self.task, pixel_values)
        task: Any = self.model.tasks[self.task]
        if isinstance(task, DetectionTask):
            boxes, scores = task.detector.decode(outputs)
            named = {"boxes": boxes, "scores": scores}
        elif isinstance(task, SegmentationTask) and isinstance(task.segmenter, Mask2FormerSegmenter):
            named = {"scores": task.segmenter.scores(outputs)}
        else:
            named = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        self.names = list(named)
        return tuple(named.values())


def need_onnx() -> None:
    """Raises a `ConfigError` that says what to install when the exporter's packages are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx needs {' and '.join(missing)}: pip install 'allinone_ds[onnx]'")


@torch.no_grad()
def write_onnx(model: AllInOneModel, task: str, target: Path) -> Path:
    """Write one task's graph; its input is `pixel_values` (batch, 3, H, W), float32, H and W the task's image_size.

    Args:
        model: in evaluation mode.
        task: its name.
        target: the file.
    """
    graph = TaskGraph(model, task).eval()
    H, W = tasks_of(model)[task].image_size
    example = torch.zeros(2, 3, H, W, device=next(model.parameters()).device)
    graph(example)  # names its outputs
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter speaks of its own insides
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[INPUT],
            output_names=graph.names,
            verbose=False,
        )
        assert program is not None
        program.save(target)
    return target


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
