"""A transformers.Trainer that survives faults: atomic checkpoints, resuming, signals, stalled ranks."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer, set_seed

from allinone_ds.distributed import extend_timeouts
from allinone_ds.errors import ConfigError, RunError
from allinone_ds.models.freezing import FreezeSchedule
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_folder.background_saver import BackgroundSaver
from allinone_ds.run_folder.checkpoints import check_resume, clear_unfinished, parse_resume, step_of
from allinone_ds.run_folder.collective import choose_checkpoint, find_faults, lock_run
from allinone_ds.run_folder.disk import explained_disk_errors
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.training.load_checkpoint import best_checkpoint, check_resumable, load_engine
from allinone_ds.training.save_checkpoint import save_checkpoint, save_weights
from allinone_ds.training.start.changed_tasks import TaskChanges
from allinone_ds.training.watch.signals import StopOnSignal
from allinone_ds.training.watch.stall_watch import StallWatch


class DurableTrainer(Trainer):
    """The part of `AllInOneTrainer` that manages the lifecycle of a run, independent of what a training step does.

    - Checkpoints are written atomically, and `train(resume_from_checkpoint=True)` continues from the last complete one
      with the same result as an uninterrupted run.
    - SIGTERM or SIGUSR1 on any rank ends training after the current step and saves a checkpoint;
      `stop_signal.caught` then holds the name of the signal.
    - A rank that makes no progress for `stall_timeout` seconds is named in an error that ends the run.

    A subclass implements `loop_state`, and calls `mark` at the same points of a step on every rank:

        class MyTrainer(DurableTrainer):
            def loop_state(self):
                return {"samples": self.samples}            # saved per rank with each checkpoint

            def training_step(self, model, inputs, num_items_in_batch=None):
                self.mark(f"step {self.state.global_step}")
                return super().training_step(model, inputs, num_items_in_batch)

    Args:
        kwargs: arguments of `transformers.Trainer`.

    Attributes:
        freezing: what of the model's backbone is frozen in which step.

    Raises:
        ConfigError: the last stage of `freeze_schedule` is never reached.
    """

    args: AllInOneArguments

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.freezing = FreezeSchedule(getattr(self.model, "backbone", None), self.args.freeze_schedule or {})
        if self.freezing.last and self.freezing.last >= self.args.max_steps:
            raise ConfigError(f"model.thaw: step {self.freezing.last} is never reached in {self.args.max_steps} steps")
        self.stop_signal = StopOnSignal()
        self.add_callback(self.stop_signal)
        self.frozen_entry: dict[str, Any] = {}
        self.saver: BackgroundSaver | None = None
        self._watch: StallWatch | None = None
        self._resumed: Path | None = None
        self.changes: TaskChanges | None = None

    def loop_state(self) -> dict[str, Any] | None:
        """Return the state of this rank's training loop that neither the engine nor Trainer saves.

        Returns:
            Tensors and plain values; None before the first step, when there is nothing new to save.
        """
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train until `max_steps`, or until SIGTERM or SIGUSR1.

        Args:
            resume_from_checkpoint: true resumes from the last complete checkpoint in `output_dir`; a path resumes from
                that checkpoint.
            args, kwargs: further arguments of `Trainer.train`.

        Raises:
            ConfigError: there is no complete checkpoint to resume, or a different run is writing to `output_dir`.
            RunError: a checkpoint could not be written, memory ran out, or a task was not finite for too many steps.
        """
        run = Path(str(self.args.output_dir))
        self.freezing.thaw()  # after an earlier call, a checkpoint is compared with all that is ever trained
        lock_run(run)
        resume_from, self._resumed = parse_resume(resume_from_checkpoint), None
        if resume_from:  # unlike a run from a YAML file, this call may overwrite existing checkpoints
            check_resume(resume_from, run)
            self._resumed, warnings = choose_checkpoint(resume_from, run)
            for message in warnings:
                self.warn(step_of(str(self._resumed)), message)
            if self._resumed is not None:
                check_resumable(self._resumed)
        if self.args.should_save:
            clear_unfinished(run)
        self.stop_signal.listen()
        if self.args.async_save and self.saver is None:
            self.saver = self.stop_signal.saver = BackgroundSaver()
        try:
            resumed = None if self._resumed is None else str(self._resumed)
            with explained_disk_errors(run):
                return super().train(resumed, *args, **kwargs)
        except BaseException:
            self._finish_save(after_error=True)
            raise
        finally:
            self.stop_signal.close()
            loader, self.callback_handler.train_dataloader = self.callback_handler.train_dataloader, None
            if isinstance(loader, Generator):  # else its workers, which ignore SIGTERM for a while, delay the exit
                loader.close()
            if self._watch is not None:
                self._watch.close()

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that training resumes from; None after the first step."""
        return self._resumed

    def warn(self, step: int, message: str) -> None:
        """Report a problem that does not end the run.

        Args:
            step: optimizer step that it concerns.
            message: text for the user.
        """
        if self.is_world_process_zero():
            print(f"warning: {message}", flush=True)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.on_warning(step, message)

    def note(self, step: int, message: str) -> None:
        """Report a fact about the run that is no problem, as `warn` does a problem."""
        if self.is_world_process_zero():
            print(message, flush=True)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.on_note(step, message)

    def mark(self, where: str) -> None:
        """Report the progress of this rank to the stall watch. Every rank makes the same sequence of calls."""
        if self._watch is not None:
            self._watch.mark(where)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # From here on, after the weights were initialized alike, dropout differs per rank. A resume loads other states.
        set_seed(self.args.seed + self.args.process_index)
        if resume_from_checkpoint is not None:
            load_engine(self, Path(resume_from_checkpoint))
        if self.args.stall_timeout:
            self._watch = StallWatch(self.args.stall_timeout)
            extend_timeouts(self.args.stall_timeout + 300)  # the watch names the rank that the others wait for
            engine: Any = self.deepspeed
            engine.module.register_forward_pre_hook(self._mark_forward, with_kwargs=True)
        return prepared

    def _mark_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training:
            self.mark(f"an evaluation after step {self.state.global_step}, task '{kwargs.get('task')}'")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = self.loop_state()
        if state is None:  # a run that had already reached max_steps was resumed
            return
        self.mark(f"the checkpoint of step {self.state.global_step}")
        save_checkpoint(self, state)
        self.mark(f"the end of the checkpoint of step {self.state.global_step}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_save()
        if self.stop_signal.caught:
            # The run will be resumed from its last checkpoint. With a best one set, Trainer would load the best
            # weights, and with save_total_limit = 1 delete the last checkpoint.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # with save_strategy "best", Trainer saves only if this returns True
        return super()._determine_best_metric(*args, **kwargs) or self.stop_signal.caught is not None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        initialized = super()._init_training_state(*args, **kwargs)
        if self._resumed is not None and self.changes is not None:  # scores of other tasks do not compare
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        elif self._resumed is not None:
            self.state.best_model_checkpoint = best_checkpoint(self._resumed) or self.state.best_model_checkpoint
            callbacks: Any = self.state.stateful_callbacks
            saved = callbacks.get(EarlyStoppingCallback.__name__)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback) and isinstance(saved, dict):
                    vars(callback).update(saved["attributes"])  # the evaluations that did not improve
        return initialized

    def _finish_save(self, after_error: bool = False) -> None:
        """Wait for a checkpoint that is still being written.

        Args:
            after_error: an error already ends the run, so a failed write is only a warning.
        """
        if self.saver is None:
            return
        try:
            if not after_error:
                self.mark("the end of a checkpoint in the background")
            self.saver.finish()
        except RunError as error:
            if not after_error:
                raise
            self.warn(self.state.global_step, str(error))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_weights(state_dict, str(output_dir or self.args.output_dir))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        faults = find_faults(best)
        if faults:
            self.warn(
                self.state.global_step,
                f"the best checkpoint, {best.name}, is broken ({faults[0]}); the weights of the last step are kept",
            )
            self.state.best_model_checkpoint = None
            return
        load_engine(self, best, resume=False)
