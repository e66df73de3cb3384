"""Balancing at the features: the gradients that come back from the heads are measured and scaled before the backbone.

T tasks whose heads read the same features need one forward and ONE backward through the backbone. An autograd function
between the features and each head passes the features on and keeps the gradient g_t that comes back; one between the
backbone and these measures all g_t over all ranks, with one small all-reduce, and passes sum_t c_t g_t on. GradNorm
(arXiv 1711.02257), MGDA-UB (arXiv 1810.04650) and LibMTL's `rep_grad` balance at the same place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from allinone_ds.balance.arithmetic import inner_products, square_norm
from allinone_ds.balance.assignment import task_names
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.balance.weightings.clipping import TaskClip
from allinone_ds.balance.weightings.gram import as_weighting
from allinone_ds.errors import BalancerError, ConfigError
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
        self._gates: dict[tuple[int, ...], _Gate] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make `task_features` mark features inside this block."""
        global _active
        if _active is not None:
            raise BalancerError("a block that balances at the features begins inside another one; leave that one first")
        _active = self
        try:
            yield
        finally:
            _active = None

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
            self._gates[key] = _Gate(self, tensors)
        marked = self._gates[key].mark(task)
        return marked[0] if isinstance(features, Tensor) else marked

    def total(self, losses: Mapping[str, Tensor | None], counts: Mapping[str, Tensor | float] | None = None) -> Tensor:
        """Return the loss to run backward on: the sum of the tasks' means over the labels of all ranks. Collective.

        Args:
            losses: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            counts: task -> number of labels; None: 1 for each loss.

        Raises:
            BalancerError: tasks that are unknown or missing, a loss that is not a scalar with a graph, or a task
                without marked features.
        """
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

    def begin_backward(self, loss_scale: float = 1.0) -> None:
        """Prepare for the backward of what `total` returned, multiplied by `loss_scale`."""
        self._unit = loss_scale / self.micro_steps * self._world

    def end_backward(self, losses: Mapping[str, Tensor | None]) -> None:
        """Forget the marks of the forward.

        Raises:
            BalancerError: a loss did not reach the features that are marked for its task.
        """
        reached = {task for gate in self._gates.values() for task in gate.reached}
        self._gates.clear()
        lost = [task for task, loss in losses.items() if loss is not None and task not in reached]
        if lost:
            raise BalancerError(
                f"the loss of task '{lost[0]}' does not reach the features that task_features(features, '{lost[0]}') "
                "returned, so nothing of it was balanced; compute it from what task_features returns"
            )

    def combine(self, tasks: Sequence[str], gradients: Mapping[str, Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Measure the tasks of one gate and return sum_t c_t g_t per tensor. Collective.

        Args:
            tasks: in the order in which they were declared.
            gradients: task -> gradient of each marked tensor; None where there is none.
        """
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
        seen = [task for task in self.tasks if self.norms[task]]
        mean = {
            name: {t: torch.stack(getattr(self, name)[t]).mean() for t in seen}
            for name in ("losses", "norms", "scales")
        }
        skipped = tuple(t for t in seen if not torch.isfinite(mean["norms"][t] + mean["losses"][t]))
        return StepReport(**mean, whole_norms={}, skipped=skipped, applied=not skipped, tasks=tuple(seen))

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


class FeatureBalance:
    """Balances tasks at the features in any training loop: one process, DDP, FSDP2; DeepSpeed is not needed.

    The gradient of a task at the features that its head reads is measured over all ranks, and what the backbone gets is
    the sum of the tasks' gradients times their factors, in one backward. Heads keep their raw gradient. With K
    micro-steps each one is scaled by the factors of its own norms.

    Args:
        tasks: names of the T tasks.
        weighting: as for `TaskBalancer`; `GlobalClip` and `TaskClip` need norms that are not known at the features.
        group: process group of the R ranks that average their gradients; None is the default group, if there is one.

    Raises:
        ConfigError: a weighting that cannot be computed at the features.

    Example:
        >>> import torch
        >>> from allinone_ds import TBGC, FeatureBalance, task_features
        >>> backbone, heads = torch.nn.Linear(4, 3), torch.nn.ModuleDict({t: torch.nn.Linear(3, 1) for t in ("a", "b")})
        >>> balance = FeatureBalance(("a", "b"), TBGC(max_norm=0.1))
        >>> with balance.joint():
        ...     features = backbone(torch.ones(2, 4))
        ...     balance.backward({t: head(task_features(features, t)).square().mean() for t, head in heads.items()})
        >>> sorted(balance.report().norms)
        ['a', 'b']
    """

    def __init__(self, tasks: Iterable[str], weighting: Weighting | Any, *, group: Any = None):
        self.tasks = task_names(tasks)
        self.weighting = feature_weighting(as_weighting(weighting))
        self.weighting.check_tasks(self.tasks)
        self._group = group
        self._block: FeatureBlock | None = None
        self._left = 0

    @contextlib.contextmanager
    def joint(self, micro_steps: int = 1) -> Iterator[None]:
        """Run a step's micro-steps: exactly `micro_steps` forwards, each with one call of `backward`.

        Raises:
            BalancerError: blocks inside each other, or another number of micro-steps.
        """
        block = FeatureBlock(self.tasks, self.weighting, micro_steps, self._group)
        with block.active():
            self._block, self._left = block, micro_steps
            yield
        if self._left:
            raise BalancerError(f"the block ended after {micro_steps - self._left} of {micro_steps} micro-steps")

    def backward(self, losses: Mapping[str, Tensor | None], count: Mapping[str, Tensor | float] | None = None) -> None:
        """Run the one backward of a micro-step. Collective.

        Args:
            losses: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            count: task -> number of labels (images, valid pixels, objects) that the loss is the mean of; the gradient
                of a task is then the mean over the labels of all ranks. None: every loss counts the same.

        Raises:
            BalancerError: outside a block, one micro-step too many, or losses that do not fit the tasks.
        """
        block = self._block
        if block is None or _active is not block:
            raise BalancerError("backward() outside a block; use it inside `with balance.joint():`")
        if not self._left:
            raise BalancerError(f"the block got more than its {block.micro_steps} micro-steps; pass micro_steps=K")
        total = block.total(losses, count)
        block.begin_backward()
        total.backward()
        block.end_backward(losses)
        self._left -= 1

    def report(self) -> StepReport:
        """Return what the last block did to each task; `skipped` names tasks that were not finite.

        Do not step the optimizer when `skipped` is not empty: the gradients of the heads are not finite then.

        Raises:
            BalancerError: no block has ended.
        """
        if self._block is None or self._left:
            raise BalancerError("report() before a block has ended; run `with balance.joint():` first")
        return self._block.report()

    def state_dict(self) -> dict[str, Any]:
        """Return what the weighting carries from one step to the next."""
        return dict(self.weighting.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.weighting.load_state_dict(state)


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


class _Gate:
    """Between the backbone and the marks of the tasks that read the same tensors."""

    def __init__(self, block: FeatureBlock, tensors: tuple[Tensor, ...]):
        self.block, self.tensors = block, tensors
        self.tasks: list[str] = []
        self.reached: dict[str, tuple[Tensor | None, ...]] = {}
        self.outputs: tuple[Tensor, ...] = _Combine.apply(self, *tensors)

    def mark(self, task: str) -> tuple[Tensor, ...]:
        self.tasks.append(task)
        return _Mark.apply(self, task, *self.outputs)

    def combine(self) -> list[Tensor]:
        """Return the scaled sum of each tensor; zeros reach the backbone too, whose ranks all take part."""
        tasks = [task for task in self.block.tasks if task in self.tasks]
        sums = self.block.combine(tasks, self.reached) or [None] * len(self.tensors)
        return [torch.zeros_like(t) if s is None else s for s, t in zip(sums, self.tensors, strict=True)]


class _Combine(Function):
    """Identity; the backward of all marks comes before it."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gate.combine())


class _Mark(Function):
    """Identity; its backward hands the gradient of one task to the gate, and nothing to autograd."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, task: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gate, ctx.task = gate, task
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gate.reached[ctx.task] = gradients
        return (None,) * (2 + len(gradients))


def _flat(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)


def _record(tasks: Sequence[str], gram: Tensor, losses: Tensor) -> StepRecord:
    return StepRecord(tuple(tasks), gram, gram.diagonal().clamp(min=0).sqrt(), losses)
