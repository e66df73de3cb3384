"""Branches of augmentation in a config, validated when the config is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from allinone_ds.data.augmentation.catalog import CONFLICTS, conflicting_pairs, parse_entry
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, explain

Entry = str | dict[str, Any]
"""The name of a transform, or {name: {option: value}}."""

_ONLY = "all"  # name of the branch that a plain list becomes


class Branch(Strict):
    """Transforms that are applied to a sample together.

    Example:
        >>> Branch(probability=0.2, transforms=["LargeScaleJitter", {"ColorRandAugment": {"num_ops": 2}}]).probability
        0.2
    """

    probability: float = Field(gt=0, le=1)
    """Probability that a sample goes through this branch; those of all branches add up to 1."""
    transforms: list[Entry]
    """Transforms in the order they run: those of torchvision v2, and `allinone_ds.data.augmentation.catalog.OWN`."""


class AugmentConfig(Strict):
    """Branches of augmentation; each sample goes through one of them, drawn by probability.

    Example:
        >>> config = AugmentConfig(branches={
        ...     "hard": {"probability": 0.8, "transforms": ["Mosaic", "MixUp"]},
        ...     "easy": {"probability": 0.2, "transforms": ["LargeScaleJitter"]},
        ... })
        >>> config.branches["hard"].transforms
        ['Mosaic', 'MixUp']
    """

    branches: dict[str, Branch] = Field(min_length=1)
    """The branches by name."""
    conflicts: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of transforms, or families, that no branch may contain both of, in addition to those of the package."""

    @model_validator(mode="after")
    def _validate(self) -> AugmentConfig:
        total = sum(branch.probability for branch in self.branches.values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            shown = ", ".join(f"{name} {branch.probability:g}" for name, branch in self.branches.items())
            raise ConfigError(f"probabilities of the branches add up to {total:g} ({shown}); they must add up to 1")
        forbidden = conflicting_pairs([*CONFLICTS, *self.conflicts])
        for name, branch in self.branches.items():
            for one, two in _combined_pairs(branch.transforms, self.location(name)):
                if frozenset((one, two)) in forbidden:
                    raise ConfigError(
                        f"{self.location(name)}: {one} and {two} are in conflict and must not be in one branch; "
                        "put them in different branches"
                    )
        return self

    def location(self, name: str) -> str:
        """Return what messages call a branch; a plain list of transforms has no name."""
        return "augment" if list(self.branches) == [_ONLY] else f"branches.{name}"


def _one_branch(value: Any) -> Any:
    """Turn a plain list of transforms into one branch for all samples."""
    if isinstance(value, list | tuple):
        return {"branches": {_ONLY: {"probability": 1.0, "transforms": list(value)}}}
    return value


Augment = Annotated[AugmentConfig, BeforeValidator(_one_branch)]
"""What a config may give: branches, or a list of transforms for all samples."""


def as_augment(value: Any) -> AugmentConfig:
    """Return the branches of a list of transforms, a mapping with `branches`, or an `AugmentConfig`.

    Raises:
        ConfigError: one line per mistake.
    """
    if isinstance(value, AugmentConfig):
        return value
    try:
        return AugmentConfig.model_validate(_one_branch(value))
    except ValidationError as error:
        raise ConfigError(explain(error, AugmentConfig, "augment")) from error


def _combined_pairs(entries: Sequence[Any], where: str) -> Iterator[tuple[str, str]]:
    """Yield every two transforms that can be applied to one sample; alternatives of a RandomChoice cannot."""
    groups = []
    for number, entry in enumerate(entries):
        location = f"{where}[{number}]"
        if isinstance(entry, list | tuple):
            yield from _combined_pairs(entry, location)
            groups.append(_all_names(entry, location))
            continue
        name, options = parse_entry(entry, location)
        inner = options.get("transforms", [])
        if name == "RandomChoice":
            for index, alternative in enumerate(inner):
                yield from _combined_pairs([alternative], f"{location}.transforms[{index}]")
        else:
            yield from _combined_pairs(inner, f"{location}.transforms")
        groups.append([name, *_all_names(inner, f"{location}.transforms")])
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            yield from ((one, two) for one in group for two in other)


def _all_names(entries: Sequence[Any], where: str) -> list[str]:
    """Return the names of all entries and of those nested in them."""
    names: list[str] = []
    for number, entry in enumerate(entries):
        location = f"{where}[{number}]"
        if isinstance(entry, list | tuple):
            names += _all_names(entry, location)
        else:
            name, options = parse_entry(entry, location)
            names += [name, *_all_names(options.get("transforms", []), f"{location}.transforms")]
    return names
