"""Which figures do docs/performance.md, docs/reliability.md and docs/scale.md report, and how are they reproduced?

    sudo python -m benchmarks.speed                     # all of them: an hour on 2 idle cores
    sudo python -m benchmarks.speed trainer start-up    # some of them
    python -m benchmarks.speed --list

Runs the benchmarks of this folder and writes their tables into the pages, each between the two comments with its name.
The figures go to benchmarks/results/ as JSON with a description of the machine; docs/images/peers.png is drawn again.
Root is needed for network namespaces.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.launch import ROOT

RUNS = {
    "one host": ("performance.md", "overhead --modes exact --json benchmarks/results/overhead_224px.json"),
    "slow link": (
        "performance.md",
        "overhead --rate 400mbit --size 96 --batch 2 --pairs 5 --json benchmarks/results/overhead_400mbit.json",
    ),
    "trainer": ("performance.md", "trainer_cost --json benchmarks/results/trainer_cost.json"),
    "trainer at 22M": (
        "performance.md",
        "trainer_cost --rounds 8 --block 2 --json benchmarks/results/trainer_cost_22m.json "
        "model.backbone.config.hidden_size=384 model.backbone.config.num_hidden_layers=12 "
        "model.backbone.config.num_attention_heads=6 model.backbone.out_indices=[11]",
    ),
    "messages": ("performance.md", "messages --hop 30 --json benchmarks/results/messages.json"),
    "start-up": ("performance.md", "startup --json benchmarks/results/startup.json"),
    "peers": ("performance.md", "peers --json benchmarks/results/peers.json --plot docs/images/peers.png"),
    "peers on a slow link": (
        "performance.md",
        "peers --rate 400mbit --tasks 3 --ranks 2 --json benchmarks/results/peers_400mbit.json",
    ),
    "joint": ("performance.md", "joint --json benchmarks/results/joint.json"),
    "joint-group": ("performance.md", "joint_group --json benchmarks/results/joint_group.json"),
    "saving": ("reliability.md", "saving --json benchmarks/results/saving.json"),
    "scale": ("scale.md", "scale --json benchmarks/results/scale.json"),
    "loading": ("scale.md", "loading --json benchmarks/results/loading.json"),
    "traffic": ("scale.md", "traffic --json benchmarks/results/traffic.json"),
}
"""Name of the table -> (page in docs/, module of this folder and its arguments)."""


def tables_of(text: str) -> str:
    """Return the Markdown tables in the output of a command, separated by empty lines."""
    lines = [line if line.startswith("|") else "" for line in text.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip("\n")


def replace_tables(page: Path, name: str, tables: str) -> None:
    """Replace what is between the two comments of a name in a page.

    Raises:
        ValueError: the page does not have exactly one such pair of comments.
    """
    old = page.read_text()
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end of {re.escape(name)} -->)"
    new, count = re.subn(pattern, lambda match: match[1] + "\n" + tables + "\n" + match[2], old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"{page} has {count} pairs of the lines '<!-- {name} -->' and '<!-- end of {name} -->'; it must have one"
        )
    page.write_text(new)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help="default: all tables")
    parser.add_argument("--list", action="store_true", help="print the tables' names and commands, and run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in RUNS]:
        parser.error(f"there is no table {', '.join(unknown)}; the tables are: {', '.join(RUNS)}")
    for name in args.names or RUNS:
        page, words = RUNS[name]
        print(f"{name}: python -m benchmarks.speed.{words}", flush=True)
        if args.list:
            continue
        start = time.perf_counter()
        module, *arguments = shlex.split(words)
        command = [sys.executable, "-m", f"benchmarks.speed.{module}", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"'{name}' failed; its table in docs/{page} was not changed")
        tables = tables_of(done.stdout)
        print(f"{tables}\n({time.perf_counter() - start:.0f} s)\n", flush=True)
        replace_tables(ROOT / "docs" / page, name, tables)


if __name__ == "__main__":
    main()
