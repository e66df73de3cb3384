"""Whole float32 weights out of the ZeRO shards of a saved checkpoint, on the CPU. Checked on DeepSpeed 0.19.8."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

_MODEL_FILE = "mp_rank_00_model_states.pt"  # stages 1 and 2


def consolidate(shards: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint of ZeRO stage 1, 2 or 3: float32 masters, frozen parameters, buffers.

    Most of it is DeepSpeed's own `zero_to_fp32`. It leaves out the frozen parameters of stage 1, and refuses the shards
    of bf16 training with float32 accumulation, whose optimizer does not write its stage down: those two are read here.

    Args:
        shards: the folder (global_stepN) in which every rank's file lies.

    Raises:
        ValueError, KeyError: files of ranks are missing, or of another kind; and what `torch.load` raises.
    """
    if "zero_stage" in _read(_optimizer_files(shards)[0])["optimizer_state_dict"]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lazy = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name, lazy_mode=True)
        state = {name: value.contiguous() for name, value in lazy.items()}
    else:
        state = _bf16_masters(shards)
    if (shards / _MODEL_FILE).is_file():
        module = _read(shards / _MODEL_FILE)["module"]
        state.update({name: value for name, value in module.items() if name not in state})
    return state


def _bf16_masters(shards: Path) -> dict[str, Tensor]:
    """Of `BF16_Optimizer`: each rank holds an equal part of every group's flat masters, in the order of its shapes."""
    parts = [
        _read(file)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for file in _optimizer_files(shards)
    ]
    shapes = _read(shards / _MODEL_FILE)["param_shapes"]
    state = {}
    for group, named in enumerate(shapes):
        flat = torch.cat([part[group] for part in parts])
        offset = 0
        for name, shape in named.items():
            state[name] = flat.narrow(0, offset, shape.numel()).view(shape).clone()
            offset += shape.numel()
    return state


def _optimizer_files(shards: Path) -> list[Path]:
    """Every rank's file, by rank."""
    files = {
        int(re.findall(r"pp_rank_(\d+)", file.name)[0]): file for file in shards.glob("*zero_pp_rank_*_optim_states.pt")
    }
    if sorted(files) != list(range(len(files))) or not files:
        raise ValueError(f"files of the ranks {sorted(files)} are there; all of a run are needed")
    return [files[rank] for rank in sorted(files)]


def _read(file: Path) -> Any:
    # the files hold objects of DeepSpeed's own beside tensors; mapped, so optimizer states are not read
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)
