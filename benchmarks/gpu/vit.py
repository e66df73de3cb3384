"""A run of three tasks on one ViT: its file, its plan, its engine and its steps. What several parts share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.part import Run

TASKS = ("det", "seg", "cls")
CLASSES = 100
PLAIN = "plain"
PHASES = ("forward", "backward", "optimizer step")
"""Of a step, as a profile names them."""


@dataclass
class Vit:
    """One backbone with three linear heads on one engine.

    Args:
        run: of the benchmark.
        backbone: as in a run's file.
        side: of the images, in pixels.
        batch: images per micro-step; a step has one micro-step per task.
        stage: ZeRO stage.
        mode: "plain", or the norm of a balancer.
        zero: further keys of DeepSpeed's "zero_optimization".
        checkpointing: recompute the backbone's layers in backward.
        compiled: compile the backbone's layers with torch.compile.
    """

    run: Run
    backbone: dict[str, Any]
    side: int
    batch: int
    stage: int
    mode: str = "exact"
    zero: dict[str, Any] | None = None
    checkpointing: bool = False
    compiled: bool = False

    def config(self) -> Any:
        """Return the configuration of the run."""
        from allinone_ds.run_config.schema import RunConfig

        source = {"format": "image_list", "images": "none", "list": "none.txt", "classes": "none.txt"}
        task = {"type": "classification", "image_size": self.side, "batch_size": self.batch, "train": source}
        norm = "exact" if self.mode == PLAIN else self.mode
        return RunConfig.model_validate({
            "name": "gpu", "data_root": str(self.run.folder), "model": {"backbone": self.backbone},
            "tasks": {name: task for name in TASKS}, "balancer": {"name": "tbgc", "norm": norm},
            "deepspeed": self.engine_config(), "trainer": {"gradient_checkpointing": self.checkpointing},
        })  # fmt: skip

    def engine_config(self) -> dict[str, Any]:
        """Return the configuration of DeepSpeed: that of configs/deepspeed, with what the trainer fills in."""
        from allinone_ds.run_config.yaml_files import find_config, read_yaml

        config = read_yaml(find_config(f"configs/deepspeed/zero{self.stage}_bf16.json"))
        config["train_micro_batch_size_per_gpu"] = self.batch
        config["gradient_accumulation_steps"] = len(TASKS) if self.mode == PLAIN else 1
        config["zero_optimization"] |= self.zero or {}
        if not self.run.on_gpu:
            config["zero_optimization"] |= {"reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5}
        return config

    def planned(self) -> dict[str, int]:
        """Return what `plan` predicts: part -> bytes on the device."""
        from allinone_ds.planning.plan import plan_run

        memory = dict(plan_run(self.config(), 1, dict.fromkeys(TASKS, CLASSES)).memory)
        if self.mode == PLAIN:
            memory.pop("balancer", None)
        return memory

    def open(self) -> None:
        """Build model, engine, balancer and a batch."""
        import deepspeed
        from transformers.modeling_layers import GradientCheckpointingLayer

        from allinone_ds import TBGC, TaskBalancer
        from allinone_ds.run_config.build import build_model
        from allinone_ds.run_config.run_files import ModelFacts

        config = self.config()
        names = [str(number) for number in range(CLASSES)]
        torch.manual_seed(0)
        with torch.device(self.run.device):
            model = build_model(config, ModelFacts(backbone=config.model.backbone, classes=dict.fromkeys(TASKS, names)))
        if self.checkpointing:
            model.activation_checkpointing_enable()
        if self.compiled:
            for module in model.backbone.modules():
                if isinstance(module, GradientCheckpointingLayer):  # transformers' class of repeated layers
                    module.compile()
        groups = [{"params": list(part.parameters())} for part in (model.backbone, *model.tasks.values())]
        fused = self.run.on_gpu and "offload_optimizer" not in (self.zero or {})
        optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=fused)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=self.engine_config())[0]
        self.balancer = None
        if self.mode != PLAIN:
            self.balancer = TaskBalancer(self.engine, TASKS, "backbone", TBGC(max_norm=0.1), norm=self.mode)
        shape = (self.batch, 3, self.side, self.side)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8, device=self.run.device)
        self.labels = torch.randint(CLASSES, (self.batch,), device=self.run.device)

    def loss(self, task: str) -> Any:
        """Run a forward."""
        return self.engine(task=task, pixel_values=self.pixels, labels=self.labels).loss

    def step(
        self, after_backward: Callable[[], Any] | None = None, before_forward: Callable[[], Any] | None = None
    ) -> Any:
        """Take one optimizer step.

        Args:
            after_backward: called after the backward of each task.
            before_forward: called before the forward of each task but the first, and after the last task.
        """
        forward, backward, optimizer = (partial(torch.profiler.record_function, phase) for phase in PHASES)
        if self.balancer is None:
            for task in TASKS:
                with forward():
                    loss = self.loss(task)
                with backward():
                    self.engine.backward(loss)
                with optimizer():
                    self.engine.step()
            return None
        for task in TASKS:
            with self.balancer.task(task):
                if before_forward is not None and task != TASKS[0]:
                    before_forward()
                with forward():
                    loss = self.loss(task)
                with backward():
                    self.balancer.backward(loss)
                if after_backward is not None:
                    after_backward()
        if before_forward is not None:
            before_forward()
        with optimizer():
            return self.balancer.step()

    def milliseconds_between_tasks(self) -> float:
        """Return the time of the device from the end of each backward to the next forward, summed over a step."""
        marks: list[Any] = []

        def mark() -> None:
            if not self.run.on_gpu:
                marks.append(time.perf_counter())
                return
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        self.step(after_backward=mark, before_forward=mark)
        self.run.synchronize()
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if self.run.on_gpu:
            return sum(a.elapsed_time(b) for a, b in pairs)
        return sum(1000 * (b - a) for a, b in pairs)

    def flops(self) -> float:
        """Return the operations of one step: 2 per weight and token and 4 per pair of tokens, layer and channel in a
        forward, and twice as many in a backward; recomputation does not count."""
        config = self.engine.module.config
        from benchmarks.common.vit import count_parameters

        tokens = (self.side // config.patch_size) ** 2 + 1
        weights = count_parameters(self.engine.module.backbone)
        pairs = 4 * config.num_hidden_layers * config.hidden_size * tokens**2
        return 3 * len(TASKS) * self.batch * (2 * weights * tokens + pairs)

    def close(self) -> None:
        """Free the memory."""
        import gc

        if self.balancer is not None:
            self.balancer.detach()
        self.engine.destroy()
        del self.engine, self.balancer, self.pixels, self.labels
        gc.collect()
        if self.run.on_gpu:
            torch.cuda.empty_cache()


def large(run: Run) -> dict[str, Any]:
    """Return the ViT-L of the parts, in a trial a tiny one."""
    return run.pick({"name": "vit_l"}, tiny())


def middle(run: Run) -> dict[str, Any]:
    """Return a ViT-B, for what does not depend on the size; in a trial a tiny one."""
    return run.pick({"name": "vit_b"}, tiny())


def tiny() -> dict[str, Any]:
    """Return a backbone for trials."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 32}
    return {"config": sizes}
