"""Strict configuration classes: an unknown key is an error that suggests the nearest valid key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from allinone_ds.errors import ConfigError


class Strict(BaseModel):
    """Base class of all configuration classes: unknown fields are refused, and assigned values are validated.

    Example:
        >>> class Optimizer(Strict):
        ...     learning_rate: float = 1e-3
        >>> Optimizer(learning_rate="0.1").learning_rate
        0.1
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def expand_path(given: str | Path) -> str:
    """Return a path with `~`, `~name`, `$VAR` and `${VAR}` replaced.

    Every path of a configuration and of the command line passes through here once, where it is read.

    Raises:
        ConfigError: a variable is not set in the environment.

    Example:
        >>> import os
        >>> os.environ["SCRATCH"] = "/scratch/me"
        >>> expand_path("$SCRATCH/runs")
        '/scratch/me/runs'
    """
    path = os.path.expandvars(os.path.expanduser(str(given)))
    unset = re.search(r"\$\w+|\$\{[^}]*\}", path)
    if unset and unset[0] in str(given):
        raise ConfigError(f"{given}: {unset[0]} is not set in the environment; set it, or write the path without it")
    return path


def _expand(given: Any) -> Any:
    return expand_path(given) if isinstance(given, str | Path) else given


PathText = Annotated[str, BeforeValidator(_expand)]
"""Type of a path in a configuration, as a string; see `expand_path`."""
ConfigPath = Annotated[Path, BeforeValidator(_expand)]
"""Type of a path in a configuration, as a Path; see `expand_path`."""


def check_task_name(name: str) -> None:
    """Refuse a name that cannot be part of the names of files, modules, logs and overrides.

    Raises:
        ConfigError: the name has other characters than letters, digits, _ and -.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ConfigError(f"tasks: '{name}' cannot name a task; use letters, digits, _ and -, for example 'lanes'")


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return the end of an error message: the nearest valid name, if there is a near one, and all valid names.

    Args:
        found: the name that is not valid.
        allowed: all valid names.

    Example:
        >>> did_you_mean("segm", ["det", "seg"])
        "did you mean 'seg'? allowed: det, seg"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return all configuration classes in an annotation such as `dict[str, A]` or `A | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the names of the fields that are valid below `path`, as far as the annotations tell."""
    candidates = [model]
    for part in path:
        fields = [c.model_fields[str(part)] for c in candidates if str(part) in c.model_fields]
        tagged = [c for c in candidates if str(part) in _tags(c)]  # the path holds the tag of a union's member
        if fields:
            candidates = _models_in(fields[0].annotation)
        elif tagged:
            candidates = tagged
    return list(candidates[0].model_fields) if candidates else []


def _tags(model: type[BaseModel]) -> list[str]:
    """Return the values of the model's Literal fields, by which a union distinguishes its members."""
    return [
        str(v)
        for f in model.model_fields.values()
        if get_origin(f.annotation) is Literal
        for v in get_args(f.annotation)
    ]


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Return one line per mistake in a pydantic error: dotted field, what was found, what is allowed.

    Args:
        error: the error that pydantic raised.
        model: the class that was validated.
        where: the file or object that was read.
    """
    lines = []
    for item in error.errors():
        path = item["loc"]
        dotted = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            hint = did_you_mean(str(path[-1]), _fields_at(model, path[:-1]))
            lines.append(f"{where}: unknown key '{dotted}'; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: '{dotted}' is missing; add it")
        elif isinstance(item.get("ctx", {}).get("error"), ConfigError):
            message = str(item["ctx"]["error"])
            named = not dotted or message.startswith(f"{dotted}.")  # the message says where
            lines.append(f"{where}: {message}" if named else f"{where}: {dotted}: {message}")
        else:
            lines.append(f"{where}: '{dotted}' = {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def dotted_values(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys.

    Example:
        >>> dotted_values({"trainer": {"max_steps": 4}, "name": "demo"})
        {'trainer.max_steps': 4, 'name': 'demo'}
    """
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(dotted_values(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found
