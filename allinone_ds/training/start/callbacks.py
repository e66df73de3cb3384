"""Callbacks of the Trainer that a run's file names."""

from __future__ import annotations

import pkgutil
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.schema import RunConfig


def configured_callbacks(config: RunConfig) -> list[TrainerCallback]:
    """Return new callbacks, as `callbacks` and `early_stopping` of a run say.

    Raises:
        ConfigError: a name that cannot be imported, that is no callback, or whose arguments are wrong.

    Example:
        >>> from allinone_ds.run_config.schema import load_config
        >>> run = load_config("configs/runs/demo.yaml", ["callbacks=[transformers.ProgressCallback]"])
        >>> [type(callback).__name__ for callback in configured_callbacks(run)]
        ['ProgressCallback']
    """
    made = [_callback(name, options) for entry in config.callbacks for name, options in entry.items()]
    if config.early_stopping is not None:
        stop = config.early_stopping
        made.append(EarlyStoppingCallback(stop.patience, stop.threshold))
    return made


def _callback(name: str, options: dict[str, Any]) -> TrainerCallback:
    try:
        cls = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"callbacks.{name}: {error}; give module.Class of an importable module") from error
    if not (isinstance(cls, type) and issubclass(cls, TrainerCallback)):
        raise ConfigError(f"callbacks.{name}: it is no subclass of transformers.TrainerCallback")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"callbacks.{name}: {error}") from error
