"""The same images in one micro-batch, in several, or on two ranks give the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from allinone_ds.data import Joint
from allinone_ds.training.label_weights import LabelWeights, block
from tests.launcher import run_ranks
from tests.tasks.heads import HEADS
from tests.tiny import tiny_model

SCRIPT = Path(__file__).with_name("ranks_train.py")
SPLITS = {
    "4x2": (1, 4, 2, []),
    "2 ranks x 4": (2, 1, 4, []),
    "tasks on ranks of their own": (
        2,
        2,
        2,
        ["balancer.parallel=tasks", "balancer.groups={det: [0], boxes: [0], seg: [1]}"],
    ),
}
"""Name -> ranks, micro-steps, images of a micro-batch, further overrides."""


@pytest.fixture(scope="module")
def uneven(home: Path) -> Path:
    """The file of a run whose images have very different numbers of objects and of valid pixels, some none."""
    data = home / "data"
    annotations = json.loads((data / "detection" / "train.json").read_text())
    bare = {image["id"] for image in annotations["images"][::3]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] not in bare]
    (home / "few.json").write_text(json.dumps(annotations))
    (home / "maps").mkdir()
    for number, file in enumerate(sorted((data / "segmentation" / "train" / "label_maps").iterdir())):
        stored = np.array(Image.open(file))
        stored[: stored.shape[0] * (number % 5) // 4] = 255
        Image.fromarray(stored).save(home / "maps" / file.name)
    content = yaml.safe_load((home / "tiny.yaml").read_text())
    det, seg = content["tasks"]["det"], content["tasks"]["seg"]
    det["train"]["annotations"] = str(home / "few.json")
    seg["train"]["label_maps"] = str(home / "maps")
    del det["test"], seg["test"]
    content["tasks"] = {"det": det, "seg": seg, "boxes": {**det, "head": "rf_detr", "options": HEADS["rf_detr"][2]}}
    content["trainer"] = {"max_steps": 2, "learning_rate": 0.02, "optim": "sgd", "save_strategy": "no"}
    (home / "uneven.yaml").write_text(yaml.safe_dump(content))
    return home / "uneven.yaml"


def train(file: Path, name: str, ranks: int, micro_steps: int, batch_size: int, *overrides: str) -> dict:
    sizes = [f"tasks.{task}.{key}={value}" for task in ("det", "boxes", "seg")
             for key, value in (("batch_size", batch_size), ("micro_steps", micro_steps))]  # fmt: skip
    folder = file.parent / name.replace(" ", "-")
    folder.mkdir()
    run_ranks(SCRIPT, ranks, folder, str(file), f"output_dir={folder / 'run'}", *sizes, *overrides)
    return load_file(folder / "run" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(uneven: Path) -> dict:
    return train(uneven, "whole", 1, 1, 8)


@pytest.mark.parametrize("split", SPLITS)
def test_weights_do_not_depend_on_how_the_images_are_divided(uneven: Path, whole: dict, split: str) -> None:
    ranks, micro_steps, batch_size, overrides = SPLITS[split]
    found = train(uneven, split, ranks, micro_steps, batch_size, *overrides)
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)


def test_tasks_that_count_images_need_no_weights() -> None:
    tasks = dict(tiny_model().tasks)
    weights = LabelWeights(tasks, dict.fromkeys(tasks, 4))
    assert sorted(weights.tasks) == ["det", "seg"]
    assert weights.of_step({"cls": [{"labels": torch.zeros(3)}] * 2}) == {"cls": [1.0, 1.0]}


def test_the_labels_of_other_ranks_are_waited_for_at_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward runs in the meantime."""
    waited: list[str] = []

    def all_reduce(totals: torch.Tensor, **options) -> SimpleNamespace:
        assert options["async_op"]

        def wait() -> None:
            waited.append("wait")
            totals[sorted(tasks).index("seg")] += torch.tensor([100, 1])  # labels and images of another rank

        return SimpleNamespace(wait=wait)

    tasks = {name: task for name, task in tiny_model().tasks.items() if name in ("det", "seg")}
    monkeypatch.setattr("allinone_ds.training.label_weights.world_size", lambda: 2)
    monkeypatch.setattr("allinone_ds.training.label_weights.cpu_group", lambda: None)
    monkeypatch.setattr("allinone_ds.training.label_weights.dist.all_reduce", all_reduce)
    weights = LabelWeights(dict(sorted(tasks.items())), {"det": 2, "seg": 2}).of_step(
        {"seg": [{"labels": torch.zeros(1, 10, 30, dtype=torch.uint8)}]}
    )
    assert not waited
    assert weights["seg"] == [2 * 300 / 400] and weights["seg"] and waited == ["wait"]


def test_a_group_counts_the_images_that_have_labels_and_leaves_out_a_task_without_any() -> None:
    tasks = dict(tiny_model().tasks)
    weights = LabelWeights(tasks, dict.fromkeys(tasks, 2), {"rooms": ["seg", "det", "cls"]})
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, :16] = 255
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]
    batches = [
        {"labels": {"seg": pixels, "det": none, "cls": torch.zeros(3)}, "labelled": {"seg": 3, "det": 0, "cls": 3}},
        {"labels": {"seg": pixels[:1], "det": none, "cls": torch.zeros(1)}, "labelled": {"seg": 1, "det": 0, "cls": 0}},
    ]
    assert weights.of_step({"rooms": batches}) == {"seg": [1.5, 0.5], "det": None, "cls": [2.0, 0.0]}
    for batch in batches:
        batch["labelled"]["det"] = 1  # images without objects are labels too
    assert weights.of_step({"rooms": batches})["det"] == [2.0, 2.0]


def test_a_joint_group_is_balanced_where_its_settings_say() -> None:
    asked = []
    balancer = SimpleNamespace(
        task=lambda name, micro_steps: asked.append((name, micro_steps)),
        joint=lambda tasks, micro_steps, at: asked.append((tasks, micro_steps, at)),
    )
    block(balancer, "det", None, 3)
    block(balancer, "rooms", Joint(("seg", "cls"), at="features"), 2)
    assert asked == [("det", 3), (("seg", "cls"), 2, "features")]
