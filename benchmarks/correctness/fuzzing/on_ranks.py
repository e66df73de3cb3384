"""Runs a program on forked ranks with DeepSpeed, and compares it there with its reference, step by step."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.errors import BalancerError
from benchmarks.correctness.fuzzing.model import inputs, make_model, param_groups
from benchmarks.correctness.fuzzing.program import Program

GRACE = 10.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"fp32": 2e-4, "bf16": 8e-2, "fp16": 2e-2}
"""Differences that rounding explains: of weights, relative to the largest change of a weight; of norms and factors,
relative to themselves."""
SOLVERS = {"aligned_mtl", "imtl_g", "upgrad", "mgda", "cagrad"}
"""Weightings that invert or iterate: rounding of the Gram matrix grows in them."""


class Planned(Exception):
    """An error that the program asked for."""


def fork_ranks(program: Program, timeout: float) -> str:
    """Run a program on fresh ranks; return "" when it agrees with its reference, else what went wrong.

    Args:
        program: what to do.
        timeout: seconds, after which the ranks are killed and the result begins with "hang".
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {_fork(rank, program, folder): rank for rank in range(program.world)}
        end, failed = time.monotonic() + timeout, False
        hang = False
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                running.pop(pid)
                if status and not failed:
                    failed, end = True, min(end, time.monotonic() + GRACE)
            elif time.monotonic() > end:
                hang = not failed
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                end += GRACE
            else:
                time.sleep(0.01)
        said = [path.read_text() for path in sorted(folder.glob("rank*.txt"), key=lambda p: p.stat().st_mtime_ns)]
        if hang:
            logs = [path.read_text()[-1500:] for path in sorted(folder.glob("*.log"))]
            return "\n".join([f"hang: no end after {timeout:g} s", *said, *logs])
        if failed and not said:
            return "a rank died\n" + "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.log")))
        return said[0] if said else ""


def _fork(rank: int, program: Program, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _run_rank(rank, program, folder)
        status = 0
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(status)


def _run_rank(rank: int, program: Program, folder: Path) -> None:
    import deepspeed
    import torch.distributed as dist

    from allinone_ds.zero.kernels import spare_cpu_kernel

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(program.world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(program.world), "LOCAL_SIZE": str(program.world), "GLOO_SOCKET_IFNAME": "lo"}
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    spare_cpu_kernel()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=program.world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    Run(program, folder).run()
    dist.barrier()


class Run:
    """One run of a program. Construct and run it on every rank.

    Args:
        program: what to do.
        folder: for checkpoints, the same on every rank.
    """

    def __init__(self, program: Program, folder: Path):
        import torch.distributed as dist

        from benchmarks.correctness.fuzzing.reference import Reference

        self.program, self.folder = program, folder
        self.rank = dist.get_rank()
        self.reference = Reference(program) if self.rank == 0 else None
        self.start = dict(make_model(program.model).named_parameters())
        self.fault = False  # whether the weighting raises in its next call
        self._open()

    def run(self) -> None:
        """Do all steps; raise an AssertionError at the first that differs from the reference."""
        for index, step in enumerate(self.program.steps):
            event = step["event"] or {"kind": None}
            if event["kind"] == "reload":
                self._reload(index)
            if self.program.options["parallel"] == "tasks":
                self.balancer.regroup(step["groups"])
            report = self._step(index, step, event)
            self._compare(index, report)
        self.balancer.detach()
        self.engine.destroy()

    def _open(self, seed: int = 0) -> None:
        import deepspeed

        from allinone_ds import TaskBalancer, weighting_from_config
        from benchmarks.correctness.fuzzing.reference import make_optimizer

        program = self.program
        model = make_model(program.model, seed).float()
        optimizer = make_optimizer(program, param_groups(model, program.case.one_group))
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=program.case.config())[0]
        weighting = weighting_from_config(program.weighting)
        factors = weighting.factors

        def maybe_raise(record: Any) -> Tensor:
            if self.fault:
                self.fault = False
                raise Planned("in the weighting")
            return factors(record)

        weighting.factors = maybe_raise
        options = {**program.options, "groups": program.steps[0].get("groups")}
        self.balancer = TaskBalancer(self.engine, program.tasks, model.shared, weighting, **options)

    def _reload(self, index: int) -> None:
        """Save, and go on with a new engine and balancer that have loaded it."""
        state = self.balancer.state_dict()
        tag = f"step{index}"
        self.engine.save_checkpoint(str(self.folder), tag=tag, client_state={"balancer": state})
        self.balancer.detach()
        self.engine.destroy()
        self._open(seed=1)
        _, client = self.engine.load_checkpoint(str(self.folder), tag=tag)
        self.balancer.load_state_dict(client["balancer"])

    def _step(self, index: int, step: dict[str, Any], event: dict[str, Any]) -> Any:
        if event["kind"] == "abandon" and self._mine(step["tasks"][0][0]):
            self._task(index, step, *step["tasks"][0])
            self.balancer.abandon()
        if event["kind"] == "raise in step":
            return self._raise_in_step(index, step)
        for task, micro_steps in step["tasks"]:
            if not self._mine(task):
                continue
            if event["kind"] == "evaluate" and task == event["task"]:
                self._evaluate(index, task)
            if event["kind"] in ("raise", "raise on one rank") and task == event["task"]:
                alone = event["kind"] == "raise on one rank" and not self._may_be_planned(index, step)
                place = event["place"] if not alone or self.rank == self.program.world - 1 else ""
                kinds = (Planned,) if place else (BalancerError,)  # which names the rank that failed
                self._expect(lambda t=task, k=micro_steps, p=place: self._task(index, step, t, k, place=p), kinds)
                if event["again"] == "step":
                    return self._from_the_start(index, step)
            bad = event["kind"] == "nan" and task == event["task"]
            self._task(index, step, task, micro_steps, factor=float("nan") if bad else 1.0)
        return self.balancer.step(require_all=False)

    def _may_be_planned(self, index: int, step: dict[str, Any]) -> bool:
        """Return whether ranks may not wait for each other in this step: it begins as one of the last step's tasks.

        An error of one rank then leaves the others in a reduction, and the job has to start again.
        """
        return index > 0 and step["tasks"][0] in self.program.steps[index - 1]["tasks"]

    def _raise_in_step(self, index: int, step: dict[str, Any]) -> Any:
        """The weighting raises, in the first task or in `step`; then the step begins again."""
        self.fault = True

        def everything() -> None:
            self._all_tasks(index, step)
            self.balancer.step(require_all=False)

        if self.program.options["norm"] == "delayed" or self.program.options["parallel"] == "tasks":
            self.fault = False  # the factors of this step are known, or the weighting runs on some ranks only
        else:
            self._expect(everything)
        return self._from_the_start(index, step)

    def _from_the_start(self, index: int, step: dict[str, Any]) -> Any:
        self.balancer.abandon()
        self._all_tasks(index, step)
        return self.balancer.step(require_all=False)

    def _all_tasks(self, index: int, step: dict[str, Any]) -> None:
        for task, micro_steps in step["tasks"]:
            if self._mine(task):
                self._task(index, step, task, micro_steps)

    def _mine(self, task: str) -> bool:
        return task in self.balancer.tasks

    def _task(
        self, index: int, step: dict[str, Any], task: str, micro_steps: int, place: str = "", factor: float = 1.0
    ) -> None:
        """Run a task's block.

        Args:
            index: of the step.
            step: its "tasks" and "batch".
            task: its name.
            micro_steps: of a rank, if every rank ran every task.
            place: where to raise; empty: nowhere.
            factor: of the loss of the first micro-step on the last rank that runs it.
        """
        mine = self.balancer.share(task, micro_steps)
        last = self.program.world - 1
        forward = self.engine.module if self.program.loss_from == "module" else self.engine
        hooks = []
        if place == "in a hook":
            hooks = [p.register_hook(_raise) for p in self.engine.module.parameters() if p.requires_grad]
        try:
            with self.balancer.task(task, micro_steps=len(mine)):
                _raise_if(place == "before the first backward")
                made: Any = (
                    forward(task, self._inputs(index, task, k, rank, step["batch"]), k == micro_steps - 1)
                    * (factor if (k, rank) == (0, last) else 1.0)
                    for k, rank in mine
                )
                for loss in list(made) if self.program.loss_from == "forwards first" else made:
                    self.balancer.backward(loss)
                    _raise_if(place == "after the first backward")
                _raise_if(place == "at the end")
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(self, index: int, task: str, k: int, rank: int, batch: int) -> Tensor:
        x = inputs(self.program.tasks.index(task), index, k, rank, batch)
        return x.to(TORCH[self.program.case.dtype])

    def _evaluate(self, index: int, task: str) -> None:
        with torch.no_grad(), self.balancer.evaluation(task):
            self.engine(task, self._inputs(index, task, 7, 0, 2), True)

    def _expect(self, call: Callable[[], Any], kinds: tuple[type[Exception], ...] = (Planned,)) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError("the error that was planned did not reach the caller")

    def _compare(self, index: int, report: Any) -> None:
        """Compare the report and the weights with the reference; every rank takes part in gathering the weights."""
        from allinone_ds.zero.params import whole_master

        named = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        weights = {name: whole_master(self.engine, p) for name, p in named.items()}
        scales = {task: float(value) for task, value in report.scales.items()}
        norms = {task: float(value) for task, value in report.norms.items()}
        if self.reference is None:
            return
        program, reference, limit = self.program, self.reference, ROUNDING[self.program.case.dtype]
        reference.measure(index)
        problems = []
        step = program.steps[index]
        ran = {task for task, _ in step["tasks"]}
        event = step["event"] or {}
        skipped = (event["task"],) if event.get("kind") == "nan" else ()
        delayed = program.options["norm"] == "delayed" and report.norm_error > 0  # its factors are those of before
        given_up = skipped and (delayed or program.options["nonfinite"] == "skip_step")
        applied = len(skipped) < len(ran) and not given_up
        wanted = {} if skipped and delayed else reference.factors(skipped)
        if set(norms) != ran or report.skipped != skipped or report.overflow or report.applied != applied:
            problems.append(f"ran {sorted(norms)}, skipped {report.skipped}, overflow {report.overflow}, applied "
                            f"{report.applied}; expected {sorted(ran)}, {skipped}, False, {applied}")  # fmt: skip
        near = limit + 4 * report.norm_error
        for task in ran - set(skipped):
            if not abs(norms[task] - reference.norms[task]) <= near * reference.norms[task] + 1e-6:
                problems.append(f"norm of '{task}': {norms[task]:.6g}; expected {reference.norms[task]:.6g}")
        if not report.norm_error and applied:
            near = 100 * limit if program.weighting["name"] in SOLVERS else 3 * limit
            for task, scale in wanted.items():
                if not abs(scales[task] - scale) <= near * max(wanted.values()):
                    problems.append(f"factor of '{task}': {scales[task]:.6g}; expected {scale:.6g}")
        if applied:
            reference.step(scales, skipped)
        moved = {n: reference.params[n] - self.start[n] for n in weights}
        largest = max([float(change.abs().max()) for n, change in moved.items() if n in reference.reached], default=0.0)
        near = limit * (10 if program.optimizer == "adamw" else 1)  # it divides small gradients by themselves
        for name, value in weights.items():
            off = float((value - reference.params[name]).abs().max())
            known = name in reference.reached or program.optimizer == "sgd"
            if known and not off <= near * largest + 1e-6:
                problems.append(
                    f"weight '{name}': off by {off:.3g}, {off / max(largest, 1e-12):.3g} of the largest change"
                )
        if problems:
            raise AssertionError(f"step {index}: " + "; ".join(problems))


def _raise(gradient: Tensor) -> None:
    raise Planned("in a hook")


def _raise_if(now: bool) -> None:
    if now:
        raise Planned("in the block")


def load_program(text: str) -> Program:
    """Return the program that a JSON text describes."""
    return Program(**json.loads(text))
