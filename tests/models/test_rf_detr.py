"""RF-DETR against `transformers`, and at full size."""

import copy

import pytest
import torch

from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.models.rf_detr import RFDetrDetector, RFDetrOptions, _targets
from allinone_ds.tasks import build_task


def detector(groups):
    torch.manual_seed(0)
    small = {"width": 32, "num_queries": 6, "self_attention_heads": 4, "cross_attention_heads": 4, "ffn_dim": 32}
    options = RFDetrOptions(**small, groups=groups, decoder_layers=1, score_threshold=0.0)
    return RFDetrDetector(3, 8, 8, 1, (32, 64), options)


def test_rf_detr_targets_are_relative_to_the_sides_of_the_image():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 30.0]])
    target = _targets([{"boxes": boxes, "labels": torch.tensor([2])}], torch.zeros(1, 3, 40, 80))[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[30 / 80, 25 / 40, 40 / 80, 10 / 40]]))
    assert target["class_labels"].tolist() == [2]


def test_rf_detr_decodes_the_boxes_that_its_post_processing_gives():
    net = detector(1).eval()
    with torch.no_grad():
        out = net((torch.randn(1, 8, 4, 8),), torch.zeros(1, 3, 32, 64))
    boxes, scores = net.decode(out)
    best = net.postprocess(out)[0]
    query, label = divmod(int(scores[0].argmax()), 3)
    assert int(best["labels"][0]) == label
    torch.testing.assert_close(boxes[0, query], best["boxes"][0])
    assert boxes[..., 2].max() > 32  # the image is wider than high, and some box lies outside its left square


def test_rf_detr_evaluates_the_group_that_predicts():
    two, one = detector(2).eval(), detector(1).eval()
    known = two.state_dict()
    one.load_state_dict({name: known[name][: len(value)] for name, value in one.state_dict().items()})
    maps, pixels = (torch.randn(2, 8, 4, 8),), torch.zeros(2, 3, 32, 64)
    labels = [{"boxes": torch.tensor([[3.0, 4.0, 40.0, 20.0]]), "labels": torch.tensor([k])} for k in (0, 2)]
    with torch.no_grad():
        torch.testing.assert_close(two(maps, pixels, labels).loss, one(maps, pixels, labels).loss)


@pytest.mark.parametrize("training", [True, False])
def test_rf_detr_losses_divide_by_boxes_as_transformers_does_on_one_process(training):
    torch.manual_seed(0)
    net = detector(3).train(training)
    groups = 3 if training else 1
    logits, boxes = torch.randn(2, 2, 6 * groups, 3), torch.rand(2, 2, 6 * groups, 4) * 0.5 + 0.1
    enc_logits, enc_boxes = torch.randn(2, 6 * groups, 3), torch.rand(2, 6 * groups, 4) * 0.5 + 0.1
    labels = [{"boxes": torch.tensor([[3.0, 4.0, 40.0, 20.0]] * n), "labels": torch.arange(n)} for n in (1, 3)]
    targets = _targets(labels, torch.zeros(2, 3, 32, 64))
    config = copy.deepcopy(net.net.config)
    config.group_detr, config.decoder_layers = groups, 2
    arguments = (logits[-1], targets, logits.device, boxes[-1], config, logits, boxes, enc_logits, enc_boxes)
    expected = net.net.loss_function(*arguments)[0]
    torch.testing.assert_close(net._loss(logits, boxes, enc_logits, enc_boxes, targets), expected)


FULL_RF_DETR = {"num_queries": 900, "decoder_layers": 6}


def test_rf_detr_at_full_size_is_built():
    with torch.device("meta"):
        fields = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16}
        backbone = build_backbone(BackboneConfig(config=fields))
        task = build_task("detection", "det", ["a"] * 45, backbone, (1024, 1024), "rf_detr", FULL_RF_DETR)
    assert len(task.detector.net.model.decoder.layers) == 6
    assert task.detector.net.model.query_feat.weight.shape == (900 * RFDetrOptions().groups, 256)


def test_rf_detr_steps_with_900_queries():
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}
    backbone = build_backbone(BackboneConfig(config=fields))
    narrow = {"width": 32, "groups": 2, "ffn_dim": 32, "self_attention_heads": 4, "cross_attention_heads": 4}
    task = build_task("detection", "det", ["a", "b"], backbone, (480, 480), "rf_detr", {**FULL_RF_DETR, **narrow})
    pixels = torch.randn(1, 3, 480, 480)
    labels = [{"boxes": torch.tensor([[30.0, 40.0, 200.0, 300.0]]), "labels": torch.tensor([1])}]
    optimizer = torch.optim.AdamW([*backbone.parameters(), *task.parameters()], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = task(backbone(pixels).feature_maps, pixels, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    task.eval()
    with torch.no_grad():
        out = task(backbone(pixels).feature_maps, pixels)
    assert out.logits.shape[:2] == (1, 900) and len(task.predict(out, [(50, 60)])) == 1
