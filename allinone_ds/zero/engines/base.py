"""The face every engine kind shows to the balancer: a task's gradient as flat pieces of this rank's shard.

S elements of this rank. An engine keeps its shard in one flat vector an optimizer group (ZeRO-3: a sub-group). A
`Piece` is a run of such a vector that is wholly shared backbone or wholly not; norms and factors work on pieces, so
partitions that straddle parameters, groups or ranks need no special case.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Span:
    """Where the elements of a parameter that this rank owns lie: group, first element in its shard, how many."""

    param: Parameter
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A run of this rank's shard of one group that is wholly shared backbone (`shared`) or wholly not."""

    group: int
    start: int
    length: int
    shared: bool


class GradientShards(ABC):
    """One engine's gradient shards on this rank.

    The balancer calls, per task: `begin_task`, the micro-steps, `take` (reads), `release`; then once `put` and the
    engine's own step, or `discard` when the step is given up.

    Attributes:
        spans: every trainable parameter's elements on this rank.
        pieces: what `take` returns, in order.
        sizes: elements of this rank's shard of each group.
        device, dtype: of the accumulator that `put` takes: those of the optimizer's gradient.
        replicated: True when every rank holds the whole gradient (stage 0), so that norms are not summed over ranks.
    """

    spans: list[Span]
    pieces: list[Piece]
    sizes: list[int]
    device: torch.device
    dtype: torch.dtype
    replicated: bool = False

    def __init__(self, engine: Any, shared: set[int]):
        """Args: engine: a DeepSpeedEngine; shared: `id` of every parameter of the backbone."""
        self.engine = engine
        self.optimizer = engine.optimizer
        self.shared = shared

    @property
    def loss_scale(self) -> float:
        """What gradients carry as a factor and the optimizer divides by (fp16); 1 otherwise."""
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if self.engine.fp16_enabled() else 1.0

    @property
    def missing_loss_scale(self) -> float:
        """The part of `loss_scale` that the engine's `backward` does not put on the loss."""
        return 1.0

    @abstractmethod
    def begin_task(self) -> None:
        """Make the next micro-step the first of a task: nothing of an earlier gradient may leak into it."""

    @abstractmethod
    def take(self) -> list[Tensor]:
        """This rank's shard of the task's averaged gradient, 1-D tensors as `pieces`; valid until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Forget the gradient that `take` showed."""

    @abstractmethod
    def put(self, flats: Sequence[Tensor], overflow: bool) -> None:
        """Give the engine the gradient for its next step.

        Args:
            flats: one 1-D tensor a group, of `sizes` elements, `device` and `dtype`; the engine may change them.
            overflow: make DeepSpeed's loss scaler see a non-finite gradient (fp16).
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop every gradient the engine holds, wherever it is in its step."""

    def after_step(self) -> None:  # noqa: B027 - most engines need nothing
        """Mend what the engine reports or keeps after its step."""

    @abstractmethod
    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        """The optimizer's flat fp32 tensor that holds `span` at `span.start`, and the optimizer's state for it."""

    def norms(self, flats: Sequence[Tensor]) -> dict[Any, Tensor]:
        """Norm of every parameter's part of `flats`, by the optimizer's id of the parameter."""
        key = self.optimizer.get_param_id
        return {key(s.param): flats[s.group].narrow(0, s.start, s.length).norm() for s in self.spans}

    def weights(self, param: Parameter) -> list[Tensor]:
        """The tensors that hold the model's own copy of a parameter on this rank."""
        return [param.data]

    def weights_put_back(self, params: Sequence[Parameter]) -> None:  # noqa: B027 - most engines need nothing
        """Called after `unmoved` has put `weights` of `params` back, for copies the engine keeps besides."""

    @contextlib.contextmanager
    def unmoved(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Keep `params` where they are over an optimizer step, momentum and weight decay included.

        Optimizer steps on flat shards move every element; what must stand still is copied before and put back.
        """
        wanted = {id(param) for param in params}
        spans = [span for span in self.spans if id(span.param) in wanted]
        whole = _groups_wholly_in(spans, self.spans)
        saved = []
        for span in spans:
            master, state = self.master(span)
            cut = slice(span.start, span.start + span.length)
            old = {k: v.view(-1)[cut].clone() for k, v in state.items() if _like(v, master)}
            scalars = {k: _copy(v) for k, v in state.items() if not _like(v, master)} if span.group in whole else {}
            saved.append((span, cut, master.data.view(-1)[cut].clone(), old, scalars))
        weights = [(target, target.clone()) for param in params for target in self.weights(param)]
        yield
        for span, cut, values, old, scalars in saved:
            master, state = self.master(span)
            master.data.view(-1)[cut].copy_(values)
            for key, value in state.items():
                if not _like(value, master):
                    continue
                if key in old:
                    value.view(-1)[cut].copy_(old[key])
                else:
                    value.view(-1)[cut].zero_()
            state.update(scalars)
        for target, values in weights:
            target.copy_(values)
        self.weights_put_back(params)


def merge_spans(spans: Sequence[Span], sizes: Sequence[int], shared: set[int]) -> list[Piece]:
    """The fewest pieces that cover each group's shard; padding (always zero) joins the piece before it."""
    pieces: list[Piece] = []
    for group, size in enumerate(sizes):
        runs: list[list[int]] = []  # [start, shared]
        for span in sorted((s for s in spans if s.group == group and s.length), key=lambda s: s.start):
            kind = int(id(span.param) in shared)
            if not runs:
                runs.append([0, kind])
            elif runs[-1][1] != kind:
                runs.append([span.start, kind])
        runs = runs or [[0, 0]]  # of a small group the last ranks have nothing but padding
        ends = [start for start, _ in runs[1:]] + [size]
        pieces += [Piece(group, start, end - start, bool(kind)) for (start, kind), end in zip(runs, ends, strict=True)]
    return pieces


def cut(flats: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
    """Views of one flat tensor a group, one view a piece."""
    return [flats[piece.group].narrow(0, piece.start, piece.length) for piece in pieces]


def _like(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == master.numel() and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _groups_wholly_in(spans: Sequence[Span], every: Sequence[Span]) -> set[int]:
    inside = {(span.group, span.start) for span in spans}
    return {s.group for s in every} - {s.group for s in every if (s.group, s.start) not in inside}
