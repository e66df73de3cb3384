"""Prevents calls that would change gradients or weights behind a balancer's back while it owns an engine."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from allinone_ds.zero.params import forget_copies


class EngineGuard:
    """Refuses an engine's `backward` and `step`, gradients of any other backward, and steps of its optimizer.

    Nothing is refused inside `allowed()`. Within a step of the balancer, `zero_grad` and `load_checkpoint` are refused
    too.

    Args:
        engine: a DeepSpeedEngine; some methods are replaced on the instance until `remove`.
        error: the exception class to raise.

    Attributes:
        in_step: whether a task of the current step has begun.
        order: a number for the order in which parameters have got gradients since it was set to 0.

    Raises:
        error: the engine has a guard already.
    """

    def __init__(self, engine: Any, error: type[Exception]):
        self.engine = engine
        self.in_step = False
        self.order = 0
        self._error = error
        self._open = False
        self._stray: str | None = None
        if "step" in vars(engine):
            raise error("this engine already has a TaskBalancer; call its detach() before constructing a second one")
        step = "balancer.step() after the last task"
        self._replaced: list[tuple[Any, str]] = []
        self._guard(engine, "backward", "engine.backward", "balancer.backward(loss) inside balancer.task(...)")
        self._guard(engine, "step", "engine.step", step)
        nothing = "nothing: every step begins without gradients"
        self._guard(engine, "zero_grad", "engine.zero_grad", nothing, True, self._remove_gradients)
        self._guard(engine.optimizer, "zero_grad", "optimizer.zero_grad", nothing, True)
        self._guard(engine, "load_checkpoint", "engine.load_checkpoint", "it between steps", True, then=forget_copies)
        base = engine.basic_optimizer
        self._all_params = list(engine.module.parameters())
        self._params = [param for param in self._all_params if param.requires_grad]
        self._numbers = {id(param): number.to_bytes(4, "little") for number, param in enumerate(self._params)}
        self._kept: list[Parameter] | None = None
        self._hooks: list[Any] = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._params]
        if isinstance(base, Optimizer):
            self._hooks.append(base.register_step_pre_hook(lambda *_: self._check("optimizer.step", step)))

    def _guard(
        self,
        owner: Any,
        method: str,
        name: str,
        use: str,
        in_step_only: bool = False,
        instead: Callable[..., Any] | None = None,
        then: Callable[[Any], None] | None = None,
    ) -> None:
        own: Callable[..., Any] = instead or getattr(owner, method)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.in_step or not in_step_only:
                self._check(name, use)
            result = own(*args, **kwargs)
            if then is not None:
                then(owner)
            return result

        setattr(owner, method, guarded)
        self._replaced.append((owner, method))

    def _check(self, name: str, use: str) -> None:
        if not self._open:
            within = " in the middle of a step" if self.in_step else ""
            raise self._error(
                f"{name}() was called{within} on an engine that a TaskBalancer owns; use {use}, "
                "or balancer.detach() to train without it"
            )

    def _remove_gradients(self) -> None:
        """Do what `engine.zero_grad` does, which looks for the names of all parameters: Trainer calls it every step."""
        for param in self._all_params:
            param.grad = None

    def _on_gradient(self, param: Parameter) -> None:
        if not self._open:
            self._stray = (
                "a backward outside balancer.backward() gave parameters a gradient, as loss.backward() does; use "
                "balancer.backward(loss) inside balancer.task(...), and torch.autograd.grad for gradients of your own"
            )
            param.grad = None
            raise self._error(self._stray)
        self.order = zlib.crc32(self._numbers[id(param)], self.order)

    def begin_task(self) -> None:
        """Watch the gradients that micro-steps leave on parameters, until `end_task`."""
        self.in_step, self._kept = True, []

    def end_task(self) -> None:
        """Watch them no longer: what a task has left may be removed."""
        self._kept = None

    def forget_stray(self) -> None:
        """Go on after gradients of a different backward, which have been dropped."""
        self._stray = None

    @contextlib.contextmanager
    def allowed(self, counted: bool = True) -> Iterator[None]:
        """Allow every call inside this block.

        Args:
            counted: whether `order` takes note of the gradients; False where they are reduced afterwards.

        Raises:
            error: a different backward has left gradients, or those of an earlier micro-step are gone.
        """
        if self._stray is not None:
            raise self._error(self._stray)
        if any(param.grad is None for param in self._kept or ()):
            raise self._error(
                "gradients of an earlier micro-step of this task are gone, as after zero_grad() of the module; a block "
                "begins without gradients, so remove the call"
            )
        self._open, before = True, self.order
        try:
            yield
        finally:
            self._open = False
            self.order = self.order if counted else before
        if self._kept is not None:
            self._kept = [param for param in self._params if param.grad is not None]

    def remove(self) -> None:
        """Restore the methods, and remove the hooks."""
        for owner, method in self._replaced:
            delattr(owner, method)
        for hook in self._hooks:
            hook.remove()
