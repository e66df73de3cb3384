"""The subcommands of `allinone-ds`. Each imports the modules it needs, so that the command line starts quickly."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from allinone_ds.errors import ConfigError
from allinone_ds.followed_run import console, folder_of, plain_console, print_summary, run_and_follow
from allinone_ds.reporting.class_tables import class_tables
from allinone_ds.reporting.tables import metrics_table, plan_tables, transfer_tables
from allinone_ds.strict import expand_path

DEMO = "configs/runs/demo.yaml"
DEMO_FULL = "configs/runs/demo_full.yaml"
DEMO_JOINT = "configs/runs/demo_joint.yaml"
_MAX_LISTED = 40
"""Files that `predict` lists before it only counts the rest."""
_SHOWN = 5  # faults that `init` prints


def say_error(error: object) -> None:
    plain_console(stderr=True).print(f"error: {error}", style="red")


# ---- init, train and demo ----


def init(args: argparse.Namespace) -> int:
    with console.status("looking into the data"):
        _quiet()
        from allinone_ds.init.first_run import write_first_run

        first = write_first_run(args.folders, args.output)
    for name, task in first.tasks.items():
        (H, W), (h, w) = task.typical, task.image_size
        console.print(f"{name}: {task.found.kind}, {task.found.layout}")
        console.print(f"  {task.samples[0]} train and {task.samples[1]} test images{task.counted}, "
                      f"{H} x {W} pixels resized to {h} x {w}")  # fmt: skip
        if task.found.test is None:
            console.print("  there is no test data: a fifth of the images is tested on and not trained on")
        for note in task.found.notes:
            console.print(f"  not sure: {note}", style="yellow")
    for name, group in first.groups.items():
        console.print(f"{name}: {', '.join(group.tasks)} read the same images: a joint group, with one forward for all")
        for note in group.notes:
            console.print(f"  not sure: {note}", style="yellow")
    for problem in first.problems[:_SHOWN]:
        console.print(f"in the data: {problem}", style="yellow")
    if len(first.problems) > _SHOWN:
        console.print(f"... and {len(first.problems) - _SHOWN} more; `allinone-ds check` lists all", style="yellow")
    for step in ("check", "preview", "train"):
        console.print(f"allinone-ds {step} {first.file}")
    return 0


def train(args: argparse.Namespace) -> int:
    from allinone_ds.run_config.yaml_files import read_yaml
    from allinone_ds.training.launcher import default_ranks

    content = read_yaml(args.config, args.overrides)
    flags = [*args.overrides, *(["--resume"] if args.resume else [])]
    seconds = run_and_follow(args.config, flags, content, args.nproc or default_ranks())
    print_summary(folder_of(content), seconds)
    return 0


def demo(args: argparse.Namespace) -> int:
    from allinone_ds.data.demo import DEMO_SIZES, FULL_SIZES, make_demo_data, make_joint_demo_data
    from allinone_ds.run_config.yaml_files import read_yaml
    from allinone_ds.run_folder.checkpoints import clear_run
    from allinone_ds.training.launcher import default_ranks

    start = time.perf_counter()
    config = DEMO_JOINT if args.joint else DEMO_FULL if args.full else DEMO
    overrides = [f"trainer.seed={args.seed}"]
    if args.output:
        overrides.append(f"output_dir={args.output}")
    if args.data:
        overrides.append(f"data_root={args.data}")
    if args.steps:
        overrides.append(f"trainer.max_steps={args.steps}")
    content = read_yaml(config, overrides)
    root = Path(expand_path(content["data_root"]))
    if args.joint:
        make_joint_demo_data(root)
    else:
        make_demo_data(root, sizes=FULL_SIZES if args.full else DEMO_SIZES)
    console.print(f"demo data in {root}")
    clear_run(folder_of(content))
    run_and_follow(config, overrides, content, args.nproc or default_ranks())
    if args.joint:
        _compare_with_constants(folder_of(content))
    print_summary(folder_of(content), time.perf_counter() - start)
    return 0


def _compare_with_constants(folder: Path) -> None:
    with console.status("evaluating predictors that do not look at the image"):
        _quiet()
        from allinone_ds.evaluation.constant import write_constants
        from allinone_ds.reporting.report import write_report

        write_constants(folder)
        write_report([folder])


# ---- eval, predict, export, report, score, check, preview, doctor ----


def evaluate(args: argparse.Namespace) -> int:
    with console.status("evaluating"):
        _quiet()
        from allinone_ds.evaluation.predictor import evaluate_run

        metrics = evaluate_run(args.folder, args.overrides)
    console.print(metrics_table(metrics, str(args.folder)))
    for part in class_tables(metrics.details):
        console.print(part)
    for message in metrics.warnings:
        console.print(f"warning: {message}", style="yellow")
    return 0


def predict(args: argparse.Namespace) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        job = bar.add_task("predicting", total=None, state="loading the model")
        _quiet()
        from allinone_ds.evaluation.predictor import default_device, predict_images
        from allinone_ds.export.loading import load

        def show(done: int, total: int, state: str) -> None:
            bar.update(job, completed=done, total=total, state=f"{done}/{total}  {state}")

        model = load(args.folder, default_device(), args.settings)
        written = predict_images(model, args.images, args.output, (), args.task, args.threshold, show, args.every)
    for file in written[:_MAX_LISTED]:
        console.print(str(file))
    if len(written) > _MAX_LISTED:
        console.print(f"... and {len(written) - _MAX_LISTED} more files in {args.output}")
    return 0


def export(args: argparse.Namespace) -> int:
    with console.status("exporting"):
        _quiet()
        from allinone_ds.export.folders import export_run

        done = export_run(args.folder, args.output, args.onnx)
    console.print(f"weights of {done.source}")
    for folder in done.folders:
        console.print(str(folder))
    for note in done.notes:
        console.print(note, style="yellow")
    return 0


def report(args: argparse.Namespace) -> int:
    from allinone_ds.reporting.report import write_report

    console.print(str(write_report(args.folders, args.output)))
    return 0


def score(args: argparse.Namespace) -> int:
    folder, output, overrides = args.folder, args.output, args.overrides
    if args.leaderboard == "B":
        folder, output, overrides = _train_on_other_data(args), None, []
    with console.status("scoring"):
        _quiet()
        from allinone_ds.evaluation.leaderboard import score_run

        done = score_run(folder, args.leaderboard, output, overrides)
    for task, metrics in done["metrics"].items():
        console.print(f"{task:16} {'  '.join(f'{key} {value:.6g}' for key, value in metrics.items())}")
    console.print(f"leaderboard {args.leaderboard}    {done['score']:.6f}", style="bold")
    console.print(f"{'predictions':16} {done['file']}")
    for message in done["warnings"]:
        console.print(f"warning: {message}", style="yellow")
    return 0


def _train_on_other_data(args: argparse.Namespace) -> Path:
    """Train the configuration of a run, from its weights, on the data that the overrides name; return its folder."""
    from allinone_ds.run_config.yaml_files import read_yaml
    from allinone_ds.run_folder.names import CONFIG_FILE
    from allinone_ds.training.launcher import default_ranks

    if not args.overrides:
        raise ConfigError("leaderboard B trains on other data of the same tasks; name it, for example data_root=/other")
    folder = args.output or args.folder / "B"
    own = [f"output_dir={folder}", f"model.start_from={args.folder}", "trainer.resume_from_checkpoint=false"]
    overrides = [*own, *args.overrides]
    config = args.folder / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(
            f"{args.folder} holds no {CONFIG_FILE}; give the folder of a run or of one of its checkpoints"
        )
    run_and_follow(str(config), overrides, read_yaml(config, overrides), args.nproc or default_ranks())
    return folder


def transfer(args: argparse.Namespace) -> int:
    from allinone_ds.reporting.report import write_report
    from allinone_ds.run_config.yaml_files import read_yaml
    from allinone_ds.run_folder.names import TRANSFER_FILE

    config = Path(args.config)
    folder = config if config.is_dir() else folder_of(read_yaml(args.config, args.overrides))
    with console.status("reading the run"):
        _quiet()
        from allinone_ds.evaluation.baselines import compare_runs, plan_baselines, read_metrics

        ranks = args.nproc or int(read_metrics(folder).get("world_size", 1))
        baselines = plan_baselines(folder)
    for number, baseline in enumerate(baselines, 1):
        state = "trained before" if baseline.done else "resumes" if baseline.begun else "trains"
        console.print(f"{number}/{len(baselines)}  {baseline.task} alone: {state}, {baseline.folder}")
        if not baseline.done:
            resume = ["--resume"] if baseline.begun else []
            run_and_follow(str(baseline.file), resume, read_yaml(baseline.file), ranks)
    with console.status("comparing"):
        found = compare_runs([folder, *args.others])
    for part in transfer_tables(found):
        console.print(part)
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(f"{'comparison':12} {folder / TRANSFER_FILE}\n{'report':12} {write_report([folder])}")
    return 0


def check(args: argparse.Namespace) -> int:
    _quiet()
    from allinone_ds.data.check import check_sources
    from allinone_ds.run_folder.checkpoints import check_resume, parse_resume
    from allinone_ds.training.launcher import default_ranks
    from allinone_ds.training.start.run_check import check_run

    config, mistakes, sources = check_run(args.config, args.overrides, args.nproc or default_ranks())
    for mistake in mistakes:
        console.print(f"error: {mistake}")
    if config is None:
        return ConfigError.exit_code
    if not parse_resume(config.trainer.get("resume_from_checkpoint")):
        try:
            check_resume(False, config.run_dir)
        except ConfigError as error:  # no error of the file: the run may be the one that is being checked
            console.print(f"warning: {error}")
    classes_of = {f"{name} test": f"{name} train" for name in config.images if f"{name} test" in sources}
    sizes = {label: config.images[label.rpartition(" ")[0]].image_size for label in sources}
    problems = check_sources(sources, config.data_root, classes_of=classes_of, image_sizes=sizes)
    for problem in problems:
        console.print(f"{problem.level}: {problem}")
    errors = sum(problem.level == "error" for problem in problems)
    in_settings = f"; {len(mistakes)} errors in the settings" if mistakes else ""
    console.print(f"{len(sources)} datasets read: {errors} errors, {len(problems) - errors} warnings{in_settings}")
    return ConfigError.exit_code if mistakes else 1 if errors else 0


def preview(args: argparse.Namespace) -> int:
    with console.status("drawing"):
        _quiet()
        from allinone_ds.reporting.preview import preview_run
        from allinone_ds.run_config.schema import load_config

        written = preview_run(load_config(args.config, args.overrides), args.output, args.samples)
    for file in written:
        console.print(str(file))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from allinone_ds.machine.doctor import examine
    from allinone_ds.training.launcher import default_ranks

    with console.status("checking this machine"):
        findings = examine(args.folder, args.nproc or default_ranks())
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        console.print(f"{finding.level:8}{finding.what:20}{finding.found}", style=colors[finding.level])
        if finding.advice:
            console.print(f"{'':28}{finding.advice}")
    return 1 if any(finding.level == "error" for finding in findings) else 0


def plan(args: argparse.Namespace) -> int:
    _quiet()
    from allinone_ds.planning.plan import plan_run
    from allinone_ds.run_config.schema import load_config

    classes = {}
    for item in args.classes:
        task, _, count = item.partition(":")
        if not count.isdigit() or int(count) < 1:
            hint = "; put KEY=VALUE overrides before --classes" if "=" in item else ""
            raise ConfigError(f"--classes {item}: write TASK:N, for example detection:45{hint}")
        classes[task] = int(count)
    config = load_config(args.config, args.overrides)
    plan = plan_run(config, args.gpus, classes, args.per_node, args.gpu_memory * 2**30)
    if args.json:
        print(json.dumps(plan.to_json(), indent=1))
        return 0
    for part in plan_tables(plan, args.config):
        console.print(part)
    for note in plan.notes:
        console.print(f"note: {note}")
    return 0


def _quiet() -> None:
    """Silence the libraries that the command is about to import."""
    import logging
    import os
    import warnings

    from allinone_ds.training.launcher import quiet_environment

    for key, value in quiet_environment().items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
