"""A micro-step that ran out of memory, in words."""

from __future__ import annotations

from allinone_ds.errors import RunError


def out_of_memory(error: BaseException, where: str, task: str, images: tuple[int, ...], rank: int) -> RunError | None:
    """The error to raise for a micro-step that ran out of memory; None when `error` is something else.

    Args:
        error: what the micro-step raised.
        where: step and micro-step, in words.
        task: its task.
        images: shape (B, 3, H, W) of its images.
        rank: of this process.
    """
    text = str(error).split("\n")[0]
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return None
    batch, _, height, width = images
    return RunError(
        f"rank {rank} ran out of memory in {where}: {batch} images of {height} x {width} pixels in a micro-batch "
        f"({text}). Make tasks.{task}.batch_size smaller and tasks.{task}.micro_steps larger by the same factor, which "
        f"gives the mean over as many images, or tasks.{task}.image_size smaller; a higher ZeRO stage or the optimizer "
        "offloaded to the CPU, leaves more memory for images"
    )
