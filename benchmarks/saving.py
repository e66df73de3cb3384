"""Print what a checkpoint costs the steps around it, written in the step (blocking) or in the background (async).

    python benchmarks/saving.py                      # ZeRO 2 and 3, 2 ranks, about 5 minutes on 2 idle cores
    python benchmarks/saving.py --saves 5 --window 20 --stages 3 --folder /mnt/disk
    python benchmarks/speed.py saving                # writes the table into docs/reliability.md, and its record

One run a stage, cut into windows of equally many steps: windows without a save, with a blocking one and with an async
one take turns. A save falls between the first and the second step of its window, and an async one is written to its
end, synced, within the window (the row says when not). The cost of a save is the time of its window less the mean of
the windows without a save before and after it; "in the step" is the part of it for which training stood still. Medians,
of rank 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from ranks import Ranks, import_everything, make_home  # noqa: E402

KINDS = ("none", "blocking", "none", "async")


def write_config(home: Path, steps: int, width: int, layers: int) -> Path:
    """The run's file: three tasks on a ViT of tens of millions of parameters, on tiny images."""
    file = make_home(home)
    content = yaml.safe_load(file.read_text())
    content["model"]["backbone"] = {
        "config": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "patch_size": 16,
            "image_size": 32,
        }
    }
    content["trainer"].update(max_steps=steps, save_strategy="no", logging_steps=steps, async_save=True)
    file.write_text(yaml.safe_dump(content))
    return file


def watch_windows(target: Path, length: int, kinds: list[str]) -> Any:
    """What a rank does before its run: save in the windows that `kinds` says, and write down their times."""
    from transformers import TrainerCallback

    import allinone_ds.training.run as run
    from allinone_ds.run_folder.background_saver import BackgroundSaver
    from allinone_ds.training.trainer import AllInOneTrainer

    rows: list[dict[str, Any]] = []

    class Windows(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer, now = self.trainer, time.perf_counter()
            window, place = divmod(state.global_step - length, length)  # the first window warms up
            if place or window < 0:
                return
            if window:
                rows[-1].update(seconds=now - self.began, unfinished=self.saver.working)
            if window == 0:
                self.saver = trainer.saver
            if window < len(kinds):
                rows.append({"kind": kinds[window], "blocked": 0.0})
                self.began = time.perf_counter()
            else:
                control.should_training_stop = True
                if args.process_index == 0:
                    target.write_text(json.dumps({"windows": rows, "parameters": parameters(trainer)}))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            window, place = divmod(state.global_step - 1 - length, length)
            if place == 0 and 0 <= window < len(kinds) and kinds[window] != "none":
                control.should_save = True
                self.trainer.saver = self.saver if kinds[window] == "async" else None

    class Timed(AllInOneTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.windows = Windows()
            self.windows.trainer = self
            self.add_callback(self.windows)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            torch.distributed.barrier()  # the ranks' steps may end at different times
            row, begun = rows[-1], time.perf_counter()
            super()._save_checkpoint(*args, **kwargs)
            row["blocked"] = time.perf_counter() - begun

    start = BackgroundSaver.start

    def timed_start(self: BackgroundSaver, step: int, work: Any) -> None:
        row = rows[-1]

        def timed_work() -> None:
            begun = time.perf_counter()
            work()
            row.update(written=time.perf_counter() - begun, processor=time.thread_time())

        start(self, step, timed_work)

    BackgroundSaver.start = timed_start  # type: ignore[method-assign]
    run.AllInOneTrainer = Timed  # type: ignore[misc]


def parameters(trainer: Any) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in trainer.deepspeed.module.parameters())


def summary(found: dict[str, Any], stage: int) -> dict[str, Any]:
    """Medians of one run's windows."""
    rows = found["windows"]
    costs: dict[str, list[float]] = {"blocking": [], "async": []}
    for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
        if row["kind"] != "none":
            costs[row["kind"]].append(row["seconds"] - (before["seconds"] + after["seconds"]) / 2)
    median = {kind: statistics.median(values) for kind, values in costs.items()}
    plain = [row["seconds"] for row in rows if row["kind"] == "none"]
    return {
        "stage": stage,
        "parameters": found["parameters"],
        "saves": len(costs["async"]),
        "window_without": statistics.median(plain),
        "window_without_spread": [min(plain), max(plain)],
        "blocking_cost": median["blocking"],
        "async_cost": median["async"],
        "part": median["async"] / median["blocking"],
        **{
            f"{kind}_blocked": statistics.median(row["blocked"] for row in rows if row["kind"] == kind)
            for kind in costs
        },
        "thread_seconds": statistics.median(row["written"] for row in rows if "written" in row),
        "thread_processor_seconds": statistics.median(row["processor"] for row in rows if "written" in row),
        "costs": costs,
        "unfinished": sum(row["unfinished"] for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--saves", type=int, default=2, help="of each kind")
    parser.add_argument("--window", type=int, default=6, help="steps of a window")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where to write checkpoints: on the disk to measure")
    parser.add_argument("--json", type=Path, help="write figures, settings and machine there too")
    args = parser.parse_args()
    begun = time.perf_counter()
    import_everything()
    torch.set_num_threads(1)
    table = []
    kinds = [*KINDS * args.saves, "none"]
    steps = (len(kinds) + 1) * args.window + 1
    print("| ZeRO | parameters | window s | blocking s | async s | part | in the step: blocking s | async s | part |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="saving-", dir=args.folder) as folder:
        home = Path(folder)
        file = write_config(home, steps, args.width, args.layers)
        for stage in args.stages:
            target = home / f"zero{stage}.json"
            flags = (f"deepspeed=configs/deepspeed/zero{stage}.json", "trainer.save_total_limit=1")
            ranks = Ranks(
                file, home / f"run{stage}", *flags, before=lambda rank, t=target: watch_windows(t, args.window, kinds)
            )
            ranks.wait(seconds=1800)
            if not target.exists():
                print(ranks.said()[-4000:], file=sys.stderr)
                return 1
            row = summary(json.loads(target.read_text()), stage)
            table.append(row)
            late = f" ({row['unfinished']} not written to the end)" if row["unfinished"] else ""
            print(
                f"| {stage} | {row['parameters'] / 1e6:.1f}M | {row['window_without']:.2f} | "
                f"{row['blocking_cost']:.2f} | {row['async_cost']:.2f} | {row['part']:.1%}{late} | "
                f"{row['blocking_blocked']:.2f} | {row['async_blocked']:.2f} | "
                f"{row['async_blocked'] / row['blocking_blocked']:.1%} |",
                flush=True,
            )
    if args.json:
        settings = {key: getattr(args, key) for key in ("stages", "saves", "window", "width", "layers")}
        record = {"machine": describe_machine(), "settings": settings, "seconds": round(time.perf_counter() - begun)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**record, "rows": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
