"""Does any head of the joint demo stop teaching the backbone in its first 200 steps?

Trains the joint demo twice for 200 steps at the rates of its first 200 steps, with batches of 4 images per rank and
balanced at the backbone: as it is, and with heads that start from equal probabilities (depth from 1). One row per task:
medians over the steps of the norm of the task's gradient on the backbone before scaling. A head that has stopped
looking at the image has hardly any.

    python -m benchmarks.heads.starts [--folder runs/starts] [--json FILE]     # 3 minutes on 2 cores
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from allinone_ds.data.demo import JointSizes, make_joint_demo_data
from allinone_ds.run_folder.names import EVENTS_FILE
from benchmarks.common.report import make_parser, print_head, print_row, write_record

CONFIG = "configs/runs/demo_joint.yaml"
STEPS = 200
SPANS = ((0, 20), (20, 60), (60, 120), (120, STEPS))
PRIORS = {  # task -> with which prior it starts, and the option that switches it off
    "detection": ("0.05", "prior=0.5"),
    "segmentation": ("data", "prior=uniform"),
    "depth": ("data", "prior=one"),
    "edges": ("0.5, balanced", None),
    "saliency": ("data", "prior=even"),
    "keypoints": ("0.05", "prior=0.5"),
    "attributes": ("data", "prior=uniform"),
    "count": ("mean of the data", None),
}


def norms(folder: Path, data: Path, overrides: list[str]) -> dict[str, list[float]]:
    """Train the run; return task -> norm of its gradient on the backbone in every step."""
    rates = ["trainer.lr_scheduler_type=constant_with_warmup", "trainer.warmup_steps=80"]  # 0.1 of the demo's 800 steps
    command = [
        *(sys.executable, "-m", "allinone_ds.cli", "train", CONFIG, f"data_root={data}", f"output_dir={folder}"),
        *("joint.scenes.at=backbone", "joint.scenes.batch_size=4", "balancer.max_norm=0.1"),
        *(f"trainer.max_steps={STEPS}", "trainer.logging_steps=1"),
        *rates,
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    key = "grad_norm/{}/raw"
    return {task: [e[key.format(task)] for e in entries if key.format(task) in e] for task in PRIORS}


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/starts"))
    args = parser.parse_args()
    data = make_joint_demo_data(args.folder / "data", sizes=JointSizes(train=1600, test=50))
    off = [f"tasks.{task}.options.{option}" for task, (_, option) in PRIORS.items() if option]
    runs = {name: norms(args.folder / name, data, more) for name, more in (("prior", []), ("none", off))}
    print_head("task", "prior", *(f"steps {a + 1} to {b}" for a, b in SPANS))
    rows = []
    for task, (prior, option) in PRIORS.items():
        for name, of_task in runs.items():
            if name == "prior" or option:
                medians = [statistics.median(of_task[task][a:b]) for a, b in SPANS]
                rows.append({"task": task, "prior": prior if name == "prior" else option, "norms": medians})
                print_row(task, rows[-1]["prior"], *(f"{norm:.1e}" for norm in medians))
    write_record(args.json, steps=STEPS, spans=SPANS, rows=rows)


if __name__ == "__main__":
    main()
