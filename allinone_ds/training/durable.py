"""A transformers.Trainer whose runs survive: whole checkpoints, resuming, signals, ranks that stand still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, set_seed

from allinone_ds.distributed import gather_objects
from allinone_ds.errors import RunError
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_folder.atomic_checkpoint import claim_run
from allinone_ds.run_folder.background_writer import BackgroundSaver
from allinone_ds.run_folder.checkpoints import check_resume, clear_unfinished
from allinone_ds.run_folder.event_log import RunCallback
from allinone_ds.run_folder.manifest import faults_of
from allinone_ds.training.checkpointing import best_beside, load_engine, pick_checkpoint, save_checkpoint, save_weights
from allinone_ds.training.signals import StopOnSignal
from allinone_ds.training.stall_watch import StallWatch


class DurableTrainer(Trainer):
    """What `AllInOneTrainer` does about a run's life, whatever a step is.

    Checkpoints are whole or not there, and `train(resume_from_checkpoint=True)` goes on from the last whole one as if
    the run had never stopped. SIGTERM or SIGUSR1 on any rank ends training after the step with a checkpoint;
    `stop_signal.caught` then names it. A rank that stands still is named and the job ended (`stall_timeout`).

    Args:
        kwargs: as of Trainer.
    """

    args: AllInOneArguments

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stop_signal = StopOnSignal()
        self.add_callback(self.stop_signal)
        self.saver: BackgroundSaver | None = None
        self._watch: StallWatch | None = None
        self._resumed: Path | None = None

    def loop_state(self) -> dict[str, Any] | None:
        """What this rank's loop knows and neither the engine nor Trainer saves; None before the first step."""
        raise NotImplementedError

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
        # the weights are made: from here on each rank drops other paths and units. A resume brings its own states
        set_seed(self.args.seed + self.args.process_index)
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
        state = self.loop_state()
        if state is None:  # a run that had ended was resumed: nothing is new
            return
        self.mark(f"the checkpoint of step {self.state.global_step}")
        save_checkpoint(self, state)
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
        faults = gather_objects(faults_of(best, self.args.process_index, self.args.world_size))
        found = sorted({fault for part in faults for fault in part})
        if found:
            self.warn(
                self.state.global_step,
                f"{best.name}, the best checkpoint, is broken ({found[0]}); the weights stay those of the last step",
            )
            self.state.best_model_checkpoint = None
            return
        load_engine(self, best)
