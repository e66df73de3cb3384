"""Compare the images of two datasets, and the depths of 16-bit images within one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from allinone_ds.data.base import Problem, SampleDataset
from allinone_ds.data.images import stored_bits
from allinone_ds.data.inspection.targets import READ_AT_START, spread

_SMALL = 512
"""Images of a train and a test set together up to which the start of a run compares their content."""


def overlap_at_start(train: SampleDataset, test: SampleDataset) -> list[Problem]:
    """Return whether test images are training images, by their paths and, in small sets, by their content."""
    if len(train) + len(test) <= _SMALL:
        digests = {digest: train.path(i) for i in range(len(train)) if (digest := digest_of(train, i))}
        own = {index: digest for index in range(len(test)) if (digest := digest_of(test, index))}
        if own:
            return overlap_problems(test, {index: digests[d] for index, d in own.items() if d in digests})
    real: dict[str, str] = {}  # folders without links
    own_places: dict[str, list[int]] = defaultdict(list)
    for index in range(len(test)):
        own_places[_real(test.path(index), real)].append(index)
    found = {path: i for i in range(len(train)) if (path := _real(train.path(i), real)) in own_places}
    common = {index: path for path in found for index in own_places[path]}
    if not common:
        return []
    first = min(common)
    digest = digest_of(test, first)  # samples of custom datasets may have names that are no files
    same = digest is not None and digest == digest_of(train, found[common[first]])
    return overlap_problems(test, dict(sorted(common.items()))) if same else []


def _real(path: str, folders: dict[str, str]) -> str:
    folder, _, name = path.rpartition(os.sep)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder or (os.sep if path.startswith(os.sep) else ""))
    return f"{folders[folder]}{os.sep}{name}"


def overlap_problems(test: SampleDataset, common: Mapping[int, str]) -> list[Problem]:
    """Return an error if all test images are training images, a warning if some are.

    Args:
        test: the test set.
        common: {index in the test set: path of the same image in the train set}.
    """
    if not common:
        return []
    index, path = next(iter(common.items()))
    own = test.path(index)
    first = own if os.path.abspath(own) == os.path.abspath(path) else f"{own} = {path}"
    equal = len(common) == len(test)
    count = f"all {len(test)} test images are" if equal else f"{len(common)} of {len(test)} test images are"
    reason = f"{count} also training images (first: {first}); give images as 'test' that the run does not train on"
    return [Problem(test.name, reason, "error" if equal else "warning")]


def digest_of(dataset: SampleDataset, index: int) -> bytes | None:
    """Return a digest of the content of a sample's image file, or None if it has none."""
    data = dataset.encoded(index)
    return None if data is None else hashlib.blake2b(data).digest()


def turned_problems(dataset: SampleDataset, turned: Sequence[str]) -> list[Problem]:
    """Return a warning that boxes or label maps may belong to the images as stored, not as they are shown.

    Args:
        dataset: the dataset.
        turned: its images that `is_turned` found.
    """
    if not turned or dataset.kind in ("classification", "attributes", "regression", "retrieval"):
        return []
    reason = (
        f"{len(turned)} of {len(dataset)} images are turned by 180 degrees or mirrored by their EXIF orientation "
        f"(first: {turned[0]}); make sure that boxes and maps belong to the upright images"
    )
    return [Problem(dataset.name, reason, "warning")]


def depths_at_start(dataset: SampleDataset) -> list[Problem]:
    """Return whether 16-bit images differ in their depth, in 64 images of a dataset."""
    found = Counter[int]()
    for index in spread(len(dataset), READ_AT_START) if len(dataset) else []:
        data = dataset.encoded(index)
        bits = None if data is None else stored_bits(data)
        if bits is not None:
            found[bits] += 1
    return depth_problems(dataset.name, found)


def depth_problems(name: str, found: Mapping[int, int]) -> list[Problem]:
    """Return a warning if the 16-bit images of a dataset use different numbers of bits.

    Args:
        name: the dataset.
        found: {bits: number of images}.
    """
    if len(found) < 2:
        return []
    counts = ", ".join(f"{bits} bits in {found[bits]}" for bits in sorted(found))
    reason = (
        f"16-bit images use different numbers of bits ({counts} images); each keeps the upper 8 of its own, so those "
        "of fewer bits become brighter than the others; if all have one scale, convert them to 8 bit with one factor"
    )
    return [Problem(name, reason, "warning")]
