"""Balancing at the features: the gradients that come back from the heads are measured and scaled before the backbone.

T tasks whose heads read the same features need one forward and ONE backward through the backbone. An autograd function
between the features and each head passes the features on and keeps the gradient g_t that comes back; one between the
backbone and these measures all g_t over all ranks, with one small all-reduce, and passes sum_t c_t g_t on. GradNorm
(arXiv 1711.02257), MGDA-UB (arXiv 1810.04650) and LibMTL's `rep_grad` balance at the same place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import inner_products, square_norm
from allinone_ds.balance.joint.gate import Gate
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.errors import BalancerError
from allinone_ds.strict import did_you_mean

Features = TypeVar("Features", Tensor, tuple[Tensor, ...])
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

    Attributes:
        losses, norms, scales: task -> one 0-dim tensor per micro-step in which any rank had a label of the task.
    """

    def __init__(self, tasks: Sequence[str], weighting: Weighting, micro_steps: int = 1, group: Any = None):
        self.tasks, self.weighting, self.micro_steps, self.group = tuple(tasks), weighting, micro_steps, group
        self.losses: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        self.norms: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        self.scales: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        self._world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._gates: dict[tuple[int, ...], Gate] = {}
        self._left = micro_steps
        self._unit = 1.0  # what gradients at the features are multiplied by, beside the sum over ranks
        self._means = self._labelled = torch.empty(0)  # of the micro-step, (T,): losses, whether any rank has a label

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make `task_features` mark features inside this block.

        Raises:
            BalancerError: inside another such block, or fewer micro-steps than `micro_steps`.
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
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return features  # evaluation inside the block, or a frozen backbone
        if any(task in gate.tasks for gate in self._gates.values()):
            raise BalancerError(
                f"task_features: task '{task}' marks features a second time before balancer.backward(); mark them once "
                "per forward, all of them in one tuple"
            )
        key = tuple(map(id, tensors))
        if key not in self._gates:
            if self._gates and not self.weighting.streams:
                first = next(iter(self._gates.values())).tasks[0]
                raise BalancerError(
                    f"task_features: task '{task}' marks other features than task '{first}', and {self.weighting!r} "
                    "compares the tasks' gradients; mark the same tensors for every task: all levels in one tuple"
                )
            self._gates[key] = Gate(tensors, self._combine)
        marked = self._gates[key].mark(task)
        return marked[0] if isinstance(features, Tensor) else marked

    @contextlib.contextmanager
    def micro_step(
        self,
        losses: Mapping[str, Tensor | None],
        counts: Mapping[str, Tensor | float] | None = None,
        loss_scale: float = 1.0,
    ) -> Iterator[Tensor]:
        """Run one micro-step's backward inside this block, on the loss that it yields. Collective.

        Args:
            losses: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            counts: task -> number of labels; None: 1 for each loss.
            loss_scale: the factor by which the caller multiplies the loss.

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
            yield self._total(losses, counts)
            reached = {task for gate in self._gates.values() for task in gate.reached}
        finally:
            self._gates.clear()
        lost = [task for task, loss in losses.items() if loss is not None and task not in reached]
        if lost:
            raise BalancerError(
                f"the loss of task '{lost[0]}' does not reach the features that task_features(features, '{lost[0]}') "
                "returned, so nothing of it was balanced; compute it from what task_features returns"
            )
        self._left -= 1

    def _total(self, losses: Mapping[str, Tensor | None], counts: Mapping[str, Tensor | float] | None = None) -> Tensor:
        """Return the sum over tasks of the mean loss over the labels of all ranks, as this rank's part of it."""
        self._check(losses)
        device = next(iter(self._gates.values())).tensors[0].device
        rows = torch.zeros(2, len(self.tasks), dtype=torch.float64, device=device)  # count, count * loss
        for index, task in enumerate(self.tasks):
            loss = losses[task]
            if loss is not None:
                count = 1.0 if counts is None else counts[task]
                rows[0, index] += count
                rows[1, index] += torch.where(rows[0, index] > 0, loss.detach().double() * count, 0.0)
        own = rows[0].clone()
        if self._world > 1:
            dist.all_reduce(rows, group=self.group)
        parts = self._world * own / rows[0].clamp(min=1e-30)  # (T,) weight of this rank's mean in the mean over ranks
        self._labelled, self._means = rows[0] > 0, rows[1] / rows[0].clamp(min=1e-30)
        total: Any = 0.0
        for index, task in enumerate(self.tasks):
            loss = losses[task]
            if loss is not None:
                total = total + loss.reshape(()) * (parts[index] / self.micro_steps).to(loss)
        if any(loss is None for loss in losses.values()):  # every rank measures, also one without any label
            for gate in self._gates.values():
                total = total + sum((out.sum() * 0.0 for out in gate.outputs), torch.zeros((), device=device))
        return total

    def _combine(self, marked: Sequence[str], gradients: Mapping[str, Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Measure the tasks of one gate over all ranks and return sum_t c_t g_t per tensor. Collective.

        Args:
            marked: the tasks of the gate.
            gradients: task -> gradient of each marked tensor; None where there is none.
        """
        tasks = [task for task in self.tasks if task in marked]
        flats = [[_flat(g) for g in gradients.get(task, ()) if g is not None] for task in tasks]
        some = next((flat[0] for flat in flats if flat), None)
        device = self._means.device if some is None else some.device
        gram = self._gram(flats, gradients, tasks, device)
        if self._world > 1:
            dist.all_reduce(gram, group=self.group)
        gram = gram / self._unit**2
        factors = self._factors(tasks, gram)
        sums: list[Tensor | None] = []
        for place in range(max((len(gradients[task]) for task in gradients), default=0)):
            total = None
            for task in tasks:
                gradient = gradients[task][place] if task in gradients else None
                if gradient is None:
                    continue
                factor = factors[task]
                part = torch.where(factor != 0, gradient * factor.to(gradient.dtype), torch.zeros_like(gradient))
                total = part if total is None else total.add_(part)
            sums.append(total)
        return sums

    def report(self) -> StepReport:
        """Return what happened to each task: means over the micro-steps in which it had labels."""
        seen = tuple(task for task in self.tasks if self.norms[task])
        losses, norms, scales = (
            {task: torch.stack(values[task]).mean() for task in seen}
            for values in (self.losses, self.norms, self.scales)
        )
        skipped = tuple(task for task in seen if not torch.isfinite(norms[task] + losses[task]))
        return StepReport(norms, scales, losses, whole_norms={}, skipped=skipped, applied=not skipped, tasks=seen)

    def _gram(
        self,
        flats: Sequence[Sequence[Tensor]],
        gradients: Mapping[str, Any],
        tasks: Sequence[str],
        device: torch.device,
    ) -> Tensor:
        """Return the inner products of this rank's gradients, (T, T); of a weighting that streams only the diagonal."""
        if self.weighting.streams:
            return torch.stack([square_norm(flat, device) for flat in flats]).diag()
        places = max((len(gradients[task]) for task in gradients), default=0)
        gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=device)
        for place in range(places):
            rows = [gradients[t][place] if t in gradients else None for t in tasks]
            like = next((row for row in rows if row is not None), None)
            if like is not None:
                gram += inner_products([[_flat(torch.zeros_like(like) if r is None else r)] for r in rows], device)
        return gram

    def _factors(self, tasks: Sequence[str], gram: Tensor) -> dict[str, Tensor]:
        """Return the factor of each task, 0 for one without labels or that is not finite, and record the micro-step."""
        index = [self.tasks.index(task) for task in tasks]
        losses, labelled = self._means[index], self._labelled[index]
        norms = gram.diagonal().clamp(min=0).sqrt()
        factors = torch.zeros_like(norms)
        if self.weighting.streams:
            for i, task in enumerate(tasks):
                if labelled[i]:
                    factors[i] = self.weighting.factors(_record([task], gram[i : i + 1, i : i + 1], losses[i : i + 1]))[
                        0
                    ]
        else:
            used = [i for i in range(len(tasks)) if labelled[i] and torch.isfinite(norms[i])]
            if used:
                record = _record([tasks[i] for i in used], gram[used][:, used], losses[used])
                factors[used] = self.weighting.factors(record).to(factors)
        if self._world > 1 and not self.weighting.streams:
            source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            dist.broadcast(factors, source, group=self.group)  # a method may draw at random or iterate
        good = torch.isfinite(factors) & torch.isfinite(norms)
        factors = torch.where(good, factors, torch.zeros_like(factors)).float()
        for i, task in enumerate(tasks):
            if labelled[i]:
                self.losses[task].append(losses[i].float())
                self.norms[task].append(norms[i].float())
                self.scales[task].append(factors[i])
        return {task: factors[i] for i, task in enumerate(tasks)}

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
        bare = [task for task, loss in losses.items() if loss is not None and task not in marked]
        if bare or not marked:
            task = bare[0] if bare else self.tasks[0]
            raise BalancerError(
                f"no features are marked for task '{task}' in this forward; call features = task_features(features, "
                f"'{task}') between backbone and head (with a frozen backbone there is nothing to balance)"
            )


def _flat(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)


def _record(tasks: Sequence[str], gram: Tensor, losses: Tensor) -> StepRecord:
    return StepRecord(tuple(tasks), gram, gram.diagonal().clamp(min=0).sqrt(), losses)
