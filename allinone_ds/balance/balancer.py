"""TaskBalancer: every task's backbone gradient measured over all ranks, scaled, and only then added to the others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..strict import did_you_mean
from ..zero import CHECKED_RELEASES, EngineGuard, ParameterTraces, checked_release, open_shards, refuse_unsupported
from .agreement import Agreement
from .errors import BalancerError, NonFinite
from .local import combiner
from .report import StepReport
from .weighting import Weighting, as_weighting

_STEP = "balancer.step()"
NONFINITE = ("skip_task", "skip_step", "stop")


class TaskBalancer:
    """Balances the tasks of one optimizer step on a DeepSpeed engine, ZeRO stage 0, 1, 2 or 3.

        balancer = TaskBalancer(engine, tasks=("det", "seg", "cls"), shared="backbone", weighting=TBGC(max_norm=0.1))
        for step in range(steps):
            for task in balancer.tasks:
                with balancer.task(task, micro_steps=2):
                    for batch in micro_batches(task):
                        balancer.backward(engine(task=task, **batch).loss)
            report = balancer.step()

    The gradient of a task is the mean over its micro-steps and over all ranks. Its norm on the shared backbone is
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
        task_traces: under ZeRO-3, prefetch parameters along one trace a task instead of one that every change of task
            throws away; and gather weights once a step instead of once a micro-step, where the model is within
            stage3_max_live_parameters and twice the model within stage3_max_reuse_distance.
        cosines_every: in each so many'th step the report holds the tasks' Gram matrix, for cosines between their
            gradients (`StepReport.cosines`); 0: never. Where nothing else needs the matrix it comes from sketches.
        check_ranks: compare the task on all ranks before it runs (a CPU message of 32 bytes a task), so that ranks
            in different tasks are an error and not a hang.
        allow_gradient_clipping: let DeepSpeed clip the balanced sum a second time.
        nonfinite: what a step does with a task whose loss or gradient is not finite: "skip_task" leaves the task out,
            "skip_step" leaves all tasks out, "stop" raises `NonFinite` and changes nothing.
        self_test: compare a toy model's balanced steps on the same kind of engine with a float64 reference first. None:
            only with a DeepSpeed release that was not checked.

    Attributes:
        tasks: the names, in the order given.
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
        norm: str = "exact",
        sketch_size: int | None = None,
        task_traces: bool = True,
        cosines_every: int = 0,
        check_ranks: bool = True,
        allow_gradient_clipping: bool = False,
        nonfinite: str = "skip_task",
        self_test: bool | None = None,
    ):
        self.tasks = _task_names(tasks)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite = {nonfinite!r}; allowed: {', '.join(NONFINITE)}")
        self.nonfinite = nonfinite
        self.weighting = as_weighting(weighting)
        self.norm = _norm_kind(norm, sketch_size)
        refuse_unsupported(engine, allow_gradient_clipping)
        self.engine = engine
        backbone = _shared_parameters(engine.module, shared)
        self._shards = open_shards(engine, backbone)
        if self_test or (self_test is None and not checked_release()):
            _run_self_test(engine)
        self._combiner = combiner(self._shards, self.weighting, norm, sketch_size, self.tasks)
        self._traces = ParameterTraces(engine) if task_traces else None
        self._agreement = Agreement((*self.tasks, _STEP)) if check_ranks else None
        self._guard = EngineGuard(engine, BalancerError)
        self._heads = [p for p in engine.module.parameters() if p.requires_grad and id(p) not in backbone]
        self._touched: dict[str, set[int]] = {}
        self._hooks = [p.register_hook(self._touch(index)) for index, p in enumerate(self._heads)]
        self._cosines_every, self._steps = _whole("cosines_every", cosines_every), 0
        self.skipped_steps = dict.fromkeys(self.tasks, 0)
        self._task: str | None = None
        self._clear()

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
        missing = [task for task in self.tasks if task not in self._combiner.tasks]
        if missing and (require_all or len(missing) == len(self.tasks)):
            ran = ", ".join(self._combiner.tasks) or "none"
            raise BalancerError(
                f"balancer.step() before task(s) {', '.join(missing)} ran (ran: {ran}); run every task, or ask for a "
                "partial step of at least one task with require_all=False"
            )
        if self._agreement:
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
        options = f"weighting={self.weighting!r}, norm={self.norm!r}"
        return f"TaskBalancer(tasks={self.tasks}, {options}, zero_stage={int(stage)})"

    def _trace(self, key: Hashable, keep: bool = False) -> contextlib.AbstractContextManager[None]:
        return self._traces.use(key, keep) if self._traces else contextlib.nullcontext()

    def _enter(self, name: str, micro_steps: int) -> None:
        if self._task is not None:
            raise BalancerError(f"task '{name}' begins inside task '{self._task}'; tasks run one after another")
        if name not in self.tasks:
            raise BalancerError(f"unknown task '{name}'; {did_you_mean(str(name), self.tasks)}")
        if name in self._combiner.tasks:
            raise BalancerError(
                f"task '{name}' runs a second time in this step; call balancer.step() first, or give it more "
                "micro_steps"
            )
        if not isinstance(micro_steps, int) or micro_steps < 1:
            raise BalancerError(f"micro_steps = {micro_steps!r} for task '{name}'; allowed: a whole number from 1 on")
        if self._agreement:
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
        self._touched = {}
        self._task, self._micro_steps, self._done = None, 0, 0
        self._loss = torch.zeros((), device=self.engine.device)


def _task_names(tasks: Iterable[str]) -> tuple[str, ...]:
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"tasks = {names!r}; pass at least one name, each once, each a non-empty string")
    return names


def _whole(field: str, value: int) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{field} = {value!r}; allowed: a whole number from 0 on")
    return value


def _norm_kind(norm: str, sketch_size: int | None) -> str:
    kinds = ("exact", "sketch", "delayed")
    if norm not in kinds:
        raise ValueError(f"norm = {norm!r}; {did_you_mean(str(norm), kinds)}")
    if sketch_size is not None and (norm == "exact" or not isinstance(sketch_size, int) or sketch_size < 1):
        raise ValueError(
            f"sketch_size = {sketch_size!r} with norm = {norm!r}; allowed: None, or a whole number from 1 on with "
            "norm='sketch' or norm='delayed'"
        )
    return norm


def _shared_parameters(module: Module, shared: str | Iterable[Parameter]) -> set[int]:
    """`id` of every trainable parameter of the backbone."""
    if isinstance(shared, str):
        modules = dict(module.named_modules())
        if shared not in modules or not shared:
            children = [name for name in modules if name and name.count(".") <= shared.count(".")]
            raise ValueError(f"shared = '{shared}': the model has no such submodule; {did_you_mean(shared, children)}")
        params = list(modules[shared].parameters())
        where = f"submodule '{shared}'"
    else:
        params = list(shared)
        where = "the iterable of parameters"
        if not all(isinstance(p, Parameter) for p in params):
            raise TypeError("shared must be a submodule's dotted name or an iterable of torch.nn.Parameter")
        own = {id(p) for p in module.parameters()}
        if any(id(p) not in own for p in params):
            raise ValueError("shared holds parameters that are not the engine's module's; take them from engine.module")
    trainable = {id(p) for p in params if p.requires_grad}
    if not trainable:
        raise ValueError(f"shared: {where} has no trainable parameter, so there is nothing to balance")
    return trainable


def _run_self_test(engine: Any) -> None:
    from .self_test import self_test

    if not checked_release():
        warnings.warn(
            f"DeepSpeed {deepspeed.__version__} was not checked with this release of allinone_ds "
            f"(checked: {', '.join(CHECKED_RELEASES)}); running a self-test of balanced steps",
            stacklevel=4,
        )
    self_test(engine)
