"""TaskBalancer: every task's backbone gradient measured over all ranks, scaled, and only then added to the others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..strict import did_you_mean
from ..zero import CHECKED_RELEASES, EngineGuard, checked_release, open_shards, refuse_unsupported
from .agreement import Agreement
from .combine import combiner
from .errors import BalancerError, NonFinite
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
        refuse_unsupported(engine, allow_gradient_clipping)
        self.engine = engine
        backbone = _shared_parameters(engine.module, shared)
        self._shards = open_shards(engine, backbone)
        if self_test or (self_test is None and not checked_release()):
            _run_self_test(engine)
        self._combiner = combiner(self._shards, self.weighting)
        self._agreement = Agreement((*self.tasks, _STEP)) if check_ranks else None
        self._guard = EngineGuard(engine, BalancerError)
        self._heads = [p for p in engine.module.parameters() if p.requires_grad and id(p) not in backbone]
        self._touched: dict[str, set[int]] = {}
        self._hooks = [p.register_hook(self._touch(index)) for index, p in enumerate(self._heads)]
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
                gradient is dropped, those of tasks already done stay: the task can run again.
        """
        self._enter(name, micro_steps)
        try:
            yield
            if self._done != micro_steps:
                raise BalancerError(
                    f"task '{name}' ended after {self._done} of {micro_steps} micro-steps; call "
                    "balancer.backward(loss) exactly micro_steps times inside the block"
                )
        except BaseException:
            self._shards.discard()
            self._touched.pop(name)
            self._task = None
            raise
        with torch.no_grad():
            self._combiner.add(name, self._loss)
        self._task = None

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
        self.engine.set_gradient_accumulation_boundary(self._done == self._micro_steps - 1)
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
        left_out = set(missing) | set(result.skipped)
        if result.skipped and self.nonfinite == "stop":
            self._clear()
            raise NonFinite(result.skipped)
        for task in result.skipped:
            self.skipped_steps[task] += 1
        applied = False
        if not result.skipped or (self.nonfinite == "skip_task" and len(result.skipped) < len(result.tasks)):
            applied = self._engine_step(result.flats, result.overflow, left_out)
        overflow = result.overflow or bool(getattr(self.engine.optimizer, "overflow", False))
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
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the engine's own state; the same on every rank."""
        return {"skipped_steps": dict(self.skipped_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; tasks that it does not know start anew."""
        self.skipped_steps.update({t: n for t, n in state["skipped_steps"].items() if t in self.skipped_steps})

    def detach(self) -> None:
        """Give the engine its own `backward` and `step` back; the balancer can no longer be used."""
        self._shards.discard()
        self._clear()
        self._guard.remove()
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        stage = self.engine.zero_optimization_stage()
        return f"TaskBalancer(tasks={self.tasks}, weighting={self.weighting!r}, zero_stage={int(stage)})"

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
        self._shards.begin_task()
        self.engine.set_gradient_accumulation_boundary(micro_steps == 1)

    def _engine_step(self, flats: list[Tensor], overflow: bool, left_out: set[str]) -> bool:
        self._shards.put(flats, overflow)
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

    def _clear(self) -> None:
        self._combiner.clear()
        self._touched = {}
        self._task, self._micro_steps, self._done = None, 0, 0
        self._loss = torch.zeros((), device=self.engine.device)


def _task_names(tasks: Iterable[str]) -> tuple[str, ...]:
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"tasks = {names!r}; pass at least one name, each once, each a non-empty string")
    return names


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
