"""A transformers.Trainer whose step is one balanced optimizer step over all tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from allinone_ds.balance import TBGC, StepReport, TaskBalancer
from allinone_ds.data.base import DataError
from allinone_ds.data.loader import StepBatch, TaskData, train_loader
from allinone_ds.data.schedule import Schedule
from allinone_ds.training.arguments import AllInOneArguments
from allinone_ds.training.ema import AverageWeights, ShardEMA
from allinone_ds.training.evaluation import evaluate_tasks, to_device
from allinone_ds.training.meters import Means
from allinone_ds.training.optimizer import parameter_groups


class RunShare(TrainerCallback):
    """Makes `epoch` the part of the run that is done, which also holds after a resume."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


class AllInOneTrainer(Trainer):
    """Trains an `AllInOneModel` on all its tasks, each task's pull on the backbone balanced.

    Callbacks, logs, schedules, saving, resuming and `report_to` are those of Trainer. A step runs every task's
    micro-steps and then one optimizer step. Logged beside Trainer's own values, as means over the steps since the last
    log: loss/TASK, grad_norm/TASK/raw (norm of the task's averaged backbone gradient), grad_norm/TASK/scale (the factor
    it got) and grad_norm/TASK/scaled; and epoch/TASK, skipped/TASK (steps that left the task out because it was not
    finite, since training was started or resumed) and broken_images (unreadable ones, all ranks, whole run). With
    `cosines_every`, of the last step that measured them: cosine/TASK/TASK and conflict_rate, the share of pairs of
    tasks whose backbone gradients point apart.

    Args:
        model: an AllInOneModel.
        args: its `deepspeed` decides the ZeRO stage.
        train_dataset: training data by task; its order is the order of tasks in a step.
        eval_dataset: evaluation data by task; tasks that are absent are not evaluated.
        weighting: how task gradients are weighted; None is TBGC().
        balancer_options: further options of `TaskBalancer`, for example {"norm": "sketch"}.
        callbacks: further callbacks.

    Raises:
        ValueError: data for a task that the model does not have, or a task without data.
    """

    args: AllInOneArguments

    def __init__(
        self,
        model: nn.Module,
        args: AllInOneArguments,
        train_dataset: Mapping[str, TaskData],
        eval_dataset: Mapping[str, TaskData] | None = None,
        weighting: Any = None,
        balancer_options: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        known = set(model.tasks)  # type: ignore[arg-type]
        wrong = sorted(known ^ set(train_dataset)) + sorted(set(eval_dataset or {}) - known)
        if wrong:
            raise ValueError(
                f"tasks of model and data differ at: {', '.join(wrong)}; give data for each of {sorted(known)}"
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=dict(train_dataset),  # type: ignore[arg-type]
            eval_dataset=dict(eval_dataset or {}),  # type: ignore[arg-type]
            callbacks=[RunShare(), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            _one_dtype(model, plugin.hf_ds_config.dtype())
        self.weighting = TBGC() if weighting is None else weighting
        self.balancer_options = dict(balancer_options or {})
        self.schedule = Schedule(
            seed=args.seed if args.data_seed is None else args.data_seed,
            sizes={task: len(data.dataset) for task, data in train_dataset.items()},
            batch={task: (data.batch_size, data.micro_steps) for task, data in train_dataset.items()},
            world_size=args.world_size,
        )
        self.balancer: TaskBalancer | None = None
        self.ema: ShardEMA | None = None
        self.resumed_from: str | None = None
        if args.ema_decay is not None:
            self.add_callback(AverageWeights(self))
        self._means = Means(args.device)
        self._watched: StepReport | None = None  # the last one with cosines
        self._broken: list[str] = []
        self._broken_total: int | None = None  # over all ranks and the whole run, as of the last log

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; see `transformers.Trainer.train`."""
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self.resumed_from = str(last) if last else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside this block the model's weights are their average over the run (`ema_decay`): evaluate or save them.

        Collective.

        Raises:
            RuntimeError: no average is kept, or nothing was trained yet.
        """
        if self.ema is None:
            raise RuntimeError("there is no average of the weights: set ema_decay, e.g. 0.9998, and train first")
        return self.ema.applied()

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Steps from the current one on; each rank reads its own samples, so accelerate has nothing to shard."""
        return _Steps(self)  # type: ignore[return-value]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step's data. There is no item count: every task averages its own losses."""
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # ---- one step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `optim` names, over one group a component and weight decay."""
        if self.optimizer is None:
            args = self.args
            module: Any = self.model if model is None else model
            groups = parameter_groups(
                module, args.learning_rate, args.weight_decay, args.backbone_lr_factor, args.layer_lr_decay
            )
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """One optimizer step: every task's micro-steps, balanced, then the engine's step.

        Args:
            model: the DeepSpeed engine.
            inputs: one step's micro-batches by task.

        Returns:
            The sum of the tasks' losses on this rank.
        """
        model.train()
        if self.balancer is None or self.balancer.engine is not model:
            self.balancer = TaskBalancer(
                model, self.schedule.tasks, "backbone", self.weighting, **self.balancer_options
            )
        if inputs.step != self.state.global_step:
            raise RuntimeError(f"data of step {inputs.step} came at step {self.state.global_step}")
        self._broken += inputs.broken
        for task in self.schedule.order(inputs.step):
            batches = inputs.batches[task]
            with self.balancer.task(task, micro_steps=len(batches)):
                for batch in batches:
                    outputs = model(task=task, **to_device(batch, self.args.device))
                    self.balancer.backward(outputs.loss)
        report = self.balancer.step()
        values: dict[str, Tensor] = {}
        for task in self.schedule.tasks:
            values[f"loss/{task}"] = report.losses[task]
            values[f"grad_norm/{task}/raw"] = report.norms[task]
            values[f"grad_norm/{task}/scale"] = report.scales[task]
            values[f"grad_norm/{task}/scaled"] = report.norms[task] * report.scales[task]
        self._means.add(values)
        if report.gram is not None:
            self._watched = report
        return torch.stack([report.losses[task].float() for task in self.schedule.tasks]).sum()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Trainer's own waits for the device in every step
        return model.get_global_grad_norm()

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log also gets the values of every task, averaged over the steps since the last one."""
        if "loss" in logs:
            logs.update(self._means.drain())
            for task in self.schedule.tasks:
                logs[f"epoch/{task}"] = self.schedule.epoch(task, self.state.global_step)
                if self.balancer is not None:
                    logs[f"skipped/{task}"] = self.balancer.skipped_steps[task]
            logs["broken_images"] = self._count_broken()
            if self._watched is not None:
                logs.update({f"cosine/{a}/{b}": value for (a, b), value in self._watched.cosines().items()})
                logs["conflict_rate"] = self._watched.conflict_rate()
                self._watched = None
        super().log(logs, start_time)

    def _count_broken(self) -> int:
        if self._broken_total is None:  # a resumed run goes on counting
            earlier = [entry["broken_images"] for entry in self.state.log_history if "broken_images" in entry]
            self._broken_total = int(earlier[-1]) if earlier else 0
        fresh = torch.tensor(len(self._broken), device=self.args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(fresh)
        self._broken_total += int(fresh)
        if self._broken_total > self.args.max_broken_images:
            found = "; ".join(self._broken[:3])
            raise DataError(
                f"{self._broken_total} images could not be read, max_broken_images allows "
                f"{self.args.max_broken_images}; on this rank since the last log: {found or 'none'}. "
                "`allinone-ds check CONFIG` lists all of them"
            )
        self._broken.clear()
        return self._broken_total

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Mapping[str, TaskData] | None = None,  # type: ignore[override]
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate every task that has data, on all ranks.

        Args:
            eval_dataset: evaluation data by task; None is what the trainer was given.
            ignore_keys: unused, Trainer passes it.
            metric_key_prefix: of all names.

        Returns:
            PREFIX_TASK_METRIC for every task and metric, PREFIX_TASK_samples, PREFIX_score (the mean of the tasks' main
            metrics) and PREFIX_runtime in seconds.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        metrics = evaluate_tasks(
            self._evaluable_model(),
            data,
            self.args.device,
            self.args.process_index,
            self.args.world_size,
            self.args.dataloader_num_workers,
            metric_key_prefix,
            around=self.balancer.evaluation if self.balancer else None,
        )
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluable_model(self) -> nn.Module:
        if self.deepspeed is not None:
            return self.deepspeed
        if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise RuntimeError(
                "the model is partitioned by ZeRO-3 and has no engine before train(); evaluate after it, or a saved "
                "run with `allinone-ds eval RUN`"
            )
        module: Any = self.model
        return module.to(self.args.device)


def _one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not yet partitioned to the engine's dtype.

    Under ZeRO-3 the ViT is born partitioned, in the engine's dtype. DeepSpeed (0.19.8) then leaves all other parameters
    as they are, and fails on the mixture.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


@dataclass
class _Steps:
    """The train loader, opened only when the loop starts and the step to start from is known. It has no length."""

    trainer: AllInOneTrainer

    def __iter__(self) -> Iterator[StepBatch]:
        trainer = self.trainer
        args = trainer.args
        data: Any = trainer.train_dataset
        return iter(
            train_loader(
                data,
                trainer.schedule,
                args.process_index,
                trainer.state.global_step,
                trainer.state.max_steps,
                args.dataloader_num_workers,
                args.max_broken_images,
            )
        )
