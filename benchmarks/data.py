"""Images a second of loading and augmenting, branch by branch, against the same transforms called directly.

    python benchmarks/data.py                                # every branch in configs/augment, one process a core
    python benchmarks/data.py --tasks detection --profile    # and where the time of one process goes

The pictures are composed scenes from real photos, stored as jpeg in the size that the network sees. "direct" is the
plainest program: one process a core, each reads a sample, runs the transforms and goes on. "loader" is the train loader
with as many workers as cores: it also collates and hands the batches to the training process. Both see the same samples
under the same seeds, and are timed after a few samples to warm up. Rounds alternate; the figure is the median.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = {"detection": 1024, "segmentation": 1024, "classification": 512}
BATCH = {"detection": 2, "segmentation": 2, "classification": 8}
WARM_UP = 8  # images of each process that are not timed


def open_task(task: str, root: Path, branch: str | None = None) -> tuple[Any, Any]:
    """TaskData and schedule of one task whose transform has one branch of configs/augment/TASK.yaml, or all."""
    from pydantic import TypeAdapter

    from allinone_ds.data.augmentation.transforms import train_transform
    from allinone_ds.data.demo import DemoData
    from allinone_ds.data.loader import TaskData
    from allinone_ds.data.schedule import Schedule
    from allinone_ds.data.sources import Source, open_source
    from allinone_ds.run_config.yaml_files import read_yaml
    from allinone_ds.tasks import task_class

    source = TypeAdapter(Source).validate_python(DemoData(root).sources(task, "train"))
    side = (SIDES[task], SIDES[task])
    transform = train_transform(read_yaml(f"configs/augment/{task}.yaml"), side, task)
    transform = transform if branch is None else transform.only(branch)
    data = TaskData(open_source(source, root), transform, task_class(task).collate, BATCH[task])
    return data, Schedule(0, {task: len(data.dataset)}, {task: (data.batch_size, 1)}, 1)


def transform_directly(task: str, root: Path, branch: str, positions: range, out: Any = None) -> None:
    """Reads and transforms samples of the schedule, one after another; puts the seconds that took into `out`."""
    import torch

    from allinone_ds.data.further_samples import FurtherSamples
    from allinone_ds.data.random_state import seed_all

    torch.set_num_threads(1)
    data, schedule = open_task(task, root, branch)
    more = FurtherSamples(data.dataset, [], 0)
    start = 0.0
    for number, position in enumerate([*positions[:WARM_UP], *positions]):
        if number == WARM_UP:
            start = time.perf_counter()
        draw = schedule.at(task, position)
        seed_all(draw.seed)
        data.transform(data.dataset[draw.index], more)
    if out is not None:
        out.put(time.perf_counter() - start)


def direct(task: str, root: Path, branch: str, images: int, cores: int) -> float:
    """Images a second of one process a core."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    share = images // cores
    jobs = [
        context.Process(target=transform_directly, args=(task, root, branch, range(n * share, (n + 1) * share), out))
        for n in range(cores)
    ]
    for job in jobs:
        job.start()
    slowest = max(out.get() for _ in jobs)
    for job in jobs:
        job.join()
    return share * cores / slowest


def loader(task: str, root: Path, branch: str, images: int, cores: int) -> float:
    """Images a second of the train loader, after each worker's first steps."""
    from allinone_ds.data.loader import train_loader

    data, schedule = open_task(task, root, branch)
    steps, first = images // data.batch_size, -(-WARM_UP * cores // data.batch_size)
    batches = iter(train_loader({task: data}, schedule, 0, 0, steps + first, num_workers=cores))
    for _ in range(first):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return steps * data.batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--images", type=int, default=96, help="of one measurement (default 96)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the two (default 3)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true", help="also print the functions that take most time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    from allinone_ds.data.demo import DemoSizes, SceneLook, make_demo_data

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        looks = {
            f"{task}_look": SceneLook(size=side, objects=(4, 8) if task != "classification" else (1, 1),
                                      scale=(0.05, 0.25) if task != "classification" else (0.65, 0.95))
            for task, side in SIDES.items()
        }  # fmt: skip
        make_demo_data(root, sizes=DemoSizes(**{task: (48, 1) for task in SIDES}, **looks), progress=False)
        rows = []
        print(f"{args.cores} cores, median of {args.rounds} rounds of {args.images} images")
        print(f"{'task':16}{'branch':16}{'direct/s':>10}{'loader/s':>10}{'ratio':>8}")
        for task in args.tasks:
            for branch in open_task(task, root)[0].transform.branches:
                found: dict[str, list[float]] = {"direct": [], "loader": []}
                for _ in range(args.rounds):
                    found["direct"].append(direct(task, root, branch, args.images, args.cores))
                    found["loader"].append(loader(task, root, branch, args.images, args.cores))
                one, two = (statistics.median(found[kind]) for kind in ("direct", "loader"))
                rows.append({"task": task, "branch": branch, "direct": one, "loader": two, "ratio": two / one})
                print(f"{task:16}{branch:16}{one:10.1f}{two:10.1f}{two / one:8.2f}", flush=True)
                if args.profile:
                    profile = cProfile.Profile()
                    profile.runcall(transform_directly, task, root, branch, range(args.images))
                    pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        if args.json:
            args.json.write_text(json.dumps({"cores": args.cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
