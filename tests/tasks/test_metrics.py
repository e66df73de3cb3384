"""Metrics against hand-made cases."""

import pytest
import torch

from allinone_ds.strict import ConfigError
from allinone_ds.tasks import build_task, task_class
from allinone_ds.tasks.classification import ClassificationMetric
from allinone_ds.tasks.detection import DetectionMetric
from allinone_ds.tasks.segmentation import SegmentationMetric
from tests.tiny import CLASSES, SIZE, samples, tiny_backbone, tiny_model


def perfect(sample):
    return {"boxes": sample["boxes"].clone(), "labels": sample["labels"], "scores": torch.ones(len(sample["labels"]))}


def test_perfect_boxes_score_one_and_none_score_zero():
    metric = DetectionMetric()
    assert metric.compute() == {"map50": 0.0, "map": 0.0}
    made = samples()
    metric.update([perfect(s) for s in made], made)
    assert metric.compute() == {"map50": 1.0, "map": 1.0}
    metric.reset()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    metric.update([nothing] * 4, made)
    assert metric.compute() == {"map50": 0.0, "map": 0.0}


def test_boxes_shifted_by_a_quarter_count_at_iou_50_only():
    made = samples()
    predictions = [perfect(s) for s in made]
    for prediction in predictions:
        prediction["boxes"] = prediction["boxes"] + torch.tensor([3.0, 0.0, 3.0, 0.0])  # IoU 9 / 15 = .6
    metric = DetectionMetric()
    metric.update(predictions, made)
    result = metric.compute()
    assert result["map50"] == pytest.approx(1.0) and 0.1 < result["map"] < 0.4


def test_what_falls_into_a_crowd_does_not_count():
    made = samples(1)[0]
    crowd = dict(made, iscrowd=torch.ones(1, dtype=torch.bool))
    metric = DetectionMetric()
    metric.update([perfect(made), perfect(made)], [made, crowd])
    assert metric.compute()["map50"] == pytest.approx(1.0)


def test_miou_is_the_mean_over_classes_seen_in_truth_or_prediction():
    metric = SegmentationMetric(4)
    truth = torch.tensor([[0, 0, 1, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    found = torch.tensor([[0, 1, 1, 1], [3, 3, 3, 3]], dtype=torch.uint8)
    metric.update([{"mask": found}], [{"mask": truth}])
    # class 0: 1 / 2, class 1: 2 / 3; class 2 never appears, class 3 only where the truth is ignored
    assert metric.compute()["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert SegmentationMetric(4).compute() == {"miou": 0.0}


def test_top1_counts_images():
    metric = ClassificationMetric(3)
    metric.update([{"label": 0}, {"label": 1}, {"label": 1}], [{"label": 0}, {"label": 1}, {"label": 2}])
    metric.update([], [])
    metric.update([{"label": 2}], [{"label": 2}])
    assert metric.compute()["top1"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(("name", "main"), [("det", "map50"), ("seg", "miou"), ("cls", "top1")])
def test_main_metric_is_computed(name, main):
    task = tiny_model().tasks[name]
    assert task.main_metric == main and main in task.metric().compute()


def test_boxes_come_back_in_original_pixels():
    torch.manual_seed(0)
    model = tiny_model()
    task = model.tasks["det"].eval()
    with torch.no_grad():
        out = model("det", torch.randn(2, 3, *SIZE))
        out.cls_logits += 8.0  # so that boxes are found at all
        small, same = task.predict(out, [SIZE, SIZE])
        large, _ = task.predict(out, [(SIZE[0] * 3, SIZE[1] * 5), SIZE])
    assert len(small["boxes"]) > 10
    torch.testing.assert_close(large["boxes"], small["boxes"] * torch.tensor([5.0, 3.0, 5.0, 3.0]))
    assert (large["boxes"][:, 2] <= SIZE[1] * 5).all() and (large["boxes"][:, 3] <= SIZE[0] * 3).all()


def test_crowds_are_no_targets():
    made = samples(2)
    made[0]["iscrowd"][:] = True
    labels = task_class("detection").collate(made)["labels"]
    assert [len(target["boxes"]) for target in labels] == [0, 1]


def test_boxes_rounded_to_bfloat16_are_refused():
    model = tiny_model()
    batch = model.tasks["det"].collate(samples())
    for target in batch["labels"]:
        target["boxes"] = target["boxes"].bfloat16()
    with pytest.raises(TypeError, match="cast pixel_values only"):
        model("det", **batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("detction",), "did you mean 'detection'"),
        (("nowhere:Thing",), "No module named 'nowhere'"),
        (("allinone_ds.tasks:Nothing",), "Nothing"),
        (("torch.nn:Linear",), "no subclass"),
        (("detection", "fcoss"), "did you mean 'fcos'"),
        (("detection", "fcos", {"num_conv": 1}), "did you mean 'num_convs'"),
        (("detection", "rf_detr", {"num_queries": 65}), "64 cells"),
        (("detection", "rf_detr", {"width": 30, "num_queries": 5}), "multiple"),
        (("segmentation", "upernet", {"scales": [3.0]}), "scales"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    type_name, head, options = (*arguments, None, None)[:3]
    with pytest.raises(ConfigError, match=message):
        build_task(type_name, "x", CLASSES, tiny_backbone(), SIZE, head, options)


def test_an_image_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        build_task("classification", "x", CLASSES, tiny_backbone(), (30, 32))
