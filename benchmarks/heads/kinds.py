"""Does the light head of every kind of objects and vectors learn from scratch within minutes?

Writes images of coloured darts and kites, trains each run of configs/runs/kinds/ on them, and compares its test metrics
with those of a predictor that always says the same: the frequency of an attribute, the mean of a number, a random order
of the images, the whole box as mask, and the mean points of the training data. The last two are given the true boxes.

    python -m benchmarks.heads.kinds [--kinds keypoints instances] [--steps 600] [--json FILE]   # 15 minutes on 2 cores
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.sources import open_source
from allinone_ds.run_config.schema import load_config
from allinone_ds.tasks.objects.coco_metric import CocoMetric
from allinone_ds.tasks.objects.points import default_sigmas
from allinone_ds.tasks.vectors.attributes import AttributesMetric
from allinone_ds.tasks.vectors.regression import RegressionMetric
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


def constant(kind: str, train: SampleDataset, test: SampleDataset) -> dict[str, float]:
    """Return the metrics of a predictor that does not look at the image."""
    if kind == "retrieval":
        counts = Counter(test.annotation(i)["label"] for i in range(len(test)))
        chance = sum(n * (n - 1) for n in counts.values()) / (len(test) * (len(test) - 1))
        return {"recall1": chance, "recall5": 1 - (1 - chance) ** 5}
    samples = [test[i] for i in range(len(test))]
    if kind in ("attributes", "regression"):
        key = "attributes" if kind == "attributes" else "value"
        mean = torch.stack([train.annotation(i)[key].double() for i in range(len(train))]).nanmean(0)
        metric: Any = AttributesMetric() if kind == "attributes" else RegressionMetric()
        metric.update([{"scores": mean, "value": mean}] * len(samples), samples)
        return metric.compute()
    objects = [{**sample, "boxes": sample["boxes"].as_subclass(Tensor)} for sample in samples]
    predictions = [{**o, "scores": torch.ones(len(o["labels"]))} for o in objects]
    if kind == "instances":
        metric = CocoMetric()
        for prediction in predictions:
            prediction["masks"] = torch.zeros_like(prediction["masks"].as_subclass(Tensor))
            for mask, (x0, y0, x1, y1) in zip(
                prediction["masks"], prediction["boxes"].round().int().tolist(), strict=True
            ):
                mask[y0:y1, x0:x1] = 1
    else:
        learned = [train[i] for i in range(min(len(train), 200))]
        low = torch.cat([s["boxes"].as_subclass(Tensor)[:, None, :2] for s in learned])
        high = torch.cat([s["boxes"].as_subclass(Tensor)[:, None, 2:] for s in learned])
        mean = ((torch.cat([s["keypoints"].as_subclass(Tensor) for s in learned]) - low) / (high - low)).mean(0)
        metric = CocoMetric(default_sigmas([str(n) for n in range(len(mean))]))
        for prediction in predictions:
            boxes = prediction["boxes"]
            prediction["keypoints"] = boxes[:, None, :2] + mean * (boxes[:, None, 2:] - boxes[:, None, :2])
    metric.update(predictions, samples)
    return metric.compute()


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
        config = load_config(ROOT / f"configs/runs/kinds/{kind}.yaml", [f"data_root={data}"])
        (name, task), *_ = config.tasks.items()
        learned = open_source(task.train_source, config.data_root)
        assert task.test_source is not None
        without = constant(kind, learned, open_source(task.test_source, config.data_root, learned.classes))
        found, seconds = train(kind, data, folder / "runs", arguments.steps, arguments.seed)
        for metric in SHOWN[kind]:
            row = (kind, metric, round(without[metric], 3), round(found[f"eval_{name}_{metric}"], 3), round(seconds))
            print_row(*row)
            rows.append(dict(zip(("kind", "metric", "constant", "trained", "seconds"), row, strict=True)))
    write_record(arguments.json, rows=rows, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
