"""A transformers.Trainer whose step is one balanced optimizer step over all tasks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from allinone_ds.balance import TBGC, StepReport, TaskBalancer
from allinone_ds.data.loader import StepBatch, TaskData
from allinone_ds.data.schedule import Schedule
from allinone_ds.training.arguments import AllInOneArguments
from allinone_ds.training.background import BackgroundSaver
from allinone_ds.training.checkpoint import claim_run, gather
from allinone_ds.training.ema import AverageWeights, ShardEMA
from allinone_ds.training.errors import RunError, out_of_memory
from allinone_ds.training.evaluation import evaluate_tasks, to_device
from allinone_ds.training.folder import check_resume, clear_unfinished
from allinone_ds.training.logs import TaskLogs
from allinone_ds.training.manifest import faults_of
from allinone_ds.training.nonfinite import Streaks
from allinone_ds.training.optimizer import parameter_groups
from allinone_ds.training.pages import collect_drawings
from allinone_ds.training.saving import (
    RunCallback,
    best_beside,
    load_engine,
    pick_checkpoint,
    read_loop_state,
    save_checkpoint,
    save_weights,
)
from allinone_ds.training.signals import StopOnSignal
from allinone_ds.training.steps import Steps
from allinone_ds.training.tracking import use_own_trackers
from allinone_ds.training.watch import StallWatch
from allinone_ds.zero.params import cast_unpartitioned


class RunShare(TrainerCallback):
    """Makes `epoch` the part of the run that is done, which also holds after a resume."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


class AllInOneTrainer(Trainer):
    """Trains an `AllInOneModel` on all its tasks, each task's pull on the backbone balanced.

    Callbacks, logs, schedules and `report_to` are those of Trainer. A step runs every task's micro-steps and then one
    optimizer step. Checkpoints are whole or not there, and `train(resume_from_checkpoint=True)` goes on from the last
    whole one as if the run had never stopped. SIGTERM or SIGUSR1 on any rank ends training after the step with a
    checkpoint; `stop_signal.caught` then names it.

    Logged beside Trainer's own values: what `TaskLogs` gathers, and skipped/TASK (steps that left the task out because
    it was not finite).

    Args:
        model: an AllInOneModel.
        args: its `deepspeed` decides the ZeRO stage.
        train_dataset: training data by task; its order is the order of tasks in a step.
        eval_dataset: evaluation data by task; tasks that are absent are not evaluated.
        weighting: how task gradients are weighted; None is TBGC().
        balancer_options: further options of `TaskBalancer`, for example {"norm": "sketch"}.
        callbacks: further callbacks.

    Raises:
        ValueError: data for a task that the model does not have, a task without data, or no data for `eval_strategy`.
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
            eval_dataset=dict(eval_dataset) if eval_dataset else None,  # type: ignore[arg-type]
            callbacks=[RunShare(), *(callbacks or [])],
        )
        self.stop_signal = StopOnSignal()
        self.add_callback(self.stop_signal)
        self.remove_callback(PrinterCallback)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            cast_unpartitioned(model, plugin.hf_ds_config.dtype())
        self.weighting = TBGC() if weighting is None else weighting
        self.balancer_options = dict(balancer_options or {})
        self.schedule = Schedule(
            seed=args.seed if args.data_seed is None else args.data_seed,
            sizes={task: len(data.dataset) for task, data in train_dataset.items()},
            batch={task: (data.batch_size, data.micro_steps) for task, data in train_dataset.items()},
            world_size=args.world_size,
        )
        self.balancer: TaskBalancer | None = None
        self.trackers = use_own_trackers(self)
        self._logs = TaskLogs(
            self.schedule,
            {task: data.batch_size * data.micro_steps * args.world_size for task, data in train_dataset.items()},
            args.device,
            args.max_broken_images,
        )
        self.saver: BackgroundSaver | None = None
        self.ema: ShardEMA | None = None
        if args.ema_decay is not None:
            self.add_callback(AverageWeights(self))
        self._watch: StallWatch | None = None
        self._resumed: Path | None = None
        self._streaks = Streaks(self.schedule.tasks, args.nonfinite_limit)

    # ---- the run ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train to `max_steps`, or until SIGTERM or SIGUSR1.

        Args:
            resume_from_checkpoint: true is the last whole checkpoint of `output_dir`, or a checkpoint's folder.
            args, kwargs: as of Trainer.

        Raises:
            ConfigError: there is no whole checkpoint to resume, or another run is writing to `output_dir`.
            RunError: a checkpoint could not be written, memory ran out, or a task was not finite too often.
        """
        run = Path(str(self.args.output_dir))
        claim_run(run)
        asked, self._resumed = resume_from_checkpoint, None
        if asked and str(asked).lower() != "false":
            check_resume(asked, run)
            self._resumed = pick_checkpoint(self, asked)
        if self.args.should_save:
            clear_unfinished(run)
        self.stop_signal.listen()
        if self.args.async_save and self.saver is None:
            self.saver = self.stop_signal.saver = BackgroundSaver()
        try:
            resumed = None if self._resumed is None else str(self._resumed)
            return super().train(resumed, *args, **kwargs)
        except BaseException:
            self._finish_save(quietly=True)
            raise
        finally:
            self.stop_signal.close()
            if self._watch is not None:
                self._watch.close()

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that training goes on from, until its first step."""
        return self._resumed

    def warn(self, step: int, message: str) -> None:
        """Tell of something that the run got over."""
        if self.is_world_process_zero():
            print(f"warning: {message}", flush=True)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.on_warning(step, message)

    def mark(self, where: str) -> None:
        """Tell the other ranks how far this one is; every rank makes the same calls."""
        if self._watch is not None:
            self._watch.mark(where)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            load_engine(self, Path(resume_from_checkpoint))
        if self.args.stall_timeout:
            self._watch = StallWatch(self.args.stall_timeout)
            engine: Any = self.deepspeed
            engine.module.register_forward_pre_hook(self._mark_forward, with_kwargs=True)
        return prepared

    def _mark_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training:
            self.mark(f"an evaluation after step {self.state.global_step}, task '{kwargs.get('task')}'")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.balancer is None:  # a run that had ended was resumed: nothing is new
            return
        self.mark(f"the checkpoint of step {self.state.global_step}")
        save_checkpoint(self, self._loop_state())
        self.mark(f"the end of the checkpoint of step {self.state.global_step}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_save()
        if self.stop_signal.caught:
            # the run goes on elsewhere, from its last checkpoint. With a best one Trainer would load that, and with
            # save_total_limit 1 delete the last one
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # with save_strategy "best" Trainer takes the answer for whether to save
        return super()._determine_best_metric(*args, **kwargs) or self.stop_signal.caught is not None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        begun = super()._init_training_state(*args, **kwargs)
        if self._resumed is not None:
            self.state.best_model_checkpoint = best_beside(self._resumed) or self.state.best_model_checkpoint
        return begun

    def _finish_save(self, quietly: bool = False) -> None:
        """Wait for a checkpoint that is still being written."""
        if self.saver is None:
            return
        try:
            if not quietly:
                self.mark("the end of a checkpoint in the background")
            self.saver.finish()
        except RunError as error:
            if not quietly:
                raise
            self.warn(self.state.global_step, str(error))  # another error already ends the run

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_weights(state_dict, str(output_dir or self.args.output_dir))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        faults = gather(faults_of(best, self.args.process_index, self.args.world_size))
        found = sorted({fault for part in faults for fault in part})
        if found:
            self.warn(
                self.state.global_step,
                f"{best.name}, the best checkpoint, is broken ({found[0]}); the weights stay those of the last step",
            )
            self.state.best_model_checkpoint = None
            return
        load_engine(self, best)

    def _loop_state(self) -> dict[str, Any]:
        """What this rank's loop knows and neither the engine nor Trainer saves."""
        assert self.balancer is not None
        return {
            "balancer": self.balancer.state_dict(),
            "logs": self._logs.state_dict(),
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "nonfinite": self._streaks.state_dict(),
            "data": self.schedule.basis(),
        }

    def _load_loop_state(self, state: dict[str, Any]) -> None:
        assert self.balancer is not None
        self.balancer.load_state_dict(state["balancer"])
        self._logs.load_state_dict(state["logs"])
        self._tr_loss += state["loss"].to(self._tr_loss.device)
        self._total_loss_scalar -= float(state["loss"])  # not of the steps that this call of train() took
        self._globalstep_last_logged = state["last_logged"]
        self._streaks.load_state_dict(state["nonfinite"])
        now = self.schedule.basis()
        before = state["data"]
        changed = [f"{what} was {before.get(what)}, is {now[what]}" for what in now if now[what] != before.get(what)]
        if changed:
            self.warn(
                self.state.global_step,
                f"the data's order is another from step {self.state.global_step} on ({'; '.join(changed)}): in the "
                "epochs that have begun, some samples come again and some are left out",
            )

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
        return Steps(self)  # type: ignore[return-value]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step's data. There is no item count: every task averages its own losses."""
        self.mark(f"the data of step {self.state.global_step}")
        with self._logs.pace.waiting():  # none when a run that had ended is resumed
            return list(itertools.islice(epoch_iterator, num_batches)), None

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
        with self._logs.pace.working():
            return self._balanced_step(model, inputs)

    def _balanced_step(self, model: nn.Module, inputs: StepBatch) -> Tensor:
        model.train()
        if self.balancer is None or self.balancer.engine is not model:
            self.balancer = TaskBalancer(
                model,
                self.schedule.tasks,
                "backbone",
                self.weighting,
                nonfinite=self.args.nonfinite,
                **self.balancer_options,
            )
        if self._resumed is not None:
            self._load_loop_state(read_loop_state(self._resumed, self.args.process_index))
            self._resumed = None
        if inputs.step != self.state.global_step:
            raise RuntimeError(f"data of step {inputs.step} came at step {self.state.global_step}")
        self._logs.add_broken(inputs.broken)
        for task in self.schedule.order(inputs.step):
            batches = inputs.batches[task]
            with self.balancer.task(task, micro_steps=len(batches)):
                for number, batch in enumerate(batches, 1):
                    where = f"step {inputs.step}, task '{task}', micro-step {number} of {len(batches)}"
                    self.mark(where)
                    try:
                        outputs = model(task=task, **to_device(batch, self.args.device))
                        self.balancer.backward(outputs.loss)
                    except (torch.OutOfMemoryError, RuntimeError) as error:
                        shape = tuple(batch["pixel_values"].shape)
                        clear = out_of_memory(error, where, task, shape, self.args.process_index)
                        if clear is None:
                            raise
                        raise clear from error
        self.mark(f"the optimizer step of step {inputs.step}")
        report = self._step(inputs.step)
        self._logs.add(report)
        return torch.stack([report.losses[task].float() for task in self.schedule.tasks]).sum()

    def _step(self, step: int) -> StepReport:
        assert self.balancer is not None
        return self._streaks.step(self.balancer, step)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Trainer's own waits for the device in every step
        return model.get_global_grad_norm()

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log also gets the values of every task, averaged over the steps since the last one."""
        if "loss" in logs:
            logs.update(self._logs.drain(self.state.global_step, self.state.log_history))
            if self.balancer is not None:
                logs.update({f"skipped/{task}": count for task, count in self.balancer.skipped_steps.items()})
        super().log(logs, start_time)

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
        data: Any = (self.eval_dataset if eval_dataset is None else eval_dataset) or {}
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
        if metric_key_prefix == "eval":  # the trackers' pictures are those of the weights that are trained
            self._show_predictions(data)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _show_predictions(self, data: Mapping[str, TaskData]) -> None:
        """A few predictions of every task for the trackers. Trackers are the same on all ranks."""
        if self.trackers:
            draws = self.is_world_process_zero()
            pictures = collect_drawings(self._evaluable_model(), data, self.args.device, 4, draws)
            for tracker in self.trackers if draws else []:
                tracker.show(pictures, self.state.global_step)

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
