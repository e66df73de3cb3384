"""One balanced step of a toy model against the same step in float64: the start-up test of a new DeepSpeed release."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..zero import CHECKED_RELEASES, checked_release
from .errors import BalancerError
from .weighting import TBGC

_KEPT_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "communication_data_type")
_TAU, _RATE = 0.1, 0.5


class _Toy(nn.Module):
    """Two tasks on one backbone; task "a" has losses a thousand times those of task "b"."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 2)})

    def forward(self, task: str, x: Tensor) -> Tensor:
        out = self.heads[task](self.backbone(x))
        loss = out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
        return loss.square().mean() * (30.0 if task == "a" else 0.03)


def _inputs(task: str, micro_step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * micro_step + ord(task))
    return torch.randn(4, 5, generator=generator)


def self_test(engine: Any, norm: str = "exact", parallel: str = "data", micro_steps: int = 2, steps: int = 3) -> float:
    """Train a toy model on an engine of the same kind and compare its weights with a float64 reference.

    Collective. `engine` itself is not touched.

    Args:
        engine: gives ZeRO stage, precision and offload settings.
        norm, parallel: of the balancer. The toy is so small that a sketch of it is exact.
        micro_steps: micro-steps a task.
        steps: balanced steps; the later show what earlier ones leave behind.

    Returns:
        The largest difference of a weight, relative to the largest change of a weight.

    Raises:
        BalancerError: it is above 1e-4 (fp32) or 0.1 (16-bit weights).
    """
    from .balancer import TaskBalancer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = _Toy().double()
    start = copy.deepcopy(reference)
    toy = _engine_like(engine, copy.deepcopy(reference).float())
    dtype = next(toy.module.parameters()).dtype
    balancer = TaskBalancer(toy, ("a", "b"), "backbone", TBGC(_TAU), norm=norm, parallel=parallel, self_test=False)
    factors: dict[str, Tensor] = {}
    for _ in range(steps):
        for task in balancer.tasks:
            mine = balancer.share(task, micro_steps)
            with balancer.task(task, len(mine)):
                for k, rank in mine:
                    x = _inputs(task, k, rank).to(toy.device, dtype)
                    balancer.backward(toy(task, x))
        balancer.step()
        found = _reference_step(reference, micro_steps, factors)
        factors = found if norm == "delayed" else {}
    names = [name for name, _ in reference.named_parameters()]
    largest = max(
        float((p - q).detach().abs().max()) for p, q in zip(reference.parameters(), start.parameters(), strict=True)
    )
    worst = 0.0
    for name, param in toy.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            got = param.detach().double().cpu()
        want = dict(zip(names, reference.parameters(), strict=True))[name].detach()
        worst = max(worst, float((got - want).abs().max()) / largest)
    balancer.detach()
    limit = 1e-4 if dtype == torch.float32 else 0.1
    if not worst <= limit or math.isnan(worst):
        raise BalancerError(
            f"self-test with DeepSpeed {deepspeed.__version__}, ZeRO stage {int(engine.zero_optimization_stage())}, "
            f"norm={norm!r}, parallel={parallel!r}: a balanced step differs from its reference by {worst:.1e} of the "
            f"largest update (allowed {limit:.0e}); use a checked release of DeepSpeed"
        )
    return worst


def run_self_test(engine: Any, norm: str, parallel: str) -> None:
    """`self_test`, with a warning when the release of DeepSpeed was not checked."""
    if not checked_release():
        warnings.warn(
            f"DeepSpeed {deepspeed.__version__} was not checked with this release of allinone_ds "
            f"(checked: {', '.join(CHECKED_RELEASES)}); running a self-test of balanced steps",
            stacklevel=4,
        )
    self_test(engine, norm, parallel)


def _reference_step(model: _Toy, micro_steps: int, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One TBGC step with plain SGD on all ranks' inputs, in float64.

    Args:
        factors: of the step before, to be used in this one; empty: this step's own.

    Returns:
        This step's own factors.
    """
    own = {}
    total = [torch.zeros_like(p) for p in model.parameters()]
    backbone = len(list(model.backbone.parameters()))
    world = dist.get_world_size()
    for task in ("a", "b"):
        losses = [model(task, _inputs(task, k, r).double()) for k in range(micro_steps) for r in range(world)]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()), allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients[:backbone] if g is not None]).norm()
        own[task] = (_TAU / (norm + 1e-6)).clamp(max=1.0)
        factor = factors.get(task, own[task])
        for kept, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                kept += factor * gradient
    with torch.no_grad():
        for param, gradient in zip(model.parameters(), total, strict=True):
            param.sub_(_RATE * gradient)
    return own


def _engine_like(engine: Any, model: nn.Module) -> Any:
    """A small engine with the ZeRO, precision and offload settings of `engine`, plain SGD and its own buffers."""
    config = {k: copy.deepcopy(v) for k, v in engine.config.items() if k in _KEPT_SECTIONS}
    zero = config.setdefault("zero_optimization", {})
    zero.update({"reduce_bucket_size": 4096, "allgather_bucket_size": 4096})
    if config.get("fp16", {}).get("enabled"):
        config["fp16"].update({"loss_scale": 0, "initial_scale_power": 4})
    config |= {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.SGD([{"params": list(child.parameters())} for child in model.children()], lr=_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
