"""Mask2Former against `transformers`, and its treatment of unknown pixels."""

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

from allinone_ds.models.mask2former import (
    Mask2FormerOptions,
    Mask2FormerOutput,
    Mask2FormerSegmenter,
    _cell_centers,
    _Criterion,
    _Float32DeformableAttention,
)
from allinone_ds.tasks.segmentation import SegmentationTask


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


def test_a_perfect_prediction_has_a_small_loss_whatever_it_is_where_the_truth_is_unknown():
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


def test_predictions_of_all_layers_count_in_training_and_in_evaluation():
    head = segmenter()
    truth = torch.zeros(1, 32, 32, dtype=torch.long)
    torch.manual_seed(1)
    # masks of one value: a layer's loss hardly depends on the points that are drawn
    layers = [(torch.randn(1, 6, 4), torch.randn(1, 6, 1, 1).repeat(1, 1, 16, 16)) for _ in range(3)]
    for training in (True, False):
        head.train(training)
        separate = sum(head.loss([classes], [masks], truth, 255) for classes, masks in layers)
        together = head.loss([classes for classes, _ in layers], [masks for _, masks in layers], truth, 255)
        torch.testing.assert_close(together, separate, rtol=0.05, atol=0.0)


def test_cell_centers_are_those_of_transformers():
    shapes = [(2, 3), (4, 6)]
    mine = torch.cat([_cell_centers(H, W, torch.device("cpu")) for H, W in shapes])
    theirs = Mask2FormerPixelDecoderEncoderOnly.get_reference_points(shapes, torch.ones(1, 2, 2), "cpu")
    torch.testing.assert_close(mine, theirs[0, :, 0])


def test_an_image_without_truth_does_not_change_the_loss():
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
    # a rank that skips a layer would leave the other ranks waiting for its parameters under ZeRO-3
    assert segmenter(dropout=0.5).net.transformer.decoder.layerdrop == 0


def test_a_mask_of_weight_w_counts_as_w():
    classes, masks = torch.randn(2, 6, 4), torch.randn(2, 6, 16, 16)
    truth = torch.randint(0, 3, (2, 32, 32))
    truth[0, truth[0] == 1] = 0  # class 1 is in one image only
    losses = []
    for weights in (None, [1.0, 1.0, 1.0], [1.0, 1.0, 5.0], [5.0, 5.0, 5.0]):
        torch.manual_seed(3)
        losses.append(segmenter(class_weights=weights).loss([classes], [masks], truth, 255))
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0] < losses[2] < losses[3]
    criterion = _Criterion(segmenter().config, {}, [1.0, 3.0, 5.0])
    labels, indices = [torch.tensor([0, 2]), torch.tensor([1])], [([4, 1], [0, 1]), ([2], [0])]
    indices = [tuple(map(torch.tensor, pair)) for pair in indices]
    found = criterion.loss_labels(classes, labels, indices)["loss_cross_entropy"]
    log_p = classes.double().log_softmax(-1)
    rest = [log_p[0, [0, 2, 3, 5], 3].sum(), log_p[1, [0, 1, 3, 4, 5], 3].sum()]
    first = -(log_p[0, 4, 0] + 5 * log_p[0, 1, 2] + 0.1 * rest[0]) / (2 + 0.1 * 4)
    second = -(3 * log_p[1, 2, 1] + 0.1 * rest[1]) / (1 + 0.1 * 5)
    torch.testing.assert_close(found, ((2 * first + second) / 3).float())  # an image counts as often as it has masks


def test_balanced_weights_follow_the_frequency_of_masks():
    options = {"width": 32, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 4}
    given = (["a", "b", "c"], 8, 4, 1, (16, 16), "mask2former")
    task = SegmentationTask("seg", *given, **options, class_weights="balanced")
    assert task.samples_to_count() > 0
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[0, 0], mask[1] = 2, 255
    assert task.class_shares({"mask": mask}).tolist() == [0.5, 0.0, 0.5]
    task.use_frequencies([0.5, 0.25, 0.25])
    assert torch.allclose(torch.tensor(task.segmenter.class_loss.weights), torch.tensor([2, 4, 4]) / 3, rtol=1e-2)
    assert SegmentationTask("seg", *given, **options).samples_to_count() == 0
