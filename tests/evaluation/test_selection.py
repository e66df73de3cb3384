"""The best model has the best metric, whichever direction is better, and an unknown direction is refused."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torchmetrics import MeanSquaredError
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.selection import contribution, main_value, score, selects_greater, settle_direction
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.tasks import build_task
from allinone_ds.tasks.classification import ClassificationTask
from tests.tiny import CLASSES, SIZE, tiny_backbone, tiny_model


class DepthTask(ClassificationTask):
    main_metric = "rmse"
    greater_is_better: ClassVar = {"rmse": False, "delta1": True}


class UndeclaredTask(ClassificationTask):
    main_metric = "val_rmse"
    greater_is_better: ClassVar = {}


class OwnNameTask(ClassificationTask):
    main_metric = "close"
    greater_is_better: ClassVar = {}


class OfTorchmetricsTask(OwnNameTask):
    def metric(self) -> Any:
        return MeanSquaredError()


def made(cls: type) -> Any:
    return cls("depth", CLASSES, 8, 4, 1, SIZE)


def test_the_smallest_error_has_the_largest_score() -> None:
    task = made(DepthTask)
    errors = [0.0, 0.1, 0.5, 3.0, 40.0, 1e6]
    parts = [main_value("depth", task, {"rmse": error}) for error in errors]
    assert parts == sorted(parts, reverse=True) and len(set(parts)) == len(parts)
    assert parts[0] == 1.0 and all(0 < part <= 1 for part in parts)
    # beside a second task the order of models by score follows the error too
    assert score([parts[1], 0.5]) > score([parts[3], 0.5])


def test_the_order_of_all_values_is_kept() -> None:
    values = [-math.inf, -5.0, -1.5, -0.25, 0.0, 0.25, 2.0, math.inf]
    for low, high in itertools.pairwise(values):
        assert contribution(low, True) < contribution(high, True)
        assert contribution(low, False) > contribution(high, False)
    assert math.isnan(contribution(math.nan, False)) and math.isnan(contribution(math.nan, True))
    assert score([-0.5, 0.0]) > score([-0.75, 0.0])  # for example a correlation
    assert score([math.nan, -1.0]) == 0.0


def test_a_main_metric_that_reads_like_an_error_must_say_its_direction() -> None:
    with pytest.raises(ConfigError, match=r"main metric 'val_rmse' .* greater_is_better = \{'val_rmse': False\}"):
        made(UndeclaredTask)
    for name in ("loss", "eval_loss", "mae", "abs_rel", "mean_error", "angular_error_deg"):
        with pytest.raises(ConfigError, match="reads like an error"):
            made(type("Named", (UndeclaredTask,), {"main_metric": name}))
    for name in ("close", "top1", "delta1", "errorless", "relevance", "map50", "lossless_share"):
        assert made(type("Named", (UndeclaredTask,), {"main_metric": name})).better_is_greater(name) is True


def test_the_metric_of_torchmetrics_says_its_direction() -> None:
    task = made(OfTorchmetricsTask)
    assert task.better_is_greater("close") is False
    assert main_value("depth", task, {"close": 1.0}) == 0.5


def test_a_main_metric_that_is_not_computed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"DepthTask.metric\(\) computed delta1, but not the main metric 'rmse'"):
        main_value("depth", made(DepthTask), {"delta1": 0.5})


def tasks() -> dict[str, Any]:
    found = dict(tiny_model().tasks)
    return {**found, "depth": made(DepthTask), "own": made(OwnNameTask)}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("score", True),
        ("eval_score", True),
        ("det_map", True),
        ("eval_seg_miou", True),
        ("depth_rmse", False),
        ("eval_depth_rmse", False),
        ("depth_delta1", True),
        ("own_close", True),
    ],
)
def test_the_direction_follows_from_the_declaration(metric: str, expected: bool) -> None:
    assert selects_greater(metric, tasks(), tasks(), None) is expected
    assert selects_greater(metric, tasks(), tasks(), expected) is expected
    with pytest.raises(ConfigError, match="the worst model would be kept"):
        selects_greater(metric, tasks(), tasks(), not expected)


def test_unknown_metrics_and_directions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no metric 'dt_map50'; did you mean 'det_map50'"):
        selects_greater("dt_map50", tasks(), tasks(), None)
    with pytest.raises(ConfigError, match="'own_loss': it is not known.*greater_is_better = {'loss': ...}"):
        selects_greater("own_loss", tasks(), tasks(), None)
    assert selects_greater("own_loss", tasks(), tasks(), False) is False
    assert selects_greater("own_loss", tasks(), tasks(), True) is True
    with pytest.raises(ConfigError, match="the task 'depth' has no evaluation data"):
        selects_greater("depth_rmse", tasks(), ["det", "seg"], None)


def test_the_longest_name_of_a_task_owns_the_metric() -> None:
    named = {"depth": made(DepthTask), "depth_far": made(DepthTask)}
    assert selects_greater("depth_far_rmse", named, named, None) is False


def test_every_metric_of_the_package_has_a_direction() -> None:
    backbone = tiny_backbone()
    torch.manual_seed(0)
    for kind in ("detection", "segmentation", "classification"):
        task = build_task(kind, kind, CLASSES, backbone, SIZE)
        assert task.main_metric in task.greater_is_better
        metric = task.metric()
        assert {*metric.compute(), *task.details(metric).get("metrics", {})} <= set(task.greater_is_better)


def arguments(**values: Any) -> Any:
    plain = {"output_dir": "unused", "max_steps": 4, "deepspeed": "configs/deepspeed/zero2.json", "use_cpu": True}
    return AllInOneArguments(**plain, **values)


@pytest.mark.parametrize(("metric", "best"), [("depth_rmse", 1), ("depth_delta1", 2), ("score", 1)])
def test_trainer_and_early_stopping_keep_the_better_model(metric: str, best: int) -> None:
    args = arguments(metric_for_best_model=metric, eval_strategy="steps", eval_steps=1, save_steps=1)
    settle_direction(args, tasks(), tasks())
    state = TrainerState()
    trainer: Any = SimpleNamespace(args=args, state=state)
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    kept = []
    for step, (rmse, delta1, score_) in enumerate([(3.0, 0.3, 0.3), (1.0, 0.2, 0.6), (2.0, 0.9, 0.5)]):
        metrics = {"eval_depth_rmse": rmse, "eval_depth_delta1": delta1, "eval_score": score_}
        value = metrics[f"eval_{metric}"]
        stopping.check_metric_value(args, state, TrainerControl(), value)
        if Trainer._determine_best_metric(trainer, metrics, None):
            kept.append(step)
    assert kept[-1] == best
    assert stopping.early_stopping_patience_counter == (0 if best == 2 else 1)


def test_a_direction_that_the_user_chose_is_known_and_a_plateau_follows() -> None:
    assert arguments().chosen_direction is None and arguments(greater_is_better=False).chosen_direction is False
    for metric, mode in (("depth_rmse", "min"), ("score", "max")):
        args = arguments(metric_for_best_model=metric, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
        settle_direction(args, tasks(), tasks())
        assert args.lr_scheduler_kwargs["mode"] == mode and args.greater_is_better is (mode == "max")
    with pytest.raises(ConfigError, match="of 'score' larger values are better"):
        settle_direction(arguments(greater_is_better=False), tasks(), tasks())
