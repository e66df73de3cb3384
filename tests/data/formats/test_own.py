"""A dataset class of one's own, named in the run's file, is the source of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors

from allinone_ds.data import OwnSource, SampleDataset, open_source
from allinone_ds.data.combination import combine
from allinone_ds.errors import DataError


class Shades(SampleDataset):
    """Grey images, dark or bright."""

    kind = "classification"

    def __init__(self, root: Path, count: int = 2) -> None:
        self.name, self.count, self.classes = str(root / "shades"), count, ["dark", "bright"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = tv_tensors.Image(torch.full((3, 4, 4), 40 * index, dtype=torch.uint8))
        return {"image": image, "label": index % 2, "path": self.path(index), "index": index}


def own(**keys: Any) -> OwnSource:
    return OwnSource(**{"format": "class", "dataset": f"{__name__}:Shades", **keys})


def test_it_is_opened_with_the_root_and_its_options(tmp_path: Path) -> None:
    dataset = open_source(own(options={"count": 5}, expect={"samples": 5}), tmp_path)
    assert len(dataset) == 5 and dataset[3]["label"] == 1 and dataset.path(3) == f"{tmp_path}/shades#3"
    several = open_source(combine([own(), own(options={"count": 3})]), tmp_path, ["dark", "bright"])
    assert len(several) == 5


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"dataset": "no_such_module:Shades"},
            "No module named 'no_such_module'; is the folder of the module on PYTHON",
        ),
        ({"dataset": f"{__name__}:Shade"}, "has no attribute 'Shade'"),
        ({"dataset": f"{__name__}:own"}, "is no subclass of allinone_ds.data.SampleDataset"),
        ({"options": {"number": 3}}, "its __init__ takes root, the folder data_root, and the options"),
        ({"expect": {"samples": 9}}, "holds 2 samples, expect.samples is 9"),
    ],
)
def test_what_cannot_be_opened_is_one_clear_line(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as failed:
        open_source(own(**keys), tmp_path)
    assert says in str(failed.value)


def test_classes_follow_the_train_set_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classes is \['dark', 'bright'\], those of the task .* \['bright', 'dark'\]"):
        open_source(own(), tmp_path, ["bright", "dark"])
    with pytest.raises(ValueError, match=r"write 'module:Class'"):
        own(dataset="shades.Shades")
