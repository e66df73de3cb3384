"""How far above constant predictions do depth, normals, edges and saliency get in minutes, from scratch?

Makes the scenes of `benchmarks.heads.dense_scenes`, trains configs/runs/dense.yaml on them, and prints for every metric
of the 100 test scenes

    constant    the best of the predictions that are the same for every pixel of every image: the median depth of the
                training scenes, their mean normal, every pixel or none an edge, every pixel or none salient
    trained     the model

    python -m benchmarks.heads.dense [--folder runs] [--json FILE] [KEY=VALUE ...]     # 3 minutes of CPU time

The command replaces FOLDER/dense_data and FOLDER/dense.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from allinone_ds.evaluation.constant import write_constants
from benchmarks.common.report import make_parser, print_head, print_row, write_record
from benchmarks.heads.dense_scenes import write_scenes

CONFIG = "configs/runs/dense.yaml"


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    data, run = args.folder / "dense_data", args.folder / "dense"
    for folder in (data, run):
        shutil.rmtree(folder, ignore_errors=True)
    write_scenes(data)
    overrides = [f"data_root={data}", f"output_dir={run}", *args.overrides]
    subprocess.run([sys.executable, "-m", "allinone_ds.cli", "train", CONFIG, *overrides], check=True)
    trained = json.loads((run / "metrics.json").read_text())
    print_head("task", "metric", "constant", "trained")
    rows: list[dict[str, Any]] = []
    for name, without in write_constants(run).items():
        for metric, constant in without.items():
            value = trained[f"eval_{name}_{metric}"]
            rows.append({"task": name, "metric": metric, "constant": constant, "trained": value})
            print_row(name, metric, f"{constant:.3f}", f"{value:.3f}")
    write_record(args.json, rows=rows, seconds=trained.get("train_runtime"))


if __name__ == "__main__":
    main()
