"""Does the light head of every kind of objects and vectors learn from scratch within minutes?

Writes images of coloured darts and kites, trains each run of configs/runs/kinds/ on them, and compares its test metrics
with those of predictors that do not look at the image (`allinone_ds/evaluation/constant.py`): the mean frequency of an
attribute, the mean of a number, random embeddings, and one box with the mean points or a full mask.

    python -m benchmarks.heads.kinds [--kinds keypoints instances] [--steps 600] [--json FILE]   # 15 minutes on 2 cores
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from allinone_ds.evaluation.constant import write_constants
from benchmarks.common.report import make_parser, print_head, print_row, write_record
from benchmarks.heads.shapes import write_shapes

ROOT = Path(__file__).parents[2]
SHOWN = {
    "attributes": ("map", "f1"),
    "regression": ("r2", "rmse", "mae"),
    "retrieval": ("recall1", "recall5"),
    "keypoints": ("map50", "map"),
    "instances": ("map50", "map"),
}


def train(kind: str, data: Path, output: Path, steps: int, seed: int) -> tuple[dict[str, float], float]:
    """Train the run of a kind in a process of its own; return its test metrics and the seconds that it took."""
    overrides = [
        f"data_root={data}",
        f"output_dir={output / kind}",
        f"trainer.max_steps={steps}",
        f"trainer.seed={seed}",
    ]
    command = [sys.executable, "-m", "allinone_ds.cli", "train", f"configs/runs/kinds/{kind}.yaml", *overrides]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return json.loads((output / kind / "metrics.json").read_text()), seconds


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(SHOWN), default=list(SHOWN))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where data and runs stay; default: a temporary folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    data = folder / "shapes"
    if not data.is_dir():
        write_shapes(data)
    print_head("kind", "metric", "constant", "trained", "seconds")
    rows = []
    for kind in arguments.kinds:
        found, seconds = train(kind, data, folder / "runs", arguments.steps, arguments.seed)
        ((name, without),) = write_constants(folder / "runs" / kind).items()
        for metric in SHOWN[kind]:
            row = (kind, metric, round(without[metric], 3), round(found[f"eval_{name}_{metric}"], 3), round(seconds))
            print_row(*row)
            rows.append(dict(zip(("kind", "metric", "constant", "trained", "seconds"), row, strict=True)))
    write_record(arguments.json, rows=rows, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
