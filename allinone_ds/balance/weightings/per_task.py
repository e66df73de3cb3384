"""Methods of torchjd that keep numbers per task: checked against the tasks, and used in a step without some of them.

T tasks in the order in which they were declared, of which k take part in a step. In such a step:

- a preference vector is restricted to the k tasks and rescaled to the same sum; constant weights are restricted;
- what a method remembers of each task or pair of tasks is used, and updated, for the k tasks only; NashMTL solves the
  game of the k tasks, from their last weights.

Checked on torchjd 0.18.0, whose private `_state_key` and `prvs_alpha` are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_VECTORS = ("pref_vector", "weights", "initial_weights")


class OfJacobians:
    """A function of Gram matrices from a weighting of Jacobians J that sees only J J^T: J is the square root.

    Args:
        weighting: from a (T, N) matrix to (T,) weights.
    """

    def __init__(self, weighting: Any):
        self.weighting = weighting

    def __call__(self, gram: Tensor) -> Tensor:
        return self.weighting(self.root(gram))

    @staticmethod
    def root(gram: Tensor) -> Tensor:
        """Return the symmetric square root of a positive semi-definite matrix (T, T)."""
        values, vectors = torch.linalg.eigh(gram)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __repr__(self) -> str:
        return repr(self.weighting)


def check_numbers(function: Any, tasks: Sequence[str]) -> None:
    """Raise unless a method has as many numbers as there are tasks.

    Args:
        function: a torchjd Weighting, or any other function of Gram matrices, which is accepted.
        tasks: names of the T tasks.

    Raises:
        ValueError: names the option, its length and the tasks.
    """
    method = function.weighting if isinstance(function, OfJacobians) else function
    listed = f"there are {len(tasks)} tasks ({', '.join(tasks)})"
    count = getattr(method, "n_tasks", len(tasks))
    if count != len(tasks):
        raise ValueError(f"{_name(method)}: n_tasks = {count}, and {listed}; set it to {len(tasks)}")
    for owner, name in _vectors(method):
        length = len(getattr(owner, name))
        if length != len(tasks):
            raise ValueError(
                f"{_name(owner)}: {name} has {length} numbers, and {listed}; give one number per task, in this order"
            )


def weights_of(function: Callable[[Tensor], Tensor], gram: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Return the weights (k,) that a function gives the k tasks of a step.

    Args:
        function: a torchjd Weighting, or any other function of Gram matrices.
        gram: of the tasks of the step, (k, k).
        rows: place of each of them among all tasks.
        count: number of all tasks T.
    """
    if (
        isinstance(function, OfJacobians)
        and hasattr(function.weighting, "prvs_alpha")
        and (len(rows) < count or count == 1)
    ):
        return _bargained(function.weighting, function.root(gram), list(rows))
    if not isinstance(function, Module):
        return function(gram)
    with _numbers_of(function, gram, list(rows)), _states_of(function, list(rows), count):
        return function(gram)


def state_of(function: Any) -> dict[str, Any]:
    """Return what a torchjd Weighting remembers from step to step; empty for any other function."""
    if isinstance(function, OfJacobians):
        nash = function.weighting
        return {"prvs_alpha": torch.tensor(nash.prvs_alpha), "step": nash.step} if hasattr(nash, "prvs_alpha") else {}
    states = {}
    for index, module in enumerate(_modules(function)):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
        if buffers:
            states[str(index)] = {"buffers": buffers, "key": getattr(module, "_state_key", None)}
    return states


def restore_state(function: Any, state: Mapping[str, Any]) -> None:
    """Restore what `state_of` returned."""
    if isinstance(function, OfJacobians):
        nash = function.weighting
        if state:
            nash.prvs_alpha, nash.step = state["prvs_alpha"].numpy().copy(), state["step"]
            if nash.step:
                nash._init_optim_problem()  # torchjd does so in its first step only
        return
    modules = _modules(function)
    for index, kept in state.items():
        module = modules[int(index)]
        for name, buffer in kept["buffers"].items():
            setattr(module, name, buffer.clone())
        if kept["key"] is not None:
            module._state_key = kept["key"]


def resized_state(state: Mapping[str, Any], rows: Sequence[int | None], count: int) -> dict[str, Any]:
    """Return what a torchjd Weighting remembers, for other tasks: as for a task that it has not seen, where it has not.

    Args:
        state: what `state_of` returned.
        rows: place of each of the tasks among the earlier ones; None: it is new.
        count: number of the earlier tasks.

    Raises:
        ValueError: what it remembers of a new task is not known.
    """
    here = [row for row, there in enumerate(rows) if there is not None]
    there = [row for row in rows if row is not None]
    if "prvs_alpha" in state:
        alpha = torch.ones(len(rows), dtype=state["prvs_alpha"].dtype)
        alpha[here] = state["prvs_alpha"][there]
        return {**state, "prvs_alpha": alpha}
    resized = dict(state)
    for index, kept in state.items():
        if not isinstance(kept, dict) or "buffers" not in kept:
            continue
        buffers = {}
        for name, buffer in kept["buffers"].items():
            if name != "_phi_t" and len(here) < len(rows):  # GradVac's averages of cosines begin at 0
                raise ValueError(f"the weighting starts fresh: what its {name} is for a new task is not known")
            buffers[name] = torch.zeros([len(rows)] * buffer.dim(), dtype=buffer.dtype)
            if set(buffer.shape) == {count}:
                buffers[name][_grid(buffers[name], here)] = buffer[_grid(buffer, there)]
            else:
                buffers[name] = buffer
        key = kept["key"]
        if isinstance(key, tuple):
            key = tuple(len(rows) if isinstance(value, int) and value == count else value for value in key)
        elif key == count:
            key = len(rows)
        resized[index] = {"buffers": buffers, "key": key}
    return resized


def _name(method: Any) -> str:
    return type(method).__name__.lstrip("_")


def _modules(method: Any) -> list[Any]:
    """Return the modules of a torchjd Weighting, itself included; those of other packages are unknown."""
    modules = method.modules() if isinstance(method, Module) else ()
    return [module for module in modules if type(module).__module__.startswith("torchjd.")]


def _vectors(method: Any) -> list[tuple[Module, str]]:
    """(module, attribute) of every vector with one number per task that a torchjd Weighting was given."""
    modules = _modules(method)
    inner = {id(m.weighting) for m in modules if hasattr(m, "pref_vector")}  # made from the preference vector
    return [
        (module, name)
        for module in modules
        for name in _VECTORS
        if id(module) not in inner and isinstance(getattr(module, name, None), Tensor) and getattr(module, name).dim()
    ]


@contextlib.contextmanager
def _numbers_of(function: Module, gram: Tensor, rows: list[int]) -> Iterator[None]:
    """Restrict the vectors of a method to some tasks inside this block, in the type and on the device of `gram`."""
    kept = [(owner, name, getattr(owner, name)) for owner, name in _vectors(function)]
    for owner, name, vector in kept:
        own = vector.to(gram)
        part = own[rows]
        if name != "weights" and len(part) < len(own) and part.sum() != 0:
            part = part * (own.sum() / part.sum())
        setattr(owner, name, part)
    try:
        yield
    finally:
        for owner, name, vector in kept:
            setattr(owner, name, vector)


@contextlib.contextmanager
def _states_of(function: Module, rows: list[int], count: int) -> Iterator[None]:
    """Restrict what a method remembers of each task to some tasks inside this block, and write it back."""
    if len(rows) == count:
        yield
        return
    kept = []
    for module in _modules(function):
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.dim() and set(b.shape) == {count}}
        key = getattr(module, "_state_key", None)
        kept.append((module, buffers, key))
        for name, buffer in buffers.items():
            setattr(module, name, buffer[_grid(buffer, rows)])
        if buffers and key is not None:
            module._state_key = tuple(_resized(v, count, rows) for v in key) if isinstance(key, tuple) else len(rows)
    try:
        yield
    finally:
        for module, buffers, key in kept:
            if buffers:
                for name, buffer in buffers.items():
                    buffer[_grid(buffer, rows)] = getattr(module, name)
                    setattr(module, name, buffer)
                if key is not None:
                    module._state_key = key
            elif hasattr(module, "_state_key") and hasattr(module, "reset"):
                module.reset()  # nothing was remembered yet, and what some tasks left does not fit all of them


def _grid(buffer: Tensor, rows: list[int]) -> Any:
    index = torch.tensor(rows, device=buffer.device)
    return index if buffer.dim() == 1 else torch.meshgrid(*[index] * buffer.dim(), indexing="ij")


def _resized(value: Any, count: int, rows: list[int]) -> Any:
    return len(rows) if isinstance(value, int) and value == count else value


def _bargained(nash: Any, matrix: Tensor, rows: list[int]) -> Tensor:
    """Return NashMTL's weights of some tasks: the game that they play alone, from their last weights."""
    if len(rows) == 1:  # torchjd cannot build the problem; its Gram matrix is scaled to norm 1, so the answer is 1
        norm = float(matrix.norm())
        clips = nash.max_norm > 0 and norm > nash.max_norm
        return matrix.new_tensor([nash.max_norm / norm if clips else 1.0])
    some = type(nash)(len(rows), nash.max_norm, 1, nash.optim_niter)
    some.prvs_alpha = nash.prvs_alpha[rows]
    weights = some(matrix)
    alpha = nash.prvs_alpha.copy()
    alpha[rows] = some.prvs_alpha
    nash.prvs_alpha = alpha
    return weights
