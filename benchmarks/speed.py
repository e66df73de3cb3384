"""Measure what performance.md, reliability.md and scale.md of docs/ say about speed, and write the tables into them.

    sudo python benchmarks/speed.py                    # everything: an hour on 2 idle cores
    sudo python benchmarks/speed.py trainer start-up   # some of it
    python benchmarks/speed.py --list

Each table stands in its page between two comments with its name. The figures go to benchmarks/results/ as json, with a
description of the machine; peers.png is drawn anew. Root is for network namespaces.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
RUNS = {
    "one host": ("docs/performance.md", "overhead.py --modes exact --json benchmarks/results/overhead_224px.json"),
    "slow link": (
        "docs/performance.md",
        "overhead.py --rate 400mbit --size 96 --batch 2 --pairs 5 --json benchmarks/results/overhead_400mbit.json",
    ),
    "trainer": ("docs/performance.md", "trainer_cost.py --json benchmarks/results/trainer_cost.json"),
    "trainer at 22M": (
        "docs/performance.md",
        "trainer_cost.py --rounds 8 --block 2 --json benchmarks/results/trainer_cost_22m.json "
        "model.backbone.config.hidden_size=384 model.backbone.config.num_hidden_layers=12 "
        "model.backbone.config.num_attention_heads=6 model.backbone.out_indices=[11]",
    ),
    "start-up": ("docs/performance.md", "startup.py --json benchmarks/results/startup.json"),
    "peers": ("docs/performance.md", "peers.py --json benchmarks/results/peers.json --plot docs/images/peers.png"),
    "peers on a slow link": (
        "docs/performance.md",
        "peers.py --rate 400mbit --tasks 3 --ranks 2 --json benchmarks/results/peers_400mbit.json",
    ),
    "saving": ("docs/reliability.md", "saving.py --json benchmarks/results/saving.json"),
    "scale": ("docs/scale.md", "scale.py --json benchmarks/results/scale.json"),
}


def tables_of(text: str) -> str:
    """The tables in what a command printed, an empty line between any two."""
    lines = [line if line.startswith("|") else "" for line in text.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip("\n")


def put(page: Path, name: str, tables: str) -> None:
    """Replace what stands between the comments of this name in a page.

    Raises:
        ValueError: the page has no such place.
    """
    old = page.read_text()
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end of {re.escape(name)} -->)"
    new, found = re.subn(pattern, lambda match: match[1] + "\n" + tables + "\n" + match[2], old, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{page}: wants '<!-- {name} -->' and '<!-- end of {name} -->' once, on lines of their own")
    page.write_text(new)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="print the tables' names and commands, and do nothing")
    args = parser.parse_args()
    if wrong := [name for name in args.names if name not in RUNS]:
        parser.error(f"no table {wrong}; there are: {', '.join(RUNS)}")
    for name in args.names or RUNS:
        page, words = RUNS[name]
        print(f"{name}: python benchmarks/{words}", flush=True)
        if args.list:
            continue
        start = time.perf_counter()
        command = [sys.executable, f"benchmarks/{words.split()[0]}", *shlex.split(words)[1:]]
        done = subprocess.run(command, cwd=HOME, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed; its table stays as it was")
        print(f"{tables_of(done.stdout)}\n({time.perf_counter() - start:.0f} s)\n", flush=True)
        put(HOME / page, name, tables_of(done.stdout))


if __name__ == "__main__":
    main()
