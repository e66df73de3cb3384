"""Strictly read configuration: unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from allinone_ds.errors import ConfigError


class Strict(BaseModel):
    """Base of every configuration class: unknown fields are refused, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """A half sentence that names the nearest valid name (when one is near) and all that is allowed.

    Args:
        found: the name somebody wrote.
        allowed: every valid name.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every configuration class that an annotation such as `dict[str, A]` or `A | B | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields that may stand where `path` (without its last part) points, as far as types tell."""
    candidates = [model]
    for part in path:
        fields = [c.model_fields[str(part)] for c in candidates if str(part) in c.model_fields]
        tagged = [
            c for c in candidates if str(part) in _tags(c)
        ]  # pydantic puts the tag of a union's member in the path
        if fields:
            candidates = _models_in(fields[0].annotation)
        elif tagged:
            candidates = tagged
    return list(candidates[0].model_fields) if candidates else []


def _tags(model: type[BaseModel]) -> list[str]:
    """The values of the model's Literal fields, by which a union tells its members apart."""
    return [
        str(v)
        for f in model.model_fields.values()
        if get_origin(f.annotation) is Literal
        for v in get_args(f.annotation)
    ]


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Turn a pydantic error into one line a mistake: dotted field, what was found, what is allowed.

    Args:
        error: what pydantic raised.
        model: the class that was being filled, for its valid names.
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
        elif isinstance(item.get("ctx", {}).get("error"), ConfigError):  # says all there is to say
            lines.append(f"{where}: {dotted}: {item['ctx']['error']}" if dotted else f"{where}: {item['ctx']['error']}")
        else:
            lines.append(f"{where}: '{dotted}' = {item['input']!r}: {item['msg']}")
    return "\n".join(lines)
