"""Data that a Python script opened itself: what a run's folder can say about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from allinone_ds.data.base import SampleDataset, SourceConfig
from allinone_ds.errors import DataError


class ScriptSource(SourceConfig):
    """Data of a script that uses `AllInOneTrainer`, in the config.yaml that the Trainer writes. It cannot be opened.

    Example:
        >>> source = ScriptSource(format="script", dataset="shades.Shades", samples=6, reason="its class is not known")
        >>> source.samples
        6
    """

    format: Literal["script"]
    dataset: str
    """Module and class of the dataset."""
    samples: int
    """Number of its samples."""
    reason: str
    """Why the folder does not say how to open it."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        raise DataError(
            f"the data ({self.dataset}, {self.samples} samples) came from a Python script, and {self.reason}; call "
            "trainer.evaluate() in that script, or write a source with a format into config.yaml of the run's folder"
        )
