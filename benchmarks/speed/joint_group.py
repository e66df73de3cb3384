"""How much faster does the trainer train a joint group than the same tasks with image sources of their own?

    python -m benchmarks.speed joint-group                       # into docs/performance.md: 3 minutes on 2 idle cores
    python -m benchmarks.speed.joint_group --ranks 1 --rounds 2

Trains the run of `allinone-ds demo --joint` (eight tasks) on scenes of its own: as it is, a joint group balanced at the
features; balanced at the backbone; and with each task reading the same images as a source of its own. Every way takes
as many steps with the same batch size, so a step trains each task on as many images. All ways alternate in one set of
processes, as runs that begin anew; the first steps of each run warm up and are not timed.

- Ratio: the median over rounds of a way's seconds per step / those of separate sources.
- Processor: the same with processor seconds, summed over all ranks, which depend less on other load on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate

WAYS = ("separate sources", "group at the backbone", "group at the features")
CONFIG = Path("configs/runs/demo_joint.yaml")


def run_of(way: str, args: argparse.Namespace) -> Any:
    """Return the configuration of a way's run."""
    import yaml

    from allinone_ds.run_config.schema import load_config
    from allinone_ds.run_config.yaml_files import read_yaml

    content: dict[str, Any] = read_yaml(CONFIG)
    group = content["joint"]["scenes"]
    content |= {"data_root": str(args.folder / "data"), "output_dir": str(args.folder / "runs" / way)}
    content["trainer"] |= {"max_steps": args.warm_up + args.steps, "save_strategy": "no"}
    del group["test"]
    group["at"] = way.removeprefix("group at the ")
    if way == WAYS[0]:
        del content["joint"]
        own = {key: group[key] for key in ("image_size", "batch_size", "cache", "augment")}
        for name, task in content["tasks"].items():
            labels = group["train"]["labels"][name]
            task |= {**own, "train": {**labels, "images": group["train"]["images"]}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        return load_config(file)


def train(way: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return seconds and processor seconds per step, the latter summed over ranks. Call on every rank."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback, set_seed

    from allinone_ds.run_config.arguments import arguments_from_config
    from allinone_ds.run_config.build import build_model, classes_of, open_train_data
    from allinone_ds.run_config.run_files import ModelFacts
    from allinone_ds.training.trainer import AllInOneTrainer

    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        """Reads the time after the steps that warm up and after the last one."""

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:  # type: ignore[override]
            if state.global_step in (args.warm_up, args.warm_up + args.steps):
                dist.barrier()
                times.append((time.perf_counter(), time.process_time()))

    config = run_of(way, args)
    arguments = arguments_from_config(config)
    set_seed(arguments.seed)
    data = open_train_data(config)
    trainer = AllInOneTrainer(
        model=build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes_of(data))),
        args=arguments,
        train_dataset=data,
        weighting=config.balancer.weighting(),
        balancer_options=config.balancer.options(),
        callbacks=[Clock()],
    )
    trainer.train()
    (start, used), (end, used_at_end) = times
    processor = torch.tensor(used_at_end - used, dtype=torch.float64)
    dist.all_reduce(processor)
    return (end - start) / args.steps, float(processor) / args.steps


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the seconds and processor seconds per step of every round, by way. Call on every rank."""
    found: dict[str, dict[str, list[float]]] = {way: {"wall": [], "processor": []} for way in WAYS}
    for number in range(args.rounds):
        for way in rotate(WAYS, number):
            wall, processor = train(way, args)
            found[way]["wall"].append(wall)
            found[way]["processor"].append(processor)
    return found


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run (default: 20)")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them (default: 4)")
    parser.add_argument("--images", type=int, default=200, help="of the data; they stay in memory (default: 200)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, lambda: measure(args))
        return
    from allinone_ds.data.demo.joint import JointSizes, make_joint_demo_data
    from allinone_ds.training.launcher import launch_environment

    with tempfile.TemporaryDirectory() as folder:
        make_joint_demo_data(Path(folder) / "data", sizes=JointSizes(train=args.images, test=1), progress=False)
        environment = launch_environment(args.ranks, compiles=False)
        arguments = [*sys.argv[1:], f"--folder={folder}"]
        found = measure_on_ranks(__spec__.name, arguments, args.ranks, environment=environment, quiet=True)
    print_head("8 tasks", "s per step", "of separate sources", "quartiles", "processor", "images/s per task")
    base, rows = found[WAYS[0]], []
    for way, row in found.items():
        ratio, quartiles = median_ratio(row["wall"], base["wall"])
        processor, _ = median_ratio(row["processor"], base["processor"])
        seconds = statistics.median(row["wall"])
        rate = 16 * args.ranks / seconds
        rows.append({"way": way, "seconds": seconds, "ratio": ratio, "quartiles": quartiles, "processor": processor,
                     "images_per_second": rate, **row})  # fmt: skip
        print_row(way, f"{seconds:.3f}", f"{ratio:.3f}", quartiles_cell(quartiles), f"{processor:.3f}", f"{rate:.1f}")
    write_record(args.json, ranks=args.ranks, rounds=args.rounds, steps=args.steps, rows=rows)


if __name__ == "__main__":
    main()
