"""Detection: the metric against pycocotools, targets, and boxes in original pixels."""

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from allinone_ds.tasks import task_class
from allinone_ds.tasks.detection import DetectionMetric
from tests.tasks.heads import build
from tests.tiny import SIZE, samples, tiny_model


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


def test_predictions_inside_a_crowd_do_not_count():
    made = samples(1)[0]
    crowd = dict(made, iscrowd=torch.ones(1, dtype=torch.bool))
    metric = DetectionMetric()
    metric.update([perfect(made), perfect(made)], [made, crowd])
    assert metric.compute()["map50"] == pytest.approx(1.0)


def random_scenes(count=40, classes=4):
    """Return truths with crowds, and predictions near them, elsewhere and of the wrong class.

    The first image has more predictions than COCO counts.
    """
    generator = torch.Generator().manual_seed(11)

    def boxes(n):
        corner = torch.rand(n, 2, generator=generator) * 80
        return torch.cat([corner, corner + 4 + torch.rand(n, 2, generator=generator) * 40], dim=1)

    def integers(high, n):
        return torch.randint(0, high, (n,), generator=generator)

    truths, predictions = [], []
    for i in range(count):
        n = int(integers(6, 1))
        truth = {"boxes": boxes(n), "labels": integers(classes, n), "iscrowd": integers(5, n) == 0}
        near = truth["boxes"] + torch.randn(n, 4, generator=generator) * 1.5
        more = 130 if i == 0 else int(integers(8, 1))
        wrong = torch.where(integers(4, n) == 0, integers(classes, n), truth["labels"])
        truths.append(truth)
        predictions.append(
            {
                "boxes": torch.cat([near, boxes(more)]),
                "labels": torch.cat([wrong, integers(classes, more)]),
                "scores": torch.cat(
                    [torch.rand(n, generator=generator) * 0.6 + 0.4, torch.rand(more, generator=generator)]
                ),
            }
        )
    return truths, predictions


def coco_map50(truths, predictions, classes=4):
    """Return the mAP50 and mAP of pycocotools."""

    def rows(things):
        for image, thing in enumerate(things):
            for k in range(len(thing["labels"])):
                x0, y0, x1, y1 = thing["boxes"][k].double().tolist()
                yield image, thing, k, [x0, y0, x1 - x0, y1 - y0]

    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(len(truths))],
        "categories": [{"id": k} for k in range(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": int(thing["labels"][k]),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(thing["iscrowd"][k]),
            }
            for number, (image, thing, k, box) in enumerate(rows(truths), 1)
        ],
    }
    truth.createIndex()
    results = [
        {"image_id": image, "category_id": int(t["labels"][k]), "bbox": box, "score": float(t["scores"][k])}
        for image, t, k, box in rows(predictions)
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"map": evaluation.stats[0], "map50": evaluation.stats[1]}


def test_map50_is_that_of_pycocotools():
    truths, predictions = random_scenes()
    metric = DetectionMetric()
    for start in range(0, 40, 7):
        metric.update(predictions[start : start + 7], truths[start : start + 7])
    result, expected = metric.compute(), coco_map50(truths, predictions)
    assert 0.05 < expected["map"] < expected["map50"] < 0.95
    assert result == pytest.approx(expected, abs=1e-6)


def test_boxes_come_back_in_original_pixels():
    torch.manual_seed(0)
    model = tiny_model()
    task = model.tasks["det"].eval()
    with torch.no_grad():
        out = model("det", torch.randn(2, 3, *SIZE))
        out.cls_logits += 8.0  # so that some boxes are above the threshold
        small, same = task.predict(out, [SIZE, SIZE])
        large, _ = task.predict(out, [(SIZE[0] * 3, SIZE[1] * 5), SIZE])
    assert len(small["boxes"]) > 10
    torch.testing.assert_close(large["boxes"], small["boxes"] * torch.tensor([5.0, 3.0, 5.0, 3.0]))
    assert (large["boxes"][:, 2] <= SIZE[1] * 5).all() and (large["boxes"][:, 3] <= SIZE[0] * 3).all()


def test_crowds_are_not_targets():
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


def test_box_distances_keep_a_gradient_however_negative_their_input():
    model, name, task = build("fcos")
    regression = task.detector.fcos.head.regression_head
    with torch.no_grad():
        regression.bbox_reg[0].bias.fill_(-5.0)
    model(name, **task.collate(samples())).loss.backward()
    assert (regression.bbox_reg[0].bias.grad.abs() > 1e-6).all()  # a ReLU: exactly 0
