"""Runs the loops of docs/loops.md on every rank, and compares them with the same steps by hand in float64."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.launcher import run_checks

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
RAW = ("DeepSpeed", "accelerate", "Trainer of transformers")
LIGHTNING = "Lightning, manual optimization"


def blocks() -> dict[str, str]:
    """The first Python block under each heading of the page."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        code = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if code:
            found[heading] = code[1]
    return found


def prelude(folder: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "documented"}
    exec(blocks()["Model and data"], names)
    return {**names, "FOLDER": folder}


def reference(names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The balanced steps by hand: each task's gradient clipped to 0.1 on the backbone, then summed; SGD."""
    torch.manual_seed(0)
    model, world = names["Model"]().double(), dist.get_world_size()
    for step in range(names["STEPS"]):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for task in names["TASKS"]:
            model.zero_grad()
            for rank in range(world):
                for x, y in names["micro_batches"](task, step, rank):
                    (model(task, x.double(), y) / world / names["MICRO_STEPS"]).backward()
            norm = torch.cat([p.grad.reshape(-1) for p in model.backbone.parameters()]).norm()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    total[name] += param.grad * (0.1 / (norm + 1e-6)).clamp(max=1)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param -= 0.5 * total[name]
    return {name: p.detach() for name, p in model.named_parameters()}


def compare(engine: Any, names: dict[str, Any]) -> None:
    wanted = reference(names)
    got = dict(engine.module.named_parameters())
    for name, value in wanted.items():
        own = got[name if name in got else f"model.{name}"].detach().double()
        torch.testing.assert_close(own, value, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert engine.global_steps == names["STEPS"]


def run_loop(heading: str, folder: str) -> None:
    names = prelude(folder)
    exec(compile(blocks()[heading], f"docs/loops.md, {heading}", "exec"), names)
    balancer = names["trainer"].balancer if "trainer" in names else names["balancer"]
    compare(balancer.engine, names)
    balancer.detach()
    balancer.engine.destroy()
    if "accelerate" in blocks()[heading] or "Trainer" in heading:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


def run_lightning(folder: str) -> None:
    """Call the hooks in Lightning's order."""
    names = prelude(folder)
    exec(compile(blocks()[LIGHTNING], "docs/loops.md, Lightning", "exec"), names)
    torch.manual_seed(0)
    module = names["Module"]()
    engine = deepspeed.initialize(model=module, optimizer=module.configure_optimizers(), config=names["CONFIG"])[0]
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(deepspeed_engine=engine))
    module.on_fit_start()
    for step in range(names["STEPS"]):
        batch = {task: list(names["micro_batches"](task, step, dist.get_rank())) for task in names["TASKS"]}
        module.training_step(batch, step)
        module.eval()
        with torch.no_grad():
            module.validation_step(batch, step)
        module.train()
        checkpoint: dict[str, Any] = {}
        module.on_save_checkpoint(checkpoint)
        module.on_load_checkpoint(checkpoint)
    compare(engine, names)
    module.balancer.detach()
    engine.destroy()


if __name__ == "__main__":
    out, folder = sys.argv[1:]
    checks = {heading: partial(run_loop, heading, folder) for heading in RAW}
    run_checks({**checks, LIGHTNING: partial(run_lightning, folder)}, out)
