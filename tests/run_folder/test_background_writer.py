"""The background writer copies what it is given and reports what failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allinone_ds.errors import RunError
from allinone_ds.run_folder.background_saver import BackgroundSaver


def test_what_is_taken_is_a_copy_whose_memory_is_used_again() -> None:
    saver = BackgroundSaver()
    flat = torch.arange(6.0)
    content = {"flat": flat, "cut": [flat[:4], (flat[2:],)], "step": torch.tensor(1.0), "name": "text"}
    places = []
    for value in (0.0, 1.0):
        flat.fill_(value)
        saver.stage(content, Path("file"))
        flat.fill_(7.0)  # the optimizer steps in place
        path, copy = saver.staged[0]
        assert path == Path("file") and copy["name"] == "text"
        for tensor in (copy["flat"], copy["cut"][0], copy["cut"][1][0]):
            assert (tensor == value).all()
        places.append(copy["flat"].data_ptr())
        saver.start(1, lambda: None)
        saver.finish()
        assert saver.staged == []
    assert places[0] == places[1] != flat.data_ptr()


@pytest.mark.parametrize("error", [OSError("no space left"), RunError("the checkpoint of step 3 could not be written")])
def test_an_error_of_the_thread_is_raised_once(error: Exception) -> None:
    saver = BackgroundSaver()

    def fail() -> None:
        raise error

    saver.start(3, fail)
    with pytest.raises(RunError, match="checkpoint of step 3"):
        saver.finish()
    assert not saver.working
    saver.finish()
