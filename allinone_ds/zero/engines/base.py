"""What every kind of DeepSpeed engine offers the balancer, the checkpoints and the averaged weights.

S elements of this rank's shard, which is divided into pieces (pieces.py).
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.errors import BalancerError, UnsupportedEngine
from allinone_ds.zero.engines.hidden_gradients import without_gradients
from allinone_ds.zero.engines.loss_scale import grad_scaler, loss_scale, scale_changes_after_step
from allinone_ds.zero.engines.muon import MuonUpdate, uses_muon
from allinone_ds.zero.engines.pieces import Piece, Span, merge_neighbours, merge_spans
from allinone_ds.zero.fragments import Fragment
from allinone_ds.zero.releases import MANAGES_ACCUMULATION


class EngineAdapter(ABC):
    """One kind of DeepSpeed engine: gradient shards, master weights, backward and step.

    For each task the balancer calls `begin_task`, `backward` once per micro-step, `gradient` and `clear_gradient`; then
    once per optimizer step `set_gradient` and `step`, or `discard` when the step is given up.

    Args:
        engine: what `deepspeed.initialize` returned.
        shared: `id` of every parameter of the shared backbone; empty where only weights are of interest.

    Attributes:
        sizes: elements of this rank's shard of each group.
        device, dtype: of the accumulator that `set_gradient` takes: those of the optimizer's gradient.
        replicated: True when every rank holds the whole gradient (stage 0), so that norms are not summed over ranks.
        keeps_local_gradients: True when gradients can stay on the rank over several backwards (`LocalGradients`).
        allows_clipping: False when DeepSpeed would clip by a norm that it computes wrongly for a balanced gradient.
    """

    replicated: bool = False
    keeps_local_gradients: bool = False
    allows_clipping: bool = True
    _muon: MuonUpdate | None = None

    @classmethod
    @abstractmethod
    def serves(cls, engine: Any) -> bool:
        """Return whether this is the adapter for `engine`."""

    def __init__(self, engine: Any, shared: AbstractSet[int] = frozenset()):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.shared = shared
        self.sizes = self._shard_sizes()
        first = self.masters()[0]
        self.device, self.dtype = first.device, first.dtype

    def take_over(self) -> None:
        """Prepare the engine for balanced steps, until `give_back`."""
        if MANAGES_ACCUMULATION:  # where it is off, `engine.step` would reduce once more
            self._managed = self.engine._config.managed_gradient_accumulation
            self.engine._config.managed_gradient_accumulation = True
        if self.stage and uses_muon(self.optimizer.optimizer):
            self._muon = MuonUpdate(self)

    def give_back(self) -> None:
        """Leave the engine as it was before `take_over`."""
        self.restore_boundary()
        if MANAGES_ACCUMULATION:
            self.engine._config.managed_gradient_accumulation = self._managed
        if self._muon is not None:
            self._muon.give_back()
            self._muon = None

    @property
    def needs_sum(self) -> bool:
        """Whether every `step` needs `set_gradient` before it: a gradient left in the engine would not do."""
        return self._muon is not None

    # ---- gradients ----

    @cached_property
    def spans(self) -> list[Span]:
        """The elements of every trainable parameter on this rank."""
        return self._find_spans()

    @cached_property
    def pieces(self) -> list[Piece]:
        """What `gradient` returns, in order."""
        return merge_spans(self.spans, self.sizes, self.shared)

    def runs(self, group: int, flat: Tensor) -> list[Tensor]:
        """Return views of a group's flat vector that cover its parameters, as the engine's step reads a gradient.

        The step runs ten kernels on each view, and copies one at a time to float64 for its norm. So neighbours share a
        view of at most 16 million elements: a ViT-L has at least 18 views, and not 400.
        """
        return [flat.narrow(0, start, length) for start, length in self._runs[group]]

    @cached_property
    def _runs(self) -> list[list[tuple[int, int]]]:
        groups = range(len(self.sizes))
        return [merge_neighbours(span for span in self.spans if span.group == group) for group in groups]

    @abstractmethod
    def _shard_sizes(self) -> list[int]:
        """Return the elements of this rank's shard of each group."""

    @abstractmethod
    def _find_spans(self) -> list[Span]:
        """Return the elements of every trainable parameter on this rank."""

    @abstractmethod
    def begin_task(self) -> None:
        """Make the next micro-step the first of a task: nothing of an earlier gradient may leak into it."""

    @abstractmethod
    def gradient(self) -> list[Tensor]:
        """Return this rank's shard of the task's averaged gradient.

        Returns:
            1-D tensors as `pieces`, views where possible; valid until `clear_gradient`.
        """

    @abstractmethod
    def clear_gradient(self) -> None:
        """Forget the gradient that `gradient` returned."""

    def set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        """Give the engine the gradient for its next step. Collective where `needs_sum`.

        Args:
            flats: one 1-D tensor per group, of `sizes` elements, `device` and `dtype`; the engine may change them.
            overflow: make DeepSpeed's loss scaler see a non-finite gradient (fp16).
        """
        if self._muon is not None and not overflow:
            self._muon.orthogonalise(flats, float(self.loss_scale))
        self._set_gradient(flats, overflow)

    @abstractmethod
    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        """Give the engine what its optimizer steps on; arguments as of `set_gradient`."""

    def reduce_accumulated(self) -> None:
        """Average, over ranks, what several backwards without a reduction have added up since `begin_task`. Collective.

        It is what the engine's step does where the config has `managed_gradient_accumulation: false`. `gradient` then
        returns the average, and `step` may follow without `set_gradient` (not where `needs_sum`).
        """
        self.set_reduces(True)
        self.engine.allreduce_gradients()

    def discard(self) -> None:
        """Drop every gradient that the engine holds, at any point of a step.

        A backward that raised may have left reductions on other streams, which would still write to what is dropped.
        """
        self.synchronize()
        self._discard()

    @abstractmethod
    def _discard(self) -> None:
        """Drop every gradient that the engine holds, with nothing of an earlier backward still running."""

    def _remove_gradients(self) -> None:
        """Remove the gradients of all parameters; the optimizer's own method may be guarded (`EngineGuard`)."""
        type(self.optimizer).zero_grad(self.optimizer, set_to_none=True)

    def norms(self, flats: Sequence[Tensor]) -> dict[Any, Tensor]:
        """Return the norm of every parameter's part of `flats`, by the optimizer's id of the parameter."""
        key = self.optimizer.get_param_id
        return {key(s.param): flats[s.group].narrow(0, s.start, s.length).norm() for s in self.spans}

    # ---- backward and step ----

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.engine.zero_optimization_stage())

    @property
    def fp16(self) -> bool:
        """Whether gradients are computed in fp16, so that they carry a loss scale and may overflow."""
        return bool(self.engine.fp16_enabled()) or grad_scaler(self.engine) is not None

    @property
    def compute_device(self) -> torch.device:
        """Device of forward and backward; `device` is that of the optimizer's gradient, which may be offloaded."""
        return self.engine.device

    @property
    def loss_scale(self) -> float | Tensor:
        """The factor that gradients carry and the engine's step divides by, a number or 0-dim on `compute_device`."""
        return loss_scale(self.engine)

    @property
    def missing_loss_scale(self) -> float | Tensor:
        """The part of `loss_scale` that the engine's `backward` does not apply to the loss."""
        return 1.0

    @property
    def overflow(self) -> bool:
        """Whether the engine's last step found an fp16 overflow."""
        return bool(getattr(self.optimizer, "overflow", False))

    def refuse_no_sync(self) -> None:
        """Raise if gradients are not averaged now.

        Raises:
            BalancerError: inside `engine.no_sync`, which accelerate's `accumulate` enters.
        """
        if self.engine.inside_no_sync_ctxt:
            raise BalancerError(
                "a task runs inside engine.no_sync(), so its gradient would not be averaged over ranks; leave the "
                "block (with accelerate: do not use accelerator.accumulate); the balancer accumulates micro_steps"
            )

    def restore_boundary(self) -> None:
        """Let DeepSpeed decide again which backward is at an accumulation boundary."""
        self.engine._is_gradient_accumulation_boundary = None

    def set_reduces(self, reduces: bool) -> None:
        """Set whether the next backward averages the gradient over ranks. ZeRO-3 asks for it before the forward."""
        self.engine.set_gradient_accumulation_boundary(reduces)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Run the engine's backward, without a division by DeepSpeed's accumulation steps.

        Args:
            loss: scalar, of one micro-batch of this rank.
            retain_graph: keep the graph for the losses of other tasks of the same forward.
        """
        missing = self.missing_loss_scale
        loss = loss * missing if isinstance(missing, Tensor) or missing != 1.0 else loss
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def step(self) -> None:
        """Take the engine's optimizer step on what `set_gradient` set; parameters that are frozen now stand still."""
        self.set_reduces(True)
        with scale_changes_after_step(self.engine), self._frozen_unmoved():
            self.engine.step()
            if self._muon is not None:
                self._muon.end_step(self.overflow)
        self._after_step()

    def _after_step(self) -> None:  # noqa: B027 - most engines need nothing
        """Correct what the engine reports or keeps after its step."""

    def synchronize(self) -> None:
        """Wait for the accelerator."""
        get_accelerator().synchronize()

    # ---- weights ----

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Return the tensors that this rank's optimizer steps on (fp32, offloaded or not); never copies."""

    @abstractmethod
    def publish_masters(self) -> None:
        """Copy what `masters` hold to the model's own weights, on all ranks. Collective."""

    def fragments(self) -> list[Fragment]:
        """Return which elements `masters` hold on this rank.

        Raises:
            UnsupportedEngine: the engine does not shard its weights.
        """
        raise UnsupportedEngine(
            f"ZeRO stage {self.stage} keeps whole weights on every rank, so its checkpoints cannot be resharded; use "
            "ZeRO stage 1, 2 or 3"
        )

    @abstractmethod
    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        """Return the optimizer's flat fp32 tensor that holds `span` at `span.start`, and its optimizer state."""

    def weights(self, param: Parameter) -> list[Tensor]:
        """Return the tensors that hold the model's own copy of a parameter on this rank."""
        return [param.data]

    def _weights_restored(self, params: Sequence[Parameter]) -> None:  # noqa: B027 - most engines need nothing
        """Update further copies of `params` that the engine keeps, after `unmoved` has restored `weights`."""

    @abstractmethod
    def model_groups(self) -> list[list[Parameter]]:
        """Return the parameters that each of `masters` holds, on any rank."""

    @contextlib.contextmanager
    def _frozen_unmoved(self) -> Iterator[None]:
        """Keep parameters where they are that were frozen after the engine was made; their step counts do not rise.

        The optimizer leaves masters without a gradient alone. A master that holds frozen and trained parameters steps,
        and what is frozen in it is restored.
        """
        groups = self.model_groups()
        if all(param.requires_grad for group in groups for param in group):
            yield
            return
        base = self.optimizer if isinstance(self.optimizer, torch.optim.Optimizer) else self.optimizer.optimizer
        still, mixed = [], []
        for master, group in zip(self.masters(), groups, strict=True):
            frozen = [param for param in group if not param.requires_grad]
            if len(frozen) == len(group) and not uses_muon(base):  # Muon steps without a gradient too
                still.append(master)
            else:
                mixed += frozen
        with torch.no_grad(), self.unmoved(mixed), without_gradients(base, {id(master) for master in still}):
            yield

    @contextlib.contextmanager
    def unmoved(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Keep `params` where they are over an optimizer step, momentum and weight decay included.

        Optimizer steps on flat shards move every element; what must not move is copied before and restored after.
        """
        wanted = {id(param) for param in params}
        spans = [span for span in self.spans if id(span.param) in wanted]
        whole_groups = _groups_covered(spans, self.spans)
        self._warn_of_shared_counts({span.group for span in spans} - whole_groups)
        saved = []
        for span in spans:
            master, state = self.master(span)
            part = slice(span.start, span.start + span.length)
            old = {k: v.view(-1)[part].clone() for k, v in state.items() if _per_element(v, master)}
            scalars: dict[str, Any] = {}
            if span.group in whole_groups:
                scalars = {k: _copy(v) for k, v in state.items() if not _per_element(v, master)}
            saved.append((span, part, master.data.view(-1)[part].clone(), old, scalars))
        weights = [(target, target.clone()) for param in params for target in self.weights(param)]
        yield
        for span, part, values, old, scalars in saved:
            master, state = self.master(span)
            master.data.view(-1)[part].copy_(values)
            for key, value in state.items():
                if _per_element(value, master):
                    value.view(-1)[part].copy_(old.get(key, torch.zeros((), dtype=value.dtype)))
                elif span.group in whole_groups:  # a state that the step created counts no step
                    state[key] = scalars[key] if key in scalars else _zero(value)
        for target, values in weights:
            target.copy_(values)
        self._weights_restored(params)

    def _warn_of_shared_counts(self, groups: AbstractSet[int]) -> None:
        """Warn if the optimizer counts steps for a group of which only some parameters move in this step."""
        masters = {span.group: self.master(span) for span in self.spans if span.group in groups}
        if any(not _per_element(value, master) for master, state in masters.values() for value in state.values()):
            warnings.warn(
                "a step without some tasks, or with frozen parameters, and an optimizer that counts steps per "
                "parameter group, as AdamW does: the heads of absent tasks and frozen parameters do not move, but "
                "their step counts rise with those of the other parameters in their group; give every head, and what "
                "is thawed together, a parameter group of its own",
                stacklevel=2,
            )


def _per_element(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == master.numel() and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)()


def _groups_covered(spans: Sequence[Span], every: Sequence[Span]) -> set[int]:
    """Groups whose spans are all among `spans`."""
    inside = {(span.group, span.start) for span in spans}
    return {s.group for s in every} - {s.group for s in every if (s.group, s.start) not in inside}
