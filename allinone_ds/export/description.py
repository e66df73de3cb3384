"""allinone.json: the description of the model in an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from allinone_ds.data.augmentation.transforms import MEAN, STD
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.models.lora import LoraOptions
from allinone_ds.strict import Strict, explain

DESCRIPTION_FILE = "allinone.json"


class Preprocessing(Strict):
    """Preprocessing from an image to the network's input, for use of the model outside of this package."""

    resize: Literal["bilinear, antialiased, to image_size, without padding"] = (
        "bilinear, antialiased, to image_size, without padding"
    )
    channels: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = MEAN
    """Of R, G, B on the scale 0..1."""
    std: tuple[float, float, float] = STD
    """Of R, G, B on the scale 0..1."""


class ExportedTask(Strict):
    """One task and its head."""

    type: str
    """A key of `allinone_ds.tasks.TASKS`, or "module:Class" for a task defined elsewhere."""
    head: str | None
    options: dict[str, Any]
    image_size: tuple[int, int]
    """(H, W) of the network's input in pixels."""
    classes: list[str]
    """Class names in the order of labels."""
    lora: LoraOptions | None = None
    """The task's own adapters in the backbone, where they are not merged into it."""


class ModelDescription(Strict):
    """Everything about an exported model except its weights."""

    version: Literal[1] = 1
    """Version of the file's layout."""
    backbone: BackboneConfig
    tasks: dict[str, ExportedTask] = Field(min_length=1)
    joint: dict[str, list[str]] = Field(default_factory=dict)
    """{joint group: its tasks}, which one forward of the backbone serves."""
    lora: LoraOptions | None = None
    """Adapters in the backbone that all tasks share, where they are not merged into it."""
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)

    def save(self, folder: Path) -> None:
        """Write allinone.json."""
        (folder / DESCRIPTION_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ModelDescription:
        """Read the description of an exported folder.

        Raises:
            ConfigError: the file is not valid, or its preprocessing differs from that of this release.
        """
        file = folder / DESCRIPTION_FILE
        try:
            description = cls.model_validate_json(file.read_text())
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(file))) from error
        if description.preprocessing != Preprocessing():
            raise ConfigError(
                f"{file}: preprocessing is {description.preprocessing}, this release supports only {Preprocessing()}; "
                "export the run with this release"
            )
        return description
