"""What do a million files cost at the start and in each worker, and how many images per second does a core load?

    python -m benchmarks.speed.loading                                   # everything: half an hour on 2 cores
    python -m benchmarks.speed.loading --sets image_list --no-rates      # one format, no images per second
    python -m benchmarks.speed.loading --files 100000 --folder /dev/shm  # fewer files

The first table opens sets of small images (hard links to a few files) as a run does, each in a process of its own,
starts 2 workers and reads 50,000 samples in random order, without decoding anything large. Seconds are those of
processors, which other load changes little. "data" is what opening the set adds to the memory of the process that
trains, "worker" the share of memory (proportional set size) of a worker at its first batch, "own" what it has then
written itself and shares with no other process, "grows" what is added to that until the last sample, and "all" the
shares of all three processes at the end. The row of 1,000 files shows what does not depend on their number.

The second table loads JPEGs of 1024 x 1024 pixels with one worker: all decode, flip and resize to 518 x 518. The third
times decoders. torchdata, PyTurboJPEG (with libturbojpeg) and OpenCV are measured where they are installed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.launch import worker_environment
from benchmarks.common.report import make_parser, print_head, print_row, write_record
from benchmarks.speed.loading.sets import SETS

SIDE = 518
PHOTOS = {"1024 x 1024": (1024, 1024), "4000 x 3000": (4000, 3000)}
_MEMORY = {"data": "data_mb", "worker": "worker_share_mb", "own": "worker_own_mb", "grows": "worker_grows_mb",
           "all": "all_share_mb"}  # fmt: skip
_FEW = 1000
_RARE = "40 tasks, each of all files"  # takes minutes


def measure_set(name: str, count: int, samples: int, folder: Path) -> dict[str, Any]:
    """Write a set, open it in a process of its own, and return its figures."""
    folder.mkdir(exist_ok=True)
    sources = SETS[name](folder, count)
    sources = {"task": sources} if "format" in sources else sources
    (folder / "sources.json").write_text(json.dumps(sources))
    command = [sys.executable, "-m", "benchmarks.speed.loading", "--worker", str(folder), "--samples", str(samples)]
    environment = {**os.environ, **worker_environment()}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_sets(names: list[str], count: int, samples: int, parent: Path | None) -> list[dict[str, Any]]:
    """Print the table of sets; return its rows."""
    rows = []
    seconds = ("open", "check", "first batch")
    print_head("data", "files", *(f"{phase}, s" for phase in seconds), *(f"{figure}, MB" for figure in _MEMORY))
    with tempfile.TemporaryDirectory(dir=parent) as root:
        for name, files in [("image_list", _FEW), *((name, count) for name in names)]:
            folder = Path(root) / ("few" if files == _FEW else "many")
            row = {"name": name, **measure_set(name, files, samples, folder)}
            rows.append(row)
            figures = (row[key] for key in _MEMORY.values())
            spent = (f"{row['processor_seconds'][phase]:.2f}" for phase in seconds)
            print_row(name, f"{row['files']:,}", *spent, *(f"{figure:.0f}" for figure in figures))
    return rows


def measure_rates(images: int, rounds: int) -> list[dict[str, Any]]:
    """Print the table of loaders; return its rows."""
    from benchmarks.speed.loading.rates import BATCH, loaders, photo, rate

    count = images // BATCH
    known = loaders()
    rates: dict[str, list[float]] = {name: [] for name in known}
    with tempfile.TemporaryDirectory() as root:
        files = [str(Path(root, f"{k}.jpg")) for k in range(48)]
        for k, file in enumerate(files):
            Path(file).write_bytes(photo(*PHOTOS["1024 x 1024"], k))
        for _ in range(rounds):
            for name, make in known.items():
                rates[name].append(rate(make(files, SIDE, count), count))
    print_head("loader", "images per second of a core", "of the plain DataLoader")
    plain = statistics.median(rates["DataLoader"])
    rows = []
    for name, found in rates.items():
        median = statistics.median(found)
        rows.append({"name": name, "images_per_second": median, "ratio": median / plain, "rounds": found})
        print_row(name, f"{median:.1f}", f"{median / plain:.2f}")
    return rows


def measure_decoders(rounds: int) -> list[dict[str, Any]]:
    """Print the table of decoders; return its rows."""
    import torch

    from benchmarks.speed.loading.decoders import decoders, measure_decoder
    from benchmarks.speed.loading.rates import photo

    torch.set_num_threads(1)
    known = decoders()
    images = {size: [photo(*pixels, k) for k in range(4)] for size, pixels in PHOTOS.items()}
    columns = [f"{size}, {what}" for size in PHOTOS for what in ("ms", f"with resize to {SIDE}, ms")]
    print_head("decoder", *columns, "mean difference from Pillow", "largest")
    rows = []
    for name, decode in known.items():
        row: dict[str, Any] = {"name": name}
        for size, encoded in images.items():
            row[size] = measure_decoder(decode, encoded, SIDE, rounds)
        rows.append(row)
        cells = [f"{row[size][key]:.1f}" for size in PHOTOS for key in ("decode_ms", "with_resize_ms")]
        mean, largest = (row["1024 x 1024"][key] for key in ("mean_difference", "largest_difference"))
        print_row(name, *cells, "another size" if mean is None else f"{mean:.3f}", "" if largest is None else largest)
    return rows


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    usual = [name for name in SETS if name != _RARE]
    parser.add_argument("--sets", nargs="*", choices=SETS, default=usual, help=f"default: all but '{_RARE}'")
    parser.add_argument("--files", type=int, default=1_000_000, help="files per set (default: 1,000,000)")
    parser.add_argument("--samples", type=int, default=50_000, help="samples that are read (default: 50,000)")
    parser.add_argument("--folder", type=Path, help="where the sets are written; default: the temporary folder")
    parser.add_argument("--images", type=int, default=200, help="images per loader and round (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--no-rates", action="store_true", help="measure sets only")
    args = parser.parse_args()
    if args.worker:
        from benchmarks.speed.loading.start import measure_start

        sources = json.loads((args.worker / "sources.json").read_text())
        print(json.dumps(measure_start(sources, args.worker, args.samples)))
        return
    start = time.perf_counter()
    record: dict[str, Any] = (
        {"sets": measure_sets(args.sets, args.files, args.samples, args.folder)} if args.sets else {}
    )
    if not args.no_rates:
        print()
        record["loaders"] = measure_rates(args.images, args.rounds)
        print()
        record["decoders"] = measure_decoders(args.rounds)
    write_record(args.json, **record, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
