"""CocoMetric, decoding and pasting: against torchmetrics, pycocotools and by hand."""

import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from allinone_ds.errors import ConfigError
from allinone_ds.models.objects.regions import decode_heatmaps, heatmap_loss, mask_loss, paste_masks
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.detection_metric import _IOU_THRESHOLDS, _RECALLS
from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.tasks.objects.coco_metric import CocoMetric
from allinone_ds.tasks.objects.instances import InstancesTask
from allinone_ds.tasks.objects.keypoints import KeypointsTask
from allinone_ds.tasks.objects.points import PERSON, default_sigmas, oks

SIZE = (60, 80)


def scenes(count: int = 12, P: int = 17) -> tuple[list[dict], list[dict]]:
    """Random objects, some of them crowds or without visible points, and predictions near some of them."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    truths, predictions = [], []
    for _ in range(count):
        n = int(torch.randint(0, 5, (), generator=generator))
        corner = uniform(n, 2) * 30
        boxes = torch.cat([corner, corner + 8 + uniform(n, 2) * 22], dim=1)
        points = boxes[:, None, :2] + uniform(n, P, 2) * (boxes[:, None, 2:] - boxes[:, None, :2])
        visible = torch.randint(0, 3, (n, P), generator=generator).to(torch.uint8)
        visible[uniform(n) < 0.15] = 0
        labels = torch.randint(0, 3, (n,), generator=generator)
        y, x = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
        middle, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        ellipse = [((x - m[0]) / h[0]) ** 2 + ((y - m[1]) / h[1]) ** 2 <= 1 for m, h in zip(middle, half, strict=True)]
        masks = torch.stack(ellipse) if n else torch.zeros(0, *SIZE, dtype=torch.bool)
        truths.append({
            "image": torch.zeros(3, *SIZE, dtype=torch.uint8),
            "boxes": boxes, "labels": labels, "iscrowd": uniform(n) < 0.15, "masks": masks.to(torch.uint8),
            "keypoints": points, "visible": visible, "area": uniform(n) * 400 + 100,
        })  # fmt: skip
        order, noise = torch.randperm(n, generator=generator), torch.randn(n, P, 2, generator=generator) / 3
        shift = [int(v) for v in torch.randint(0, 6, (n,), generator=generator)]
        moved = torch.stack([m.roll(s, 1) for m, s in zip(masks[order], shift, strict=True)]) if n else masks
        predictions.append({
            "boxes": boxes[order], "labels": labels[order], "scores": uniform(n), "masks": moved,
            "keypoints": points[order] + noise * torch.tensor(shift)[:, None, None],
        })  # fmt: skip
    return truths, predictions


def test_masks_equal_torchmetrics():
    truths, predictions = scenes()
    metric = CocoMetric(None, 100)
    metric.update(predictions, truths)
    found, details = metric.compute(), metric.details(["a", "b", "c"])
    reference = MeanAveragePrecision(
        iou_type="segm", class_metrics=True, iou_thresholds=_IOU_THRESHOLDS, rec_thresholds=_RECALLS
    )
    reference.update(
        [{key: p[key] for key in ("masks", "scores", "labels")} for p in predictions],
        [{"masks": t["masks"].bool(), "labels": t["labels"], "iscrowd": t["iscrowd"].long()} for t in truths],
    )
    expected = reference.compute()
    assert found["map"] == pytest.approx(float(expected["map"]), abs=1e-6) and 0.1 < found["map"] < 0.9
    assert found["map50"] == pytest.approx(float(expected["map_50"]), abs=1e-6)
    assert details["per_class"]["ap"] == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)
    assert details["metrics"]["map_small"] == pytest.approx(float(expected["map_small"]), abs=1e-6)
    assert sum(details["per_class"]["objects"]) == sum(int((~t["iscrowd"]).sum()) for t in truths)


def test_keypoints_equal_pycocotools_on_files(tmp_path):
    truths, predictions = scenes()
    metric = CocoMetric(default_sigmas(PERSON), 20)
    metric.update(predictions, truths)
    found = metric.compute()
    annotations, results = [], []
    for image, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        for i in range(len(truth["labels"])):
            x0, y0, x1, y1 = truth["boxes"][i].tolist()
            flat = torch.cat([truth["keypoints"][i], truth["visible"][i][:, None]], dim=1).flatten().tolist()
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(truth["labels"][i]),
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(truth["area"][i]), "keypoints": flat,
                "num_keypoints": int((truth["visible"][i] > 0).sum()), "iscrowd": int(truth["iscrowd"][i]),
            })  # fmt: skip
        for points, label, score in zip(*(prediction[k] for k in ("keypoints", "labels", "scores")), strict=True):
            flat = torch.cat([points, torch.ones(17, 1)], dim=1).flatten().tolist()
            results.append({"image_id": image, "category_id": int(label), "keypoints": flat, "score": float(score)})
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(truths))]
    content = {"images": images, "annotations": annotations, "categories": [{"id": k} for k in range(3)]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    coco = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert found["map"] == pytest.approx(evaluation.stats[0], abs=1e-9) and 0.1 < found["map"] < 0.9
    assert found["map50"] == pytest.approx(evaluation.stats[1], abs=1e-9)
    similar = evaluation.computeOks(0, 0)
    truth, prediction = truths[0], predictions[0]
    mine, theirs = (truth["labels"] == 0).nonzero()[:, 0], (prediction["labels"] == 0).nonzero()[:, 0]
    theirs = theirs[prediction["scores"][theirs].argsort(descending=True)]
    seen = (truth["visible"][mine] > 0).any(1)
    own = oks(prediction["keypoints"][theirs], truth["keypoints"][mine], truth["visible"][mine], truth["area"][mine],
              default_sigmas(PERSON))  # fmt: skip
    if len(mine) and len(theirs):
        assert np.allclose(np.asarray(similar)[:, seen.numpy()], own[:, seen].numpy(), atol=1e-6)


@pytest.mark.parametrize(("visible", "expected"), [(0, 0.0), (1, 1.0), (2, 1.0)])
def test_points_that_are_labelled_but_hidden_count(visible, expected):
    points = torch.tensor([[[4.0, 5.0], [14.0, 15.0]]])
    box, label = torch.tensor([[2.0, 2.0, 18.0, 18.0]]), torch.tensor([0])
    truth = {"image": torch.zeros(3, *SIZE), "boxes": box, "labels": label, "keypoints": points,
             "visible": torch.full((1, 2), visible), "iscrowd": torch.tensor([False])}  # fmt: skip
    metric = CocoMetric([0.05, 0.05])
    metric.update([{"labels": label, "scores": torch.ones(1), "keypoints": points, "boxes": box}], [truth])
    assert metric.compute()["map50"] == pytest.approx(expected)


def test_nothing_predicted_and_nothing_true():
    truths, predictions = scenes(3)
    empty = [{key: value[:0] for key, value in p.items()} for p in predictions]
    for sigmas in (None, default_sigmas(PERSON)):
        metric = CocoMetric(sigmas)
        metric.update(empty, truths)
        assert metric.compute() == {"map50": 0.0, "map": 0.0}
        assert metric.details(["a", "b", "c"])["per_class"]["predicted"] == [0, 0, 0]
        metric.reset()
        assert metric.compute() == {"map50": 0.0, "map": 0.0} and metric.details(["a", "b", "c"])["metrics"] == {}


def test_a_heatmap_that_fits_its_loss_decodes_to_its_points():
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20.0, 38.0, 62.0], [0.0, 0.0, 14.0, 14.0]])
    points = boxes[:, None, :2] + torch.rand(2, 5, 2) * (boxes[:, None, 2:] - boxes[:, None, :2]) * 0.8 + 0.1
    target = {"boxes": boxes, "keypoints": torch.cat([points, torch.ones(2, 5, 1)], dim=-1)}
    cells = torch.arange(28) + 0.5
    place = (points - boxes[:, None, :2]) / (boxes[:, None, 2:] - boxes[:, None, :2]) * 28
    along = (cells - place[..., None]).square() * -0.5  # (2, 5, 2, S)
    maps = along[:, :, 1, :, None] + along[:, :, 0, None, :]
    assert heatmap_loss(maps, [boxes], [target]).abs().max() < 1e-5
    found, scores = decode_heatmaps(maps, boxes)
    torch.testing.assert_close(found, points, atol=0.05, rtol=0)
    assert ((scores > 0.3) & (scores <= 1)).all()
    assert heatmap_loss(maps.roll(3, -1), [boxes], [target]).min() > 1
    each = torch.cat([heatmap_loss(maps.roll(3, -1)[:, [p]], [boxes], [
        {**target, "keypoints": target["keypoints"][:, [p]]}]) for p in range(5)]).reshape(5, 2)  # fmt: skip
    target["keypoints"][:, 2:, 2] = 0
    torch.testing.assert_close(heatmap_loss(maps.roll(3, -1), [boxes], [target]), each[:2].mean(0))
    target["keypoints"][..., 2] = 0
    assert (heatmap_loss(maps.roll(3, -1), [boxes], [target]) == 0).all()
    outside = {"boxes": boxes, "keypoints": target["keypoints"] + torch.tensor([100.0, 0, 1])}
    assert (heatmap_loss(maps, [boxes], [outside]) == 0).all()


def test_a_mask_that_fits_its_loss_is_pasted_where_it_was():
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 10:34, 20:48] = 1
    masks[0, 20:34, 30:40] = 0
    masks[1, 5:19, 60:74] = 1
    boxes = torch.tensor([[20.0, 10.0, 48.0, 34.0], [60.0, 5.0, 74.0, 19.0]])
    grid_y, grid_x = (torch.arange(28) + 0.5) / 28, (torch.arange(28) + 0.5) / 28
    y = (10 + grid_y * 24).long()
    x = (20 + grid_x * 28).long()
    maps = torch.stack([20.0 * (2 * masks[0][y][:, x] - 1.0), torch.full((28, 28), 20.0)])
    pasted = paste_masks(maps, boxes, SIZE)
    union = (pasted | masks.bool()).flatten(1).sum(1)
    assert ((pasted & masks.bool()).flatten(1).sum(1) / union).min() > 0.93
    labels = [{"labels": torch.tensor([0, 0]), "masks": masks}]
    assert mask_loss(maps[:, None], [boxes], labels).max() < 1.0
    assert mask_loss(-maps[:, None], [boxes], labels).min() > 10
    of_two = [{"labels": torch.tensor([1, 1]), "masks": masks}]
    assert mask_loss(torch.stack([-maps, maps], dim=1), [boxes], of_two).max() < 1.0  # that of the object's class


def test_objects_whose_mask_has_no_pixel_are_no_targets():
    """After a resize to the size of the network nothing may be left of a small object."""
    masks = torch.zeros(3, 16, 16, dtype=torch.uint8)
    masks[1, 3, 4] = 1
    sample = {
        "image": torch.zeros(3, 16, 16, dtype=torch.uint8),
        "boxes": torch.tensor([[2.0, 2.0, 2.4, 2.4], [4.0, 3.0, 5.0, 4.0], [0.0, 0.0, 0.2, 0.2]]),
        "labels": torch.tensor([0, 1, 2]),
        "masks": masks,
    }
    (target,) = InstancesTask.collate([sample])["labels"]
    assert (
        target["labels"].tolist() == [1] and target["masks"].sum() == 1 and target["boxes"].tolist() == [[4, 3, 5, 4]]
    )


def keypoints(**options) -> KeypointsTask:
    return KeypointsTask("it", options.pop("classes", ["fish"]), 8, 4, 1, (16, 16), width=16, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 3, "sigmas": [0.1, 0.2]}, "sigmas: has 2 numbers for 3 points"),
        ({"regions": "image", "classes": ["a", "b"]}, "the data has 2 classes; use 'boxes'"),
        ({"points": 0}, "points"),
        ({"jitter": 0.5}, "jitter"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        keypoints(**options)


def test_data_with_another_number_of_points_or_objects_is_refused():
    labels = [{"boxes": torch.tensor([[2.0, 2, 9, 9]]), "labels": torch.tensor([0]), "keypoints": torch.ones(1, 5, 3)}]
    with pytest.raises(ConfigError, match="the data has 5 points per object, options.points is 17"):
        keypoints()((torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16), labels)
    two = [{key: torch.cat([value, value]) for key, value in labels[0].items()}]
    with pytest.raises(ConfigError, match="an image shows 2 objects, but options.regions is 'image'"):
        keypoints(points=5, regions="image")((torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16), two)


@pytest.mark.parametrize("head", ["fcos", "heatmap", "fcos_masks", "mask2former"])
def test_images_of_another_size_and_rounded_boxes_are_refused(head):
    cls = {"fcos": DetectionTask, "heatmap": KeypointsTask}.get(head, InstancesTask)
    it = cls("it", ["a"], 8, 4, 1, (16, 16), head=head, width=32)
    features, pixels = (torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"tasks.it: images of \(16, 20\) pixels, but image_size is \(16, 16\)"):
        it(features, torch.zeros(1, 3, 16, 20))
    with pytest.raises(TypeError, match=r"target boxes are torch.bfloat16, which rounds them"):
        it(features, pixels, [{"boxes": torch.zeros(0, 4, dtype=torch.bfloat16)}])


def test_the_region_weight_multiplies_the_loss_of_the_points():
    points = torch.tensor([[[3.0, 4.0, 1.0], [9.0, 11.0, 1.0]]])
    labels = [{"boxes": torch.tensor([[2.0, 2, 10, 12]]), "labels": torch.tensor([0]), "keypoints": points}]
    losses = []
    for weight in (1.0, 2.0, 3.0):
        torch.manual_seed(0)
        it = keypoints(points=2, region_weight=weight).eval()
        losses.append(it((torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16), labels).loss.item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4) and losses[1] > losses[0] + 1


def test_names_sigmas_and_thresholds():
    assert keypoints().points == PERSON and len(set(keypoints().sigmas)) == 9
    assert keypoints(points=["a", "b"]).sigmas == [0.05, 0.05]
    with pytest.raises(ConfigError, match="score_threshold = 0.05"):
        keypoints().check_threshold(0.01)
    keypoints(points=["a"], regions="image").check_threshold(0.01)
    with pytest.raises(ConfigError, match="score_threshold = 0.05"):
        InstancesTask("it", ["a"], 8, 4, 1, (16, 16), width=16).check_threshold(0.01)


def test_balanced_weights_of_mask2former_reach_its_loss():
    sizes = {
        "width": 32,
        "num_queries": 4,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "attention_heads": 4,
        "points": 64,
    }
    losses = []
    for weights in (None, "balanced"):
        torch.manual_seed(0)
        it = InstancesTask("it", ["a", "b"], 8, 4, 1, (16, 16), head="mask2former", class_weights=weights, **sizes)
        data = [{"labels": np.array([0, 0, 0, 1])}, {"labels": np.zeros(0, dtype=int)}]
        notes = use_frequencies({"it": it}, {"it": data})  # type: ignore[dict-item]
        assert bool(notes) == (weights is not None)
        masks = torch.zeros(1, 16, 16, dtype=torch.bool)
        masks[0, 2:9, 2:9] = True
        labels = [{"boxes": torch.tensor([[2.0, 2, 9, 9]]), "labels": torch.tensor([1]), "masks": masks}]
        torch.manual_seed(1)
        losses.append(it((torch.randn(1, 8, 4, 4),), torch.zeros(1, 3, 16, 16), labels).loss.item())
    assert losses[1] > losses[0] and "a 75.00%" in notes[0]
