"""DeepSpeed's Muon on balanced gradients: one orthogonalised update per optimizer step. Checked on DeepSpeed 0.19.8.

DeepSpeed orthogonalises where it fills gradient shards: on ZeRO-1 and ZeRO-2 at every accumulation boundary
(`stage_1_and_2.py`, `get_flat_partition`), on ZeRO-3 and in `BF16_Optimizer` in the step. With several tasks per step
the first would update the momentum once per task and give the balancer orthogonal matrices in place of gradients. So
this is switched off, and the sum of the balanced tasks is orthogonalised here, for every stage in the same way:
momentum and Nesterov's blend are element-wise, hence computed on shards; each matrix is sent to one rank, which runs
DeepSpeed's Newton-Schulz iteration on it and returns the parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.zero.params import whole_shape

MOMENTUM = "muon_momentum"
"""Key of the momentum in the optimizer's state: laid out like the weights, unlike DeepSpeed's own on ZeRO-1 and 2."""
_OF_DEEPSPEED = "momentum_buffer"


def make_muon(
    groups: Sequence[dict[str, Any]], momentum: float, ns_method: str, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return DeepSpeed's optimizer that uses Muon for some parameter groups and AdamW for the others.

    Args:
        groups: with `use_muon`, `lr` and `weight_decay`.
        momentum: of the groups with `use_muon`.
        ns_method: their Newton-Schulz iteration, "gram" (on the Gram matrix, in fp16 on a GPU) or "standard" (bf16).
        betas, eps: of AdamW in the other groups.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    of_muon, of_adam = {"momentum": momentum, "ns_method": ns_method}, {"betas": betas, "eps": eps}
    return MuonWithAuxAdam([{**group, **(of_muon if group["use_muon"] else of_adam)} for group in groups])


def uses_muon(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's Muon."""
    if "muon" not in type(optimizer).__name__.lower():
        return False  # the import below takes a second
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return isinstance(optimizer, MuonWithAuxAdam)


def options_of_groups(optimizer: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the options of the parameter group of each flat tensor.

    Args:
        optimizer: of the engine.
        count: number of flat tensors; ZeRO-3 may have several per parameter group.
    """
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    of_sub_group = getattr(optimizer, "sub_group_to_group_id", None)
    return [groups[of_sub_group[index] if of_sub_group is not None else index] for index in range(count)]


def unfit_for_muon(engine: Any) -> list[str]:
    """Return the names of vectors that are in a parameter group of Muon, which would step on their raw gradient."""
    zero = engine.optimizer
    found = (getattr(zero, name, None) for name in ("bit16_groups", "bf16_groups", "fp16_groups"))
    groups = next((groups for groups in found if groups), None) or [group["params"] for group in zero.param_groups]
    names = {id(param): name for name, param in engine.module.named_parameters()}
    marked = zip(groups, options_of_groups(zero, len(groups)), strict=True)
    params = [param for group, options in marked if options["use_muon"] for param in group]
    return [names[id(param)] for param in params if len(whole_shape(param)) < 2]


@dataclass(frozen=True)
class _Part:
    """The elements of a matrix that a rank owns: those from `offset` on, at `start` of the flat tensor of `group`."""

    name: str
    offset: int
    group: int
    start: int
    length: int


class MuonUpdate:
    """Turns the gradient shards of an engine into the update of Muon, once per step.

    Args:
        adapter: `EngineAdapter` of an engine of ZeRO stage 1, 2 or 3 whose optimizer is DeepSpeed's Muon.
    """

    def __init__(self, adapter: Any):
        self.adapter = adapter
        self._zero = adapter.optimizer
        self._base = adapter.optimizer.optimizer
        self._staged: dict[int, Tensor] = {}  # group -> momentum of the step that is being taken
        self._norm: Tensor | None = None
        self._layout: _Layout | None = None
        # DeepSpeed runs Muon on tagged parameters (ZeRO 1 and 2), and where its optimizer says so (ZeRO-3, bf16)
        switches = [(self._zero, "_uses_muon"), *((param, "use_muon") for param in adapter.engine.module.parameters())]
        switches.append((self._zero, "use_muon"))
        self._switched_off = [(owner, name) for owner, name in switches if getattr(owner, name, False)]
        for owner, name in self._switched_off:
            setattr(owner, name, False)

    def give_back(self) -> None:
        """Let DeepSpeed run Muon again; warn if it would begin without the momentum of the balanced steps."""
        for owner, name in self._switched_off:
            setattr(owner, name, True)
        if any(MOMENTUM in state for state in self._base.state.values()):
            warnings.warn(
                "steps that DeepSpeed's Muon takes without a balancer begin with a momentum of zero; that of the "
                "balanced steps is kept for the next balancer",
                stacklevel=3,
            )

    @torch.no_grad()
    def orthogonalise(self, flats: Sequence[Tensor], loss_scale: float) -> None:
        """Replace the gradient of Muon's parameters by their update. Collective.

        Args:
            flats: gradient shard of each group, changed in place.
            loss_scale: factor of the gradient; the update gets it too, because the engine's step divides by it.
        """
        self._layout = self._layout or _Layout(self.adapter, self._groups())
        square = torch.stack([flat.float().square().sum() for flat in flats]).sum()
        dist.all_reduce(square, group=self._zero.dp_process_group)
        self._norm = square.sqrt() / loss_scale
        for group, options in self._groups().items():
            gradient, momentum = flats[group].div_(loss_scale), self._momentum(group)
            self._staged[group] = momentum.lerp(gradient, 1 - options["momentum"])
            gradient.lerp_(self._staged[group], options["momentum"])  # Nesterov
        self._layout.orthogonalise(flats)
        for group in self._groups():
            flats[group].mul_(loss_scale)

    def end_step(self, overflow: bool) -> None:
        """Keep the momentum of the step, unless the engine did not take it; report the norm of the raw gradient."""
        if not overflow:
            for group, momentum in self._staged.items():
                self._momentum(group).copy_(momentum)
            if self._norm is not None:
                self._zero._global_grad_norm = self.adapter.engine._global_grad_norm = self._norm
        self._staged, self._norm = {}, None

    def _groups(self) -> dict[int, Mapping[str, Any]]:
        """Index of a flat tensor -> options of its parameter group, where Muon's."""
        options = options_of_groups(self._zero, len(self.adapter.sizes))
        return {index: group for index, group in enumerate(options) if group["use_muon"]}

    def _momentum(self, group: int) -> Tensor:
        master = self.adapter.masters()[group]
        state = self._base.state[master]
        if MOMENTUM not in state:
            if state.pop(_OF_DEEPSPEED, None) is not None:
                warnings.warn(
                    "Muon's momentum of steps taken without a balancer is not used: its layout is different; the "
                    "momentum begins at zero",
                    stacklevel=3,
                )
            state[MOMENTUM] = torch.zeros_like(master.data)
        return state[MOMENTUM].view(-1)


class _Layout:
    """Which rank orthogonalises which matrix, and where the parts of the matrices are."""

    def __init__(self, adapter: Any, groups: Mapping[int, Mapping[str, Any]]):
        self._group = adapter.optimizer.dp_process_group
        self.rank, self.world = dist.get_rank(self._group), dist.get_world_size(self._group)
        own = [_Part(f.name, f.offset, f.group, f.start, f.length) for f in adapter.fragments() if f.group in groups]
        everywhere: list[list[_Part]] = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(everywhere, own, group=self._group)
        params = dict(adapter.engine.module.named_parameters())
        self._params = {name: params[name] for name in sorted({p.name for parts in everywhere for p in parts})}
        self._method = {p.name: groups[p.group].get("ns_method", "gram") for parts in everywhere for p in parts}
        workers = self._workers()
        # parts by (worker of the matrix, name of the matrix): the order in which they are sent
        by_worker = [sorted(parts, key=lambda p: (workers[p.name], p.name, p.offset)) for parts in everywhere]
        self._own = by_worker[self.rank]
        self._sent = [sum(p.length for p in self._own if workers[p.name] == rank) for rank in range(self.world)]
        self._work = [[p for p in parts if workers[p.name] == self.rank] for parts in by_worker]
        self._received = [sum(p.length for p in parts) for parts in self._work]

    def _workers(self) -> dict[str, int]:
        """Return a rank per matrix, so that all ranks have about the same work."""
        shapes = {name: whole_shape(param) for name, param in self._params.items()}
        cost = {name: shape.numel() * min(shape[0], shape.numel() // shape[0]) for name, shape in shapes.items()}
        load, workers = [0] * self.world, {}
        for name in sorted(cost, key=lambda name: (-cost[name], name)):
            worker = load.index(min(load))
            workers[name] = worker
            load[worker] += cost[name]
        return workers

    def orthogonalise(self, flats: Sequence[Tensor]) -> None:
        """Replace every matrix by its orthogonalised one, in place. Collective."""
        views = [flats[part.group].narrow(0, part.start, part.length) for part in self._own]
        packed = torch.cat(views) if views else flats[0].new_empty(0)
        arrived = self._exchange(packed, self._sent, self._received)
        pieces = arrived.split([part.length for parts in self._work for part in parts])
        mine = list(zip((part for parts in self._work for part in parts), pieces, strict=True))
        for name in dict.fromkeys(part.name for part, _ in mine):
            self._orthogonalise(name, [(part, piece) for part, piece in mine if part.name == name])
        returned = self._exchange(arrived, self._received, self._sent)
        for view, values in zip(views, returned.split([part.length for part in self._own]), strict=True):
            view.copy_(values)

    def _orthogonalise(self, name: str, parts: Sequence[tuple[_Part, Tensor]]) -> None:
        from deepspeed.runtime.zero.muon.original_muon import muon_update

        param: Any = self._params[name]
        shape = whole_shape(param)
        matrix = parts[0][1].new_empty(shape.numel())
        for part, piece in parts:
            matrix[part.offset : part.offset + part.length] = piece
        # with beta = 0 its momentum is the gradient that it is given, which holds ours already
        with torch.compiler.set_stance("force_eager"):  # no compilation per shape, the same numbers after a resume
            update = muon_update(
                matrix.view(shape),
                torch.zeros_like(matrix).view(shape),
                beta=0.0,
                ns_method=self._method[name],
                num_heads=getattr(param, "muon_num_heads", None),
            ).reshape(-1)
        for part, piece in parts:
            piece.copy_(update[part.offset : part.offset + part.length])

    def _exchange(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        if self.world == 1:
            return values
        result = values.new_empty(sum(received))
        dist.all_to_all_single(result, values, list(received), list(sent), group=self._group)
        return result
