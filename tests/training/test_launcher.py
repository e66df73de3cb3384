"""The launcher follows a run, passes on why it failed, and leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from allinone_ds import commands
from allinone_ds.errors import REQUEUE, ConfigError, RunFailed
from allinone_ds.training import launcher as launch
from allinone_ds.training.launcher import follow_run

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(__file__).with_name("fake_launcher.py")
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from allinone_ds.errors import ConfigError, DataError, RunError
from allinone_ds.training.ranks.command_watch import end_with_command
from allinone_ds.training.ranks.failures import announce_rank, record_failure
announce_rank()
end_with_command()
rank, folder = int(os.environ["RANK"]), Path(os.environ["RUN_FOLDER"])
def event(name, **values):
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"event": name, **values}) + "\\n")
try:
    BODY
except Exception as error:
    record_failure(error)
    if isinstance(error, (ConfigError, DataError)):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    raise
"""


def ranks(body: str) -> list[str]:
    """The command of a launcher whose two ranks run the code."""
    return [sys.executable, str(LAUNCHER), RANK.replace("BODY", textwrap.indent(textwrap.dedent(body), "    ").strip())]


def environment(folder: Path) -> dict[str, str]:
    script = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": script, "PYTHONUNBUFFERED": "1", "RUN_FOLDER": str(folder)}


def failed_run(body: str, folder: Path) -> RunFailed:
    with pytest.raises(RunFailed) as failed:
        follow_run(ranks(body), environment(folder), folder, print)
    return failed.value


def test_a_failed_run_gives_the_reason_and_events_arrive(tmp_path: Path) -> None:
    event = json.dumps({"event": "begin", "step": 0})
    script = f"open({str(tmp_path / 'log.jsonl')!r}, 'a').write({event!r} + chr(10)); print('noise'); "
    events: list[dict] = []
    with pytest.raises(RunFailed, match="^data is missing$") as failed:
        failing = script + "print('error: data is missing'); raise SystemExit(2)"
        follow_run([sys.executable, "-c", failing], {}, tmp_path, events.append)
    assert failed.value.exit_code == 2
    assert events == [{"event": "begin", "step": 0}]
    with pytest.raises(RunFailed, match="(?s)train.log.*ZeroDivisionError"):
        follow_run([sys.executable, "-c", "1 / 0"], {}, tmp_path, events.append)


def test_the_error_of_the_rank_that_failed_first_is_the_end_of_the_message_and_of_the_log(tmp_path: Path) -> None:
    error = failed_run(
        """
        if rank == 1:
            raise ZeroDivisionError("the cause")
        time.sleep(0.5)
        print("x\\n" * 100)
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer [127.0.0.1]:3788")
        """,
        tmp_path,
    )
    assert str(error).endswith("ZeroDivisionError: the cause") and "rank 1 failed first" in str(error)
    assert "Connection closed" not in str(error) and error.exit_code == 1
    assert (tmp_path / "train.log").read_text().rstrip().endswith("ZeroDivisionError: the cause")


def test_the_cause_is_found_if_the_rank_that_lost_its_connection_is_quicker(tmp_path: Path) -> None:
    error = failed_run(
        """
        if rank == 0:
            raise RuntimeError("Connection closed by peer")
        time.sleep(0.5)
        raise DataError("images/7.png: cannot be read")
        """,
        tmp_path,
    )
    assert str(error) == "images/7.png: cannot be read" and error.exit_code == 2


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    error = failed_run(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        raise RuntimeError("Connection reset by peer")
        """,
        tmp_path,
    )
    assert "rank 1 ended without an error of Python" in str(error) and "dmesg" in str(error)
    both = failed_run("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert "SIGKILL ended a rank" in str(both)


def test_a_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    error = failed_run("raise ConfigError('tasks.seg.head: unknown head')", folder)
    assert str(error) == "tasks.seg.head: unknown head" and error.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    error = failed_run("raise ZeroDivisionError('early')", folder)
    assert str(error).endswith("ZeroDivisionError: early") and "train.log" not in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("", "event('begin', step=0, max_steps=4, time=0); raise ConfigError('late')"),
        ("", "(folder / 'notes.txt').touch(); raise ConfigError('x')"),
        ("", "(folder / 'checkpoint-2').mkdir(exist_ok=True); raise ConfigError('x')"),
        ("notes.txt", "raise ConfigError('x')"),
        (".", "raise ConfigError('x')"),
    ],
)
def test_a_folder_that_existed_or_holds_more_than_a_start_stays(tmp_path: Path, before: str, body: str) -> None:
    folder = tmp_path / "run"
    if before:
        folder.mkdir()
        if before != ".":
            (folder / before).touch()
    failed_run(body, folder)
    assert folder.is_dir() and (not before or before == "." or (folder / before).exists())


STOPPING = """
def stop(number, frame):
    if rank == 0:
        (folder / "checkpoint-7").mkdir(exist_ok=True)
        event("stopped", step=7, signal="SIGTERM")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if rank == 0:
    event("begin", step=0, max_steps=9)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)])
def test_a_signal_says_what_was_saved_and_how_to_resume(tmp_path: Path, number: int, code: int) -> None:
    def on_event(event: dict) -> None:
        if event["event"] == "begin":
            time.sleep(0.5)  # until the second rank listens too
            os.kill(os.getpid(), number)

    with pytest.raises(RunFailed) as failed:
        follow_run(ranks(STOPPING), environment(tmp_path), tmp_path, on_event, "allinone-ds train x.yaml --resume")
    assert failed.value.exit_code == code
    assert "step 7 is saved" in str(failed.value) and str(tmp_path / "checkpoint-7") in str(failed.value)
    assert "`allinone-ds train x.yaml --resume`" in str(failed.value)


def test_an_interrupt_before_anything_was_saved_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    body = "time.sleep(60)"

    def interrupt(command: list[str]) -> str:
        with pytest.raises(RunFailed) as failed:
            follow_run(command, environment(folder), folder, print)
        assert failed.value.exit_code == 130
        return str(failed.value)

    for command in (
        ranks(body),
        [sys.executable, "-c", f"import time; {body}"],
    ):  # with ranks, and before there are any
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            assert "no step was saved" in interrupt(command)
        finally:
            timer.cancel()
        assert not folder.exists()


def test_ranks_end_when_the_command_is_killed(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.training.test_launcher import environment, ranks
from allinone_ds.training.launcher import follow_run
folder = Path({str(tmp_path)!r})
body = '(folder / f"pid{{rank}}").write_text(str(os.getpid())); time.sleep(300)'
follow_run(ranks(body), environment(folder), folder, print)
"""
    command = subprocess.Popen([sys.executable, "-c", script], env=environment(tmp_path), cwd=ROOT)
    files = [tmp_path / f"pid{rank}" for rank in (0, 1)]
    while command.poll() is None and not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    processes = [psutil.Process(int(file.read_text())) for file in files]
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_any_key_that_makes_trainer_compile_leaves_the_compiler_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(
        launch, "follow_run", lambda command, environment, *rest: seen.append("TORCHDYNAMO_DISABLE" in environment)
    )
    for trainer in ({}, {"torch_compile": True}, {"torch_compile_backend": "aot_eager"}):
        commands.run_and_follow("run.yaml", [], {"name": "x", "trainer": trainer}, ranks=1)
    assert seen == [True, False, False]


def test_ranks_get_the_gpus_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher sets the variable anew, so that `4,5` would become GPUs 0 and 1."""

    def given(value: str | None, ranks: int, gpus: int = 8) -> list:
        monkeypatch.setattr(launch, "gpu_count", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        [world] = [word for word in launch.launch_command("run.yaml", [], ranks) if word.startswith("--world_info=")]
        return json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))["localhost"]

    assert given("4,5,6,7", 2) == ["4", "5"]
    assert given("GPU-8932f937, MIG-GPU-5c2b", 2) == ["GPU-8932f937", "MIG-GPU-5c2b"]
    assert given(None, 2) == given("", 2) == [0, 1]
    assert given("4,5", 3, gpus=0) == [0, 1, 2]  # ranks on the CPU
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=4,5 names 2 GPU.*--nproc 2"):
        given("4,5", 3)
