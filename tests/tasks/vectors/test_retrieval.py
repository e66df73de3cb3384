"""RetrievalTask: recall against pytorch-metric-learning, losses, pairs, missing packages."""

import importlib
import warnings

import pytest
import torch
from torch.nn import functional as F

from allinone_ds.errors import ConfigError
from allinone_ds.models.vectors import embedding
from allinone_ds.tasks.vectors.retrieval import RetrievalMetric, RetrievalTask


def task(count: int = 3, **options) -> RetrievalTask:
    torch.manual_seed(0)
    return RetrievalTask("it", [str(k) for k in range(count)], 8, 4, 1, (16, 16), width=6, **options)


def test_recall_equals_that_of_pytorch_metric_learning(monkeypatch):
    tester = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils import inference

    monkeypatch.setattr("allinone_ds.tasks.vectors.retrieval._CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (60,), generator=generator)
    embeddings = F.normalize(torch.randn(60, 6, generator=generator) + torch.eye(8, 6)[labels])
    metric = RetrievalMetric()
    metric.update([{"embedding": e} for e in embeddings], [{"label": int(k)} for k in labels])
    found = metric.compute()

    distances = embeddings @ embeddings.T - 3 * torch.eye(60)
    nearest = distances.argsort(1, descending=True)
    for k in (1, 5, 10):
        expected = (labels[nearest[:, :k]] == labels[:, None]).any(1).float().mean()
        assert found[f"recall{k}"] == pytest.approx(float(expected))
    search = inference.CustomKNN(CosineSimilarity())
    theirs = tester.AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"), knn_func=search)
    value = theirs.get_accuracy(embeddings, labels, embeddings, labels, True)["precision_at_1"]
    assert found["recall1"] == pytest.approx(value)


def test_images_without_another_of_their_identity_are_not_searched():
    metric = RetrievalMetric()
    vectors = [[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]]
    labels = [0, 0, 1, 2]
    metric.update([{"embedding": torch.tensor(v)} for v in vectors], [{"label": k} for k in labels])
    assert metric.compute()["recall1"] == 1.0
    assert "2 of 4 images are the only ones of their identity" in metric.details()["notes"][0]
    metric.reset()
    assert metric.compute() == {"recall1": 0.0, "recall5": 0.0, "recall10": 0.0}
    metric.update([{"embedding": torch.ones(2)}], [{"label": 0}])
    assert metric.compute()["recall1"] == 0.0


def test_identities_that_training_lacks_are_drawn():
    it = task()
    sample = {"image": torch.zeros(3, 16, 16, dtype=torch.uint8), "label": 7}
    assert it.draw(sample["image"], {"embedding": torch.randn(6)}, sample).shape[0] == 3


@pytest.mark.parametrize("loss", ["contrastive", "triplet", "multi_similarity", "ntxent", "supcon"])
def test_every_loss_on_pairs_equals_that_of_its_package(loss):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    it = task(loss=loss)
    features, labels = torch.randn(6, 8, 4, 4), torch.tensor([0, 0, 1, 1, 2, -100])
    outputs = it((features,), torch.zeros(6, 3, 16, 16), labels)
    expected = getattr(losses, embedding._PAIRS[loss])()(outputs.embeddings[:5], labels[:5])
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.embeddings.norm(dim=1), torch.ones(6))


def test_unknown_numbers_of_a_loss_are_refused():
    pytest.importorskip("pytorch_metric_learning")
    assert task(loss="triplet", loss_options={"margin": 0.3}).embedding.criterion.margin == 0.3
    for loss, options in (("triplet", {"marign": 0.3}), ("arcface", {"marign": 0.3})):
        with pytest.raises(ConfigError, match=f"'marign' is no number of the loss '{loss}'; did you mean 'margin'"):
            task(loss=loss, loss_options=options)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'allinone_ds\[retrieval\]', or use 'arcface'"):
        task(loss="triplet")


def test_micro_batches_without_pairs_are_warned_of_and_counted_before():
    pytest.importorskip("pytorch_metric_learning")
    it = task(20, loss="triplet")
    samples = [{"label": k % 20} for k in range(60)]
    assert it.use_samples(samples) == (
        "20 identities in 60 training images; a micro-batch of 8 images has one pair of one identity on average, from "
        "which a loss on pairs learns"
    )
    assert "no two of 3 training images" in it.use_samples([{"label": k} for k in range(3)])
    features, pixels = (torch.randn(4, 8, 4, 4),), torch.zeros(4, 3, 16, 16)
    for labels in (torch.arange(4), torch.zeros(4, dtype=torch.long)):
        it = task(20, loss="triplet")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(19):
                it(features, pixels, labels)
        with pytest.warns(UserWarning, match="20 of 20 micro-batches had no two images of one identity, or only one"):
            it(features, pixels, labels)
