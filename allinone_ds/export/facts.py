"""allinone.json: what an exported folder says about its model, beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from allinone_ds.data.augmentation.transforms import MEAN, STD
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.strict import Strict, explain

FACTS_FILE = "allinone.json"


class Preprocessing(Strict):
    """From a picture to the network's input; what another runtime has to do itself."""

    resize: Literal["bilinear, antialiased, to image_size, without padding"] = (
        "bilinear, antialiased, to image_size, without padding"
    )
    channels: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = MEAN
    """Of R, G, B on the scale 0..1."""
    std: tuple[float, float, float] = STD
    """Of R, G, B on the scale 0..1."""


class ExportedTask(Strict):
    """One head."""

    type: str
    """A key of `allinone_ds.tasks.TASKS`, or "module:Class" for a task of one's own."""
    head: str | None
    options: dict[str, Any]
    image_size: tuple[int, int]
    """(H, W) of the network's input in pixels."""
    classes: list[str]
    """Class names by label."""


class ExportFacts(Strict):
    """All of an exported model but its weights."""

    version: Literal[1] = 1
    """Of this file's layout."""
    backbone: BackboneConfig
    tasks: dict[str, ExportedTask] = Field(min_length=1)
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)

    def save(self, folder: Path) -> None:
        (folder / FACTS_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ExportFacts:
        """The facts of an exported folder.

        Raises:
            ConfigError: a fault in the file, or a normalisation that this release does not do.
        """
        file = folder / FACTS_FILE
        try:
            facts = cls.model_validate_json(file.read_text())
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(file))) from error
        if facts.preprocessing != Preprocessing():
            raise ConfigError(f"{file}: preprocessing is {facts.preprocessing}, this release does {Preprocessing()}")
        return facts
