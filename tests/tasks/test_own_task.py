"""The example of a user's own task: short, outside of the package, learns, and fits in a model beside the others."""

import subprocess
import sys
from pathlib import Path

import torch

from allinone_ds.model import AllInOneModel
from allinone_ds.tasks import build_task
from tests.tiny import CLASSES, SIZE, samples, tiny_backbone

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task.py"


def test_it_is_short_and_runs_alone():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout.split()[-1]) < 0.5  # four classes by chance: 1.39


def test_it_works_beside_a_task_of_the_package(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    backbone = tiny_backbone()
    own = build_task("own_task:RotationTask", "rot", CLASSES, backbone, SIZE)
    model = AllInOneModel(backbone, {"rot": own, "cls": build_task("classification", "cls", CLASSES, backbone, SIZE)})
    model("rot", **own.collate(samples())).loss.backward()
    assert own.classifier.weight.grad is not None
    with torch.no_grad():
        predictions = own.predict(model("rot", **own.collate(samples())), [SIZE] * 4)
    metric = own.metric()
    metric.update(predictions, samples())
    assert set(metric.compute()) == {"top1"}
    assert own.draw(samples()[0]["image"], predictions[0]).shape[0] == 3
