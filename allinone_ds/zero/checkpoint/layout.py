"""The files of all ranks in a checkpoint, and which elements of each parameter they hold. DeepSpeed 0.19.8."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from allinone_ds.zero.fragments import Fragment, Shapes, fragments_of_parameters, fragments_of_parts, no_paddings

# Classes that DeepSpeed 0.19.8 pickles into its checkpoints beside tensors and plain containers.
KNOWN_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
MODEL_FILE = "mp_rank_00_model_states.pt"  # stages 0, 1 and 2; stage 3 has one a rank


@dataclass(frozen=True)
class Segment:
    """Elements of a tensor of this run that are taken from a tensor of a checkpoint.

    Args:
        start: first of the elements in the flattened tensor of this run.
        length: number of elements.
        name: of the tensor in the checkpoint.
        offset: first of the elements in that tensor, flattened.
    """

    start: int
    length: int
    name: str
    offset: int


Segments = Mapping[str, Sequence[Segment]]
"""{tensor of this run: its elements that are in the checkpoint}; a tensor without an entry has the same name there."""


def in_checkpoint(wanted: Sequence[Fragment], segments: Segments) -> list[Fragment]:
    """Return fragments with the names and offsets that their elements have in a checkpoint.

    Args:
        wanted: elements of this run's parameters.
        segments: where they are in the checkpoint; elements in no segment are left out.
    """
    found = []
    for w in wanted:
        for segment in segments.get(w.name, (Segment(0, w.offset + w.length, w.name, 0),)):
            begin = max(w.offset, segment.start)
            end = min(w.offset + w.length, segment.start + segment.length)
            if begin < end:
                offset = segment.offset + begin - segment.start
                found.append(Fragment(segment.name, offset, w.group, w.start + begin - w.offset, end - begin))
    return found


class SavedShards:
    """The files of all ranks in a checkpoint's folder (global_stepN), mapped, so that only what is copied is read.

    Reading runs no code from the files: they may hold tensors, plain containers and `KNOWN_CLASSES`.

    Args:
        folder: with the files of all ranks, ZeRO stage 1, 2 or 3.

    Attributes:
        shapes: of every parameter that was trained, by name.
        masters: each rank's flat float32 tensors, by group.
        states: each rank's optimizer state of them, by group; empty before the first step.
        optimizer: rank 0's `optimizer_state_dict`.
        model: rank 0's file of what is not sharded: counters, buffers, and under stages 1 and 2 the weights.

    Raises:
        ValueError, KeyError: files of ranks are missing or of a different kind; and what `torch.load` raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved = [read_file(file)["optimizer_state_dict"] for file in self._files("*zero_pp_rank_*_optim_states.pt")]
        self.optimizer: dict[str, Any] = saved[0]
        self.world = len(saved)
        self.stage3 = "fp32_flat_groups" in saved[0]
        self._models = [read_file(f) for f in (self._files("zero_pp_rank_*_model_states.pt") if self.stage3 else
                                               [folder / MODEL_FILE])]  # fmt: skip
        self.model = self._models[0]
        groups: Shapes = self.model["param_shapes"]
        self.shapes = {name: shape for named in groups for name, shape in named.items()}
        self.masters: list[list[Tensor]] = [
            s["fp32_flat_groups" if self.stage3 else "single_partition_of_fp32_groups"] for s in saved
        ]
        self.states = [_states(s, len(groups)) for s in saved]
        self._held: dict[str, list[tuple[int, Fragment]]] = defaultdict(list)
        for rank in range(self.world):
            for fragment in self._fragments(groups, rank):
                self._held[fragment.name].append((rank, fragment))

    def _fragments(self, groups: Shapes, rank: int) -> list[Fragment]:
        if self.stage3:
            return fragments_of_parameters(groups, rank, self.world)
        paddings = self.optimizer.get("param_alignment_paddings") or no_paddings(groups)
        # a rank's file omits the padding at the end of the group, so only the last parts may be short
        parts = [
            (sum(self.masters[r][group].numel() for r in range(rank)), self.masters[rank][group].numel())
            for group in range(len(groups))
        ]
        return fragments_of_parts(groups, paddings, parts)

    def where(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield which ranks hold elements of a parameter.

        Args:
            name: of the parameter.
            offset: first element.
            length: number of elements.

        Yields:
            (rank, group, first element in the rank's flat tensor, first element counted from `offset`, number).

        Raises:
            KeyError: the checkpoint has no such parameter.
            ValueError: not all of the elements are in the files.
        """
        if name not in self.shapes:
            raise KeyError(f"{self.folder} holds no trained parameter '{name}'")
        found = 0
        for rank, held in self._held[name]:
            begin, end = max(offset, held.offset), min(offset + length, held.offset + held.length)
            if begin < end:
                found += end - begin
                yield rank, held.group, held.start + begin - held.offset, begin - offset, end - begin
        if found != length:
            raise ValueError(f"{self.folder}: of {length} elements of '{name}' only {found} are in the files")

    def fill(self, targets: Sequence[Any], wanted: Sequence[Fragment], sources: Sequence[Sequence[Any]]) -> None:
        """Copy what a rank needs from the flat tensors of all ranks.

        Args:
            targets: flat tensors by group, of any device; ignored for a group that `wanted` does not name.
            wanted: which elements `targets` hold; the rest of them stays as it is.
            sources: flat tensors by rank and group, laid out like `masters`.
        """
        for w in wanted:
            target = targets[w.group]
            for rank, group, start, position, length in self.where(w.name, w.offset, w.length):
                part = sources[rank][group].view(-1).narrow(0, start, length)
                target.narrow(0, w.start + position, length).copy_(part)

    def whole(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the float32 master of a parameter, in its shape, as `dtype`."""
        shape = self.shapes[name]
        value = torch.empty(shape.numel(), dtype=dtype)
        self.fill([value], [Fragment(name, 0, 0, 0, shape.numel())], self.masters)
        return value.view(shape)

    def untrained(self) -> dict[str, Tensor]:
        """Return what no shard holds: buffers and frozen parameters, whole, as they were saved."""
        module = self.model["module"]
        if not self.stage3:
            return {name: value for name, value in module.items() if name not in self.shapes}
        found = {name: module[name] for name in self.model["buffer_names"]}  # parameters are empty tensors there
        for name, shape in (self.model["frozen_param_shapes"] or {}).items():
            parts = [model["frozen_param_fragments"][name].view(-1) for model in self._models]
            found[name] = torch.cat(parts)[: shape.numel()].view(shape)
        return found

    def _files(self, pattern: str) -> list[Path]:
        """Return the file of every rank, by rank."""
        files = {int(re.findall(r"pp_rank_(\d+)", file.name)[0]): file for file in self.folder.glob(pattern)}
        if sorted(files) != list(range(len(files))) or not files:
            raise ValueError(
                f"{self.folder}: found files of the ranks {sorted(files)}; the files of all ranks of the run are needed"
            )
        return [files[rank] for rank in sorted(files)]


def trained_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that was trained, by name, from the file of one rank.

    Args:
        folder: with the files of all ranks, ZeRO stage 1, 2 or 3.
    """
    groups: Shapes = _of_one_rank(folder)["param_shapes"]
    return {name: tuple(shape) for named in groups for name, shape in named.items()}


def frozen_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that was not trained, by name, as far as the shards of ZeRO-3 hold them."""
    return {name: tuple(shape) for name, shape in (_of_one_rank(folder).get("frozen_param_shapes") or {}).items()}


def _of_one_rank(folder: Path) -> dict[str, Any]:
    file = folder / MODEL_FILE
    return read_file(file if file.is_file() else min(folder.glob("zero_pp_rank_*_model_states.pt")))


def read_file(file: str | Path, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """Return the content of a checkpoint file, without running code from it.

    Args:
        file: a file of DeepSpeed or of `training`.
        map_location: as for `torch.load`.
        mmap: map the file instead of reading it.
    """
    with torch.serialization.safe_globals(list(KNOWN_CLASSES)):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def _states(saved: Mapping[str, Any], groups: int) -> list[dict[str, Any]]:
    states = saved["optimizer_state_dict"] if "fp32_flat_groups" in saved else saved["base_optimizer_state"]
    if isinstance(states, list):  # stage 1 and 2 with elastic_checkpoint
        return states
    return [states["state"].get(group, {}) for group in range(groups)]
