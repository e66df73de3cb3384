"""What the trainer itself costs: images a second of `AllInOneTrainer` against bare DeepSpeed loops on the same loader.

    python benchmarks/trainer_cost.py                       # the demo's run on 2 CPU ranks
    python benchmarks/trainer_cost.py --json benchmarks/results/trainer_cost.json trainer.logging_steps=1

Three loops train the same run (model, data order, optimizer, DeepSpeed config) in one set of processes and take turns,
a block of steps each, so that what else the machine does falls on all of them. "plain" is DeepSpeed accumulation of the
tasks' micro-steps, as short as it can be written: it balances, logs and saves nothing. "balancer" is the loop of the
README around `TaskBalancer`. "trainer" is `AllInOneTrainer` as `allinone-ds train` starts it, with its logs, callbacks
and schedule. Reading and augmenting the pictures is in all three. A ratio is the median over rounds of one loop's
seconds / another's; ratios of processor seconds, of all ranks, stand beside them, since others on the machine touch
those less.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine

LOOPS = ("plain", "balancer", "trainer")


def bare_loop(way: str, trainer: Any, model: Any) -> Callable[[], None]:
    """A function that takes one step of a bare loop on an engine and a loader of its own; collective.

    Args:
        way: "plain" or "balancer".
        trainer: an AllInOneTrainer that has its engine, whose run the loop repeats.
        model: of the same shape, not in any engine.
    """
    import deepspeed

    from allinone_ds import TaskBalancer
    from allinone_ds.data.loader import train_loader
    from allinone_ds.evaluation.evaluate import to_device
    from allinone_ds.training.optimizer import parameter_groups

    args, tasks = trainer.args, trainer.schedule.tasks
    groups = parameter_groups(
        model, args.learning_rate, args.weight_decay, args.backbone_lr_factor, args.layer_lr_decay
    )
    kind, options = trainer.get_optimizer_cls_and_kwargs(args)
    config = copy.deepcopy(trainer.deepspeed.config)
    if way == "plain":
        config["gradient_accumulation_steps"] = sum(micro_steps for _, micro_steps in trainer.schedule.batch.values())
        config.pop("train_batch_size", None)
    engine = deepspeed.initialize(model=model, optimizer=kind(groups, **options), config=config)[0]
    engine.train()
    batches = iter(
        train_loader(
            trainer.train_dataset,
            trainer.schedule,
            args.process_index,
            0,
            args.max_steps,
            args.dataloader_num_workers,
            args.max_broken_images,
        )
    )
    if way == "plain":

        def step() -> None:
            data = next(batches).batches
            for task in tasks:
                for batch in data[task]:
                    engine.backward(engine(task=task, **to_device(batch, args.device)).loss)
                    engine.step()

        return step
    balancer = TaskBalancer(engine, tasks, "backbone", trainer.weighting, **trainer.balancer_options)

    def balanced() -> None:
        data = next(batches).batches
        for task in tasks:
            with balancer.task(task, micro_steps=len(data[task])):
                for batch in data[task]:
                    balancer.backward(engine(task=task, **to_device(batch, args.device)).loss)
        balancer.step()

    return balanced


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the three loops take turns; collective. Seconds of every block by loop, and what was run."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback, set_seed

    from allinone_ds.balance.options import balancer_from_config
    from allinone_ds.reporting.progress import PrintProgress
    from allinone_ds.run_config.arguments import arguments_from_config
    from allinone_ds.run_config.build import build_model, open_train_data
    from allinone_ds.run_config.run_files import ModelFacts, RunFiles
    from allinone_ds.run_config.schema import load_config
    from allinone_ds.run_folder.event_log import EventLog
    from allinone_ds.training.trainer import AllInOneTrainer

    steps = (args.rounds + 1) * args.block
    own = [f"output_dir={folder / 'run'}", f"data_root={folder / 'data'}", f"trainer.max_steps={steps}"]
    config = load_config(args.config, [*args.overrides, *own, "trainer.save_strategy=no"])
    arguments = arguments_from_config(config)
    set_seed(arguments.seed)
    data = open_train_data(config)
    facts = ModelFacts(
        backbone=config.model.backbone, classes={name: list(part.dataset.classes) for name, part in data.items()}
    )
    weighting, options = balancer_from_config(config.balancer)
    seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    processor: dict[str, list[float]] = {loop: [] for loop in LOOPS}

    class TakeTurns(TrainerCallback):
        """Runs the bare loops between the trainer's blocks; the clock of the trainer stands meanwhile."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.loops = {way: bare_loop(way, trainer, build_model(config, facts)) for way in ("plain", "balancer")}
            self._start()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % args.block:
                return
            self._stop("trainer")
            names = list(self.loops)
            for name in names if len(seconds["trainer"]) % 2 else reversed(names):
                self._start()
                for _ in range(args.block):
                    self.loops[name]()
                self._stop(name)
            self._start()

        def _start(self) -> None:
            dist.barrier()
            self.since = time.perf_counter(), time.process_time()

        def _stop(self, name: str) -> None:
            used = torch.tensor(time.process_time() - self.since[1], dtype=torch.float64)
            dist.all_reduce(used)  # waits for all ranks
            seconds[name].append(time.perf_counter() - self.since[0])
            processor[name].append(float(used))

    trainer = AllInOneTrainer(
        model=build_model(config, facts),
        args=arguments,
        train_dataset=data,
        weighting=weighting,
        balancer_options=options,
        callbacks=[RunFiles(config, facts), EventLog(config.run_dir), PrintProgress(), TakeTurns()],
    )
    trainer.train()
    images = sum(size * micro_steps for size, micro_steps in trainer.schedule.batch.values()) * dist.get_world_size()
    return {
        "config": args.config,
        "overrides": args.overrides,
        "ranks": dist.get_world_size(),
        "stage": trainer.accelerator.state.deepspeed_plugin.zero_stage,
        "parameters": sum(int(getattr(p, "ds_numel", p.numel())) for p in trainer.model.parameters()),
        "images_a_step": images,
        "block": args.block,
        "seconds": {loop: values[1:] for loop, values in seconds.items()},  # the first block warms up
        "processor_seconds": {loop: values[1:] for loop, values in processor.items()},
    }


def ratio(seconds: dict[str, list[float]], loop: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of images a second of `loop` / of `to` over rounds."""
    found = sorted(b / a for a, b in zip(seconds[loop], seconds[to], strict=True))
    quarter = len(found) // 4
    return statistics.median(found), found[quarter], found[-1 - quarter]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the run")
    parser.add_argument("--config", default="configs/runs/demo.yaml", help="the run, on demo data")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each loop that are timed")
    parser.add_argument("--block", type=int, default=10, help="steps of a block: one log in each at the demo's rate")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        found = measure(args, args.worker)
        import torch.distributed as dist

        if dist.get_rank() == 0:
            (args.worker / "found.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()
        return
    from allinone_ds.data.demo import DEMO_SIZES, make_demo_data
    from allinone_ds.training.launcher import launch_environment

    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(Path(folder) / "data", sizes=DEMO_SIZES, progress=False)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        same = [f"--{name}={getattr(args, name)}" for name in ("config", "rounds", "block")]
        environment = {**launch_environment(args.ranks, compiles=False), **os.environ}
        subprocess.run(
            [*command, __file__, f"--worker={folder}", *same, *args.overrides],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads((Path(folder) / "found.json").read_text())
    seconds, images = found["seconds"], found["images_a_step"] * found["block"]
    print("| loop | images/s | of plain | quartiles | processor | of balancer | quartiles | processor |")
    print("|---|---|---|---|---|---|---|---|")
    for loop in LOOPS:
        row: dict[str, Any] = {"images_per_second": images / statistics.median(seconds[loop])}
        cells = [f"{row['images_per_second']:.1f}"]
        for to in ("plain", "balancer"):
            median, low, high = row[f"of_{to}"] = ratio(seconds, loop, to)
            processor = row[f"processor_of_{to}"] = ratio(found["processor_seconds"], loop, to)
            cells += [f"{median:.3f}", f"{low:.3f}-{high:.3f}", f"{processor[0]:.3f}"]
        print(f"| {loop} | {' | '.join(cells)} |")
        found[loop] = row
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
