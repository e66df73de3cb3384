"""What a program must reach: its steps computed by hand on one process, with sums, norms and weights in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds import StepRecord, weighting_from_config
from allinone_ds.testing.reference import norm_of
from benchmarks.correctness.fuzzing.model import inputs, make_model, param_groups
from benchmarks.correctness.fuzzing.program import Program

DTYPES = {"fp32": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = {"sgd": 0.003, "momentum": 0.003, "adamw": 0.003}


def make_optimizer(program: Program, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Return the program's optimizer."""
    lr = LR[program.optimizer]
    if program.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, eps=1e-4)
    if program.optimizer == "momentum":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1)
    return torch.optim.SGD(groups, lr=lr)


class Reference:
    """Trains by hand; `step` takes the factors that the balancer reported, and `factors` computes them.

    The two are compared apart, so that the rounding of a factor does not grow over the steps.

    Args:
        program: what to do.

    Attributes:
        params: name -> float64 weight.
        norms: of the last step, task -> norm of its gradient on the backbone.
        reached: names of the parameters that had a gradient in any step.
    """

    def __init__(self, program: Program):
        self.program = program
        self.weighting = weighting_from_config(program.weighting)
        self.model = make_model(program.model).to(DTYPES[program.case.dtype])
        master = make_model(program.model)
        for p, q in zip(master.parameters(), self.model.parameters(), strict=True):
            p.data.copy_(q.data)  # engines round the weights first, then copy them to fp32
        self._master = master
        self._optimizer = make_optimizer(program, param_groups(master, program.case.one_group))
        backbone = {id(p) for p in master.get_submodule(master.shared).parameters()}
        self._backbone = {name for name, p in master.named_parameters() if id(p) in backbone}
        self.params = {name: p.data for name, p in master.named_parameters() if p.requires_grad}
        self.reached: set[str] = set()
        self.norms: dict[str, float] = {}
        self._found: dict[str, dict[str, Tensor]] = {}
        self._losses: dict[str, float] = {}

    def measure(self, index: int) -> None:
        """Compute the gradients, norms and losses of a step."""
        step = self.program.steps[index]
        with torch.no_grad():
            for p, q in zip(self._master.parameters(), self.model.parameters(), strict=True):
                q.copy_(p)
        self._found, self.norms, self._losses = {}, {}, {}
        for task, micro_steps in step["tasks"]:
            self._found[task], self._losses[task] = self._gradient(task, index, micro_steps, step["batch"])
            self.norms[task] = norm_of(self._shared(task).values()) if self._shared(task) else 0.0

    def step(self, scales: Mapping[str, float], left_out: Sequence[str]) -> None:
        """Take the optimizer's step with these factors, without the tasks that are left out."""
        total = self._total(scales, left_out)
        self._optimizer.zero_grad()
        for name, p in self._master.named_parameters():
            if name in total:
                p.grad = total[name]
            elif name in self._backbone and p.requires_grad:
                p.grad = torch.zeros_like(p)  # the backbone takes part in each step, whichever task ran
        self._optimizer.step()
        self.reached |= set(total)

    def factors(self, left_out: Sequence[str]) -> dict[str, float]:
        """Return the factors that the weighting gives in this step to the tasks that are not left out."""
        used = [task for task in self.program.tasks if task in self._found and task not in left_out]
        if not used:
            return {}
        if self.weighting.streams:
            factors = [self.weighting.factors(self._record([task]))[0] for task in used]
        else:
            factors = list(self.weighting.factors(self._record(used)))
        scales = {task: float(factor) for task, factor in zip(used, factors, strict=True)}
        total = self._total(scales, left_out)
        last = self.weighting.sum_factor(torch.tensor(norm_of(total.values())))
        return scales if last is None else {task: scale * float(last) for task, scale in scales.items()}

    def _total(self, scales: Mapping[str, float], left_out: Sequence[str]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for task, gradient in self._found.items():
            for name, value in {} if task in left_out else gradient.items():
                raw = self.weighting.heads == "none" and name not in self._backbone
                total[name] = total.get(name, 0) + value * (1.0 if raw else scales[task])
        return total

    def _record(self, tasks: Sequence[str]) -> StepRecord:
        zeros = {name: torch.zeros_like(self._master.get_parameter(name)) for name in sorted(self._backbone)}
        rows = torch.stack(
            [
                torch.cat([self._shared(task).get(name, zero).reshape(-1) for name, zero in zeros.items()])
                for task in tasks
            ]
        )  # (T, P)
        whole = torch.tensor([norm_of(self._found[task].values()) for task in tasks], dtype=torch.float64)
        values = torch.tensor([self._losses[task] for task in tasks], dtype=torch.float64)
        return StepRecord(tuple(tasks), rows @ rows.T, whole, values)

    def _gradient(self, task: str, index: int, micro_steps: int, batch: int) -> tuple[dict[str, Tensor], float]:
        """Return a task's gradient by name and its loss: means over micro-steps and ranks, float64."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total: dict[str, Tensor] = {}
        mean = 0.0
        number, world = self.program.tasks.index(task), self.program.world
        for k in range(micro_steps):
            for rank in range(world):
                x = inputs(number, index, k, rank, batch).to(next(self.model.parameters()).dtype)
                loss = self.model(task, x, k == micro_steps - 1) / (micro_steps * world)
                mean += float(loss)
                for name, value in zip(
                    named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True
                ):
                    if value is not None:
                        total[name] = total.get(name, 0) + value.double()
        return total, mean

    def _shared(self, task: str) -> dict[str, Tensor]:
        return {name: value for name, value in self._found[task].items() if name in self._backbone}
