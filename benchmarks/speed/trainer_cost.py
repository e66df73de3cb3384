"""How much slower than a bare DeepSpeed loop is `AllInOneTrainer`, in images per second on the same loader?

    python -m benchmarks.speed.trainer_cost                     # the demo's run on 2 CPU ranks: 3 minutes on 2 cores
    python -m benchmarks.speed.trainer_cost --json benchmarks/results/trainer_cost.json trainer.logging_steps=1

Four loops train the same run (model, data order, optimizer, DeepSpeed config) in one set of processes and alternate in
blocks of steps, so that other load on the machine affects all of them:

    plain      DeepSpeed accumulation of the tasks' micro-steps, as short as possible: no balancing, no logs, no saving
    balancer   the loop of README.md around `TaskBalancer`
    unchecked  the same with check_ranks=False: without the message in which ranks compare what they do
    trainer    `AllInOneTrainer` as `allinone-ds train` starts it, with its logs, callbacks and schedule

All of them read and augment the images. A ratio is the median over rounds of one loop's images per second / another's.
The ratios of processor seconds, summed over all ranks, depend less on other load on the machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio
from benchmarks.common.vit import count_parameters

LOOPS = ("plain", "balancer", "unchecked", "trainer")


def bare_loop(way: str, trainer: Any, model: Any) -> Callable[[], None]:
    """Return a function that takes one step of a bare loop with its own engine and loader. Call on every rank.

    Args:
        way: "plain", "balancer" or "unchecked".
        trainer: an AllInOneTrainer with its engine; the loop trains the same run.
        model: of the same shape, in no engine.
    """
    import deepspeed

    from allinone_ds import TaskBalancer
    from allinone_ds.data.loading.ahead import to_device
    from allinone_ds.data.loading.loader import train_loader
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
    workers, broken = args.dataloader_num_workers, args.max_broken_images
    loader = train_loader(
        trainer.train_dataset, trainer.schedule, args.process_index, 0, args.max_steps, workers, broken
    )
    batches = iter(loader)
    if way == "plain":

        def step() -> None:
            data = next(batches).batches
            for task in tasks:
                for batch in data[task]:
                    engine.backward(engine(task=task, **to_device(batch, args.device)).loss)
                    engine.step()

        return step
    options = {**trainer.balancer_options, "check_ranks": way == "balancer"}
    balancer = TaskBalancer(engine, tasks, "backbone", trainer.weighting, **options)

    def balanced() -> None:
        data = next(batches).batches
        for task in tasks:
            with balancer.task(task, micro_steps=len(data[task])):
                for batch in data[task]:
                    balancer.backward(engine(task=task, **to_device(batch, args.device)).loss)
        balancer.step()

    return balanced


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternate the loops; return the seconds of every block by loop, and the run. Call on every rank."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback, set_seed

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
    weighting, options = config.balancer.weighting(), config.balancer.options()
    seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    processor: dict[str, list[float]] = {loop: [] for loop in LOOPS}

    class AlternateLoops(TrainerCallback):
        """Run the bare loops between the trainer's blocks, which are timed without them."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.loops = {
                way: bare_loop(way, trainer, build_model(config, facts)) for way in ("plain", "balancer", "unchecked")
            }
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
            dist.all_reduce(used)  # also waits for all ranks
            seconds[name].append(time.perf_counter() - self.since[0])
            processor[name].append(float(used))

    trainer = AllInOneTrainer(
        model=build_model(config, facts),
        args=arguments,
        train_dataset=data,
        weighting=weighting,
        balancer_options=options,
        callbacks=[RunFiles(config, facts), EventLog(config.run_dir), PrintProgress(), AlternateLoops()],
    )
    trainer.train()
    images = sum(size * micro_steps for size, micro_steps in trainer.schedule.batch.values()) * dist.get_world_size()
    return {
        "config": args.config,
        "overrides": args.overrides,
        "ranks": dist.get_world_size(),
        "stage": trainer.accelerator.state.deepspeed_plugin.zero_stage,
        "parameters": count_parameters(trainer.model),
        "images_a_step": images,
        "block": args.block,
        "seconds": {loop: values[1:] for loop, values in seconds.items()},  # the first block warms up
        "processor_seconds": {loop: values[1:] for loop, values in processor.items()},
    }


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the run")
    parser.add_argument("--config", default="configs/runs/demo.yaml", help="the run, on the demo's data")
    parser.add_argument("--rounds", type=int, default=20, help="timed blocks of each loop (default: 20)")
    parser.add_argument("--block", type=int, default=10, help="steps per block; the demo logs every 10 (default: 10)")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        serve(args.worker, lambda: measure(args, args.folder))
        return
    from allinone_ds.data.demo import DEMO_SIZES, make_demo_data
    from allinone_ds.training.launcher import launch_environment

    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(Path(folder) / "data", sizes=DEMO_SIZES, progress=False)
        environment = launch_environment(args.ranks, compiles=False)
        arguments = [*sys.argv[1:], f"--folder={folder}"]
        found = measure_on_ranks(__spec__.name, arguments, args.ranks, environment=environment, quiet=True)
    seconds, images = found["seconds"], found["images_a_step"] * found["block"]
    print_head("loop", "images/s", "of plain", "quartiles", "processor", "of balancer", "quartiles", "processor")
    for loop in LOOPS:
        row: dict[str, Any] = {"images_per_second": images / statistics.median(seconds[loop])}
        cells = [f"{row['images_per_second']:.1f}"]
        for base in ("plain", "balancer"):  # images per second are inversely proportional to seconds
            median, quartiles = median_ratio(seconds[base], seconds[loop])
            of_processor = median_ratio(found["processor_seconds"][base], found["processor_seconds"][loop])
            row |= {f"of_{base}": [median, *quartiles], f"processor_of_{base}": [of_processor[0], *of_processor[1]]}
            cells += [f"{median:.3f}", quartiles_cell(quartiles), f"{of_processor[0]:.3f}"]
        print_row(loop, *cells)
        found[loop] = row
    write_record(args.json, **found)


if __name__ == "__main__":
    main()
