"""Balancing at the features: the gradients that come back from the heads are measured and scaled before the backbone.

T tasks whose heads read the same features need one forward and ONE backward through the backbone. An autograd function
between the features and each head passes the features on and keeps the gradient g_t that comes back; one between the
backbone and these measures all g_t over all ranks, with one small all-reduce, and passes sum_t c_t g_t on. GradNorm
(arXiv 1711.02257), MGDA-UB (arXiv 1810.04650) and LibMTL's `rep_grad` balance at the same place.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.joint.counts import check_counts
from allinone_ds.balance.joint.gate import Gate, Sums, reached_from
from allinone_ds.balance.joint.measure import add_scaled, gram_matrix, squares
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.balance.weightings.clipping import TaskClip
from allinone_ds.device_constants import copied_to
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.strict import did_you_mean

Features = TypeVar("Features", Tensor, tuple[Tensor, ...])
_AT_ONCE = 8
"""Tasks whose gradients one rank holds at a time, where it measures them alone."""
_active: FeatureBlock | None = None


def task_features(features: Features, task: str) -> Features:
    """Return the features unchanged; inside a block that balances at the features, mark them as read by `task`.

    Call it in the model's forward, once per task, between the backbone and the task's head. Outside of such a block it
    does nothing, so a model with marks trains, evaluates and exports as one without.

    Args:
        features: what the head reads, of any shape: a tensor or a tuple of tensors.
        task: the name of the task whose head reads them.

    Raises:
        BalancerError: an unknown task, a task that marks a second time in one forward, or features that differ from
            those of the other tasks where the weighting compares tasks.

    Example:
        >>> import torch
        >>> from allinone_ds import task_features
        >>> features = torch.ones(2, 3)
        >>> task_features(features, "seg") is features
        True
    """
    return features if _active is None else _active.mark(features, task)


class FeatureBlock:
    """The micro-steps that one block balances at the features: marks, measures and scales.

    Args:
        tasks: names of the T tasks.
        weighting: turns the record of a micro-step into factors.
        micro_steps: K; gradients at the features belong to a loss that is divided by it.
        group: process group of the R ranks; None is the default group.
        checked: tasks whose losses were seen to read their own marks; changed in place, so that each is checked once.
        backbone: `id` of the parameters of the backbone, where they are known.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weighting: Weighting,
        micro_steps: int = 1,
        group: Any = None,
        checked: set[str] | None = None,
        backbone: AbstractSet[int] = frozenset(),
    ):
        self.tasks, self.weighting, self.micro_steps, self.group = tuple(tasks), weighting, micro_steps, group
        self._world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._alone = self._world == 1 and weighting.streams  # several ranks send one message for all tasks
        self._gates: dict[tuple[int, ...], Gate] = {}
        self._left = micro_steps
        self._in_backward = False
        self._unit: float | Tensor = 1.0  # what gradients at the features are multiplied by, beside the sum over ranks
        self._parts = torch.empty(0)  # of the micro-step: this rank's part of each task's mean loss, (T,)
        self._labelled: list[bool] = []  # of the micro-step: whether any rank has a label of each task
        self._sums: Tensor | None = None  # losses, norms and factors, each a sum over labelled micro-steps, (3, T)
        self._seen = [0] * len(self.tasks)  # micro-steps in which any rank had a label
        self._checked, self._backbone = set() if checked is None else checked, backbone

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make `task_features` mark features inside this block.

        Raises:
            BalancerError: inside another such block.
        """
        global _active
        if _active is not None:
            raise BalancerError("a block that balances at the features begins inside another one; leave that one first")
        _active = self
        try:
            yield
        finally:
            _active = None
            self._gates.clear()

    def check_complete(self) -> None:
        """Raise unless all micro-steps are done.

        Raises:
            BalancerError: some are missing.
        """
        if self._left:
            done = self.micro_steps - self._left
            raise BalancerError(f"the block ended after {done} of {self.micro_steps} micro-steps")

    def mark(self, features: Any, task: str) -> Any:
        """Return the features with the task's mark on their gradient; see `task_features`."""
        if task not in self.tasks:
            raise BalancerError(f"task_features: unknown task '{task}'; {did_you_mean(str(task), self.tasks)}")
        tensors = (features,) if isinstance(features, Tensor) else tuple(features)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            kinds = ", ".join(sorted({type(tensor).__name__ for tensor in tensors})) or "nothing"
            raise BalancerError(
                f"task_features: the features of task '{task}' are {kinds}; pass a tensor or a tuple of them"
            )
        if self._in_backward or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return features  # recomputed by activation checkpointing, evaluation, or a frozen backbone
        if any(task in gate.tasks for gate in self._gates.values()):
            raise BalancerError(
                f"task_features: task '{task}' marks features a second time before balancer.backward(); mark them once "
                "per forward, all of them in one tuple, and run forwards without a backward under torch.no_grad()"
            )
        key = tuple(map(id, tensors))
        if key not in self._gates:
            if self._gates and not self.weighting.streams:
                first = next(iter(self._gates.values())).tasks[0]
                raise BalancerError(
                    f"task_features: task '{task}' marks other features than task '{first}', and {self.weighting!r} "
                    "compares the tasks' gradients; mark the same tensors for every task: all levels in one tuple"
                )
            self._gates[key] = Gate(tensors, self._combine, _AT_ONCE if self._alone else None)
        marked = self._gates[key].mark(task)
        return marked[0] if isinstance(features, Tensor) else marked

    def order(self) -> int:
        """Return a number for the order in which the heads of this forward marked their features."""
        return zlib.crc32(" ".join(task for gate in self._gates.values() for task in gate.tasks).encode())

    @contextlib.contextmanager
    def micro_step(
        self,
        losses: Mapping[str, Tensor | None],
        counts: Mapping[str, Tensor | float] | None = None,
        loss_scale: float | Tensor = 1.0,
        labels: Sequence[tuple[float, float]] | None = None,
    ) -> Iterator[Tensor]:
        """Run one micro-step's backward inside this block, on the loss that it yields. Collective.

        Args:
            losses: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            counts: task -> number of labels; None: 1 for each loss.
            loss_scale: the factor by which the caller multiplies the loss.
            labels: numbers of labels of each task on this rank and on all ranks, where the ranks have exchanged them.

        Raises:
            BalancerError: outside of `active`, one micro-step too many, tasks that are unknown or missing, a loss that
                is not a scalar with a graph, or that does not reach the features marked for its task.
        """
        if _active is not self:
            raise BalancerError("backward() outside its block; use it inside `with balance.joint():`")
        if not self._left:
            raise BalancerError(f"the block got more than its {self.micro_steps} micro-steps; pass micro_steps=K")
        self._unit = loss_scale / self.micro_steps * self._world
        try:
            total = self._total(losses, counts, labels)
            self._in_backward = True
            yield total
            reached = {task for gate in self._gates.values() for task in gate.reached}
        finally:
            self._in_backward = False
            self._gates.clear()
        lost = [task for task, loss in losses.items() if loss is not None and task not in reached]
        if lost:
            raise BalancerError(
                f"the loss of task '{lost[0]}' does not reach the features that task_features(features, '{lost[0]}') "
                "returned, so nothing of it was balanced; compute it from what task_features returns"
            )
        self._left -= 1

    def means(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return task -> its loss, norm and factor: means over the micro-steps in which any rank had a label of it."""
        if self._sums is None:
            return {}
        rows = self._sums / copied_to(torch.tensor([max(n, 1) for n in self._seen]), self._sums.device)
        columns = zip(self.tasks, self._seen, *(row.unbind() for row in rows.float().unbind()), strict=True)
        return {task: (loss, norm, factor) for task, seen, loss, norm, factor in columns if seen}

    def report(self) -> StepReport:
        """Return what happened to each task; waits for the device."""
        found = self.means()
        losses, norms, scales = ({task: values[i] for task, values in found.items()} for i in range(3))
        finite = torch.stack([norms[t] + losses[t] for t in found]).isfinite().tolist() if found else []
        skipped = tuple(task for task, good in zip(found, finite, strict=True) if not good)
        return StepReport(norms, scales, losses, {}, skipped, applied=not skipped, tasks=tuple(found))

    def _total(self, losses: Mapping[str, Tensor | None], counts: Any, labels: Any) -> Tensor:
        """Return the sum over tasks of the mean loss over the labels of all ranks, as this rank's part of it."""
        self._check(losses)
        check_counts(self.tasks, losses, counts)
        device = next(iter(self._gates.values())).tensors[0].device
        fractions = self._exchange(losses, counts, device) if labels is None else self._given(labels, device)
        values = [loss if loss is None else loss.reshape(()) for loss in (losses[task] for task in self.tasks)]
        given = [index for index, loss in enumerate(values) if loss is not None]
        self._parts = torch.zeros(len(self.tasks), dtype=torch.float64, device=device)
        total = torch.zeros((), device=device)
        if given:
            own = fractions if len(given) == len(values) else fractions[_index(given, device)]
            stacked = torch.stack(
                [v.to(device, torch.promote_types(v.dtype, torch.float32)) for v in values if v is not None]
            )
            part = torch.where(own > 0, stacked.detach().double() * own, 0.0)
            self._parts = part if len(given) == len(values) else self._parts.index_copy_(0, _index(given, device), part)
            total = (stacked * (own * (self._world / self.micro_steps)).to(stacked.dtype)).sum()
        if len(given) < len(values):  # every rank measures, also one without any label
            for gate in self._gates.values():
                total = total + sum((out.sum() * 0.0 for out in gate.outputs), torch.zeros((), device=device))
        return total

    def _given(self, labels: Sequence[tuple[float, float]], device: torch.device) -> Tensor:
        """Return this rank's fraction of the labels of each task, (T,), from numbers that all ranks know."""
        self._labelled = [every > 0 for _, every in labels]
        fractions = [own / every if every else 0.0 for own, every in labels]
        return copied_to(torch.tensor(fractions, dtype=torch.float64), device)

    def _exchange(self, losses: Mapping[str, Any], counts: Any, device: torch.device) -> Tensor:
        """Return this rank's fraction of the labels of each task, (T,). Collective.

        Waits for the device only where this rank alone does not know whether a task has a label.
        """
        numbers = [0 if losses[task] is None else 1 if counts is None else counts[task] for task in self.tasks]
        known = [not isinstance(n, Tensor) and n > 0 for n in numbers]
        if any(isinstance(n, Tensor) for n in numbers):
            own = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device).reshape(()) for n in numbers])
        else:
            own = copied_to(torch.tensor(numbers, dtype=torch.float64), device)
        every = own.clone()
        if self._world > 1:
            dist.all_reduce(every, group=self.group)
        self._labelled = known if all(known) else (every > 0).tolist()
        return own / every.clamp(min=1e-30)

    def _combine(
        self, marked: Sequence[str], gradients: Mapping[str, Sequence[Tensor | None]], sums: Sums
    ) -> list[Tensor | None]:
        """Measure tasks of one gate over all ranks and return sums + sum_t c_t g_t per tensor. Collective.

        Args:
            marked: the tasks.
            gradients: task -> gradient of each marked tensor; None where there is none.
            sums: of each tensor so far, changed in place.
        """
        index = [i for i, task in enumerate(self.tasks) if task in marked]
        found = [gradients.get(self.tasks[i], ()) for i in index]
        device, size = self._parts.device, len(index)
        products = squares(found, device) if self.weighting.streams else gram_matrix(found, device)
        own = self._parts if size == len(self.tasks) else self._parts[_index(index, device)]
        message = torch.cat([products.flatten(), own])  # one small message for all tasks
        if self._world > 1:
            dist.all_reduce(message, group=self.group)
        products, losses = message[:-size] / self._unit**2, message[-size:]
        gram = products.diag() if self.weighting.streams else products.view(size, size)
        norms = gram.diagonal().clamp(min=0).sqrt()
        factors = self._factors(index, gram, norms, losses)
        self._record(index, torch.stack([losses, norms, factors.double()]))
        return add_scaled(found, factors, sums)

    def _factors(self, index: Sequence[int], gram: Tensor, norms: Tensor, losses: Tensor) -> Tensor:
        """Return the factors of the tasks of a gate, (T,): 0 for one without labels or that is not finite."""
        names = [self.tasks[i] for i in index]
        used = [place for place, i in enumerate(index) if self._labelled[i]]
        factors = torch.zeros_like(norms)
        if self.weighting.streams:
            every = self.weighting.batched and len(used) == len(names)
            for some in [range(len(names))] if every else [[place] for place in used]:
                part = slice(some[0], some[-1] + 1)
                record = _record([names[place] for place in some], gram[part, part], losses[part])
                factors[part] = self.weighting.factors(record).to(factors)
        else:
            finite = torch.isfinite(norms).tolist() if used else []
            used = [place for place in used if finite[place]]
            if used:
                rows = slice(None) if len(used) == len(names) else _index(used, factors.device)
                record = _record([names[place] for place in used], gram[rows][:, rows], losses[rows])
                factors[rows] = self.weighting.factors(record).to(factors)
            if self._world > 1:
                source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
                dist.broadcast(factors, source, group=self.group)  # a method may draw at random or iterate
        return torch.where(torch.isfinite(factors) & torch.isfinite(norms), factors, 0.0).float()

    def _record(self, index: Sequence[int], rows: Tensor) -> None:
        """Add losses, norms and factors of a gate's tasks, (3, T), to the sums over micro-steps."""
        used = [place for place, i in enumerate(index) if self._labelled[i]]
        if not used:
            return
        places = [index[place] for place in used]
        if self._sums is None:
            self._sums = torch.zeros(3, len(self.tasks), dtype=torch.float64, device=rows.device)
        if len(used) == len(self.tasks):
            self._sums += rows
        else:
            self._sums.index_add_(1, _index(places, rows.device), rows[:, _index(used, rows.device)])
        for place in places:
            self._seen[place] += 1

    def _check(self, losses: Mapping[str, Any]) -> None:
        for task in losses:
            if task not in self.tasks:
                raise BalancerError(f"a loss of the unknown task '{task}'; {did_you_mean(str(task), self.tasks)}")
        for task in self.tasks:
            if task not in losses:
                raise BalancerError(
                    f"no loss of task '{task}'; pass one for every task of the block, None where this rank has no label"
                )
            loss = losses[task]
            if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad):
                kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise BalancerError(
                    f"the loss of task '{task}' is {kind}; pass a scalar tensor with requires_grad, or None"
                )
        marked = {task for gate in self._gates.values() for task in gate.tasks}
        bare = [task for task in self.tasks if task not in marked]
        unread = [task for task in bare if losses[task] is not None]
        if unread or not marked:
            task = unread[0] if unread else self.tasks[0]
            raise BalancerError(
                f"no features are marked for task '{task}' in this forward; call features = task_features(features, "
                f"'{task}') between backbone and head, on every rank. A frozen backbone leaves nothing to balance; "
                "checkpoint(..., use_reentrant=True) hides the marks inside it: use use_reentrant=False"
            )
        if bare and len(self._gates) > 1:
            raise BalancerError(
                f"no features are marked for task '{bare[0]}' in this forward, and the other tasks mark different "
                f"ones; call task_features(features, '{bare[0]}') on every rank, also where it has no label"
            )
        for gate in self._gates.values():  # ranks measure the same tasks, whoever has labels of them
            gate.tasks += bare
        for task, loss in losses.items():
            if loss is not None and task not in self._checked:
                self._check_marks(task, loss)
                self._checked.add(task)

    def _check_marks(self, task: str, loss: Tensor) -> None:
        """Raise if a loss reads features that are marked for a different task; warn if it reads some without a mark."""
        marks, leaves = reached_from(loss)
        if marks and task not in marks:
            raise BalancerError(
                f"the loss of task '{task}' reads features that task_features marked for task '{min(marks)}'; mark "
                f"what the head of '{task}' reads with task_features(features, '{task}')"
            )
        past = len(leaves & self._backbone)
        if past:
            warnings.warn(
                f"the loss of task '{task}' reaches {past} parameter(s) of the backbone without passing "
                "task_features; their part of its gradient is neither measured nor scaled: mark all features that the "
                "head reads, in one tuple",
                stacklevel=2,
            )


def feature_weighting(weighting: Weighting) -> Weighting:
    """Return the weighting, if it can be computed from gradients at the features.

    Raises:
        ConfigError: it needs the norm of the whole gradient or of the sum.
    """
    if isinstance(weighting, TaskClip) or type(weighting).sum_factor is not Weighting.sum_factor:
        raise ConfigError(
            f"{weighting!r} needs norms of whole gradients, heads included, which are not known at the features; use "
            "TBGC or another weighting, or balance at the backbone"
        )
    return weighting


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _index(places: Sequence[int], device: torch.device) -> Tensor:
    return copied_to(torch.tensor(places), device)


def _record(tasks: Sequence[str], gram: Tensor, losses: Tensor) -> StepRecord:
    return StepRecord(tuple(tasks), gram, gram.diagonal().clamp(min=0).sqrt(), losses)
