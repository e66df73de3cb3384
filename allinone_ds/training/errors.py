"""Errors that end a run which was well configured."""

from __future__ import annotations

REQUEUE = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


class RunError(Exception):
    """A run that cannot go on. The message says what happened, where, and what to do.

    Args:
        message: the text for the user.
        on_all_ranks: every rank raises it with the same words, so one of them says it.
    """

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


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
