"""TaskBalancer: every task's backbone gradient measured over all ranks, scaled, and only then added to the others."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups, groups_for, task_groups, task_names
from allinone_ds.balance.combiners.base import Combined
from allinone_ds.balance.combiners.choose import choose_combiner
from allinone_ds.balance.combiners.task_parallel import GroupedCombiner
from allinone_ds.balance.heads import HeadUse, agreed_backbone
from allinone_ds.balance.measure import measure_tasks
from allinone_ds.balance.options import check_options, combination_error
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.running_task import RunningTask, refuse_missing, refuse_task, tell_failure, undone_after_error
from allinone_ds.balance.self_test import self_test as run_self_test
from allinone_ds.balance.self_test import warn_of_unchecked_release
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.gram import as_weighting
from allinone_ds.distributed import rank, watched_waits, world_size
from allinone_ds.errors import BalancerError, NonFinite
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.guard import EngineGuard
from allinone_ds.zero.support import checked_release, refuse_unsupported
from allinone_ds.zero.traces import ParameterTraces


class TaskBalancer:
    """Balances the tasks of one optimizer step on a DeepSpeed engine, ZeRO stage 0, 1, 2 or 3.

    The gradient of a task is the mean over its micro-steps and over all ranks that run it. Its norm on the backbone is
    computed from ZeRO shards with one small all-reduce; nothing of full-model size is built. Until `detach()` the
    balancer owns the engine: `engine.backward` and `engine.step` raise. Construct it on every rank.

    Args:
        engine: what `deepspeed.initialize` returned; "gradient_clipping" must be 0.0 in its config.
        tasks: names of the T tasks.
        shared: dotted name of the backbone in the engine's module, the backbone, or an iterable of its parameters.
        weighting: a `Weighting` such as `TBGC`, or a callable from the (T, T) Gram matrix of the tasks' backbone
            gradients to (T,) weights, such as a `torchjd` Weighting.
        parallel: "data": every rank runs every task, one after another. "tasks": ranks are divided among the tasks,
            `balancer.tasks` are those of this rank, and nothing is sent before `step`. "tasks" needs ZeRO-1 or ZeRO-2
            and norm "exact" or "sketch"; every rank keeps the gradients of its tasks. `share` tells which micro-batches
            a rank runs.
        groups: with parallel="tasks": task -> number of its ranks, or its ranks; None: evenly. See `plan_groups`.
        norm: where norms come from. "exact": the averaged gradient of each task, one reduce per task (ZeRO-2 and 3 send
            as much for a micro-step in any case; plain ZeRO-1 reduces once per step). "sketch": estimates (see
            `sketch_size`) before the reduce, one reduce per step; every rank keeps two gradients of the whole model.
            "delayed": factors from the step before, one reduce per step; every rank keeps one gradient of the whole
            model. The first step is then exact, and a step with a task that is not finite is not taken at all.
        sketch_size: length k of a sketch (a task sends 2 k float32 numbers); the relative standard error of a norm is
            at most sqrt(6 / k) / 2. None: 65,536, or about a 512th of the model's parameters where that is more.
        task_traces: under ZeRO-3, prefetch parameters along one trace per task, where DeepSpeed's one trace is
            discarded at every change of task. Also gather weights once per step instead of once per micro-step, where
            the model is within stage3_max_live_parameters and twice the model within stage3_max_reuse_distance.
        cosines_every: steps between two reports with the tasks' Gram matrix, for cosines between their gradients
            (`StepReport.cosines`); 0: never. Where nothing else needs the matrix it comes from sketches.
        check_ranks: before each collective operation of a step, compare what the ranks do (CPU messages of 32 bytes:
            K + 2 per task with K micro-steps, 3 under ZeRO-0 and 1), so that a rank in a different task, or with an
            error, is an error on all ranks and not a hang. With parallel="tasks" they compare in the step, always.
        allow_gradient_clipping: let DeepSpeed clip the balanced sum a second time.
        nonfinite: what a step does with a task whose loss, gradient or factor is not finite: "skip_task" leaves it
            out, "skip_step" leaves all tasks out, "stop" raises `NonFinite` and changes nothing.
        self_test: first compare balanced steps of a toy model, on the same kind of engine, with a float64 reference.
            None: only with a DeepSpeed release that was not checked.

    Attributes:
        groups: which ranks run which task; `groups.tasks` are all names.
        skipped_steps: task -> number of steps that left it out because it was not finite.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or that differs between ranks.
        UnsupportedEngine: an engine kind or setting that is not served.

    Example:
        ::

            balancer = TaskBalancer(engine, tasks=("det", "seg"), shared="backbone", weighting=TBGC(max_norm=0.1))
            for step in range(steps):
                for task in balancer.tasks:
                    with balancer.task(task, micro_steps=2):
                        for batch in micro_batches(task):  # exactly micro_steps of them
                            balancer.backward(engine(task=task, **batch).loss)
                report = balancer.step()
    """

    def __init__(
        self,
        engine: Any,
        tasks: Iterable[str],
        shared: str | Module | Iterable[Parameter],
        weighting: Weighting | Any,
        *,
        parallel: str = "data",
        groups: Mapping[str, int | Sequence[int]] | TaskGroups | None = None,
        norm: str = "exact",
        sketch_size: int | None = None,
        task_traces: bool = True,
        cosines_every: int = 0,
        check_ranks: bool = True,
        allow_gradient_clipping: bool = False,
        nonfinite: str = "skip_task",
        self_test: bool | None = None,
    ):
        tasks = names = task_names(tasks)
        options = {k: v for k, v in locals().items() if k not in ("self", "engine", "shared", "names")}
        refuse_unsupported(engine, allow_gradient_clipping)
        backbone = agreed_backbone(engine.module, shared, options)
        check_options(norm, sketch_size, parallel, cosines_every, nonfinite)
        self.engine, self.weighting = engine, as_weighting(weighting)
        self.weighting.check_tasks(names)
        self.norm, self.parallel, self.nonfinite = norm, parallel, nonfinite
        self._adapter = open_engine(engine, backbone)
        error = combination_error(
            norm, parallel, self.weighting, self._adapter.stage, self._adapter.keeps_local_gradients
        )
        if error is not None:
            raise error
        if self_test or (self_test is None and not checked_release()):
            warn_of_unchecked_release()
            run_self_test(engine, TaskBalancer, norm, parallel)
        self.groups = groups_for(parallel, groups, names, world_size())
        apart = parallel == "tasks"
        self._agreement = Agreement() if check_ranks or apart else None
        self._leave = weakref.finalize(self, self._agreement.leave if self._agreement else int)
        self._combiner = choose_combiner(
            self._adapter, self.weighting, norm, sketch_size, self.groups, self._agreement if apart else None
        )
        self._traces = ParameterTraces(engine) if task_traces else None
        self._guard = EngineGuard(engine, BalancerError)
        self._heads = HeadUse(engine.module, backbone, self._guard)
        self._cosines_every, self._steps = cosines_every, 0
        self.skipped_steps = dict.fromkeys(names, 0)
        self._adapter.discard()  # gradients of steps that the engine took without a balancer
        self._running: RunningTask | None = None
        self._clear()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this rank runs, in the order given: all, unless parallel is "tasks"."""
        return self.groups.of(rank())

    def share(self, task: str, micro_steps: int = 1) -> list[tuple[int, int]]:
        """Return (micro-step k, rank r) of each micro-batch of a task that this rank runs.

        Where every rank runs every task they are its own: (0, r), (1, r), ... Where tasks run on different ranks, the
        ranks of a task divide those that all R ranks would have run, so that the samples of a step are the same.

        Args:
            task: one of `tasks`.
            micro_steps: of one rank, if every rank ran every task.
        """
        return self.groups.share(task, micro_steps, rank())

    def regroup(self, groups: Mapping[str, int | Sequence[int]] | TaskGroups) -> None:
        """Change which ranks run which task, between steps. Collective.

        Args:
            groups: as in the constructor.

        Raises:
            ValueError, BalancerError: invalid groups; in the middle of a step, or parallel is not "tasks".
        """
        combiner = self._grouped_between_steps("regroup")
        new_groups = task_groups(groups, self.groups.tasks, self.groups.world)
        combiner.regroup(new_groups)
        self.groups = new_groups

    def measure(self, loss_of: Callable[[str], Tensor], repeats: int = 3) -> dict[str, float]:
        """Return the seconds of one micro-batch of every task, for `plan_groups`. Collective, between steps.

        No weight changes. Every rank runs every task, also those of other ranks, so give it data of all tasks.

        Args:
            loss_of: task -> loss of one micro-batch, from a forward of the engine.
            repeats: micro-batches per task after one to warm up.

        Returns:
            Task -> seconds of forward and backward: median of the repeats, mean over ranks; the same on all ranks.
        """
        self._grouped_between_steps("measure")
        return measure_tasks(self.groups.tasks, self._combiner, self._guard, loss_of, repeats)

    @property
    def extra_bytes(self) -> int:
        """Bytes of gradient that the balancer keeps on this rank beside the engine's own."""
        return self._combiner.bytes

    @contextlib.contextmanager
    def task(self, name: str, micro_steps: int = 1) -> Iterator[None]:
        """Run one task's micro-steps: exactly `micro_steps` calls of `backward` inside the block.

        Args:
            name: one of `tasks`, not yet run in this step.
            micro_steps: number of micro-batches that the task's gradient is the mean of.

        Raises:
            BalancerError: wrong task, number of micro-steps or nesting; ranks in different tasks, or one that failed.
                The task's gradient is dropped, those of others stay, and it can run again (norm="delayed": all must).
        """
        running = self._enter(name, micro_steps)
        restore = partial(self.weighting.load_state_dict, self.weighting.state_dict())
        with undone_after_error(running.fail, self._leave_task, self._combiner.drop, restore), self._watched():
            with self._trace(name, keep=True):
                yield
            running.end()
            with torch.no_grad():
                self._combiner.add(name, running.loss)
        self._heads.end(keep=True)
        self._running = None
        self._ran[name] = micro_steps

    def evaluation(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Evaluate a task inside this block: under ZeRO-3 its forwards have a parameter trace of their own."""
        return self._trace(("evaluation", name))

    def backward(self, loss: Tensor) -> None:
        """Run the backward of one micro-step of the current task, never scaled by the engine's accumulation steps.

        Args:
            loss: scalar, mean over the micro-batch of this rank.

        Raises:
            BalancerError: outside a task, one micro-step too many, a loss that is not a scalar with a graph, an earlier
                backward of the task failed, or ranks do not run the same backward.
        """
        if self._running is None:
            raise BalancerError("balancer.backward() outside a task; use it inside `with balancer.task(name):`")
        scaled, last = self._running.scaled(loss), self._running.next_is_last
        self._combiner.before_backward()
        with self._running.micro_step(scaled, self._combiner.communicates(last)), self._guard.allowed():
            self._adapter.set_reduces(self._combiner.reduces(last))
            self._adapter.backward(scaled)

    def step(self, require_all: bool = True) -> StepReport:
        """Add the tasks' scaled gradients and take the engine's optimizer step. Collective.

        Heads of tasks that did not run, or were left out because they were not finite, do not move at all: no momentum,
        no weight decay. When every task is left out the optimizer does not step. After an error in the step itself, as
        of the weighting, all tasks must run again.

        Args:
            require_all: refuse a step in which a task never ran; False allows a partial step.

        Raises:
            BalancerError: inside a task, tasks are missing, or ranks do not all take this step.
            NonFinite: a task was not finite and `nonfinite` is "stop"; every rank raises it.
        """
        if self._running is not None:
            raise BalancerError(f"balancer.step() inside task '{self._running.name}'; leave its block first")
        own = ", ".join(self._combiner.tasks) if self.parallel == "data" else "its tasks"
        self._agree(f"balancer.step({'' if require_all else 'require_all=False'}) after {own or 'no task'}")
        ran = self._combiner.agree(self._ran)
        missing = [task for task in self.groups.tasks if task not in ran]
        refuse_missing(missing, ran, require_all)
        try:
            with self._stepping(inside=False):
                self._heads.check_trainable()
                with torch.no_grad():
                    result = self._combiner.finish()
                if self._traces:
                    self._traces.partition()
                if result.skipped and self.nonfinite == "stop":
                    raise NonFinite(result.skipped)
                self._agree("the optimizer step")
            with self._stepping(inside=True):
                return self._take_step(result, missing)
        finally:
            self._clear()

    def abandon(self) -> None:
        """Forget the tasks of this step that have run; no weight changes, and every task can run again.

        Raises:
            BalancerError: inside a task.
        """
        if self._running is not None:
            raise BalancerError(f"balancer.abandon() inside task '{self._running.name}'; leave its block first")
        self._combiner.reset()
        self._restore_weighting()
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the engine's own state; the same on every rank."""
        return {
            "skipped_steps": dict(self.skipped_steps),
            "steps": self._steps,
            "weighting": self.weighting.state_dict(),
            "combiner": self._combiner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore, between steps, what `state_dict` returned; tasks that it does not know start fresh."""
        self.skipped_steps.update({t: n for t, n in state["skipped_steps"].items() if t in self.skipped_steps})
        self._steps = state["steps"]
        self.weighting.load_state_dict(state["weighting"])
        self._clear()
        self._combiner.load_state_dict(state["combiner"])

    def detach(self) -> None:
        """Give the engine its own `backward` and `step` back; the balancer can no longer be used.

        Other ranks that wait for this one in a task or a step raise a `BalancerError` that names it.
        """
        self._leave()
        if self._traces:
            self._traces.partition()
        self._combiner.close()
        self._adapter.restore_boundary()
        self._guard.remove()
        self._heads.close()

    def __repr__(self) -> str:
        options = f"weighting={self.weighting!r}, norm={self.norm!r}, parallel={self.parallel!r}"
        return f"TaskBalancer(tasks={self.groups.tasks}, {options}, zero_stage={self._adapter.stage})"

    def _trace(self, key: Hashable, keep: bool = False) -> contextlib.AbstractContextManager[None]:
        return self._traces.use(key, keep) if self._traces else contextlib.nullcontext()

    def _leave_task(self) -> None:
        self._running = None
        self._heads.end(keep=False)

    @contextlib.contextmanager
    def _stepping(self, inside: bool) -> Iterator[None]:
        tell = partial(tell_failure, agreement=self._agreement, place="balancer.step()", inside=inside)
        with undone_after_error(tell, self._combiner.reset, self._restore_weighting), self._watched():
            yield

    def _restore_weighting(self) -> None:
        self.weighting.load_state_dict(self._weighting_before)

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        return watched_waits(self._agreement.wait) if self._agreement else contextlib.nullcontext()

    def _agree(self, doing: str) -> None:
        if self._agreement:
            self._agreement.check(doing, within_step=bool(self._ran) and self.parallel == "data")

    def _grouped_between_steps(self, method: str) -> GroupedCombiner:
        if not isinstance(self._combiner, GroupedCombiner):
            raise BalancerError(f"{method}() is for parallel='tasks'; here every rank runs every task")
        if self._running is not None or self._combiner.tasks:
            raise BalancerError(f"{method}() in the middle of a step; call it after balancer.step()")
        self._agree(f"balancer.{method}()")
        return self._combiner

    def _enter(self, name: str, micro_steps: int) -> RunningTask:
        refuse_task(name, self.groups, self._combiner.tasks, self._running)
        asked = self._agreement if self.parallel == "data" else None
        running = RunningTask(name, micro_steps, self.engine.device, asked, self._adapter.stage == 3)
        running.begin(first=not self._ran)
        self._combiner.begin(name)
        self._heads.begin(name)
        self._running = running
        self._adapter.set_reduces(self._combiner.reduces(running.next_is_last))
        return running

    def _take_step(self, result: Combined, missing: Sequence[str]) -> StepReport:
        for task in result.skipped:
            self.skipped_steps[task] += 1
        applied = result.usable and (self.nonfinite == "skip_task" or not result.skipped)
        if applied:
            self._engine_step(result.overflow, left_out={*missing, *result.skipped})
        overflow = result.overflow or self._adapter.overflow
        watched = self._watches(self._steps)
        self._steps += 1
        return result.report(overflow, applied and not overflow, watched)

    def _engine_step(self, overflow: bool, left_out: set[str]) -> None:
        self._combiner.hand_over(overflow)
        if not left_out or overflow:
            with self._guard.allowed():
                self._adapter.step()
            return
        flags = self._heads.flags(without=left_out)
        if self._agreement:
            flags = self._agreement.union(flags)
        with torch.no_grad(), self._guard.allowed(), self._adapter.unmoved(self._heads.unused(flags)):
            self._adapter.step()

    def _watches(self, step: int) -> bool:
        return self._cosines_every > 0 and step % self._cosines_every == 0

    def _clear(self) -> None:
        self._combiner.clear()
        self._combiner.watch = self._watches(self._steps)
        self._heads.clear()
        self._weighting_before = self.weighting.state_dict()
        self._running = None
        self._ran: dict[str, int] = {}  # task -> micro-steps, on this rank
