"""A Trainer that evaluates every task, keeps what was found for each class, and shows predictions to the trackers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.evaluation.evaluate import evaluate_tasks
from allinone_ds.evaluation.metrics import Evaluation, flatten
from allinone_ds.reporting.pictures import collect_drawings, worst_images
from allinone_ds.reporting.trackers import LOWEST
from allinone_ds.run_folder.checkpoints import step_of
from allinone_ds.training.durable_trainer import DurableTrainer


class EvaluatingTrainer(DurableTrainer):
    """The evaluation of `AllInOneTrainer`, which constructs the balancer.

    Attributes:
        balancer: of the training run; None before it.
        trackers: W&B and TensorBoard, where they are used.
        details: {(prefix, step): {task: details}} of the last evaluation and of that of the best checkpoint, as
            described in `allinone_ds.tasks.details`.

    Example::

        trainer = AllInOneTrainer(model, args, train_dataset=train, eval_dataset=test)
        trainer.evaluate()["eval_score"]
    """

    balancer: Any = None
    trackers: Sequence[Any] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.details: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._evaluation_warnings: set[str] = set()
        super().__init__(*args, **kwargs)

    @property
    def test_data(self) -> dict[str, TaskData]:
        """{task: evaluation data}, empty if there is none."""
        data: Any = self.eval_dataset
        return data or {}

    def evaluate(
        self,
        eval_dataset: Mapping[str, TaskData] | None = None,  # type: ignore[override]
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate every task that has data. Collective.

        Args:
            eval_dataset: {task: evaluation data}; None uses that of the constructor.
            ignore_keys: not used; Trainer passes it.
            metric_key_prefix: prefix of all names.

        Returns:
            PREFIX_TASK_METRIC per task and metric, PREFIX_TASK_samples, PREFIX_score (the mean of the tasks' main
            metrics) and PREFIX_runtime in seconds.
        """
        data: Any = (self.eval_dataset if eval_dataset is None else eval_dataset) or {}
        start = time.perf_counter()
        evaluation = evaluate_tasks(
            self._evaluable_model(),
            data,
            self.args.device,
            self.args.dataloader_num_workers,
            around=self.balancer.evaluation if self.balancer else None,
        )
        self._keep_details(metric_key_prefix, evaluation)
        metrics = flatten(evaluation, metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(dict(metrics))
        if metric_key_prefix == "eval":  # trackers show predictions of the trained weights, not of averaged ones
            self._show_predictions(data)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_details(self, prefix: str, evaluation: Evaluation) -> None:
        """Keep what was found for each class, and warn once of what makes the metrics misleading."""
        step, best = self.state.global_step, self.state.best_model_checkpoint
        steps = {step, step_of(best)} if best else {step}
        self.details = {key: found for key, found in self.details.items() if key[1] in steps}
        self.details[prefix, step] = evaluation.details
        for message in evaluation.warnings:
            if message not in self._evaluation_warnings:
                self._evaluation_warnings.add(message)
                self.warn(step, message)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: the predictions of different tasks have no common shape."""
        raise NotImplementedError(
            "AllInOneTrainer.predict is not supported: use evaluate() for metrics, `allinone-ds predict RUN IMAGE...` "
            "for pictures and JSON, or allinone_ds.load(FOLDER) for predictions of an exported model (docs/export.md)"
        )

    def _show_predictions(self, data: Mapping[str, TaskData]) -> None:
        """Send a few drawn predictions of every task, and its worst, to the trackers, which every rank has alike."""
        if self.trackers:
            draws, model = self.is_world_process_zero(), self._evaluable_model()
            pictures = collect_drawings(model, data, self.args.device, 4, draws)
            worst = worst_images(self.details["eval", self.state.global_step])
            lowest = collect_drawings(model, data, self.args.device, 4, draws, worst)
            pictures |= {f"{task}/{LOWEST}": drawn for task, drawn in lowest.items()}
            for tracker in self.trackers if draws else []:
                tracker.show(pictures, self.state.global_step)

    def _evaluable_model(self) -> nn.Module:
        if self.deepspeed is not None:
            return self.deepspeed
        if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise RuntimeError(
                "the model is partitioned by ZeRO-3 and has no engine before train(): call train() first, or evaluate "
                "a saved run with `allinone-ds eval RUN`"
            )
        module: Any = self.model
        return module.to(self.args.device)
