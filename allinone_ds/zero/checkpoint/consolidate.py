"""Whole weights from the ZeRO shards of a saved checkpoint, on the CPU. Checked on DeepSpeed 0.19.8."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from allinone_ds.zero.checkpoint.layout import MODEL_FILE, SavedShards, read_file


def consolidate(shards: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint of ZeRO stage 1, 2 or 3: trained and frozen parameters, buffers.

    It holds what DeepSpeed's own `zero_to_fp32` gives, and also the frozen parameters of stage 1, and the weights of
    bf16 training with float32 accumulation. It runs no code from the files, and prints nothing.

    Args:
        shards: the folder (global_stepN) with the files of all ranks.
        dtype: of the trained parameters, rounded from the float32 masters; the others stay as they were saved.

    Raises:
        ValueError, KeyError: files of ranks are missing or of a different kind; and what `torch.load` raises.
    """
    saved = SavedShards(shards)
    state = {name: saved.whole(name, dtype) for name in saved.shapes}
    state.update({name: value.clone() for name, value in saved.untrained().items()})
    for name, original in (saved.model.get("shared_params") or {}).items():
        if original in state:
            state[name] = state[original]
    return state


def trained_weights(shards: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict of the model as it was trained, for any ZeRO stage; equal to gathering it in the run.

    Args:
        shards: the folder (global_stepN) with the files of all ranks.
        dtype: of the trained parameters.

    Raises:
        As `consolidate`.
    """
    if (shards / MODEL_FILE).is_file():  # only stage 3 has no whole weights beside the shards
        return {name: value.clone() for name, value in read_file(shards / MODEL_FILE)["module"].items()}
    return consolidate(shards, dtype)
