"""Open a large set, start workers and read some of it; note processor seconds and memory."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import psutil

WORKERS = 2
_BATCH = 250  # samples of a step over all tasks


def memory(pid: int) -> dict[str, float]:
    """Return MB of a process: its share of memory (proportional set size), and what it has written alone."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    found = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}
    return {"share": found["Pss"], "own": found["Private_Dirty"]}


def pixels(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate one pixel of each image."""
    import torch

    return {"pixel_values": torch.stack([sample["image"].as_subclass(torch.Tensor)[:, 0, 0] for sample in samples])}


def unchanged(sample: Any) -> Any:
    """Return the sample."""
    return sample


def measure_start(sources: dict[str, Any], root: Path, samples: int) -> dict[str, Any]:
    """Return the figures of one start.

    Args:
        sources: {task: source}
        root: folder of the set.
        samples: number of samples to read.
    """
    import torch
    from pydantic import TypeAdapter

    from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
    from allinone_ds.data.inspection.files import depths_at_start, overlap_at_start
    from allinone_ds.data.inspection.targets import target_problems
    from allinone_ds.data.loading.loader import train_loader
    from allinone_ds.data.loading.schedule import Schedule
    from allinone_ds.data.loading.task_data import TaskData
    from allinone_ds.data.sources import Source, open_source

    if any(source["format"] in ("datasets", "webdataset") for source in sources.values()):
        import datasets  # noqa: F401  # its import is no part of opening the data
    torch.set_num_threads(1)
    before = memory(psutil.Process().pid)
    marks = [(time.perf_counter(), time.process_time())]
    opened = {t: open_source(TypeAdapter(Source).validate_python(source), root) for t, source in sources.items()}
    marks.append((time.perf_counter(), time.process_time()))
    test = ClassifiedDataset("test", root, [f"test/{i}.jpg" for i in range(1000)], [0] * 1000, ["one"])
    for dataset in opened.values():
        target_problems(dataset, (64, 64))
        depths_at_start(dataset)
        overlap_at_start(dataset, test)
    marks.append((time.perf_counter(), time.process_time()))
    data_mb = memory(psutil.Process().pid)["own"] - before["own"]
    size = max(_BATCH // len(opened), 1)
    data = {task: TaskData(dataset, unchanged, pixels, batch_size=size) for task, dataset in opened.items()}
    schedule = Schedule(0, {t: len(d) for t, d in opened.items()}, {t: (size, 1) for t in opened}, world_size=1)
    steps = max(samples // (size * len(opened)), 3 * WORKERS)
    batches = iter(train_loader(data, schedule, 0, 0, steps, num_workers=WORKERS))
    for _ in range(WORKERS):
        next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    marks.append((time.perf_counter(), time.process_time()))
    used = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in workers]
    first = [memory(pid) for pid in workers]
    read = WORKERS
    for _ in batches:
        read += 1
        if read == steps - WORKERS:  # before the workers end
            last = [memory(pid) for pid in workers]
            every = [*last, memory(psutil.Process().pid)]
    phases = [b[1] - a[1] for a, b in zip(marks, marks[1:], strict=False)]
    return {
        "files": sum(len(dataset) for dataset in opened.values()),
        "processor_seconds": dict(zip(("open", "check"), phases, strict=False))
        | {"first batch": phases[2] + max(used)},
        "clock_seconds": marks[-1][0] - marks[0][0],
        "data_mb": data_mb,
        "all_share_mb": sum(each["share"] for each in every),
        "worker_share_mb": max(each["share"] for each in first),
        "worker_own_mb": max(each["own"] for each in first),
        "worker_grows_mb": max(b["own"] - a["own"] for a, b in zip(first, last, strict=True)),
        "samples": steps * size * len(opened),
    }
