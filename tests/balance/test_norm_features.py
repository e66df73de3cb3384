"""`norm="features"`: task blocks balanced at the features, whose gradients add up in the engine."""

from pathlib import Path

import pytest

from allinone_ds.balance.options import BalancerConfig
from tests.launcher import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_norm_features.py"), 2, tmp_path_factory.mktemp("norm"))


@pytest.mark.parametrize(
    "name",
    [
        "weights_and_norms_equal_the_reference", "nothing_is_kept_and_zero1_reduces_once",
        "a_step_begins_without_what_the_last_one_left", "a_step_with_a_task_that_is_not_finite_is_not_taken",
        "an_overflow_at_the_features_alone_lowers_the_loss_scale", "counts_weigh_the_ranks_of_a_micro_step",
        "misuse", "refused_options", "the_self_test_serves_it",
        "a_parameter_of_the_first_micro_step_alone_keeps_its_gradient",
    ],
)  # fmt: skip
def test_norm_features(results, name):
    assert not results[name], results[name]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "global_clip"}, "not known at the features"),
        ({"name": "task_clip"}, "not known at the features"),
        ({"name": "tbgc", "target": "mean"}, "must see every task"),
        ({"name": "gradnorm"}, "must see every task"),
        ({"name": "tbgc", "parallel": "tasks"}, "parallel='tasks'"),
        ({"name": "tbgc", "cosines_every": 5}, "cosines_every = 5"),
        ({"name": "tbgc", "sketch_size": 64}, "sketch_size = 64"),
    ],
)
def test_what_cannot_work_is_refused_when_the_file_is_read(options, text):
    with pytest.raises(ValueError, match=text):
        BalancerConfig(norm="features", **options)
    assert BalancerConfig(norm="features", name="tbgc").options() == {"norm": "features"}
