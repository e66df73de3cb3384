"""The transforms that a config may name, which of them are in conflict, and how an entry becomes a transform."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torchvision.transforms import v2

from allinone_ds.data.augmentation import colour, geometry, weather
from allinone_ds.data.dense_maps import EMPTY
from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean

OWN: dict[str, type[v2.Transform]] = {
    cls.__name__: cls
    for cls in (
        colour.ColorJitter, colour.ColorRandAugment, colour.HSVJitter,
        geometry.LargeScaleJitter, geometry.MixUp, geometry.Mosaic,
        weather.Fog, weather.Frost, weather.Rain, weather.Spatter,
    )
}  # fmt: skip
"""Transforms that torchvision does not have, or that are faster here."""

# Not for a config: they transform batches, return several images, take code as an option, or leave uint8 RGB.
_REFUSED = {
    "Transform", "CutMix", "MixUp", "FiveCrop", "TenCrop", "Lambda", "LinearTransformation",
    "Normalize", "ToDtype", "ConvertImageDtype", "PILToTensor", "ToImage", "ToPILImage", "ToPureTensor",
    "ToTensor", "SanitizeKeyPoints", "ClampKeyPoints", "ConvertBoundingBoxFormat", "SetClampingMode",
    "UniformTemporalSubsample", "Compose", "SanitizeBoundingBoxes", "Grayscale",
}  # fmt: skip
NAMES: dict[str, type[v2.Transform]] = {
    name: cls
    for name, cls in vars(v2).items()
    if isinstance(cls, type) and issubclass(cls, v2.Transform) and name not in _REFUSED
} | OWN
"""Every transform that a config may name."""

PIXELS_ONLY = (
    colour.ColorJitter,
    colour.PixelTransform,
    *(
        getattr(v2, name)
        for name in NAMES
        if name not in OWN
        and (
            getattr(v2, name).__module__.endswith("._color")
            or name in ("GaussianBlur", "GaussianNoise", "JPEG", "RandomErasing")
        )
    ),
)
"""Transforms that change only pixel values, not the position of boxes and masks."""

_AUTO = ("AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    # torchvision moves the pixels, but not boxes and masks
    **dict.fromkeys(_AUTO, ("classification", "retrieval", "attributes", "regression", "joint")),
    "RandomIoUCrop": ("detection",),
    "Mosaic": ("detection", "segmentation"),
    "MixUp": ("detection",),
}
"""Kinds of data that a transform supports, if it does not support all. In a joint group it must support each kind."""

NOT_FOR: dict[str, tuple[str, ...]] = {"RandomPerspective": ("normals",), "ElasticTransform": ("normals",)}
"""Kinds of data that a transform cannot move correctly."""
OPTIONS_NOT_FOR: dict[tuple[str, str], tuple[str, ...]] = {("RandomAffine", "shear"): ("normals",)}
"""Kinds of data that a transform cannot move correctly with one of its options."""

FAMILIES: dict[str, tuple[str, ...]] = {"auto-augment": (*_AUTO, "ColorRandAugment")}
"""Names for several transforms, which conflicts may use."""
CONFLICTS: tuple[tuple[str, str], ...] = (("Mosaic", "auto-augment"), ("MixUp", "auto-augment"))
"""Pairs (transform or family) that no branch may contain both of, since together they degrade training."""


def conflicting_pairs(pairs: Iterable[tuple[str, str]]) -> set[frozenset[str]]:
    """Return every pair of transforms in conflict, with families replaced by their members.

    Raises:
        ConfigError: a name is neither a transform nor a family.
    """
    conflicts = set()
    for pair in pairs:
        for name in pair:
            if name not in NAMES and name not in FAMILIES:
                hint = did_you_mean(name, [*NAMES, *FAMILIES])
                raise ConfigError(f"conflicts: '{name}' is neither a transform nor a family; {hint}")
        one, two = (FAMILIES.get(name, (name,)) for name in pair)
        conflicts |= {frozenset((a, b)) for a in one for b in two}
    return conflicts


def parse_entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an entry, which is a name or {name: {option: value}}.

    Raises:
        ConfigError: the entry is neither, the name is unknown, or `transforms` is not a list.
    """
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
    elif isinstance(entry, str):
        name, options = entry, {}
    else:
        raise ConfigError(f"{where}: {entry!r} must be the name of a transform or {{name: {{option: value}}}}")
    if name not in NAMES:
        raise ConfigError(f"{where}: there is no augmentation '{name}'; {did_you_mean(str(name), NAMES)}")
    options = dict(options or {})
    if not isinstance(options.get("transforms", []), list | tuple):
        raise ConfigError(f"{where}: {name}: transforms is {options['transforms']!r}; it must be a list of entries")
    return name, options


def build_transform(
    entry: Any, size: tuple[int, int], where: str, kind: str | None = None, nested: bool = False
) -> v2.Transform:
    """Return the v2 transform of an entry.

    Args:
        entry: a name, {name: {option: value}}, or, within another entry, a list of these.
        size: (H, W) in pixels, the default of the options `size` and `target_size`.
        where: location of the entry, for messages.
        kind: kind of the data; None allows every transform.
        nested: whether the entry is within another one.

    Raises:
        ConfigError: names the location, what was found and what is allowed.
    """
    if isinstance(entry, list | tuple):  # several transforms in sequence
        return v2.Compose([build_transform(e, size, f"{where}[{n}]", kind, nested=True) for n, e in enumerate(entry)])
    name, options = parse_entry(entry, where)
    cls = NAMES[name]
    if kind is not None and kind not in ONLY_FOR.get(name, (kind,)):
        hint = ", or use ColorRandAugment, which moves no pixels" if name in _AUTO else ""
        supported = ", ".join(ONLY_FOR[name][:-1]) + " and " * (len(ONLY_FOR[name]) > 1) + ONLY_FOR[name][-1]
        raise ConfigError(f"{where}: {name} supports only {supported}, the data is {kind}; remove the transform{hint}")
    if kind in NOT_FOR.get(name, ()):
        raise ConfigError(f"{where}: {name} cannot move {kind} correctly; remove the transform")
    for (owner, option), kinds in OPTIONS_NOT_FOR.items():
        if name == owner and kind in kinds and options.get(option):
            raise ConfigError(f"{where}: {name} cannot move {kind} correctly with '{option}'; remove the option")
    if nested and issubclass(cls, geometry.MultiSampleTransform):
        raise ConfigError(
            f"{where}: {name} combines several samples and must not be nested; list it directly in a branch, "
            "with its option p for the probability"
        )
    allowed = [p for p in inspect.signature(cls).parameters if p not in ("self", "args", "kwargs")]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"{where}: {name} has no option '{option}'; {did_you_mean(str(option), allowed)}")
    given = dict(options)
    if "transforms" in options:
        options["transforms"] = [
            build_transform(e, size, f"{where}.transforms[{n}]", kind, nested=True)
            for n, e in enumerate(options["transforms"])
        ]
    if "interpolation" in options:
        modes = {mode.value: mode for mode in v2.InterpolationMode}
        mode = options["interpolation"]
        if mode not in modes:
            raise ConfigError(f"{where}: {name}: interpolation is '{mode}'; {did_you_mean(str(mode), modes)}")
        options["interpolation"] = modes[mode]
    for option in ("size", "target_size"):
        if option in allowed and option not in options:
            options[option] = size
    if "pad_if_needed" in allowed:
        options.setdefault("pad_if_needed", True)  # otherwise an image smaller than `size` would end the run
    if "fill" in allowed and name not in OWN:
        fill = options.get("fill", 0)
        options["fill"] = {**EMPTY, "others": 0 if fill is None else fill}
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name} cannot be constructed with {given}: {error}") from None
