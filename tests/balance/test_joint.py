"""Joint blocks and counted labels on engines of all ZeRO stages, against float64 on one process."""

from pathlib import Path

import pytest

from tests.launcher import run_ranks


@pytest.fixture(scope="module", params=[2])
def results(request, tmp_path_factory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_joint.py"), request.param, tmp_path_factory.mktemp("joint"))


@pytest.mark.parametrize(
    "name",
    [
        "joint_at_the_backbone_equals_one_process", "joint_at_the_features_equals_one_process",
        "joint_and_task_blocks_mix", "counts_in_task_blocks_are_means_over_all_labels",
        "partial_labels_have_the_right_denominator", "a_missing_loss_on_zero3_is_an_error_of_all_ranks",
        "an_error_in_a_joint_block_leaves_nothing_of_it", "misuse_of_joint_blocks",
        "how_images_are_divided_does_not_matter_for_pixels_and_objects", "the_order_of_the_losses_does_not_matter",
        "a_task_without_labels_in_the_whole_step_is_absent", "ranks_run_the_heads_in_different_orders",
        "layers_of_a_task_run_in_different_orders", "activation_checkpointing", "evaluation_inside_a_block",
        "a_step_without_any_label_changes_nothing",
    ],
)  # fmt: skip
def test_joint(results, name):
    assert not results[name], results[name]


def test_joint_at_the_backbone_equals_torchjd(tmp_path):
    """On one process, 3 and 5 tasks, five methods."""
    for name, problem in run_ranks(Path(__file__).with_name("ranks_torchjd.py"), 1, tmp_path).items():
        assert not problem, f"{name}: {problem}"
