"""TaskBalancer: every task's backbone gradient measured over all ranks, scaled, and only then added to the others."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.arguments import NONFINITE, combiner, norm_kind, shared_parameters, task_names, whole
from allinone_ds.balance.assignment import TaskGroups, groups_for, task_groups
from allinone_ds.balance.combiners.task_parallel import GroupedCombiner
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.self_test import self_test as run_self_test
from allinone_ds.balance.self_test import warn_of_unchecked_release
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.clipping import TBGC
from allinone_ds.balance.weightings.gram import as_weighting
from allinone_ds.errors import BalancerError, NonFinite
from allinone_ds.strict import did_you_mean
from allinone_ds.testing import toy
from allinone_ds.zero.guard import EngineGuard
from allinone_ds.zero.support import checked_release, open_shards, refuse_unsupported
from allinone_ds.zero.traces import ParameterTraces

_STEP = "balancer.step()"


class TaskBalancer:
    """Balances the tasks of one optimizer step on a DeepSpeed engine, ZeRO stage 0, 1, 2 or 3.

        balancer = TaskBalancer(engine, tasks=("det", "seg", "cls"), shared="backbone", weighting=TBGC(max_norm=0.1))
        for step in range(steps):
            for task in balancer.tasks:
                with balancer.task(task, micro_steps=2):
                    for batch in micro_batches(task):
                        balancer.backward(engine(task=task, **batch).loss)
            report = balancer.step()

    The gradient of a task is the mean over its micro-steps and over all ranks that run it. Its norm on the backbone is
    computed from ZeRO shards with one small all-reduce; nothing of full-model size is built. While the balancer
    lives it owns the engine: `engine.backward` and `engine.step` raise until `detach()`. Collective to make.

    Args:
        engine: what `deepspeed.initialize` returned; "gradient_clipping" must be 0.0 in its config.
        tasks: names of the T tasks.
        shared: dotted name of the backbone in the engine's module, or an iterable of its parameters.
        weighting: a `Weighting` such as `TBGC`, or a callable from the (T, T) Gram matrix of the tasks' backbone
            gradients to (T,) weights, such as a `torchjd` Weighting.
        norm: where norms come from. "exact": the averaged gradient of each task, one reduce a task (ZeRO-1 to 3: what
            they send for a micro-step anyway, but for ZeRO-1, which else reduces once a step). "sketch": estimates
            (see `sketch_size`) before the reduce, one reduce a step; every rank keeps two gradients of the whole model.
            "delayed": factors from the step before, one reduce a step; every rank keeps one gradient of the whole
            model; the first step is exact, and a step with a task that is not finite is not taken at all.
        sketch_size: length k of a sketch (a task sends 2 k float32 numbers); a norm's relative standard error is at
            most sqrt(6 / k) / 2. None: 65,536, or about a 512th of the model's parameters where that is more.
        parallel: "data": every rank runs every task, one after another. "tasks": ranks are divided among the tasks,
            `balancer.tasks` are those of this rank, and nothing is sent before `step`; ZeRO-1 and ZeRO-2, norm "exact"
            or "sketch". Every rank keeps the gradients of its tasks. See `share` for the micro-batches of a rank.
        groups: with parallel="tasks", task -> how many ranks run it, or task -> its ranks; None: evenly. See
            `plan_groups`.
        task_traces: under ZeRO-3, prefetch parameters along one trace a task instead of one that every change of task
            throws away; and gather weights once a step instead of once a micro-step, where the model is within
            stage3_max_live_parameters and twice the model within stage3_max_reuse_distance.
        cosines_every: in each so many'th step the report holds the tasks' Gram matrix, for cosines between their
            gradients (`StepReport.cosines`); 0: never. Where nothing else needs the matrix it comes from sketches.
        check_ranks: compare the task on all ranks before it runs (a CPU message of 32 bytes a task), so that ranks
            in different tasks are an error and not a hang. (parallel="tasks": they compare once a step in any case.)
        allow_gradient_clipping: let DeepSpeed clip the balanced sum a second time.
        nonfinite: what a step does with a task whose loss or gradient is not finite: "skip_task" leaves the task out,
            "skip_step" leaves all tasks out, "stop" raises `NonFinite` and changes nothing.
        self_test: compare a toy model's balanced steps on the same kind of engine with a float64 reference first. None:
            only with a DeepSpeed release that was not checked.

    Attributes:
        tasks: names of the tasks that this rank runs, in the order given: all, unless parallel is "tasks".
        groups: which ranks run which task; `groups.tasks` are all names.
        skipped_steps: task -> how many steps left it out because it was not finite.
        extra_bytes: what the balancer keeps on this rank beside the engine.

    Raises:
        TypeError, ValueError: an argument that cannot be used; says what is allowed.
        UnsupportedEngine: an engine kind or setting that is not served.
    """

    def __init__(
        self,
        engine: Any,
        tasks: Iterable[str],
        shared: str | Iterable[Parameter],
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
        names = task_names(tasks)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite = {nonfinite!r}; allowed: {', '.join(NONFINITE)}")
        self.nonfinite = nonfinite
        self.weighting = as_weighting(weighting)
        self.norm = norm_kind(norm, sketch_size, parallel)
        self.parallel = parallel
        refuse_unsupported(engine, allow_gradient_clipping)
        self.engine = engine
        backbone = shared_parameters(engine.module, shared)
        self._shards = open_shards(engine, backbone)
        if self_test or (self_test is None and not checked_release()):
            warn_of_unchecked_release()
            run_self_test(engine, toy_balancer, norm, parallel)
        self.groups = groups_for(parallel, groups, names, dist.get_world_size())
        apart = parallel == "tasks"
        self._agreement = Agreement((*names, _STEP)) if check_ranks or apart else None
        self._combiner = combiner(
            self._shards, self.weighting, norm, sketch_size, self.groups, self._agreement if apart else None
        )
        self._traces = ParameterTraces(engine) if task_traces else None
        self._guard = EngineGuard(engine, BalancerError)
        self._heads = [p for p in engine.module.parameters() if p.requires_grad and id(p) not in backbone]
        self._touched: dict[str, set[int]] = {}
        self._ran: dict[str, int] = {}  # task -> micro-steps, on this rank
        self._hooks = [p.register_hook(self._touch(index)) for index, p in enumerate(self._heads)]
        self._cosines_every, self._steps = whole("cosines_every", cosines_every), 0
        self.skipped_steps = dict.fromkeys(names, 0)
        self._task: str | None = None
        self._clear()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this rank runs, in the order given."""
        return self.groups.of(dist.get_rank())

    def share(self, task: str, micro_steps: int = 1) -> list[tuple[int, int]]:
        """The micro-batches of a task that are this rank's: (micro-step k, rank r) of each.

        Where every rank runs every task they are its own: (0, r), (1, r), ... Where tasks live on different ranks, the
        ranks of a task deal out those that all R ranks would have run, so that the samples of a step are the same.

        Args:
            task: one of `tasks`.
            micro_steps: of one rank, if every rank ran every task.
        """
        return self.groups.share(task, micro_steps, dist.get_rank())

    def regroup(self, groups: Mapping[str, int | Sequence[int]] | TaskGroups) -> None:
        """Divide the ranks anew among the tasks, between steps. Collective.

        Args:
            groups: as when the balancer was made.

        Raises:
            ValueError: groups that cannot be used, or that are not the same on all ranks.
            BalancerError: in the middle of a step, or parallel is not "tasks".
        """
        grouped = self._between_steps("regroup")
        found = task_groups(groups, self.groups.tasks, self.groups.world)
        grouped.regroup(found)
        self.groups = found

    def measure(self, loss_of: Callable[[str], Tensor], repeats: int = 3) -> dict[str, float]:
        """Seconds of one micro-batch of every task, for `plan_groups`; between steps, no weight changes. Collective.

        Every rank runs every task, also those that are another's, so give it data of all.

        Args:
            loss_of: task -> loss of one micro-batch, from a forward of the engine.
            repeats: micro-batches a task after one to warm up.

        Returns:
            Task -> seconds of forward and backward: median of the repeats, mean over ranks; the same on all ranks.

        Raises:
            BalancerError: in the middle of a step, or parallel is not "tasks".
        """
        self._between_steps("measure")
        seconds = []
        for task in self.groups.tasks:
            times = []
            for _ in range(repeats + 1):
                self._combiner.begin(task)
                self.engine.set_gradient_accumulation_boundary(False)
                get_accelerator().synchronize()
                start = time.perf_counter()
                loss = loss_of(task)
                with self._guard.allowed():
                    self.engine.backward(loss, scale_wrt_gas=False)
                get_accelerator().synchronize()
                times.append(time.perf_counter() - start)
                self._combiner.drop()
            seconds.append(statistics.median(times[1:]))
        self._combiner.close()
        found = torch.tensor(seconds, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(found)
        return dict(zip(self.groups.tasks, (found / self.groups.world).tolist(), strict=True))

    def _between_steps(self, method: str) -> GroupedCombiner:
        if not isinstance(self._combiner, GroupedCombiner):
            raise BalancerError(f"{method}() is for parallel='tasks'; here every rank runs every task")
        if self._task is not None or self._combiner.tasks:
            raise BalancerError(f"{method}() in the middle of a step; call it after balancer.step()")
        return self._combiner

    @property
    def extra_bytes(self) -> int:
        """Bytes of gradient the balancer keeps on this rank beside the engine's own."""
        return self._combiner.bytes

    @contextlib.contextmanager
    def task(self, name: str, micro_steps: int = 1) -> Iterator[None]:
        """Run one task's micro-steps: exactly `micro_steps` calls of `backward` inside the block.

        Args:
            name: one of `tasks`, not yet run in this step.
            micro_steps: how many micro-batches the task's gradient is the mean of.

        Raises:
            BalancerError: wrong task, number of micro-steps or nesting, or ranks in different tasks. The task's
                gradient is dropped, those of tasks already done stay: the task can run again. (norm="delayed": all
                tasks of the step are dropped and must run again.)
        """
        self._enter(name, micro_steps)
        try:
            with self._trace(name, keep=True):
                yield
            if self._done != micro_steps:
                raise BalancerError(
                    f"task '{name}' ended after {self._done} of {micro_steps} micro-steps; call "
                    "balancer.backward(loss) exactly micro_steps times inside the block"
                )
        except BaseException:
            self._combiner.drop()
            self._touched.pop(name)
            self._task = None
            raise
        with torch.no_grad():
            self._combiner.add(name, self._loss)
        self._task = None
        self._ran[name] = micro_steps

    def evaluation(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Evaluate a task inside this block: under ZeRO-3 its forwards keep a parameter trace of their own."""
        return self._trace(("evaluation", name))

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-step of the current task; never scaled by the engine's accumulation steps.

        Args:
            loss: scalar, mean over the micro-batch of this rank.

        Raises:
            BalancerError: outside a task, one micro-step too many, or a loss that is not a scalar with a graph.
        """
        if self._task is None:
            raise BalancerError("balancer.backward() outside a task; use it inside `with balancer.task(name):`")
        if self._done == self._micro_steps:
            raise BalancerError(
                f"task '{self._task}' got more than its {self._micro_steps} micro-steps; pass micro_steps=K to "
                "balancer.task() for K backward calls"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = (
                f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise BalancerError(f"the loss of task '{self._task}' is {found}; pass a scalar tensor with requires_grad")
        loss = loss.reshape(())
        self._loss += loss.detach().float() / self._micro_steps
        self.engine.set_gradient_accumulation_boundary(self._combiner.reduces(self._done == self._micro_steps - 1))
        with self._guard.allowed():
            self.engine.backward(loss * (self._shards.missing_loss_scale / self._micro_steps), scale_wrt_gas=False)
        self._done += 1

    def step(self, require_all: bool = True) -> StepReport:
        """Add the tasks' scaled gradients and take the engine's optimizer step.

        Heads of tasks that did not run, or were left out because they were not finite, do not move at all: no momentum,
        no weight decay. When every task is left out the optimizer does not step.

        Args:
            require_all: refuse a step in which a task never ran; False allows a partial step.

        Raises:
            BalancerError: inside a task, or tasks missing.
            NonFinite: a task was not finite and `nonfinite` is "stop"; every rank raises it.
        """
        if self._task is not None:
            raise BalancerError(f"balancer.step() inside task '{self._task}'; leave its block first")
        names = self.groups.tasks
        ran = self._combiner.agree(self._ran)
        missing = [task for task in names if task not in ran]
        if missing and (require_all or len(missing) == len(names)):
            raise BalancerError(
                f"balancer.step() before task(s) {', '.join(missing)} ran (ran: {', '.join(ran) or 'none'}); run every "
                "task, or ask for a partial step of at least one task with require_all=False"
            )
        if self._agreement and self.parallel == "data":
            self._agreement.check(_STEP, -len(missing) - 1)
        with torch.no_grad():
            result = self._combiner.finish()
        if self._traces:
            self._traces.put_away()
        left_out = set(missing) | set(result.skipped)
        if result.skipped and self.nonfinite == "stop":
            self._clear()
            raise NonFinite(result.skipped)
        for task in result.skipped:
            self.skipped_steps[task] += 1
        applied = False
        if result.usable and (self.nonfinite == "skip_task" or not result.skipped):
            applied = self._engine_step(result.overflow, left_out)
        overflow = result.overflow or bool(getattr(self.engine.optimizer, "overflow", False))
        self._steps += 1
        self._clear()
        return StepReport(
            norms=result.norms,
            scales=result.scales,
            losses=result.losses,
            whole_norms=result.whole_norms,
            skipped=result.skipped,
            overflow=overflow,
            applied=applied and not overflow,
            tasks=result.tasks,
            gram=result.gram if self._watches(self._steps - 1) else None,
            norm_error=result.norm_error,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the engine's own state; the same on every rank."""
        return {
            "skipped_steps": dict(self.skipped_steps),
            "steps": self._steps,
            "weighting": self.weighting.state_dict(),
            "combiner": self._combiner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over, between steps, what `state_dict` gave; tasks that it does not know start anew."""
        self.skipped_steps.update({t: n for t, n in state["skipped_steps"].items() if t in self.skipped_steps})
        self._steps = state["steps"]
        self.weighting.load_state_dict(state["weighting"])
        self._clear()
        self._combiner.load_state_dict(state["combiner"])

    def detach(self) -> None:
        """Give the engine its own `backward` and `step` back; the balancer can no longer be used."""
        if self._traces:
            self._traces.put_away()
        self._combiner.close()
        self._guard.remove()
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        stage = self.engine.zero_optimization_stage()
        options = f"weighting={self.weighting!r}, norm={self.norm!r}, parallel={self.parallel!r}"
        return f"TaskBalancer(tasks={self.groups.tasks}, {options}, zero_stage={int(stage)})"

    def _trace(self, key: Hashable, keep: bool = False) -> contextlib.AbstractContextManager[None]:
        return self._traces.use(key, keep) if self._traces else contextlib.nullcontext()

    def _enter(self, name: str, micro_steps: int) -> None:
        if self._task is not None:
            raise BalancerError(f"task '{name}' begins inside task '{self._task}'; tasks run one after another")
        if name not in self.groups.tasks:
            raise BalancerError(f"unknown task '{name}'; {did_you_mean(str(name), self.groups.tasks)}")
        if name not in self.tasks:
            raise BalancerError(
                f"task '{name}' runs on rank(s) {list(self.groups.ranks[name])}, this is rank {dist.get_rank()}; loop "
                "over balancer.tasks, which are those of this rank"
            )
        if name in self._combiner.tasks:
            raise BalancerError(
                f"task '{name}' runs a second time in this step; call balancer.step() first, or give it more "
                "micro_steps"
            )
        if not isinstance(micro_steps, int) or micro_steps < 1:
            raise BalancerError(f"micro_steps = {micro_steps!r} for task '{name}'; allowed: a whole number from 1 on")
        if self._agreement and self.parallel == "data":
            self._agreement.check(name, micro_steps)
        self._task, self._micro_steps, self._done = name, micro_steps, 0
        self._touched[name] = set()
        self._loss = torch.zeros((), device=self.engine.device)
        self._combiner.begin(name)
        self.engine.set_gradient_accumulation_boundary(self._combiner.reduces(micro_steps == 1))

    def _engine_step(self, overflow: bool, left_out: set[str]) -> bool:
        self._combiner.give(overflow)
        self.engine.set_gradient_accumulation_boundary(True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._guard.allowed())
            if left_out and not overflow:
                with torch.no_grad():
                    stack.enter_context(self._shards.unmoved(self._idle_heads(left_out)))
                    self.engine.step()
            else:
                self.engine.step()
        self._shards.after_step()
        return True

    def _idle_heads(self, left_out: set[str]) -> list[Parameter]:
        """Parameters outside the backbone that no task of this step gave a gradient, on any rank."""
        used = set().union(*(touched for task, touched in self._touched.items() if task not in left_out))
        flags = [index in used for index in range(len(self._heads))]
        if self._agreement:
            flags = self._agreement.union(flags)
        return [p for p, flag in zip(self._heads, flags, strict=True) if not flag]

    def _touch(self, index: int) -> Any:
        def hook(gradient: Tensor) -> None:
            if self._task is not None:
                self._touched[self._task].add(index)

        return hook

    def _watches(self, step: int) -> bool:
        return self._cosines_every > 0 and step % self._cosines_every == 0

    def _clear(self) -> None:
        self._combiner.clear()
        self._combiner.watch = self._watches(self._steps)
        self._touched, self._ran = {}, {}
        self._task, self._micro_steps, self._done = None, 0, 0
        self._loss = torch.zeros((), device=self.engine.device)


def toy_balancer(engine: Any, **options: Any) -> TaskBalancer:
    """A balancer of the self-test's toy model."""
    return TaskBalancer(engine, toy.TASKS, "backbone", TBGC(max_norm=0.1), self_test=False, **options)
