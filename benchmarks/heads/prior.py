"""Does a segmentation head that starts from the class frequencies escape the collapse to background?

Trains the head `light` on a small ViT from scratch, on scenes of nine classes in which the background has 92 % of the
pixels, with AdamW and TBGC's limit of 0.1 on the norm of the backbone's gradient. One row per setting, medians over the
seeds:

    norm        norm of the backbone's gradient before clipping, median of steps 80 to 130
    mIoU N      mean IoU on 64 other scenes after N steps; a head that predicts background everywhere has 0.102

    python -m benchmarks.heads.prior [--seeds 3] [--steps 400] [--json FILE]       # 5 minutes on one core
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks import build_task
from allinone_ds.tasks.frequencies import use_frequencies
from allinone_ds.tasks.segmentation import SegmentationMetric
from benchmarks.common.report import make_parser, print_head, print_row, write_record

CLASSES = ["background", *"abcdefgh"]
SIDE = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "prior: uniform": {"prior": "uniform"},
    "prior: data (default)": {"prior": "data"},
    "prior: data, focal_gamma: 2": {"prior": "data", "focal_gamma": 2.0},
    "prior: data, class_weights: balanced": {"prior": "data", "class_weights": "balanced"},
}
EARLY = 130  # steps after which the collapse was reported


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normalised images (B, 3, H, W) and label maps (B, H, W): one to three squares of a noisy colour, the
    class, on noise of no colour.
    """
    colours = torch.tensor([[r, g, b] for r in (-1.0, 1.0) for g in (-1.0, 1.0) for b in (-1.0, 1.0)])
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 0.5
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            k, side = (
                int(torch.randint(8, (1,), generator=generator)),
                int(torch.randint(8, 14, (1,), generator=generator)),
            )
            y, x = (int(v) for v in torch.randint(0, SIDE - side, (2,), generator=generator))
            image[:, y : y + side, x : x + side] += colours[k][:, None, None]
            mask[y : y + side, x : x + side] = k + 1
    return images, masks


def train(options: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Train one model; return the norms of the backbone's gradient and the mIoU by step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8, "image_size": SIDE}
    backbone = build_backbone(BackboneConfig(stem="conv", config=sizes))  # type: ignore[call-arg]
    task = build_task("segmentation", "seg", CLASSES, backbone, (SIDE, SIDE), "light", {"width": 64, **options})
    data: Any = [{"mask": mask} for mask in scenes(64, torch.Generator().manual_seed(1))[1]]
    use_frequencies({"seg": task}, {"seg": data})
    optimizer = torch.optim.AdamW([*backbone.parameters(), *task.parameters()], lr=2e-3, weight_decay=0.05)
    images, masks = scenes(64, torch.Generator().manual_seed(2))
    norms, miou = [], {}
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 20)
        pixels, labels = scenes(4, generator)
        task(backbone(pixels).feature_maps, pixels, labels).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(backbone.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        if step in (EARLY, steps):
            metric = SegmentationMetric(len(CLASSES))
            with torch.no_grad():
                predictions = task.predict(task(backbone(images).feature_maps, images), [(SIDE, SIDE)] * len(images))
            metric.update(predictions, [{"mask": mask} for mask in masks])
            miou[step] = metric.compute()["miou"]
    return {"seed": seed, "norm": statistics.median(norms[80:EARLY]), "miou": miou}


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_head("setting", "norm", f"mIoU {EARLY}", f"mIoU {args.steps}")
    rows = []
    for name, options in SETTINGS.items():
        runs = [train(options, seed, args.steps) for seed in range(args.seeds)]
        rows.append({"setting": name, "runs": runs})
        early, late = (statistics.median(run["miou"][step] for run in runs) for step in (EARLY, args.steps))
        print_row(name, f"{statistics.median(run['norm'] for run in runs):.1e}", f"{early:.3f}", f"{late:.3f}")
    write_record(args.json, steps=args.steps, rows=rows)


if __name__ == "__main__":
    main()
