"""Which augmentations a config may name, which must not meet in one branch, and how an entry becomes a transform."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation import colour as colors
from allinone_ds.data.augmentation import geometry, weather
from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean

OWN: dict[str, type[v2.Transform]] = {
    cls.__name__: cls
    for cls in (
        colors.ColorJitter, colors.ColorRandAugment, colors.HSVJitter,
        geometry.LargeScaleJitter, geometry.MixUp, geometry.Mosaic,
        weather.Fog, weather.Frost, weather.Rain, weather.Spatter,
    )
}  # fmt: skip
"""What torchvision lacks, or takes more time for."""

# Not for a config: they work on whole batches, give several pictures, take code, or leave uint8 RGB.
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
"""Every augmentation that a config may name."""

PIXELS_ONLY = (
    colors.ColorJitter,
    colors.PixelTransform,
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
"""Those that leave boxes and masks where they are."""

_AUTO = ("AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_AUTO, ("classification",)),  # torchvision's move the pixels without boxes and masks
    "RandomIoUCrop": ("detection",),
    "Mosaic": ("detection", "segmentation"),
    "MixUp": ("detection",),
}
"""Kinds of data that a transform is for, where it is not for all."""

FAMILIES: dict[str, tuple[str, ...]] = {"auto-augment": (*_AUTO, "ColorRandAugment")}
"""Names for several transforms at once, to be used in conflicts."""
CONFLICTS: tuple[tuple[str, str], ...] = (("Mosaic", "auto-augment"), ("MixUp", "auto-augment"))
"""Pairs (transform or family) that hurt each other, so that no branch may hold both."""


def conflicting(pairs: Iterable[tuple[str, str]]) -> set[frozenset[str]]:
    """Every pair of transforms that must not meet, families spelled out.

    Raises:
        ConfigError: a name is neither a transform nor a family.
    """
    found = set()
    for pair in pairs:
        for name in pair:
            if name not in NAMES and name not in FAMILIES:
                raise ConfigError(f"conflicts: there is no '{name}'; {did_you_mean(name, [*NAMES, *FAMILIES])}")
        one, two = (FAMILIES.get(name, (name,)) for name in pair)
        found |= {frozenset((a, b)) for a in one for b in two}
    return found


def named(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a config's entry, which is a name or {name: {option: value}}.

    Raises:
        ConfigError: it is neither, there is no such augmentation, or its `transforms` are no list.
    """
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
    elif isinstance(entry, str):
        name, options = entry, {}
    else:
        raise ConfigError(f"{where}: {entry!r} must be a transform's name or {{name: {{option: value}}}}")
    if name not in NAMES:
        raise ConfigError(f"{where}: there is no augmentation '{name}'; {did_you_mean(str(name), NAMES)}")
    options = dict(options or {})
    if not isinstance(options.get("transforms", []), list | tuple):
        raise ConfigError(f"{where}: {name}: transforms is {options['transforms']!r}; it must be a list of entries")
    return name, options


def build(entry: Any, size: tuple[int, int], where: str, kind: str | None = None, nested: bool = False) -> v2.Transform:
    """One v2 transform from a config's entry.

    Args:
        entry: a name, {name: {option: value}}, or within another transform a list of such.
        size: (H, W) that `size` and `target_size` are filled in with, in pixels.
        where: the entry's place, for messages.
        kind: of the data; None allows what any kind allows.
        nested: whether it stands within another transform.

    Raises:
        ConfigError: names the place, what was found and what is allowed.
    """
    if isinstance(entry, list | tuple):  # several transforms in a row
        return v2.Compose([build(e, size, f"{where}[{n}]", kind, nested=True) for n, e in enumerate(entry)])
    name, options = named(entry, where)
    cls = NAMES[name]
    if kind is not None and kind not in ONLY_FOR.get(name, (kind,)):
        raise ConfigError(f"{where}: {name} is for {' and '.join(ONLY_FOR[name])}, the data here is {kind}; "
                          f"remove it{_instead(name)}")  # fmt: skip
    if nested and issubclass(cls, geometry.Join):
        raise ConfigError(f"{where}: {name} takes further samples, so it stands directly in a branch; use its option p")
    allowed = [p for p in inspect.signature(cls).parameters if p not in ("self", "args", "kwargs")]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"{where}: {name} has no option '{option}'; {did_you_mean(str(option), allowed)}")
    given = dict(options)
    if "transforms" in options:
        options["transforms"] = [
            build(e, size, f"{where}.transforms[{n}]", kind, nested=True) for n, e in enumerate(options["transforms"])
        ]
    if "interpolation" in options:
        kinds = {mode.value: mode for mode in v2.InterpolationMode}
        wanted = options["interpolation"]
        if wanted not in kinds:
            raise ConfigError(f"{where}: {name}: interpolation is '{wanted}'; {did_you_mean(str(wanted), kinds)}")
        options["interpolation"] = kinds[wanted]
    for option in ("size", "target_size"):
        if option in allowed and option not in options:
            options[option] = size
    if "pad_if_needed" in allowed:
        options.setdefault("pad_if_needed", True)  # otherwise the first small image ends the run
    if "fill" in allowed and name not in OWN:
        fill = options.get("fill", 0)
        options["fill"] = {tv_tensors.Mask: 255, "others": 0 if fill is None else fill}
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name} cannot be made from {given}: {error}") from None


def _instead(name: str) -> str:
    return ", or use ColorRandAugment, which leaves boxes and masks in place" if name in _AUTO else ""
