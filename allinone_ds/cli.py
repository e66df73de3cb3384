"""The command `allinone-ds`: train, demo, eval, predict, export, report, score, check, preview, plan, doctor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from allinone_ds.strict import ConfigError
from allinone_ds.tables import metrics_table, plan_tables

DEMO = "configs/runs/demo.yaml"
DEMO_FULL = "configs/runs/demo_full.yaml"
_console = partial(Console, highlight=False, soft_wrap=True, markup=False, emoji=False)  # names are printed as they are
console = _console()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        Exit status: 0; 1 when a run failed or data has faults; 2 for a configuration that cannot be used; 75 when
        SIGTERM or SIGUSR1 ended a run after a checkpoint; 130 when interrupted.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args)
    except ConfigError as error:
        _say_error(error)
        return 2
    except KeyboardInterrupt:
        _say_error("interrupted")
        return 130
    except Exception as error:
        # heavy modules are loaded by now or never: compare by name rather than import them for this
        if type(error).__name__ not in ("RunFailed", "DataError"):
            raise
        _say_error(error)
        return getattr(error, "status", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allinone-ds",
        description="Train one shared vision backbone on many tasks under DeepSpeed ZeRO, every task's pull balanced.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run (starts the DeepSpeed launcher)")
    train.add_argument("config", help="the run's YAML file")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides, e.g. trainer.max_steps=50")
    train.add_argument("--nproc", type=_positive, help="ranks on this machine (default: the GPUs, or 2 without any)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run's folder")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="make demo data, train on it, evaluate, draw")
    demo.add_argument("--full", action="store_true", help="the longer demo (about 25 minutes on 2 cores)")
    demo.add_argument("--seed", type=int, default=0, help="of data order, augmentation and weights (default 0)")
    demo.add_argument("--output", type=Path, help="folder of the run (default runs/demo or runs/demo_full)")
    demo.add_argument("--data", type=Path, help="folder of the demo data (default: the config's data_root)")
    demo.add_argument("--steps", type=_positive, help="optimizer steps instead of the config's")
    demo.add_argument("--nproc", type=_positive, help="ranks (default: the GPUs, or 2 without any)")
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser("eval", help="evaluate a trained run on its test data")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. tasks.NAME.test_time.flip=true")
    evaluate.set_defaults(run=_eval)

    predict = commands.add_parser("predict", help="run a trained model on images: pictures and json")
    predict.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write to (predictions)")
    predict.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
                         help="overrides of the run's configuration, e.g. tasks.NAME.test_time.flip=true")  # fmt: skip
    predict.set_defaults(run=_predict)

    export = commands.add_parser("export", help="write a run's model as folders that load without it")
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    export.add_argument("--output", type=Path, help="folder to write to (default RUN/export)")
    export.add_argument("--onnx", action="store_true", help="also an ONNX graph for every task (extra `onnx`)")
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="one page of HTML about one run or several side by side")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default report.html in the first RUN)")
    report.set_defaults(run=_report)

    score = commands.add_parser("score", help="the challenge's leaderboard score and the predictions behind it")
    score.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    score.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="A: as of eval; B: the second data, e.g. data_root=/other"
    )
    score.add_argument("--leaderboard", choices=("A", "B"), default="A", help="B trains the run on other data first")
    score.add_argument("--output", type=Path, help="A: the submission file; B: folder of the second run (RUN/B)")
    score.add_argument("--nproc", type=_positive, help="B: ranks (default: the GPUs, or 2 without any)")
    score.set_defaults(run=_score)

    check = commands.add_parser("check", help="read every file of a run's data and report faults")
    check.add_argument("config", help="the run's YAML file")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    check.set_defaults(run=_check)

    preview = commands.add_parser("preview", help="draw what every branch of augmentation does to training samples")
    preview.add_argument("config", help="the run's YAML file")
    preview.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), metavar="FILE",
                         help="NAME.png gives one NAME-TASK.png a task (default preview.png)")  # fmt: skip
    preview.add_argument("--samples", type=_positive, default=6, help="columns of a sheet (default 6)")
    preview.set_defaults(run=_preview)

    doctor = commands.add_parser(
        "doctor", help="look at this machine: versions, accelerators, network, disk, bandwidth"
    )
    doctor.add_argument(
        "--nproc", type=_positive, help="ranks of the bandwidth test (default: the GPUs, or 2; 1: none)"
    )
    doctor.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are to be written (runs)")
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser("plan", help="memory and messages that a run needs of each GPU, before there is any")
    plan.add_argument("config", help="the run's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    plan.add_argument("--gpus", type=_positive, required=True, help="ranks of the job")
    plan.add_argument("--classes", nargs="*", default=[], metavar="TASK:N", help="classes of tasks without data here")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.set_defaults(run=_plan)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _say_error(error: object) -> None:
    _console(stderr=True).print(f"error: {error}", style="red")


# ---- train and demo ----


def _train(args: argparse.Namespace) -> int:
    from allinone_ds.training.files import read_yaml
    from allinone_ds.training.launch import default_ranks

    content = read_yaml(args.config, args.overrides)
    flags = [*args.overrides, *(["--resume"] if args.resume else [])]
    seconds = _run(args.config, flags, content, args.nproc or default_ranks())
    _summary(_folder_of(content), seconds)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from allinone_ds.data.demo import DEMO_SIZES, FULL_SIZES, make_demo_data
    from allinone_ds.training.files import read_yaml
    from allinone_ds.training.folder import clear_run
    from allinone_ds.training.launch import default_ranks

    start = time.perf_counter()
    config = DEMO_FULL if args.full else DEMO
    overrides = [f"trainer.seed={args.seed}"]
    if args.output:
        overrides.append(f"output_dir={args.output}")
    if args.data:
        overrides.append(f"data_root={args.data}")
    if args.steps:
        overrides.append(f"trainer.max_steps={args.steps}")
    content = read_yaml(config, overrides)
    made = make_demo_data(Path(content["data_root"]), sizes=FULL_SIZES if args.full else DEMO_SIZES)
    console.print(f"demo data in {made.root}")
    clear_run(_folder_of(content))
    _run(config, overrides, content, args.nproc or default_ranks())
    _summary(_folder_of(content), time.perf_counter() - start)
    return 0


def _folder_of(content: dict[str, Any]) -> Path:
    # the ranks read the file strictly; here only the place of the log is needed
    return Path(content.get("output_dir") or Path("runs") / str(content.get("name", "run")))


def _run(config: str, flags: Sequence[str], content: dict[str, Any], ranks: int) -> float:
    """Start the launcher and show its progress until it ends; returns seconds."""
    from allinone_ds.training.launch import follow_run, launch_command, launch_environment
    from allinone_ds.training.text import clock, metrics_line, task_losses

    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        job = bar.add_task(f"training on {ranks} ranks", total=None, state="starting")
        begun: dict[str, float] = {}

        def show(event: dict[str, Any]) -> None:
            step = event["step"]
            if event["event"] == "begin":
                begun.update(step=step, time=event["time"], max_steps=event["max_steps"])
                bar.update(job, total=event["max_steps"], completed=step, state=f"step {step}/{event['max_steps']}")
            elif event["event"] == "warning":
                console.print(f"warning: {event['message']}", style="yellow")
            elif event["event"] == "end":
                bar.update(job, state="evaluating and drawing")
            elif "eval_score" in event:
                console.print(f"step {step}  {metrics_line(event)}")
            elif task_losses(event):
                pace = (event["time"] - begun["time"]) / max(step - begun["step"], 1)
                losses = " ".join(f"{name} {value:.2f}" for name, value in task_losses(event).items())
                total = int(begun["max_steps"])
                line = f"step {step}/{total}  {clock(pace * (total - step))} left  loss {losses}"
                bar.update(job, completed=step, state=line)
                if not console.is_terminal:
                    console.print(line)

        trainer = content.get("trainer")
        asked = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # each of them switches it on
        compiles = isinstance(trainer, dict) and any(trainer.get(key) for key in asked)
        environment = launch_environment(ranks, compiles)
        follow_run(launch_command(config, flags, ranks), environment, _folder_of(content), show)
    return time.perf_counter() - start


def _summary(folder: Path, seconds: float) -> None:
    from allinone_ds.training.folder import METRICS_FILE, PAGE_FILE, PLOTS, REPORT_FILE, WEIGHTS_FILE
    from allinone_ds.training.text import clock

    metrics = json.loads((folder / METRICS_FILE).read_text())
    console.print(metrics_table(metrics, f"{metrics['steps']} steps, {clock(seconds)} in all"))
    named = {
        "weights": WEIGHTS_FILE,
        "metrics": METRICS_FILE,
        "plots": PLOTS,
        "predictions": PAGE_FILE,
        "report": REPORT_FILE,
    }
    for what, name in named.items():
        if (folder / name).exists():
            console.print(f"{what:12} {folder / name}")


# ---- eval, predict, export, report, score, check, preview, doctor ----


def _eval(args: argparse.Namespace) -> int:
    with console.status("evaluating"):
        _quiet()
        from allinone_ds.training.predict import evaluate_run

        metrics = evaluate_run(args.folder, args.overrides)
    console.print(metrics_table(metrics, str(args.folder)))
    return 0


def _predict(args: argparse.Namespace) -> int:
    with console.status("predicting"):
        _quiet()
        from allinone_ds.training.predict import predict_images

        written = predict_images(args.folder, args.images, args.output, args.settings)
    for file in written:
        console.print(str(file))
    return 0


def _export(args: argparse.Namespace) -> int:
    with console.status("exporting"):
        _quiet()
        from allinone_ds.export import export_run

        done = export_run(args.folder, args.output, args.onnx)
    console.print(f"weights of {done.source}")
    for folder in done.folders:
        console.print(str(folder))
    for note in done.notes:
        console.print(note, style="yellow")
    return 0


def _report(args: argparse.Namespace) -> int:
    from allinone_ds.training.report import write_report

    console.print(str(write_report(args.folders, args.output)))
    return 0


def _score(args: argparse.Namespace) -> int:
    folder, output, overrides = args.folder, args.output, args.overrides
    if args.leaderboard == "B":
        folder, output, overrides = _train_on_other_data(args), None, []
    with console.status("scoring"):
        _quiet()
        from allinone_ds.training.score import score_run

        done = score_run(folder, args.leaderboard, output, overrides)
    for task, metrics in done["metrics"].items():
        console.print(f"{task:16} {'  '.join(f'{key} {value:.6g}' for key, value in metrics.items())}")
    console.print(f"leaderboard {args.leaderboard}    {done['score']:.6f}", style="bold")
    console.print(f"{'predictions':16} {done['file']}")
    return 0


def _train_on_other_data(args: argparse.Namespace) -> Path:
    """The run's configuration, from its weights, on the data that the overrides name."""
    from allinone_ds.training.files import read_yaml
    from allinone_ds.training.folder import CONFIG_FILE
    from allinone_ds.training.launch import default_ranks

    if not args.overrides:
        raise ConfigError("leaderboard B trains on other data of the same kinds; give it, for example data_root=/other")
    folder = args.output or args.folder / "B"
    own = [f"output_dir={folder}", f"model.start_from={args.folder}", "trainer.resume_from_checkpoint=false"]
    overrides = [*own, *args.overrides]
    config = args.folder / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(
            f"{args.folder}: no {CONFIG_FILE} in it; give the folder of a run or of one of its checkpoints"
        )
    _run(str(config), overrides, read_yaml(config, overrides), args.nproc or default_ranks())
    return folder


def _check(args: argparse.Namespace) -> int:
    _quiet()
    from allinone_ds.data.check import check_sources
    from allinone_ds.training.arguments import arguments_from_config
    from allinone_ds.training.config import load_config

    config = load_config(args.config, args.overrides)
    arguments_from_config(config)
    sources, classes_of = {}, {}
    for name, task in config.tasks.items():
        sources[f"{name} train"] = task.train
        if task.test is not None:
            sources[f"{name} test"] = task.test
            classes_of[f"{name} test"] = f"{name} train"
    problems = check_sources(sources, config.data_root, classes_of=classes_of)
    for problem in problems:
        console.print(f"{problem.level}: {problem}")
    errors = sum(problem.level == "error" for problem in problems)
    console.print(f"{len(sources)} datasets read: {errors} errors, {len(problems) - errors} warnings")
    return 1 if errors else 0


def _preview(args: argparse.Namespace) -> int:
    with console.status("drawing"):
        _quiet()
        from allinone_ds.training.config import load_config
        from allinone_ds.training.preview import preview_run

        written = preview_run(load_config(args.config, args.overrides), args.output, args.samples)
    for file in written:
        console.print(str(file))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from allinone_ds.doctor import examine
    from allinone_ds.training.launch import default_ranks

    with console.status("looking"):
        findings = examine(args.folder, args.nproc or default_ranks())
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        console.print(f"{finding.level:8}{finding.what:20}{finding.found}", style=colors[finding.level])
        if finding.advice:
            console.print(f"{'':28}{finding.advice}")
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _plan(args: argparse.Namespace) -> int:
    _quiet()
    from allinone_ds.training.config import load_config
    from allinone_ds.training.plan import plan_run

    classes = {}
    for item in args.classes:
        task, _, count = item.partition(":")
        if not count.isdigit() or int(count) < 1:
            hint = "; KEY=VALUE overrides go before --classes" if "=" in item else ""
            raise ConfigError(f"--classes {item}: write TASK:N, for example detection:45{hint}")
        classes[task] = int(count)
    plan = plan_run(load_config(args.config, args.overrides), args.gpus, classes)
    if args.json:
        print(json.dumps(plan.to_json(), indent=1))
        return 0
    for part in plan_tables(plan, args.config):
        console.print(part)
    for note in plan.notes:
        console.print(f"note: {note}")
    return 0


def _quiet() -> None:
    import logging
    import os
    import warnings

    from allinone_ds.training.launch import quiet_environment

    for key, value in quiet_environment().items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
