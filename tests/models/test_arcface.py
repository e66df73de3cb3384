"""ArcFace against pytorch-metric-learning and the papers it follows."""

import math

import pytest
import torch
from torch import nn

from allinone_ds.errors import ConfigError
from allinone_ds.models.arcface import ArcFace, ArcFaceOptions, class_margins

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
