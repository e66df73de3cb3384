"""Whatever one rank does that the others do not, every rank has an error that names ranks and task, and none waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_out_of_step.py")
SEG = ("left task 'seg' with ValueError: a bad",)
DET = ("left task 'det' with BalancerError: task 'det'",)
LOST = ("start all processes again",)
DIFFERENT = ("ranks disagree on what comes next",)

LOOPS = {
    "an exception before the forward": SEG,
    "an exception after the forward": SEG,
    "an exception in a layer": SEG,
    "an exception in a hook": (*SEG, *LOST),
    "an exception after the backward": SEG,
    "too few micro-steps": (*DET, "after 1 of 2 micro-steps"),
    "too many micro-steps": (*DET, "more than its 1 micro-steps"),
    "other micro-steps": (*DIFFERENT, "task 'det', 1 micro-steps", "task 'det', 2 micro-steps"),
    "other order": (*DIFFERENT, "task 'det'", "task 'cls'"),
    "skips a task": (*DIFFERENT, "task 'seg'", "task 'cls'"),
    "steps early": (*DIFFERENT, "task 'cls'", "balancer.step() after det, seg"),
    "partial step": (*DIFFERENT, "balancer.step() after", "balancer.step(require_all=False) after"),
    "steps inside": ("left task 'det' with BalancerError: balancer.step() inside task 'det'",),
    "abandons": (*DIFFERENT, "task 'seg'", "task 'det'"),
    "detaches": (*LOST, "has left the loop", "task 'seg'"),
    "leaves": (*LOST, "no answer", "task 'seg'"),
    "stays away": (
        *LOST,
        "rank 0: waits at task 'seg'",
        "rank 0 has waited for 0 s at task 'seg'",
        "not there: rank 1",
    ),
    "a weighting that raises": ("left balancer.step() with ZeroDivisionError: of the weighting",),
    "thaws": ("left balancer.step() with BalancerError: parameter 'backbone.frozen.weight'",),
}
"""Loop -> what every rank must read, in the error or in a note on it."""
LEFT = ("detaches", "leaves", "stays away")
"""Loops whose last rank ends without an error."""
RUNS = [
    *((loop, "zero2 fp32", "exact", 2, texts) for loop, texts in LOOPS.items()),
    *((loop, "zero3 fp32", "exact", 2, (*LOOPS[loop], *LOST)) for loop in LOOPS
      if "exception" in loop or loop in ("too few micro-steps", "steps inside")),
    ("too many micro-steps", "zero3 fp32", "exact", 2, ("waits at the end of task 'det'", *LOST)),
    ("a weighting that raises", "zero3 fp32", "exact", 2, LOOPS["a weighting that raises"]),
    *((loop, case, "exact", 2, LOOPS[loop]) for case in ("zero0 fp32", "zero1 fp32", "zero1 bf16 fp32-accumulation")
      for loop in ("an exception in a hook", "an exception after the backward")),
    ("an exception in a hook", "zero1 fp32 overlap=1 contiguous=1", "exact", 2, (*SEG, *LOST)),
    ("steps early", "zero1 fp32", "delayed", 2, LOOPS["steps early"]),
    ("an exception before the forward", "zero2 fp32", "sketch", 2, SEG),
    ("an exception in a hook", "zero2 fp32", "exact", 3, (*SEG, *LOST, "ranks 0, 1: in a collective operation")),
    ("an exception before the forward", "zero2 fp32", "exact", 3, (*SEG, "ranks 0, 1: backward 1 of 1 of task 'seg'")),
    ("leaves", "zero3 fp32", "exact", 3, (*LOST, "ranks 0, 1: waits at task 'seg'", "rank 2: no answer")),
    ("an exception in a hook", "zero2 fp32 tasks apart", "exact", 2, ("task 'seg' ran on rank(s) 0 and not on 1",)),
    ("skips a task", "zero2 fp32 tasks apart", "exact", 2, ("task 'seg' ran on rank(s) 0 and not on 1",)),
    ("a weighting that raises", "zero1 fp32 tasks apart", "exact", 2, LOOPS["a weighting that raises"]),
    ("detaches", "zero1 fp32 tasks apart", "exact", 2, (*LOST, "has left the loop", "balancer.step()")),
    ("leaves", "zero1 fp32 tasks apart", "sketch", 2, (*LOST, "rank 1: no answer", "balancer.step()")),
]  # fmt: skip


PLANNED = [
    ("an exception before the forward", "zero2 fp32", SEG),
    ("an exception before the forward", "zero3 fp32", SEG),
    ("an exception in a hook", "zero2 fp32", SEG),
    ("an exception after the backward", "zero1 fp32", SEG),
    ("too few micro-steps", "zero2 fp32", (*DET, "after 1 of 2 micro-steps")),
    ("other micro-steps", "zero2 fp32", ("task 'det', 1 micro-steps, then as in the last step", "2 micro-steps")),
    ("other order", "zero3 fp32", ("task 'det', 1 micro-steps, then as in the last step", "task 'cls'")),
    ("skips a task", "zero2 fp32", ("waits at task 'cls'", "in a collective operation after backward 1 of 1 of task")),
    ("steps early", "zero2 fp32", ("waits at balancer.step() after det, seg", "task 'cls'")),
    ("detaches", "zero2 fp32", ("has left the loop", "task 'seg'")),
    ("leaves", "zero1 fp32", ("no answer", "task 'seg'")),
    ("a weighting that raises", "zero2 fp32", ("left balancer.step() with ZeroDivisionError: of the weighting",)),
]
"""What the ranks read in a step that goes as planned until one of them leaves the plan."""


@pytest.mark.parametrize(("loop", "case", "texts"), PLANNED)
def test_every_rank_has_an_error_in_a_planned_step(
    loop: str, case: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    test_every_rank_has_an_error(loop, case, "exact", 2, texts, tmp_path, good_steps=1)


@pytest.mark.parametrize(("loop", "case", "norm", "world", "texts"), RUNS)
def test_every_rank_has_an_error(
    loop: str, case: str, norm: str, world: int, texts: tuple[str, ...], tmp_path: Path, good_steps: int = 0
) -> None:
    ended = run_ranks(SCRIPT, world, tmp_path, loop, case, norm, str(good_steps), timeout=60)
    for rank, (kind, message, notes) in ended.items():
        if loop in LEFT and int(rank) == world - 1:
            continue
        assert kind != "nothing was raised", ended
        said = " ".join([f"{kind}: {message}", *notes])
        for text in texts:
            assert text in said, ended
        assert f"rank {world - 1}" in said or f"on {world - 1}" in said, "the rank is named"
