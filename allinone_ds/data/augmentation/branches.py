"""Branches of augmentation as a run's file gives them: read strictly, conflicts refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from allinone_ds.data.augmentation.catalog import CONFLICTS, conflicting, named
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, explain

Entry = str | dict[str, Any]
"""A transform's name, or {name: {option: value}}."""

_ONLY = "all"  # the branch that a plain list becomes


class Branch(Strict):
    """Transforms that a sample goes through together."""

    probability: float = Field(gt=0, le=1)
    """Share of the samples that take this branch; those of all branches add up to 1."""
    transforms: list[Entry]
    """In the order they run. torchvision's v2 transforms, and those of `allinone_ds.data.catalog.OWN`."""


class AugmentConfig(Strict):
    """Every sample goes through one branch, drawn by its probability."""

    branches: dict[str, Branch] = Field(min_length=1)
    """By name."""
    conflicts: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of transforms (or families) that no branch may hold both of, beside those of the package."""

    @model_validator(mode="after")
    def _fits(self) -> AugmentConfig:
        total = sum(branch.probability for branch in self.branches.values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            shown = ", ".join(f"{name} {branch.probability:g}" for name, branch in self.branches.items())
            raise ConfigError(f"probabilities of the branches add up to {total:g} ({shown}); they must add up to 1")
        forbidden = conflicting([*CONFLICTS, *self.conflicts])
        for name, branch in self.branches.items():
            for one, two in _meetings(branch.transforms, self.place(name)):
                if frozenset((one, two)) in forbidden:
                    raise ConfigError(
                        f"{self.place(name)}: {one} and {two} stand in one branch, and they hurt each other; "
                        "put them in different branches"
                    )
        return self

    def place(self, name: str) -> str:
        """How messages call a branch; a plain list of transforms has no name of its own."""
        return "augment" if list(self.branches) == [_ONLY] else f"branches.{name}"


def _one_branch(value: Any) -> Any:
    """A plain list of transforms is one branch that every sample takes."""
    if isinstance(value, list | tuple):
        return {"branches": {_ONLY: {"probability": 1.0, "transforms": list(value)}}}
    return value


Augment = Annotated[AugmentConfig, BeforeValidator(_one_branch)]
"""What a config may give: branches, or a list of transforms as the only one."""


def as_augment(value: Any) -> AugmentConfig:
    """Branches from what a config holds: a list of transforms, a mapping with `branches`, or the class itself.

    Raises:
        ConfigError: one line a mistake.
    """
    if isinstance(value, AugmentConfig):
        return value
    try:
        return AugmentConfig.model_validate(_one_branch(value))
    except ValidationError as error:
        raise ConfigError(explain(error, AugmentConfig, "augment")) from error


def _meetings(entries: Sequence[Any], where: str) -> Iterator[tuple[str, str]]:
    """Every two transforms that one sample can go through; alternatives of a RandomChoice never meet."""
    groups = []
    for number, entry in enumerate(entries):
        here = f"{where}[{number}]"
        if isinstance(entry, list | tuple):
            yield from _meetings(entry, here)
            groups.append(_all_names(entry, here))
            continue
        name, options = named(entry, here)
        inner = options.get("transforms", [])
        if name == "RandomChoice":
            for place, alternative in enumerate(inner):
                yield from _meetings([alternative], f"{here}.transforms[{place}]")
        else:
            yield from _meetings(inner, f"{here}.transforms")
        groups.append([name, *_all_names(inner, f"{here}.transforms")])
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            yield from ((one, two) for one in group for two in other)


def _all_names(entries: Sequence[Any], where: str) -> list[str]:
    found: list[str] = []
    for number, entry in enumerate(entries):
        here = f"{where}[{number}]"
        if isinstance(entry, list | tuple):
            found += _all_names(entry, here)
        else:
            name, options = named(entry, here)
            found += [name, *_all_names(options.get("transforms", []), f"{here}.transforms")]
    return found
