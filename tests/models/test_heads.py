"""The strong heads against the libraries and papers they follow, and at full size."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerImageProcessor
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoderEncoderOnly,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as DeformableAttention,
)

from allinone_ds.errors import ConfigError
from allinone_ds.models.arcface import ArcFace, ArcFaceOptions, class_margins
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.models.mask2former import (
    Mask2FormerOptions,
    Mask2FormerOutput,
    Mask2FormerSegmenter,
    _cell_centers,
    _Float32DeformableAttention,
)
from allinone_ds.models.rf_detr import RFDetrDetector, RFDetrOptions, _targets
from allinone_ds.tasks import build_task

K, WIDTH = 5, 12


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("opposite", [False, True])  # opposite to its class: angles near pi, where the margin is linear
def test_arcface_equals_pytorch_metric_learning(sub_centers, opposite):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    mine = ArcFace(K, WIDTH, ArcFaceOptions(width=WIDTH, margin=0.5, scale=20.0, sub_centers=sub_centers))
    pooled, labels = torch.randn(9, WIDTH), torch.arange(9) % K
    if opposite:
        centers = torch.randn(K, 1, WIDTH)
        mine.embed = nn.Identity()
        mine.weight.data = (centers + 0.05 * torch.randn(K, sub_centers, WIDTH)).view(-1, WIDTH)
        pooled = -centers[labels, 0]
    kind = losses.ArcFaceLoss if sub_centers == 1 else losses.SubCenterArcFaceLoss
    more = {} if sub_centers == 1 else {"sub_centers": sub_centers}
    theirs = kind(num_classes=K, embedding_size=WIDTH, margin=math.degrees(0.5), scale=20.0, **more)
    theirs.W.data = mine.weight.data.T.clone()
    _, hardened = mine(pooled, labels)
    loss = nn.functional.cross_entropy(hardened, labels)
    expected = theirs(mine.embed(pooled), labels)
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.weight.grad, theirs.W.grad.T.float(), rtol=1e-3, atol=1e-5)


def test_margins_fall_with_class_counts_as_published():
    options = ArcFaceOptions(class_counts=[1, 16, 10_000], margin=0.5, smallest_margin=0.1)
    margins = class_margins(3, options)
    assert margins[0] == pytest.approx(0.5) and margins[2] == pytest.approx(0.1)
    # n ** -1/4: 1, .5, .1; the middle one lies at (.5 - .1) / (1 - .1) of the span
    assert margins[1] == pytest.approx(0.1 + 0.4 * (0.5 - 0.1) / 0.9)
    assert class_margins(2, ArcFaceOptions(class_counts=[7, 7])) == [0.5, 0.5]


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 0]])
def test_class_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ConfigError, match="class_counts"):
        class_margins(3, ArcFaceOptions(class_counts=counts))


def test_without_labels_arcface_has_no_margin():
    torch.manual_seed(0)
    head = ArcFace(K, 7, ArcFaceOptions(width=WIDTH))
    pooled = torch.randn(4, 7)
    plain, hardened = head(pooled, torch.zeros(4, dtype=torch.long))
    assert torch.equal(plain, head(pooled)[0])
    assert (hardened[:, 0] < plain[:, 0]).all() and torch.equal(hardened[:, 1:], plain[:, 1:])


def segmenter(**options):
    torch.manual_seed(0)
    small = {"width": 32, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 3, "attention_heads": 4}
    return Mask2FormerSegmenter(3, 8, 1, Mask2FormerOptions(**small, points=512, **options))


def test_predictions_where_the_truth_is_unknown_change_no_loss():
    head = segmenter()
    classes, masks = [torch.randn(2, 6, 4)], [torch.randn(2, 6, 16, 16)]
    truth = torch.randint(0, 3, (2, 32, 32))
    truth[:, :, 16:] = 255
    other = masks[0].clone()
    other[..., 8:] += 5 * torch.randn(2, 6, 16, 8)
    losses = []
    for logits in (masks[0], other):
        torch.manual_seed(3)  # the points that are looked at
        losses.append(head.loss(classes, [logits], truth, 255))
    torch.testing.assert_close(losses[0], losses[1])
    other[..., 0] += 5
    torch.manual_seed(3)
    assert head.loss(classes, [other], truth, 255) != losses[0]


def test_a_perfect_prediction_costs_little_whatever_it_says_where_the_truth_is_unknown():
    head = segmenter()
    truth = torch.zeros(1, 32, 32, dtype=torch.long)
    truth[:, :, 16:] = 255
    classes, masks = torch.full((1, 6, 4), -20.0), torch.full((1, 6, 16, 16), -20.0)
    classes[:, 0, 0] = classes[:, 1:, 3] = 20.0  # query 0 is class 0, the others are no object
    masks[:, 0] = 20.0  # everywhere, and so beyond what is known too
    torch.manual_seed(3)
    loss = head.loss([classes], [masks], truth, 255)
    masks[:, 0, :, :4] = -20.0  # a quarter of the picture, and of what is known a half, is wrong
    torch.manual_seed(3)
    assert loss < 0.2 * head.loss([classes], [masks], truth, 255)


def test_losses_divide_by_masks_as_transformers_does_on_one_process(monkeypatch):
    head = segmenter()
    classes, masks = [torch.randn(2, 6, 4)], [torch.randn(2, 6, 16, 16)]
    truth = torch.randint(0, 3, (2, 32, 32))
    losses = []
    for criterion in (None, Mask2FormerLoss):
        if criterion is not None:
            monkeypatch.setattr("allinone_ds.models.mask2former._Criterion", criterion)
        torch.manual_seed(3)
        losses.append(head.loss(classes, masks, truth, 255))
    torch.testing.assert_close(losses[0], losses[1])


def test_every_layer_s_prediction_counts_in_training_and_in_evaluation():
    head = segmenter()
    truth = torch.zeros(1, 32, 32, dtype=torch.long)
    torch.manual_seed(1)
    # masks of one value: a layer's loss hardly depends on the points that are drawn
    layers = [(torch.randn(1, 6, 4), torch.randn(1, 6, 1, 1).repeat(1, 1, 16, 16)) for _ in range(3)]
    for training in (True, False):
        head.train(training)
        alone = sum(head.loss([classes], [masks], truth, 255) for classes, masks in layers)
        together = head.loss([classes for classes, _ in layers], [masks for _, masks in layers], truth, 255)
        torch.testing.assert_close(together, alone, rtol=0.05, atol=0.0)


def test_cell_centers_are_those_of_transformers():
    shapes = [(2, 3), (4, 6)]
    mine = torch.cat([_cell_centers(H, W, torch.device("cpu")) for H, W in shapes])
    theirs = Mask2FormerPixelDecoderEncoderOnly.get_reference_points(shapes, torch.ones(1, 2, 2), "cpu")
    torch.testing.assert_close(mine, theirs[0, :, 0])


def test_an_image_without_truth_says_nothing():
    head = segmenter()
    classes, masks = torch.randn(2, 6, 4), torch.randn(2, 6, 16, 16)
    truth = torch.randint(0, 3, (2, 32, 32))
    truth[1] = 255
    losses = []
    for count in (1, 2):
        torch.manual_seed(3)
        losses.append(head.loss([classes[:count]], [masks[:count]], truth[:count], 255))
    torch.testing.assert_close(losses[0], losses[1])


def test_scores_equal_the_post_processing_of_transformers():
    torch.manual_seed(0)
    out = Mask2FormerOutput(
        class_queries_logits=torch.randn(1, 6, 4) * 3, masks_queries_logits=torch.randn(1, 6, 384, 384) * 3
    )
    expected = Mask2FormerImageProcessor().post_process_semantic_segmentation(out, target_sizes=[(384, 384)])[0]
    assert torch.equal(Mask2FormerSegmenter.scores(out)[0].argmax(0), expected)


def test_sampling_in_float32_equals_that_of_transformers():
    torch.manual_seed(0)
    shapes = [(2, 3), (4, 6), (8, 12)]
    tokens = sum(H * W for H, W in shapes)
    mine = _Float32DeformableAttention(32, 4, n_levels=3, n_points=4)
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = DeformableAttention(32, 4, n_levels=3, n_points=4)
    theirs.load_state_dict(mine.state_dict())
    references = torch.cat([_cell_centers(H, W, torch.device("cpu")) for H, W in shapes])[None, :, None].expand(
        2, -1, 3, 2
    )
    hidden, positions = torch.randn(2, tokens, 32), torch.randn(2, tokens, 32)
    arguments = dict(encoder_hidden_states=hidden, position_embeddings=positions, spatial_shapes_list=shapes)
    expected = theirs(hidden, reference_points=references, **arguments)[0]
    torch.testing.assert_close(mine(hidden, **arguments)[0], expected)


def test_defaults_are_those_of_the_paper():
    paper, head = Mask2FormerConfig(), Mask2FormerSegmenter(3, 8, 1, Mask2FormerOptions(encoder_layers=1)).config
    fields = ("num_queries", "decoder_layers", "num_attention_heads", "dim_feedforward", "encoder_feedforward_dim",
              "train_num_points", "no_object_weight", "feature_size", "hidden_dim")  # fmt: skip
    assert {f: getattr(head, f) for f in fields} == {f: getattr(paper, f) for f in fields}
    assert Mask2FormerOptions().encoder_layers == paper.encoder_layers


def test_dropout_skips_no_layer():
    # a rank that skips a layer alone would leave the others waiting for its parameters under ZeRO-3
    assert segmenter(dropout=0.5).net.transformer.decoder.layerdrop == 0


def detector(groups):
    torch.manual_seed(0)
    small = {"width": 32, "num_queries": 6, "self_attention_heads": 4, "cross_attention_heads": 4, "ffn_dim": 32}
    options = RFDetrOptions(**small, groups=groups, decoder_layers=1, score_threshold=0.0)
    return RFDetrDetector(3, 8, 8, 1, (32, 64), options)


def test_rf_detr_targets_are_shares_of_the_image_s_own_sides():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 30.0]])
    found = _targets([{"boxes": boxes, "labels": torch.tensor([2])}], torch.zeros(1, 3, 40, 80))[0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[30 / 80, 25 / 40, 40 / 80, 10 / 40]]))
    assert found["class_labels"].tolist() == [2]


def test_rf_detr_decodes_the_boxes_that_its_post_processing_gives():
    net = detector(1).eval()
    with torch.no_grad():
        out = net((torch.randn(1, 8, 4, 8),), torch.zeros(1, 3, 32, 64))
    boxes, scores = net.decode(out)
    best = net.postprocess(out)[0]
    query, label = divmod(int(scores[0].argmax()), 3)
    assert int(best["labels"][0]) == label
    torch.testing.assert_close(boxes[0, query], best["boxes"][0])
    assert boxes[..., 2].max() > 32  # wider than high, and some box lies where a square would not reach


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
