"""Explain a micro-step that ran out of memory."""

from __future__ import annotations

import torch

from allinone_ds.errors import RunError


def out_of_memory(error: BaseException, where: str, keys: str, images: tuple[int, ...], rank: int) -> RunError | None:
    """Return the error to raise for a micro-step that ran out of memory; None if `error` has a different cause.

    Args:
        error: the error that the micro-step raised.
        where: step, task and micro-step, for the message.
        keys: beginning of the keys of the run's file that set the images, such as "tasks.det".
        images: shape (B, 3, H, W) of the images.
        rank: rank of this process.
    """
    text = str(error).split("\n")[0]
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    batch, _, height, width = images
    return RunError(
        f"rank {rank} ran out of memory in {where}: {batch} images of {height} x {width} pixels per micro-batch "
        f"({text}). Divide {keys}.batch_size and multiply {keys}.micro_steps by the same factor, which "
        f"keeps the number of images per step, or reduce {keys}.image_size. A higher ZeRO stage, or an optimizer "
        "offloaded to the CPU, also frees memory"
    )
