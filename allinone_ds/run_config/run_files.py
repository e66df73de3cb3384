"""The files that describe the weights in a run's folder: config.yaml and model.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from allinone_ds.atomic_file import write_atomically
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.run_folder.names import CONFIG_FILE, MODEL_FILE
from allinone_ds.strict import Strict


def save_config(config: RunConfig, folder: str | Path) -> Path:
    """Write the resolved configuration to a folder, for `load_config`; return the path of the file.

    Whether this start resumed is left out: a run that is based on the file would look for a checkpoint of its own.
    """
    target = Path(folder) / CONFIG_FILE
    content = config.model_dump(mode="json")
    content["trainer"].pop("resume_from_checkpoint", None)
    write_atomically(target, yaml.safe_dump(content, sort_keys=False, width=110))
    return target


class ModelFacts(Strict):
    """What is needed, in addition to configuration and weights, to build the model of a run without its data."""

    backbone: BackboneConfig
    """Backbone configuration with all sizes, so that the checkpoint it started from is not needed."""
    classes: dict[str, list[str]]
    """{task: class names}."""


def save_run_files(config: RunConfig, facts: ModelFacts, folder: str | Path) -> None:
    """Write config.yaml and model.json, which are needed to use the weights in the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    write_atomically(Path(folder) / MODEL_FILE, facts.model_dump_json(indent=1) + "\n")


def read_run_files(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, ModelFacts]:
    """Return the configuration and model facts of a run.

    Args:
        folder: folder of the run or of one of its checkpoints.
        overrides: dotted overrides of the configuration.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no {name}; give the folder of a run or of one of its checkpoints")
    facts = ModelFacts.model_validate_json((folder / MODEL_FILE).read_text())
    return load_config(folder / CONFIG_FILE, overrides), facts


class RunFiles(RunCallback):
    """Writes config.yaml and model.json to the run's folder and to every checkpoint.

    Args:
        config: configuration of the run.
        facts: further facts that are needed to build its model.
    """

    def __init__(self, config: RunConfig, facts: ModelFacts) -> None:
        self.config = config
        self.facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.on_checkpoint(Path(args.output_dir))

    def on_checkpoint(self, folder: Path) -> None:
        save_run_files(self.config, self.facts, folder)
