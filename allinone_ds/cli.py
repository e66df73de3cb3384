"""The command `allinone-ds`: train, demo, eval, predict, export, report, score, check, preview, plan, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from allinone_ds import commands
from allinone_ds.errors import AllInOneError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        Exit status: 0; 1 when a run failed or `check` found faults; 2 for a configuration or data that cannot be
        used; 75 when SIGTERM or SIGUSR1 ended a run after a checkpoint; 130 when interrupted.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args)
    except AllInOneError as error:
        commands.say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        commands.say_error("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allinone-ds",
        description="Train one shared vision backbone on many tasks under DeepSpeed ZeRO, every task's pull balanced.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = subparsers.add_parser("train", help="train a run (starts the DeepSpeed launcher)")
    train.add_argument("config", help="the run's YAML file")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides, e.g. trainer.max_steps=50")
    train.add_argument("--nproc", type=_positive, help="ranks on this machine (default: the GPUs, or 2 without any)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run's folder")
    train.set_defaults(run=commands.train)

    demo = subparsers.add_parser("demo", help="make demo data, train on it, evaluate, draw")
    demo.add_argument("--full", action="store_true", help="the longer demo (about 25 minutes on 2 cores)")
    demo.add_argument("--seed", type=int, default=0, help="of data order, augmentation and weights (default 0)")
    demo.add_argument("--output", type=Path, help="folder of the run (default runs/demo or runs/demo_full)")
    demo.add_argument("--data", type=Path, help="folder of the demo data (default: the config's data_root)")
    demo.add_argument("--steps", type=_positive, help="optimizer steps instead of the config's")
    demo.add_argument("--nproc", type=_positive, help="ranks (default: the GPUs, or 2 without any)")
    demo.set_defaults(run=commands.demo)

    evaluate = subparsers.add_parser("eval", help="evaluate a trained run on its test data")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. tasks.NAME.test_time.flip=true")
    evaluate.set_defaults(run=commands.evaluate)

    predict = subparsers.add_parser("predict", help="run a trained model on images: pictures and json")
    predict.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write to (predictions)")
    predict.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
                         help="overrides of the run's configuration, e.g. tasks.NAME.test_time.flip=true")  # fmt: skip
    predict.set_defaults(run=commands.predict)

    export = subparsers.add_parser("export", help="write a run's model as folders that load without it")
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    export.add_argument("--output", type=Path, help="folder to write to (default RUN/export)")
    export.add_argument("--onnx", action="store_true", help="also an ONNX graph for every task (extra `onnx`)")
    export.set_defaults(run=commands.export)

    report = subparsers.add_parser("report", help="one page of HTML about one run or several side by side")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default report.html in the first RUN)")
    report.set_defaults(run=commands.report)

    score = subparsers.add_parser("score", help="the challenge's leaderboard score and the predictions behind it")
    score.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    score.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="A: as of eval; B: the second data, e.g. data_root=/other"
    )
    score.add_argument("--leaderboard", choices=("A", "B"), default="A", help="B trains the run on other data first")
    score.add_argument("--output", type=Path, help="A: the submission file; B: folder of the second run (RUN/B)")
    score.add_argument("--nproc", type=_positive, help="B: ranks (default: the GPUs, or 2 without any)")
    score.set_defaults(run=commands.score)

    check = subparsers.add_parser("check", help="read every file of a run's data and report faults")
    check.add_argument("config", help="the run's YAML file")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    check.set_defaults(run=commands.check)

    preview = subparsers.add_parser("preview", help="draw what every branch of augmentation does to training samples")
    preview.add_argument("config", help="the run's YAML file")
    preview.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), metavar="FILE",
                         help="NAME.png gives one NAME-TASK.png a task (default preview.png)")  # fmt: skip
    preview.add_argument("--samples", type=_positive, default=6, help="columns of a sheet (default 6)")
    preview.set_defaults(run=commands.preview)

    doctor = subparsers.add_parser(
        "doctor", help="look at this machine: versions, accelerators, network, disk, bandwidth"
    )
    doctor.add_argument(
        "--nproc", type=_positive, help="ranks of the bandwidth test (default: the GPUs, or 2; 1: none)"
    )
    doctor.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are to be written (runs)")
    doctor.set_defaults(run=commands.doctor)

    plan = subparsers.add_parser("plan", help="memory and messages that a run needs of each GPU, before there is any")
    plan.add_argument("config", help="the run's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    plan.add_argument("--gpus", type=_positive, required=True, help="ranks of the job")
    plan.add_argument("--classes", nargs="*", default=[], metavar="TASK:N", help="classes of tasks without data here")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.set_defaults(run=commands.plan)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
