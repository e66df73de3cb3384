"""Which parameters belong to the backbone, and which heads a step used."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from allinone_ds.distributed import first_difference, rank
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.guard import EngineGuard
from allinone_ds.zero.params import whole_shape

NOTHING_TO_BALANCE = (
    "no parameter of the backbone is trained, so there is nothing to balance: the heads get their raw gradients, and "
    "norms are those of the heads"
)
_ADDRESS = re.compile(" at 0x[0-9a-f]+")


def shared_parameters(module: Module, shared: str | Module | Iterable[Parameter]) -> set[int]:
    """Return the `id` of every trainable parameter of the backbone; none if all of it is frozen.

    Args:
        module: the engine's module.
        shared: dotted name of a submodule, the submodule, or its parameters.

    Raises:
        ValueError: no such submodule, parameters of a different module, or no parameter at all.
        TypeError: `shared` is neither.
    """
    if isinstance(shared, str):
        # torch.compile puts the model into a wrapper, which the user's name does not know
        modules = {name.replace("_orig_mod.", ""): child for name, child in module.named_modules()}
        if shared not in modules or not shared:
            children = [name for name in modules if name and name.count(".") <= shared.count(".")]
            raise ValueError(f"shared = '{shared}': the model has no such submodule; {did_you_mean(shared, children)}")
        params = list(modules[shared].parameters())
        origin = f"submodule '{shared}'"
    else:
        params = list(shared.parameters() if isinstance(shared, Module) else shared)
        origin = f"the module {type(shared).__name__}" if isinstance(shared, Module) else "the iterable of parameters"
        if not all(isinstance(p, Parameter) for p in params):
            raise TypeError("shared must be a submodule, its dotted name, or an iterable of torch.nn.Parameter")
        own = {id(p) for p in module.parameters()}
        if any(id(p) not in own for p in params):
            raise ValueError(
                "shared has parameters that do not belong to the engine's module; take them from engine.module"
            )
    if not params:
        raise ValueError(f"shared: {origin} has no parameter; pass the backbone")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("shared: no parameter of the engine's module is trainable, so there is nothing to train")
    return {id(p) for p in params if p.requires_grad}


def agreed_backbone(module: Module, shared: str | Module | Iterable[Parameter], options: Mapping[str, Any]) -> set[int]:
    """Return the backbone's parameters, as `shared_parameters` does, if all ranks construct the same balancer.

    Collective. Ranks that train different parameters would wait for each other, or average different things.

    Args:
        module: the engine's module.
        shared: as in `shared_parameters`.
        options: of the balancer, by name.

    Raises:
        ConfigError: names the ranks and the first option or parameter in which they differ.
    """
    backbone: set[int] = set()
    failure: Exception | None = None
    try:
        backbone = shared_parameters(module, shared)
    except (TypeError, ValueError) as error:
        failure = error
    lines = [f"{name} = {_ADDRESS.sub('', repr(value))}" for name, value in options.items()]
    for name, param in module.named_parameters():
        part = "backbone" if id(param) in backbone else "head" if param.requires_grad else "frozen"
        lines.append(f"parameter '{name}': {tuple(whole_shape(param))}, {param.dtype}, {part}")
    difference = first_difference([*lines, f"shared: {failure}"])
    if difference is not None:
        raise ConfigError(
            f"ranks construct different balancers ({difference}); give every rank the same model, with the same "
            "parameters frozen, and the same tasks and options"
        )
    if failure is not None:
        raise failure
    return backbone


def without_backbone(module: Module) -> set[int]:
    """Warn that nothing is balanced, since no parameter of the backbone is trained.

    Args:
        module: the engine's module.

    Returns:
        The `id` of every trainable parameter; the norms of a step are then those of the heads.
    """
    if rank() == 0:
        warnings.warn(f"shared: {NOTHING_TO_BALANCE}", stacklevel=3)
    return {id(p) for p in module.parameters() if p.requires_grad}


class HeadUse:
    """Records which head parameters each task of a step gives a gradient, and tells the guard when a step is under way.

    Args:
        module: the engine's module.
        backbone: `id` of the parameters of the backbone. If they are all that is trained, each counts as a head's: it
            stands still in a step without a task that uses it.
        guard: of the engine.
        shares: whether any parameter of the backbone is trained.

    Attributes:
        shares: as given.
        task: the task that runs now; None between tasks.
        met: tasks whose losses have been seen to come from one forward, in joint blocks.
        marked: tasks whose losses have been seen to read the features that are marked for them.
    """

    def __init__(self, module: Module, backbone: set[int], guard: EngineGuard, shares: bool = True):
        self.shares = shares
        self.task: str | None = None
        self.met: set[str] = set()
        self.marked: set[str] = set()
        self._module, self._guard = module, guard
        self._modules = list(module.modules())
        self._trainable = {id(p) for p in module.parameters() if p.requires_grad}
        trainable = [p for p in module.parameters() if p.requires_grad]
        heads = [p for p in trainable if id(p) not in backbone]
        self._params = heads or trainable  # of a frozen backbone all that is trained is balanced, and belongs to heads
        self._used: dict[str, set[int]] = {}
        self._hooks = [p.register_hook(self._hook(index)) for index, p in enumerate(self._params)]

    def check_trainable(self) -> None:
        """Raise if a parameter was thawed after the balancer was constructed.

        Raises:
            BalancerError: names the parameter; its gradient would count as that of a head.
        """
        if all(
            param is None or not param.requires_grad or id(param) in self._trainable
            for module in self._modules
            for param in module._parameters.values()
        ):
            return
        for name, param in self._module.named_parameters():
            if param.requires_grad and id(param) not in self._trainable:
                raise BalancerError(
                    f"parameter '{name}' was frozen when the balancer was constructed and is trainable now; call "
                    "balancer.detach() and construct a new TaskBalancer after thawing"
                )

    def begin(self, task: str) -> None:
        """Record gradients from now on for `task`, beside those of its earlier micro-steps."""
        self.task = task
        self._used.setdefault(task, set())
        self._guard.begin_task()

    def end(self, keep: bool) -> None:
        """Stop recording; forget the task's gradients unless `keep`."""
        if self.task is not None and not keep:
            del self._used[self.task]
            self._guard.forget_stray()
        self.task = None
        self._guard.end_task()

    def divide(self, joint: str, tasks: Sequence[str]) -> None:
        """Give each of several tasks what was recorded for all of them under one name."""
        used = self._used.pop(joint)
        self._used.update((task, used) for task in tasks)

    def clear(self) -> None:
        """Forget all tasks."""
        self.task, self._used = None, {}
        self._guard.in_step = False
        self._guard.forget_stray()

    def flags(self, without: set[str]) -> list[bool]:
        """Return, per head parameter, whether a task that is not in `without` gave it a gradient on this rank."""
        used = set().union(*(indices for task, indices in self._used.items() if task not in without))
        return [index in used for index in range(len(self._params))]

    def unused(self, flags: list[bool]) -> list[Parameter]:
        """Return the head parameters whose flag is False."""
        return [param for param, flag in zip(self._params, flags, strict=True) if not flag]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def record(gradient: Tensor) -> None:
            if self.task is not None:
                self._used[self.task].add(index)

        return record
