"""ONNX graphs of single tasks: from normalised pixels to raw predictions, for any batch size."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.model import AllInOneModel

PACKAGES = ("onnx", "onnxscript")
INPUT = "pixel_values"


class TaskGraph(nn.Module):
    """One task as a function of pixels; it returns the tensors of the task's `export_outputs`.

    Args:
        model: the model in evaluation mode.
        task: name of the task.

    Attributes:
        names: names of the outputs in their order, known after the first forward.
    """

    def __init__(self, model: AllInOneModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.names: list[str] = []

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(self.task, pixel_values)
        named = tasks_of(self.model)[self.task].export_outputs(outputs)
        self.names = list(named)
        return tuple(named.values())


def need_onnx() -> None:
    """Check that the packages of the exporter are installed.

    Raises:
        ConfigError: names the missing packages and the command that installs them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx needs {' and '.join(missing)}: pip install 'allinone_ds[onnx]'")


@torch.no_grad()
def write_onnx(model: AllInOneModel, task: str, target: Path) -> Path:
    """Write the graph of one task and return the file.

    Its input is `pixel_values` (B, 3, H, W), normalised, float32, where (H, W) is the task's image_size.

    Args:
        model: the model in evaluation mode.
        task: name of the task.
        target: the file to write.
    """
    graph = TaskGraph(model, task).eval()
    H, W = tasks_of(model)[task].image_size
    example = torch.zeros(2, 3, H, W, device=next(model.parameters()).device)
    graph(example)  # sets graph.names
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silence("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter's warnings are about its own code
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
def _silence(*names: str) -> Iterator[None]:
    """Show only errors of these loggers inside this context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
