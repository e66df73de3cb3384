"""Broken images are counted over the whole run."""

from __future__ import annotations

import pytest
import torch

from allinone_ds.data.schedule import Schedule
from allinone_ds.errors import DataError
from allinone_ds.reporting.logs import TaskLogs


def test_broken_images_are_counted_over_the_run_and_limited() -> None:
    logs = TaskLogs(Schedule(0, {"a": 4}, {"a": (2, 1)}, 1), {"a": 2}, torch.device("cpu"), max_broken_images=4)
    earlier = [{"broken_images": 2}]  # what a resumed run finds
    logs.add_broken(["a.jpg: cut off"])
    assert logs.drain(1, earlier)["broken_images"] == 3
    assert logs.drain(2, [])["broken_images"] == 3
    logs.add_broken(["b.jpg: cut off", "c.jpg: cut off"])
    with pytest.raises(DataError, match="(?s)5 images.*max_broken_images allows 4.*b.jpg"):
        logs.drain(3, [])
