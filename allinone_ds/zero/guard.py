"""Prevents direct calls of an engine's `backward` and `step` while a balancer owns the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class EngineGuard:
    """Wraps `engine.backward` and `engine.step`; outside `allowed()` they raise and change nothing.

    Args:
        engine: a DeepSpeedEngine; its two methods are replaced on the instance until `remove`.
        error: the exception class to raise.

    Raises:
        error: the engine has a guard already.
    """

    def __init__(self, engine: Any, error: type[Exception]):
        self.engine = engine
        self._open = False
        if "step" in vars(engine):
            raise error("this engine already has a TaskBalancer; call its detach() before constructing a second one")
        engine.backward = self._guarded(
            engine.backward, error, "engine.backward", "balancer.backward(loss) inside balancer.task(...)"
        )
        engine.step = self._guarded(engine.step, error, "engine.step", "balancer.step() after the last task")

    def _guarded(self, method: Callable[..., Any], error: type[Exception], name: str, use: str) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not self._open:
                raise error(
                    f"{name}() was called on an engine that a TaskBalancer owns; use {use}, "
                    "or balancer.detach() to train without it"
                )
            return method(*args, **kwargs)

        return guarded

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Allow calls of the two methods inside this block."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def remove(self) -> None:
        """Restore the engine's own methods."""
        del self.engine.backward, self.engine.step
