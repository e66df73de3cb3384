"""How many images per second does the loader deliver, per augmentation branch, beside transforms called directly?

    python -m benchmarks.speed.data_loader                                # every branch in configs/augment: 15 minutes
    python -m benchmarks.speed.data_loader --tasks detection --profile    # also prints the slowest functions

The images are composed scenes from real photos, stored as JPEG in the size that the network reads. "direct" is the
simplest program: one process per core, each of which reads a sample and runs the transforms. "loader" is the train
loader with one worker per core; it also collates the samples and transfers the batches to the training process. Both
process the same samples with the same seeds and are timed after a few samples of warm-up. Rounds alternate; the figure
is the median.
"""

from __future__ import annotations

import cProfile
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.report import make_parser, print_head, print_row, write_record

SIDES = {"detection": 1024, "segmentation": 1024, "classification": 512}
BATCH = {"detection": 2, "segmentation": 2, "classification": 8}
WARM_UP = 8  # images per process that are not timed


def open_task(task: str, root: Path, branch: str | None = None) -> tuple[Any, Any]:
    """Return data and schedule of a task, with one branch of the transforms in configs/augment/TASK.yaml or all."""
    from pydantic import TypeAdapter

    from allinone_ds.data.augmentation.transforms import train_transform
    from allinone_ds.data.demo import DemoData
    from allinone_ds.data.loading.schedule import Schedule
    from allinone_ds.data.loading.task_data import TaskData
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
    """Read and transform samples of the schedule, one after another; put the seconds taken into the queue `out`."""
    import torch

    from allinone_ds.data.loading.further_samples import FurtherSamples
    from allinone_ds.data.loading.random_state import seed_all

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
    """Return the images per second of one process per core."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    count = images // cores  # per process
    jobs = [
        context.Process(target=transform_directly, args=(task, root, branch, range(n * count, (n + 1) * count), out))
        for n in range(cores)
    ]
    for job in jobs:
        job.start()
    slowest = max(out.get() for _ in jobs)
    for job in jobs:
        job.join()
    return count * cores / slowest


def loader(task: str, root: Path, branch: str, images: int, cores: int) -> float:
    """Return the images per second of the train loader, after each worker's first steps."""
    from allinone_ds.data.loading.loader import train_loader

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
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=SIDES, default=list(SIDES), help="default: all")
    parser.add_argument("--images", type=int, default=96, help="images per measurement (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both programs (default: 3)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="default: all")
    parser.add_argument("--profile", action="store_true", help="also print the slowest functions")
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
        print_head("task", "branch", "direct images/s", "loader images/s", "loader / direct")
        for task in args.tasks:
            for branch in open_task(task, root)[0].transform.branches:
                rates: dict[str, list[float]] = {"direct": [], "loader": []}
                for _ in range(args.rounds):
                    rates["direct"].append(direct(task, root, branch, args.images, args.cores))
                    rates["loader"].append(loader(task, root, branch, args.images, args.cores))
                simple, loaded = (statistics.median(rates[kind]) for kind in ("direct", "loader"))
                rows.append(
                    {"task": task, "branch": branch, "direct": simple, "loader": loaded, "ratio": loaded / simple}
                )
                print_row(task, branch, f"{simple:.1f}", f"{loaded:.1f}", f"{loaded / simple:.2f}")
                if args.profile:
                    profile = cProfile.Profile()
                    profile.runcall(transform_directly, task, root, branch, range(args.images))
                    pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    write_record(args.json, cores=args.cores, rows=rows)


if __name__ == "__main__":
    main()
