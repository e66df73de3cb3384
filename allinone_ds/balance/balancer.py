"""TaskBalancer: every task's backbone gradient measured over all ranks, scaled, and only then added to the others."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups, groups_for, task_names
from allinone_ds.balance.combiners.choose import choose_combiner
from allinone_ds.balance.combiners.outcome import Combined
from allinone_ds.balance.heads import HeadUse, agreed_backbone, without_backbone
from allinone_ds.balance.joint.running import JointTasks, joint_tasks, single_task
from allinone_ds.balance.options import check_options, combination_error
from allinone_ds.balance.rank_groups import RankGroups, opening_of_step
from allinone_ds.balance.renaming import Names, renamed_state
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.running_task import RunningTask, refuse_missing, refuse_task, tell_failure, undone_after_error
from allinone_ds.balance.self_test import self_test as run_self_test
from allinone_ds.balance.self_test import unchecked, warn_of_unchecked_release
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.clipping import Sum
from allinone_ds.balance.weightings.gram import as_weighting, kind_of
from allinone_ds.distributed import rank, watched_waits, world_size
from allinone_ds.errors import BalancerError, NonFinite
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.guard import EngineGuard
from allinone_ds.zero.params import forget_copies
from allinone_ds.zero.support import refuse_unsupported
from allinone_ds.zero.traces import ParameterTraces


class TaskBalancer(RankGroups):
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
            "features": of gradients at the features that `task_features` marks, scaled there before the reduce; heads
            keep their raw gradient, and the balancer keeps none. A step with a task that is not finite is not taken.
        sketch_size: length k of a sketch (a task sends 2 k float32 numbers); the relative standard error of a norm is
            at most sqrt(6 / k) / 2. None: 65,536, or about a 512th of the model's parameters where that is more.
        task_traces: under ZeRO-3, prefetch parameters along one trace per task, where DeepSpeed's one trace is
            discarded at every change of task. Also keep weights gathered over the step: the whole model if it is within
            stage3_max_live_parameters and half of stage3_max_reuse_distance, else the last layers of the backbone.
        cosines_every: steps between two reports with the tasks' Gram matrix, for cosines between their gradients
            (`StepReport.cosines`); 0: never. Where nothing else needs the matrix it comes from sketches.
        check_ranks: compare what the ranks do (CPU messages of 32 bytes), so that a rank in a different task, or with
            an error, is an error on all ranks and not a hang. A step with the same tasks, micro-steps and order as the
            one before sends one message, which travels during the first forward; any other step sends one before each
            collective operation. With parallel="tasks" they compare in the step, always.
        allow_gradient_clipping: let DeepSpeed clip the balanced sum a second time.
        nonfinite: what a step does with a task whose loss, gradient or factor is not finite: "skip_task" leaves it
            out, "skip_step" leaves all tasks out, "stop" raises `NonFinite` and changes nothing.
        self_test: first compare balanced steps of a toy model, on the same kind of engine, with a float64 reference.
            None: with a DeepSpeed release that was not checked, and on several accelerators, which were not either.

    Attributes:
        groups: which ranks run which task; `groups.tasks` are all names.
        nothing_shared: whether all of the backbone is frozen, so that the heads get their raw gradients.
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
        tasks = task_names(tasks)
        options = {k: v for k, v in locals().items() if k not in ("self", "engine", "shared")}
        refuse_unsupported(engine, allow_gradient_clipping)
        backbone = agreed_backbone(engine.module, shared, options)
        check_options(norm, sketch_size, parallel, cosines_every, nonfinite)
        self.nothing_shared = not backbone
        if self.nothing_shared:
            backbone, weighting, norm = without_backbone(engine.module), Sum(), "exact"
        self.weighting = as_weighting(weighting)
        self.weighting.check_tasks(tasks)
        self.engine, self.norm, self.parallel, self.nonfinite = engine, norm, parallel, nonfinite
        adapter = self._adapter = open_engine(engine, backbone)
        if error := combination_error(norm, parallel, self.weighting, adapter.stage, adapter.keeps_local_gradients):
            raise error
        if self_test or (self_test is None and unchecked(adapter)):
            warn_of_unchecked_release()
            run_self_test(engine, TaskBalancer, norm, parallel)
        self.groups = groups_for(parallel, groups, tasks, world_size())
        self._agreement = Agreement() if check_ranks or parallel == "tasks" else None
        self._leave = weakref.finalize(self, self._agreement.leave if self._agreement else int)
        self._combiner = choose_combiner(
            adapter, self.weighting, norm, sketch_size, self.groups, self._agreement if parallel == "tasks" else None
        )
        if self._agreement:
            self._combiner.wait = self._agreement.wait
        self._traces = ParameterTraces(engine, backbone, task_traces)
        self._guard = EngineGuard(engine, BalancerError)
        adapter.take_over()
        self._heads = HeadUse(engine.module, backbone, self._guard, shares=not self.nothing_shared)
        self._cosines_every, self._steps = cosines_every, 0
        self.skipped_steps = dict.fromkeys(tasks, 0)
        adapter.discard()  # gradients of steps that the engine took without a balancer
        forget_copies(engine)  # of weights that were loaded since
        self._clear()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this rank runs, in the order given: all, unless parallel is "tasks"."""
        return self.groups.of(rank())

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
                The task's gradient is dropped and it can run again (norm="delayed" and "features": all must).
        """
        refuse_task(name, self.groups, self._combiner.tasks, self._running)
        asked = self._agreement if self.parallel == "data" else None
        running = single_task(name, micro_steps, self._combiner, self._heads, asked, self.weighting)
        with self._block(running), running.forwards():
            yield

    @contextlib.contextmanager
    def joint(self, names: Iterable[str], micro_steps: int = 1, at: str = "backbone") -> Iterator[None]:
        """Run several tasks whose losses come from one forward, `backward({task: loss})`, `micro_steps` times.

        Args:
            names: of the tasks, not yet run in this step.
            micro_steps: number of forwards.
            at: "backbone": one backward per task, exact norms on the backbone. "features": one backward for all, norms
                at the features that `task_features` marks in the model's forward, heads with their raw gradient.

        Raises:
            BalancerError: as in `task`; after an error in the block all tasks of the step must run again.
            ConfigError: norms are not exact, or tasks run on different ranks; or a weighting that the features cannot
                serve.
        """
        tasks = task_names(names)
        for name in tasks:
            refuse_task(name, self.groups, self._combiner.tasks, self._running)
        running = joint_tasks(tasks, micro_steps, at, self._combiner, self._heads, self._agreement, self.weighting)
        with self._block(running), running.forwards():
            yield

    def evaluation(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Evaluate a task inside this block: under ZeRO-3 its forwards have a parameter trace of their own."""
        return self._traces.use(("evaluation", name))

    def backward(self, loss: Any, count: Any = None) -> None:
        """Run the backward of one micro-step of the current task, never scaled by the engine's accumulation steps.

        Args:
            loss: scalar, mean over the labels in the micro-batch of this rank; in a joint block a dict: task -> loss,
                None where this rank has no label of the task.
            count: how many labelled things (images, valid pixels, objects) the loss is the mean of, in a joint block a
                dict of them: the task's gradient is then the mean over all of them in the step, over micro-steps and
                ranks. None: micro-steps and ranks count the same.

        Raises:
            BalancerError: outside a task, one micro-step too many, a loss that is not a scalar with a graph, an earlier
                backward of the task failed, or ranks do not run the same backward.
        """
        if self._running is None:
            raise BalancerError("balancer.backward() outside a task; use it inside `with balancer.task(name):`")
        self._combiner.before_backward()
        self._running.backward(loss, count, self._run_backward)

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
        self._agree(opening_of_step(self._combiner.tasks if self.parallel == "data" else ("its tasks",), require_all))
        ran = self._combiner.agree(self._ran)
        missing = [task for task in self.groups.tasks if task not in ran]
        refuse_missing([task for task in missing if task not in self._ran], ran or tuple(self._ran), require_all)
        try:
            with self._stepping(inside=False):
                self._heads.check_trainable()
                with torch.no_grad():
                    result = self._combiner.finish() if ran else self._combiner.nothing_ran()
                self._traces.partition()
                if result.skipped and self.nonfinite == "stop":
                    raise NonFinite(result.skipped)
                self._agree("the optimizer step")
            with self._stepping(inside=True):
                report = self._take_step(result, missing)
            if self._agreement:
                self._agreement.end_step()
            return report
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
            "tasks": list(self.groups.tasks),
            "skipped_steps": dict(self.skipped_steps),
            "steps": self._steps,
            "weighting": self.weighting.state_dict(),
            "weighting_kind": kind_of(self.weighting),
            "combiner": self._combiner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Names | None = None) -> None:
        """Restore, between steps, what `state_dict` returned; tasks that it does not know start fresh.

        `names` maps a task of `state` to its name in this balancer, or to None where it does not go on.
        """
        state = renamed_state(state, names or {}, self.groups.tasks)
        self.skipped_steps.update({t: n for t, n in state["skipped_steps"].items() if t in self.skipped_steps})
        self._steps = state["steps"]
        if state.get("weighting_kind", kind_of(self.weighting)) == kind_of(self.weighting):
            self.weighting.load_state_dict(state["weighting"])  # that of another would mean something else
        self._clear()
        self._combiner.load_state_dict(state["combiner"])

    def detach(self) -> None:
        """Give the engine its own `backward` and `step` back; the balancer can no longer be used.

        Other ranks that wait for this one in a task or a step raise a `BalancerError` that names it.
        """
        self._leave()
        self._traces.partition()
        self._combiner.close()
        self._adapter.give_back()
        self._guard.remove()
        self._heads.close()

    def __repr__(self) -> str:
        options = f"weighting={self.weighting!r}, norm={self.norm!r}, parallel={self.parallel!r}"
        return f"TaskBalancer(tasks={self.groups.tasks}, {options}, zero_stage={self._adapter.stage})"

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
            self._agreement.reach(doing)

    @contextlib.contextmanager
    def _block(self, running: RunningTask) -> Iterator[None]:
        running.begin()
        self._guard.order = 0
        self._combiner.begin(running.name)
        self._heads.begin(running.name)
        self._running = running
        self._adapter.set_reduces(self._combiner.reduces(running.next_is_last))
        restore = partial(self.weighting.load_state_dict, self.weighting.state_dict())
        cleanups: tuple[Callable[[], Any], ...] = (self._combiner.drop, restore)
        if isinstance(running, JointTasks):  # some of its tasks, or micro-steps, are in a sum already
            cleanups = (self._combiner.reset, self._restore_weighting, self._clear)
        with undone_after_error(running.fail, self._leave_task, *cleanups), self._watched():
            with self._traces.use(running.name, keep=True):
                yield
            running.end(self._guard.order if self._combiner.reduces_in_order else 0)
            with torch.no_grad():
                running.hand_over()
        self._heads.end(keep=True)
        self._running = None
        self._ran.update(dict.fromkeys(running.tasks, running.micro_steps))

    def _run_backward(self, loss: Tensor, reduces: bool, retain_graph: bool = False, local: bool = False) -> None:
        with self._guard.allowed(counted=not local):
            self._adapter.set_reduces(reduces)
            self._adapter.backward(loss, retain_graph)

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
        if self._agreement:
            self._agreement.end_step(complete=False)
        self._running: RunningTask | None = None
        self._ran: dict[str, int] = {}  # task -> micro-steps, on this rank
