"""A transformers.Trainer whose step is one balanced optimizer step over all tasks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from allinone_ds.balance.assignment import groups_for
from allinone_ds.balance.balancer import TaskBalancer
from allinone_ds.balance.heads import NOTHING_TO_BALANCE
from allinone_ds.balance.options import sampling_error
from allinone_ds.balance.weightings.clipping import TBGC
from allinone_ds.data.joint.batches import by_task, task_names
from allinone_ds.data.loading.ahead import ahead
from allinone_ds.data.loading.loader import StepBatch, train_loader
from allinone_ds.data.loading.sampling import Sampling, TaskSampling
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.evaluation.selection import settle_direction
from allinone_ds.models.lora import shared_parameters
from allinone_ds.reporting.logs import TaskLogs, thin_history
from allinone_ds.reporting.progress import PrintProgress, ProgressBar
from allinone_ds.reporting.trackers import use_own_trackers
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_config.run_files import RunFiles
from allinone_ds.run_config.script_run import script_run_files
from allinone_ds.run_folder.event_log import EventLog, find_callback
from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.training.ema import AverageWeights, ShardEMA
from allinone_ds.training.evaluating_trainer import EvaluatingTrainer
from allinone_ds.training.label_weights import LabelWeights, block, losses_of
from allinone_ds.training.load_checkpoint import check_freezing, check_optimizer, read_loop_state, saved_frequencies
from allinone_ds.training.optimizer import optimizer_of_run
from allinone_ds.training.start.arguments import argument_problems, raise_all, require_launcher, settings_to_warn_of
from allinone_ds.training.start.head_schedules import groups_of_optimizer, head_rates, with_head_schedules
from allinone_ds.training.start.loop_state import begin_data, load_loop_state, loop_state
from allinone_ds.training.warm_start import StartReport
from allinone_ds.training.watch.nonfinite import NonFiniteStreaks
from allinone_ds.training.watch.out_of_memory import out_of_memory
from allinone_ds.zero.params import cast_unpartitioned, move_buffers


class EpochFromStep(TrainerCallback):
    """Sets `epoch` to the completed fraction of the run, which is also correct after a resume."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


class AllInOneTrainer(EvaluatingTrainer):
    """Trains an `AllInOneModel` on all its tasks with balanced task gradients.

    A training step runs the micro-steps of every task and then one optimizer step. Callbacks, logs, learning rate
    schedules and `report_to` work as in Trainer; checkpoints, resuming and signals as described in `DurableTrainer`.
    In addition to Trainer's values it logs those of `TaskLogs`, and skipped/TASK: the number of steps that skipped the
    task because its loss, gradient or factor was not finite.

    `output_dir` is a run's folder: log.jsonl, config.yaml and model.json are written to it, the last two from the
    objects given here, so that the commands `report`, `eval`, `export` and `predict` and `allinone_ds.load` work on it
    as on the run of a YAML file. `finish_run` adds the weights and results at the end.

    While the whole backbone is frozen there is nothing to balance: the heads train on their own gradients, the logged
    norms are those of the heads, and a warning says so.

    Args:
        model: an AllInOneModel.
        args: arguments; `args.deepspeed` determines the ZeRO stage.
        train_dataset: {task: training data}; the order of the tasks is their order in a step.
        eval_dataset: {task: evaluation data}; tasks without data are not evaluated.
        weighting: weighting of the task gradients; None is `TBGC()`.
        balancer_options: further options of `TaskBalancer`, for example {"norm": "sketch"}. With {"parallel": "tasks"}
            each rank reads only the data of its own tasks; the samples of a step are the same.
        callbacks: further Trainer callbacks.
        sampling: which tasks run in a step, a `Sampling` or its fields; None: every task runs in each step.
        continues: task -> the task of the checkpoint with which it goes on when a run is resumed; False: it starts
            fresh. Tasks that are not named go on with that of their own name, if there is one.

    Raises:
        ConfigError: the tasks of model and data differ, `groups` of ranks are invalid, or the metric that selects the
            best checkpoint does not exist or has no direction.
        ValueError: `eval_strategy` is set without evaluation data.

    Attributes:
        events: the event log of the run, RUN/log.jsonl.
        run_files: what writes config.yaml and model.json to the run's folder and to every checkpoint; None if the model
            cannot be built again from such files.
        own_micro_batches: {task: (micro-step, rank) of each micro-batch of the schedule that this rank runs}.
        details: {(prefix, step): {task: details}} of the last evaluation and of that of the best checkpoint, as
            described in `allinone_ds.tasks.details`.

    Example::

        args = AllInOneArguments(output_dir="runs/mine", max_steps=1000, deepspeed="configs/deepspeed/zero2.json")
        trainer = AllInOneTrainer(
            model=AllInOneModel(backbone, {"boxes": boxes, "classes": classes}),
            args=args,
            train_dataset={"boxes": boxes_data, "classes": classes_data},  # TaskData
            weighting=TBGC(max_norm=0.1),
        )
        trainer.train()

    examples/ contains complete scripts. Start them with the `deepspeed` launcher or torchrun.
    """

    def __init__(
        self,
        model: nn.Module,
        args: AllInOneArguments,
        train_dataset: Mapping[str, TaskData],
        eval_dataset: Mapping[str, TaskData] | None = None,
        weighting: Any = None,
        balancer_options: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        continues: Mapping[str, str | Literal[False]] | None = None,
    ) -> None:
        known_tasks = tasks_of(model)
        known = set(known_tasks)
        train_data, test_data = by_task(train_dataset), by_task(eval_dataset or {})
        wrong = sorted(known ^ set(train_data)) + sorted(set(test_data) - known)
        if wrong:
            raise ConfigError(
                f"the tasks of model and data differ: {', '.join(wrong)}; provide data for each of {sorted(known)}"
            )
        require_launcher()
        raise_all(argument_problems(args, {name: known_tasks[name] for name in test_data}))
        settle_direction(args, known_tasks, set(test_data))
        weighting = TBGC() if weighting is None else weighting
        options = dict(balancer_options or {})
        sampling = None if sampling is None else Sampling.model_validate(sampling)
        self.continues = dict(continues or {})
        self._gaps: list[str] = []
        self.run_files = find_callback(callbacks, RunFiles)
        if self.run_files is None:
            self.run_files, self._gaps = script_run_files(
                model, args, train_dataset, eval_dataset or {}, weighting, options, sampling
            )
        self.events = find_callback(callbacks, EventLog) or EventLog(str(args.output_dir))
        printed = find_callback(callbacks, PrintProgress) or PrintProgress()
        own = [callback for callback in (self.run_files, self.events, printed) if callback is not None]
        given = [*own, *(callback for callback in callbacks or [] if callback not in own)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=dict(train_dataset),  # type: ignore[arg-type]
            eval_dataset=dict(eval_dataset) if eval_dataset else None,  # type: ignore[arg-type]
            callbacks=[EpochFromStep(), *given],
        )
        self.remove_callback(PrinterCallback)
        for bar in [c for c in self.callback_handler.callbacks if type(c) is ProgressCallback]:
            self.remove_callback(bar)
            self.add_callback(ProgressBar())
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            cast_unpartitioned(model, plugin.hf_ds_config.dtype())
            move_buffers(model, args.device)
        self.weighting = weighting
        self._first_head = next(iter(known_tasks))
        self._head_rates: dict[str, float] = {}
        self.balancer_options = options
        sizes = {task: len(data.dataset) for task, data in train_dataset.items()}
        seed = args.seed if args.data_seed is None else args.data_seed
        self.schedule = Schedule(
            seed=seed,
            sizes=sizes,
            batch={task: (data.batch_size, data.micro_steps) for task, data in train_dataset.items()},
            world_size=args.world_size,
            parts={task: data.dataset.draw_parts for task, data in train_dataset.items()},
            sampling=None if sampling is None else TaskSampling(sampling, sizes, seed),
        )
        parallel = options.get("parallel", "data")
        if sampling is not None and (refusal := sampling_error(options.get("norm", "exact"), parallel, weighting)):
            raise refusal
        groups = groups_for(parallel, options.get("groups"), self.schedule.tasks, args.world_size)
        micro_batches = [
            {task: groups.share(task, self.schedule.batch[task][1], rank) for task in groups.of(rank)}
            for rank in range(args.world_size)
        ]
        self.own_micro_batches = micro_batches[args.process_index]
        self._most_micro_batches = max(sum(map(len, of_rank.values())) for of_rank in micro_batches)
        self.joint = {name: data.joint for name, data in train_dataset.items() if data.joint is not None}
        self.tasks = task_names(train_dataset)
        self._tasks_in = {n: self.joint[n].tasks if n in self.joint else (n,) for n in train_dataset}
        self._label_weights = LabelWeights(
            known_tasks,
            {task: data.micro_steps * args.world_size for task, data in train_data.items()},
            {name: joint.tasks for name, joint in self.joint.items()},
        )
        self.balancer: TaskBalancer | None = None
        self.trackers = use_own_trackers(self)
        self._logs = TaskLogs(
            self.schedule,
            {task: data.batch_size * data.micro_steps * args.world_size for task, data in train_data.items()},
            args.device,
            args.max_broken_images,
            {task: name for name, joint in self.joint.items() for task in joint.tasks},
        )
        self._frequencies: dict[str, list[float]] = {}
        self._counted: list[str] = []
        self.add_callback(StartReport(self, self._counted))
        self.ema: ShardEMA | None = None
        if args.ema_decay is not None:
            self.add_callback(AverageWeights(self))
        self._streaks = NonFiniteStreaks(self.tasks, args.nonfinite_limit, sampled=sampling is not None)

    # ---- state of the training loop ----

    def loop_state(self) -> dict[str, Any] | None:
        return loop_state(self)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights, to evaluate or save it. Collective.

        Raises:
            RuntimeError: `ema_decay` is not set, or `train` was not called yet.
        """
        if self.ema is None:
            raise RuntimeError("there is no average of the weights: set ema_decay, e.g. 0.9998, and call train() first")
        return self.ema.applied()

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the data from the current step on. Each rank reads its own samples, so accelerate shards nothing."""
        return self._train_steps()  # type: ignore[return-value]

    def _train_steps(self) -> Iterator[StepBatch]:
        """Yield the data per step. A generator: it opens the loader when the step to resume at is known."""
        data: Any = self.train_dataset
        yield from train_loader(
            data,
            self.schedule,
            self.args.process_index,
            self.state.global_step,
            self.state.max_steps,
            self.args.dataloader_num_workers,
            self.args.max_broken_images,
            self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            share=self.own_micro_batches,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Return the data of the next step, and no item count: every task averages its own losses."""
        self.mark(f"the data of step {self.state.global_step}")
        with self._logs.pace.waiting():  # the list is empty if a run that had reached max_steps is resumed
            return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate is for language models

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for gap in [*self._gaps, *settings_to_warn_of(self.args)]:
            self.warn(self.state.global_step, gap)
        if self.schedule.sampling is not None:
            self.schedule.sampling.check_run(self.args.max_steps)
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Set what depends on the classes of the data: counted once, since a resume must not change the loss."""
        self.changes = begin_data(self, self._resumed)
        if self.deepspeed is None:
            if self._resumed is not None:
                check_optimizer(self._resumed, self.args.optim_name)
                check_freezing(self._resumed, list(self.freezing.stages.values()))
                self._frequencies |= saved_frequencies(self._resumed, self.changes)
            data: Any = self.train_dataset
            datasets = {task: of_task.dataset for task, of_task in by_task(data).items()}
            self._counted += use_frequencies(tasks_of(self.model), datasets, self._frequencies)
        return super()._prepare_for_training(*args, **kwargs)

    # ---- one step ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule that `lr_scheduler_type` names, with the rates that it starts from in `base_lrs`."""
        groups = groups_of_optimizer(self.optimizer if optimizer is None else optimizer, self.args.learning_rate)
        rates = [group["lr"] for group in groups]
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._factor = getattr(scheduler, "lr_lambdas", [None])[0]
        return with_head_schedules(scheduler, groups, rates, self.args, num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer that `optim` names, with the groups of `parameter_groups`."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            self.optimizer = optimizer_of_run(module, self.args)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Run one optimizer step: the micro-steps of every task, then the balanced step of the engine.

        Args:
            model: the DeepSpeed engine.
            inputs: micro-batches of the step per task.

        Returns:
            Sum of the task losses that are finite, each averaged over the ranks that run the task.
        """
        with self._logs.pace.working():
            return self._balanced_step(model, inputs)

    def _balanced_step(self, model: nn.Module, inputs: StepBatch) -> Tensor:
        if self.freezing.apply(inputs.step) or self.balancer is None or self.balancer.engine is not model:
            self._modules = list(model.modules())
            self._open_balancer(model, inputs.step)
        assert self.balancer is not None
        if self._resumed is not None:
            load_loop_state(self, read_loop_state(self._resumed, self.args.process_index), self.changes)
            self._resumed = None
        if not all(module.training for module in self._modules):  # `train` itself takes 1 % of a step of a small model
            model.train()
        if inputs.step != self.state.global_step:
            raise RuntimeError(f"received the data of step {inputs.step} in step {self.state.global_step}")
        self._logs.add_broken(inputs.broken)
        weights = self._label_weights.of_step(inputs.batches)
        if self.schedule.sampling is not None:
            self.balancer.plan_step([(self._tasks_in[name], len(of)) for name, of in inputs.batches.items()])
        copies = ahead((batch for batches in inputs.batches.values() for batch in batches), self.args.device)
        for name, batches in inputs.batches.items():
            joint = self.joint.get(name)
            what = f"task '{name}'" if joint is None else f"joint group '{name}'"
            with block(self.balancer, name, joint, len(batches)):
                for number, batch in enumerate(batches, 1):
                    where = f"step {inputs.step}, {what}, micro-step {number} of {len(batches)}"
                    self.mark(where)
                    try:
                        losses = losses_of(model, name, joint, next(copies), weights, number - 1)
                        self.balancer.backward(losses)
                    except (torch.OutOfMemoryError, RuntimeError) as error:
                        shape = tuple(batch["pixel_values"].shape)
                        keys = f"{'joint' if joint else 'tasks'}.{name}"
                        explained = out_of_memory(error, where, keys, shape, self.args.process_index)
                        if explained is None:
                            raise
                        raise explained from error
        # every rank makes the same number of marks per step, also with fewer micro-batches than another rank
        for _ in range(sum(map(len, inputs.batches.values())), self._most_micro_batches):
            self.mark(f"step {inputs.step}, after its tasks")
        self.mark(f"the optimizer step of step {inputs.step}")
        report = self._streaks.step(self.balancer, inputs.step)
        self._logs.add(report)
        losses = [torch.zeros((), device=self.args.device), *report.losses.values()]  # a step may have no label at all
        # Trainer adds up what is returned until the next log, where a NaN would stay for the rest of the run
        return torch.stack([loss.float() for loss in losses]).nan_to_num(0.0, 0.0, 0.0).sum()

    def _open_balancer(self, engine: Any, step: int) -> None:
        """Construct the balancer, anew after a thaw: then with the state of the one before."""
        before = self.balancer if self.balancer is not None and self.balancer.engine is engine else None
        options = {"nonfinite": self.args.nonfinite, **self.balancer_options}
        if before is not None:
            before.detach()
            options["self_test"] = False  # the engine is the same
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"shared: {NOTHING_TO_BALANCE}")
            shared = shared_parameters(engine.module.backbone)
            self.balancer = TaskBalancer(engine, self.tasks, shared, self.weighting, **options)
        if before is not None:
            self.balancer.load_state_dict(before.state_dict())
        if thawed := self.freezing.message(step):
            self.note(step, thawed)
        if self.balancer.nothing_shared:
            self.warn(step, f"model.freeze: {NOTHING_TO_BALANCE}")
        self.stop_signal.travel_with(self.balancer)

    def _get_learning_rate(self) -> float:
        # Trainer logs the rate of the first group, the first head's; the log shows the one without what is its own
        engine, scheduler = self.deepspeed, self.lr_scheduler
        assert engine is not None and scheduler is not None
        self._head_rates = head_rates(engine.optimizer.param_groups, self.args)
        if self._first_head in (self.args.head_schedule or {}):
            return self.args.learning_rate * self._factor(scheduler.last_epoch)
        return super()._get_learning_rate() / (self.args.head_lr_factor or {}).get(self._first_head, 1.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # the method of Trainer synchronizes with the device in every step
        return model.get_global_grad_norm()

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values; add those of every task to a training log, averaged over the steps since the previous log."""
        if "loss" in logs:
            logs.update(self._logs.drain(self.state.global_step))
            logs.update(self._head_rates)
            for message in self._logs.warnings:
                self.warn(self.state.global_step, message)
            if self.balancer is not None:
                logs.update({f"skipped/{task}": count for task, count in self.balancer.skipped_steps.items()})
        super().log(logs, start_time)
        thin_history(self.state.log_history)
