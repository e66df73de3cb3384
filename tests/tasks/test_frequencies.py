"""What is counted in the training data before the first step, and again after a resume."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from allinone_ds.tasks.frequencies import use_frequencies
from tests.tasks.dense.tiny import HEADS as DENSE
from tests.tasks.dense.tiny import dense_model, dense_samples
from tests.tasks.kinds import kind_model, kind_samples
from tests.tiny import samples, tiny_model


class Unreadable:
    """Data of which no sample may be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        raise AssertionError("a resume counts the data again")


def built() -> dict[str, nn.Module]:
    """Tasks of all kinds with a prior from the data."""
    upernet = tiny_model({"seg": ("upernet", {"width": 16, "scales": [2.0, 1.0, 0.5]})})
    tasks: dict[str, Any] = {
        **dense_model({name: DENSE[name] for name in ("depth", "depth-dpt", "edges-plain", "saliency")}).tasks,
        **kind_model("binary").tasks,
        "light": tiny_model().tasks["seg"],
        "upernet": upernet.tasks["seg"],
    }
    return tasks


def test_a_resume_restores_priors_from_what_was_stored_with_the_checkpoint() -> None:
    tasks = built()
    data: dict[str, Any] = {name: dense_samples() for name in tasks} | {"binary": kind_samples()}
    data |= dict.fromkeys(("light", "upernet"), samples(4))
    before = {name: {key: value.clone() for key, value in task.state_dict().items()} for name, task in tasks.items()}
    stored: dict[str, list[float]] = {}
    notes = use_frequencies(tasks, data, stored)
    assert len(notes) == len(tasks) and set(stored) == set(tasks)
    for name, task in tasks.items():
        changed = [key for key, value in task.state_dict().items() if not torch.equal(value, before[name][key])]
        assert len(changed) == 1 and changed[0].endswith("bias"), (name, changed)

    again = built()
    assert use_frequencies(again, dict.fromkeys(tasks, Unreadable()), json.loads(json.dumps(stored))) == []
    for name, task in again.items():
        for key, value in task.state_dict().items():
            assert torch.equal(value, tasks[name].state_dict()[key]), (name, key)
