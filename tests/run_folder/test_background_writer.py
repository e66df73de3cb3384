"""The background writer copies what it is given and reports what failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.distributed.checkpoint.staging import DefaultStager

from allinone_ds.errors import RunError
from allinone_ds.run_folder import background_saver
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
    assert places[1] != flat.data_ptr()
    if Version(torch.__version__) >= Version("2.14"):
        assert places[0] == places[1]


class _ClosesItself(DefaultStager):
    """As that of torch 2.11: it serves one call."""

    def stage(self, state_dict, **kwargs):
        staged = super().stage(state_dict, **kwargs)
        self.close()
        return staged


def test_a_stager_that_closes_itself_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_saver, "DefaultStager", _ClosesItself)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    saver = BackgroundSaver()
    for number in range(2):
        saver.stage({"weights": torch.full((3,), float(number)), "kind": int}, Path("file"))
    assert [float(content["weights"][0]) for _, content in saver.staged] == [0.0, 1.0]


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
