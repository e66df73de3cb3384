"""Predictions of keypoints and instances from outputs that are written down by hand, and those of mirrored images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from allinone_ds.models.mask2former import Mask2FormerOutput
from allinone_ds.models.objects.regions import RegionOutput
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.objects.instances import InstancesTask
from allinone_ds.tasks.objects.keypoints import KeypointsTask

GIVEN: Any = (8, 4, 1, (16, 16))  # channels, stride, levels, size of the network's input
SIZE = (40, 80)  # of the image: 2.5 and 5 times that


def outputs(maps: torch.Tensor) -> RegionOutput:
    """One object of class 1 in the box (4, 2, 12, 10) of the network's input."""
    return RegionOutput(
        boxes=(torch.tensor([[4.0, 2.0, 12.0, 10.0]]),),
        scores=(torch.tensor([0.9]),),
        labels=(torch.tensor([1]),),
        maps=(maps[None],),
    )


def test_points_are_places_in_the_region_around_the_box() -> None:
    task = KeypointsTask("it", ["a", "b"], *GIVEN, width=16, points=["tip", "tail"])
    maps = torch.full((2, 10, 10), -20.0)
    maps[0, 2, 5], maps[1, 8, 1] = 20.0, 20.0  # row, column
    (found,) = task.predict(outputs(maps), [SIZE])
    # the region reaches an eighth of the box beyond it, so that its cells have a side of 1: x from 3, y from 1
    expected = torch.tensor([[(3 + 5.5) * 5, (1 + 2.5) * 2.5], [(3 + 1.5) * 5, (1 + 8.5) * 2.5]])
    torch.testing.assert_close(found["keypoints"][0], expected, atol=0.3, rtol=0)
    assert found["boxes"].tolist() == [[20.0, 5.0, 60.0, 25.0]] and found["labels"].tolist() == [1]


def test_a_training_region_contains_the_border_of_its_box() -> None:
    task = KeypointsTask("it", ["a"], *GIVEN, width=16, points=1)
    boxes = torch.tensor([[4.0, 2.0, 12.0, 10.0]]).repeat(200, 1)
    target = {"boxes": boxes, "labels": torch.zeros(200, dtype=torch.long)}
    torch.manual_seed(0)
    (regions,) = task.detector._training_regions([target])
    assert (regions[:, :2] <= boxes[:, :2]).all() and (regions[:, 2:] >= boxes[:, 2:]).all()
    assert regions.std(0).min() > 0.2, "a predicted box is inexact, and so are training regions"
    (still,) = task.eval().detector._training_regions([target])
    assert still[0].tolist() == [3.0, 1.0, 13.0, 11.0]


def test_a_mask_is_that_of_the_object_s_class_in_its_box() -> None:
    task = InstancesTask("it", ["a", "b"], *GIVEN, width=16)
    maps = torch.stack([torch.full((4, 4), -9.0), torch.full((4, 4), 9.0)])
    maps[1, :2] = -9.0  # the upper half of the box is outside
    (found,) = task.predict(outputs(maps), [SIZE])
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[15:25, 20:60] = True
    assert torch.equal(found["masks"][0], expected)
    exported = task.export_outputs(outputs(maps))
    assert torch.equal(exported["masks"][0, 0], maps[1])


def test_queries_become_objects_with_the_boxes_of_their_masks() -> None:
    sizes = {"width": 32, "num_queries": 3, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 4}
    task = InstancesTask("it", ["a", "b"], *GIVEN, head="mask2former", **sizes)
    masks = torch.full((1, 3, 8, 8), -9.0)
    masks[0, 0, 1:3, 2:7] = 9.0
    masks[0, 1, 5:8, 0:2] = 9.0
    classes = torch.tensor([[[-9.0, 9.0, -9.0], [2.0, -9.0, 0.0], [9.0, 0.0, -9.0]]])  # a, b, no object
    (found,) = task.predict(Mask2FormerOutput(class_queries_logits=classes, masks_queries_logits=masks), [(8, 8)])
    best = found["scores"] > 0.5
    assert found["labels"][best].tolist() == [1, 0]  # the third has an empty mask
    assert found["boxes"][best].tolist() == [[2, 1, 7, 3], [0, 5, 2, 8]]
    assert found["scores"][best].tolist() == pytest.approx([1.0, 0.88], abs=0.01)
    assert torch.equal(found["masks"][best], masks[0, :2] > 0)


def test_objects_of_a_mirrored_image_are_as_they_are_in_the_image() -> None:
    boxes, masks = torch.tensor([[2.0, 3.0, 10.0, 12.0]]), torch.zeros(1, 20, 40, dtype=torch.bool)
    masks[0, 3:12, 2:10] = True
    prediction = {
        "boxes": boxes,
        "scores": torch.ones(1),
        "labels": torch.zeros(1),
        "masks": masks,
        "keypoints": torch.tensor([[[3.0, 4.0], [5.0, 6.0], [9.0, 8.0]]]),
        "point_scores": torch.tensor([[0.1, 0.2, 0.3]]),
    }
    tasks = {
        "boxes": DetectionTask("it", ["a"], *GIVEN, width=16),
        "masks": InstancesTask("it", ["a"], *GIVEN, width=16),
        "keypoints": KeypointsTask("it", ["a"], *GIVEN, width=16, points=["nose", "left_ear", "right_ear"]),
    }
    found = {key: task.mirrored(prediction, 40) for key, task in tasks.items()}
    assert all(of_task["boxes"].tolist() == [[30.0, 3.0, 38.0, 12.0]] for of_task in found.values())
    assert found["masks"]["masks"].sum() == masks.sum() and found["masks"]["masks"][0, 3:12, 30:38].all()
    assert found["keypoints"]["keypoints"].tolist() == [[[37.0, 4.0], [31.0, 8.0], [35.0, 6.0]]]
    assert found["keypoints"]["point_scores"].tolist() == [[pytest.approx(v) for v in (0.1, 0.3, 0.2)]]
