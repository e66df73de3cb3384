"""The command `allinone-ds` and its subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from allinone_ds import commands
from allinone_ds.errors import INTERRUPTED, AllInOneError, ConfigError, print_every_name
from allinone_ds.strict import expand_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments of the command; None reads `sys.argv`.

    Returns:
        Exit code: 0; 1 if a run failed or `check` found errors only in the data; 2 for an invalid configuration or
        invalid data; 75 if SIGTERM or SIGUSR1 ended a run after it saved a checkpoint; 130 if interrupted.

    Example:
        >>> main(["train", "nowhere.yaml"])     # prints an error that lists the files that come with the package
        2
    """
    print_every_name()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args)
    except AllInOneError as error:
        commands.say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        commands.say_error("interrupted")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allinone-ds",
        description="Train one shared vision backbone on many tasks with DeepSpeed ZeRO and balanced task gradients.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = subparsers.add_parser("train", help="train a run on this machine (starts the DeepSpeed launcher)")
    train.add_argument("config", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. trainer.max_steps=50")
    train.add_argument("--nproc", type=_positive, help="number of ranks (default: one per GPU, 2 without GPUs)")
    train.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the run's folder")
    train.set_defaults(run=commands.train)

    init = subparsers.add_parser("init", help="look into folders of data and write the YAML file of a first run")
    init.add_argument("folders", type=Path, nargs="+", metavar="DATA", help="folder of a data set; each is one task")
    init.add_argument("--output", type=Path, default=Path("run.yaml"), metavar="FILE",
                      help="file to write, which must not exist (default run.yaml)")  # fmt: skip
    init.set_defaults(run=commands.init)

    demo = subparsers.add_parser("demo", help="create demo data, train on it and draw predictions (about 2 minutes)")
    longer = demo.add_mutually_exclusive_group()
    longer.add_argument("--full", action="store_true", help="the longer demo (about 10 minutes on 2 cores)")
    longer.add_argument("--joint", action="store_true", help="eight tasks on one set of images (about 5 minutes)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data order, augmentation and weights (default 0)")
    demo.add_argument(
        "--output", type=_path, help="folder of the run (default runs/demo, runs/demo_full or runs/demo_joint)"
    )
    demo.add_argument("--data", type=_path, help="folder of the demo data (default: data_root of the YAML file)")
    demo.add_argument("--steps", type=_positive, help="number of optimizer steps (default: as in the YAML file)")
    demo.add_argument("--nproc", type=_positive, help="number of ranks (default: one per GPU, 2 without GPUs)")
    demo.set_defaults(run=commands.demo)

    evaluate = subparsers.add_parser("eval", help="evaluate a trained run on its test data")
    evaluate.add_argument("folder", type=_path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. tasks.NAME.test_time.flip=true")
    evaluate.set_defaults(run=commands.evaluate)

    predict = subparsers.add_parser("predict", help="predict on images and videos: pictures and JSON")
    predict.add_argument("folder", type=_path, metavar="MODEL", help="folder of a run, a checkpoint or an export")
    predict.add_argument("images", nargs="+", metavar="INPUT", help='image, video, folder or pattern ("photos/*.jpg")')
    predict.add_argument(
        "--output", type=_path, default=Path("predictions"), help="folder to write (default predictions)"
    )
    predict.add_argument("--task", action="append", default=[], metavar="NAME",
                         help="a task to predict; may be given several times (default: all)")  # fmt: skip
    predict.add_argument("--threshold", type=float, metavar="SCORE",
                         help="lowest score of the boxes that are drawn and written (default 0.3)")  # fmt: skip
    predict.add_argument("--every", type=_positive, default=1, metavar="N",
                         help="of a video, predict each N-th frame (default 1: all)")  # fmt: skip
    predict.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
                         help="overrides of a run, e.g. tasks.NAME.test_time.flip=true")  # fmt: skip
    predict.set_defaults(run=commands.predict)

    export = subparsers.add_parser("export", help="export the model of a run to self-contained folders")
    export.add_argument("folder", type=_path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    export.add_argument("--output", type=_path, help="folder to write to (default RUN/export)")
    export.add_argument(
        "--onnx", action="store_true", help="also write one ONNX graph per task (needs the extra `onnx`)"
    )
    export.set_defaults(run=commands.export)

    report = subparsers.add_parser("report", help="write an HTML page that shows one run or compares several")
    report.add_argument("folders", type=_path, nargs="+", metavar="RUN", help="folders of runs")
    report.add_argument(
        "--output", type=_path, metavar="FILE", help="file to write (default report.html in the first RUN)"
    )
    report.set_defaults(run=commands.report)

    score = subparsers.add_parser("score", help="compute the challenge's leaderboard score and write its submission")
    score.add_argument("folder", type=_path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    score.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="A: as for eval; B: the other data, e.g. data_root=/other"
    )
    score.add_argument(
        "--leaderboard", choices=("A", "B"), default="A", help="B first trains on other data (default A)"
    )
    score.add_argument("--output", type=_path, help="A: submission file; B: folder of the new run (default RUN/B)")
    score.add_argument("--nproc", type=_positive, help="B: number of ranks (default: one per GPU, 2 without GPUs)")
    score.set_defaults(run=commands.score)

    transfer = subparsers.add_parser(
        "transfer", help="train the single-task baselines of a run and compare: gain per task and metric, Delta m"
    )
    transfer.add_argument("config", metavar="RUN", help="folder of a run that has ended, or its YAML file")
    transfer.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides that the run was trained with")
    transfer.add_argument("--with", type=_path, nargs="+", default=[], metavar="RUN", dest="others",
                          help="further runs of the same tasks, compared with the same baselines")  # fmt: skip
    transfer.add_argument("--nproc", type=_positive, help="number of ranks of the baselines (default: as of the run)")
    transfer.set_defaults(run=commands.transfer)

    check = subparsers.add_parser("check", help="report everything that would stop a run: settings, model, data files")
    check.add_argument("config", help="YAML file of the run")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides")
    check.add_argument("--nproc", type=_positive, help="number of ranks of the run (default: as of train)")
    check.set_defaults(run=commands.check)

    preview = subparsers.add_parser("preview", help="draw training samples under each branch of their augmentation")
    preview.add_argument("config", help="YAML file of the run")
    preview.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides")
    preview.add_argument("--output", type=_path, default=Path("preview.png"), metavar="FILE",
                         help="NAME.png writes one NAME-TASK.png per task (default preview.png)")  # fmt: skip
    preview.add_argument("--samples", type=_positive, default=6, help="samples per branch (default 6)")
    preview.set_defaults(run=commands.preview)

    doctor = subparsers.add_parser(
        "doctor", help="check this machine: versions, accelerators, network, disk, bandwidth"
    )
    doctor.add_argument(
        "--nproc", type=_positive, help="ranks of the bandwidth test (default: one per GPU, 2 without GPUs; 1: no test)"
    )
    doctor.add_argument("--folder", type=_path, default=Path("runs"), help="folder that runs write to (default runs)")
    doctor.set_defaults(run=commands.doctor)

    plan = subparsers.add_parser("plan", help="estimate the memory and traffic per GPU of a run without starting it")
    plan.add_argument("config", help="YAML file of the run")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides")
    plan.add_argument("--gpus", type=_positive, required=True, help="number of ranks, one per GPU")
    plan.add_argument(
        "--classes",
        nargs="*",
        default=[],
        metavar="TASK:N",
        help="classes of a task whose data is not here",
    )
    plan.add_argument("--per-node", type=_positive, default=8, help="GPUs of a node (default: 8)")
    plan.add_argument("--gpu-memory", type=_positive, default=80, metavar="GIB", help="of a GPU (default: 80)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.set_defaults(run=commands.plan)
    return parser


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
