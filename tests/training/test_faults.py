"""Runs that are broken on purpose: every row of `benchmarks/faults` once; and the parts behind it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from allinone_ds.errors import REQUEUE, ConfigError, NonFinite
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_folder import lock
from allinone_ds.run_folder.atomic_checkpoint import CheckpointWriter
from allinone_ds.run_folder.checkpoints import (
    checkpoint_to_resume,
    checkpoints,
    clear_run,
    clear_unfinished,
    prune,
    set_aside,
)
from allinone_ds.run_folder.event_log import EventLog
from allinone_ds.run_folder.lock import check_free, claim
from allinone_ds.run_folder.manifest import MANIFEST_FILE, faults_of, files_of, measure, write_manifest
from allinone_ds.training.launcher import _tail, follow_run
from allinone_ds.training.out_of_memory import out_of_memory
from allinone_ds.training.signals import StopOnSignal
from allinone_ds.training.stall_watch import StallWatch
from allinone_ds.zero.checkpoint.write import CheckpointFiles

ROOT = Path(__file__).parents[2]
FAULTS = re.findall(r'^    yield "([^"]+)"', (ROOT / "benchmarks" / "faults" / "table.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_faults(tmp_path_factory.mktemp("faults") / "table.json")


def run_faults(target: Path, *flags: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "benchmarks.faults", "--once", "--json", str(target), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert target.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return {row["fault"]: row for row in json.loads(target.read_text())["rows"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(table: dict[str, dict], fault: str) -> None:
    row = table[fault]
    if not row["tried"]:
        pytest.skip(row["notes"][0])
    assert row["kept"] == row["tried"], "\n".join(row["notes"])


def test_the_table_of_the_documents_is_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line.split(" | ") for line in page.partition("| fault |")[2].splitlines() if line.startswith("| ")]
    found = [(row[0].removeprefix("| "), int(row[2]), int(row[3].removesuffix(" |"))) for row in rows]
    assert found == [(row["fault"], row["tried"], row["kept"]) for row in record["rows"]]
    assert [fault for fault, _, _ in found] == FAULTS
    assert ("is not at its end" in page) == (not record["finished"])


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(200)))
    (path / "inner" / "state").write_text(f"step {step}")
    write_manifest(path, {name: measure(path / name) for name in files_of(path)}, step=step)
    return path


def test_a_manifest_finds_every_kind_of_damage(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 1)
    assert faults_of(good) == []
    (good / "extra").write_text("nobody minds")
    assert faults_of(good) == []
    for name, damage, word in (
        ("weights", lambda p: p.write_bytes(p.read_bytes()[:-1]), "199 bytes, 200 were written"),
        ("weights", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\0"), "another checksum"),
        ("inner/state", lambda p: p.unlink(), "is missing"),
        (MANIFEST_FILE, lambda p: p.write_text(p.read_text()[:-9]), "cannot be read"),
        (MANIFEST_FILE, lambda p: p.unlink(), "not written to its end"),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        damage(bad / name)
        found = faults_of(bad)
        assert len(found) == 1 and word in found[0], found
        assert {f for part in range(3) for f in faults_of(bad, part, 3)} == set(found)
        shutil.rmtree(bad)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, 1) / MANIFEST_FILE
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert len(faults_of(tmp_path / "checkpoint-1")) == 1, (
            f"byte {place}: {bytes(changed[place - 9 : place + 9])!r}"
        )


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []  # the system's own, with the number of the file or folder that they are of
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("sync", os.fstat(handle).st_ino)))
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        calls.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    writer = CheckpointWriter(tmp_path, 2)
    (writer.folder / "inner").mkdir()
    for name in ("latest", "inner/shard"):
        (writer.folder / name).write_text(name)
    writer.publish()
    names = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
    found = [(what, names[number]) for what, number in calls]
    assert set(found[:2]) == {("sync", "latest"), ("sync", "shard")}
    assert found[2] == ("sync", MANIFEST_FILE)  # says what the files are: after them
    assert set(found[3:5]) == {("sync", "inner"), ("sync", "checkpoint-2")}
    assert found[5:] == [("rename", "checkpoint-2"), ("sync", tmp_path.name)]
    assert faults_of(tmp_path / "checkpoint-2") == []


def test_one_process_writes_to_a_folder(tmp_path: Path) -> None:
    words = "import sys; from allinone_ds.run_folder.lock import claim; claim(sys.argv[1]); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        checkpoint(tmp_path, 2)
        for refused in (claim, check_free, clear_run):
            with pytest.raises(ConfigError, match=f"process {holder.pid} on .* is writing to"):
                refused(tmp_path)
        with pytest.raises(ConfigError, match="is writing to"):
            follow_run([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path, print)
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        claim(tmp_path)
    assert checkpoints(tmp_path)


def test_a_run_of_another_host_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ["process 7 on elsewhere"] * 3
    real = lock._try_lock
    monkeypatch.setattr(lock, "_try_lock", lambda folder: (real(folder)[0], held.pop()) if held else real(folder))
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    claim(tmp_path)
    assert not held and capsys.readouterr().out.count("waiting for process 7 on elsewhere") == 1
    held = ["process 7 on elsewhere"] * 9
    monkeypatch.setattr(lock, "PATIENCE", -1.0)
    with pytest.raises(ConfigError, match="process 7 on elsewhere is writing to"):
        claim(tmp_path / "other")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run cannot be written to .*give another output_dir"):
        claim(tmp_path / "file" / "run")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("begin", step=0)
    with log.path.open("a") as file:
        file.write('{"event": "lo')
    followed = _tail(log.path)
    assert next(followed) == []  # what was there before counts for nothing
    log.write("begin", step=3)
    assert [event["step"] for event in next(followed)] == [3]
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()[::2]] == [0, 3]


def test_the_last_whole_checkpoint_is_resumed_and_the_broken_ones_named(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 10)]
    assert checkpoint_to_resume(True, tmp_path) == (paths[2], [])
    (paths[2] / "weights").write_bytes(b"")
    (paths[1] / "inner" / "state").unlink()
    found, broken = checkpoint_to_resume("true", tmp_path)
    assert found == paths[0]
    assert [path for path, _ in broken] == [paths[2], paths[1]]
    assert "weights has 0 bytes" in broken[0][1] and "state is missing" in broken[1][1]
    with pytest.raises(ConfigError, match="checkpoint-10.*is broken.*weights"):
        checkpoint_to_resume(str(paths[2]), tmp_path)
    aside = set_aside(paths[2])
    assert aside.is_dir() and checkpoints(tmp_path) == paths[:2]
    (paths[0] / "weights").unlink()
    with pytest.raises(ConfigError, match="no checkpoint in .* is whole"):
        checkpoint_to_resume(True, tmp_path)


def test_unfinished_checkpoints_are_never_picked_and_are_cleared(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4).rename(tmp_path / ".unfinished-checkpoint-4")
    assert checkpoint_to_resume(True, tmp_path) == (whole, [])
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (None, None, [2, 4, 6, 10]),
        (2, None, [6, 10]),
        (1, "elsewhere/checkpoint-4", [4, 10]),
        (2, "checkpoint-10", [6, 10]),
        (3, "checkpoint-2", [2, 6, 10]),
    ],
)
def test_the_last_and_the_best_are_not_pruned(tmp_path: Path, keep: int | None, best: str | None, kept: list) -> None:
    for step in (2, 4, 6, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2.mine").mkdir()  # a copy of the user's is no checkpoint of the run
    prune(tmp_path, keep, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(f"checkpoint-{s}" for s in kept), "checkpoint-2.mine"]
    )


class _Thief:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("stolen",)


def test_checkpoints_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.ones(2), "more": _Thief()}, "bad.pt")
    files = CheckpointFiles(SimpleNamespace(zipfile_serialization=True))  # type: ignore[arg-type]
    with pytest.raises(pickle.UnpicklingError):
        files.load("bad.pt")
    assert not Path("stolen").exists()


def test_failed_writes_are_noted_only_while_the_engine_saves(tmp_path: Path) -> None:
    files = CheckpointFiles(SimpleNamespace(zipfile_serialization=True))  # type: ignore[arg-type]
    with pytest.raises((OSError, RuntimeError)):
        files.save({}, str(tmp_path / "none" / "file.pt"))
    files.errors = []
    files.save({}, str(tmp_path / "none" / "file.pt"))
    assert len(files.errors) == 1 and files.errors[0].startswith("file.pt: ")


def watch(rank: int, seen: dict[int, list], answered: float = 100.0) -> StallWatch:
    made = object.__new__(StallWatch)
    made.rank, made.world, made.timeout, made.interval = rank, len(seen), 10.0, 1.0
    made._seen, made._answered, made._place = seen, answered, (9, "here")
    return made


@pytest.mark.parametrize(
    ("seen", "answered", "words"),
    [  # rank -> count, where, when it moved, beat, when it beat; now is 100
        ({0: [5, "a", 95, 1, 99], 1: [4, "b", 94, 1, 99]}, 99, None),
        ({0: [5, "a", 80, 1, 99], 1: [4, "b", 95, 1, 99]}, 99, None),  # 0 waits for 1, which moves
        ({0: [5, "a", 85, 1, 99], 1: [4, "b", 80, 1, 80]}, 99, "rank 1 .*does not answer.* at b.* at a"),
        ({0: [5, "a", 85, 1, 99], 1: [4, "b", 80, 1, 99]}, 99, "rank 1 .*is alive but does not come on"),
        ({0: [5, "a", 85, 1, 99], 1: [5, "a", 80, 1, 99]}, 99, "no rank has moved.* at a"),
        ({0: [5, "a", 89, 1, 99], 1: [5, "a", 91, 1, 95]}, 99, None),  # 1 has just stopped, or is a little late
        ({0: [5, "a", 88, 1, 99], 1: [5, "a", 91, 1, 93]}, 99, "rank 1 .*does not answer"),
        ({0: [6, "a", 88, 1, 91], 1: [5, "b", 88, 1, 91]}, 91, None),  # rank 0 keeps silent, 1 had been behind it
        ({0: [6, "a", 88, 1, 89], 1: [5, "b", 88, 1, 89]}, 89, "rank 0, which keeps"),
        ({0: [5, "a", 85, 1, 85], 1: [5, "a", 85, 1, 85]}, 85, "rank 0, which keeps.* at a; rank 1 is at here"),
    ],
)
def test_the_rank_that_others_wait_for_is_named(seen: dict, answered: float, words: str | None) -> None:
    found = watch(1, seen, answered)._verdict(100.0)
    assert (not found) if words is None else re.search(words, found), found


def test_out_of_memory_names_what_to_change() -> None:
    said = str(out_of_memory(torch.OutOfMemoryError("CUDA out of memory.\nmore"), "step 7", "det", (2, 3, 64, 96), 3))
    for word in ("rank 3", "step 7", "2 images of 64 x 96", "tasks.det.batch_size", "tasks.det.image_size"):
        assert word in said
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "", "d", (1, 3, 8, 8), 0)
    assert out_of_memory(RuntimeError("shapes differ"), "", "d", (1, 3, 8, 8), 0) is None


def test_a_signal_saves_and_stops_unless_the_run_is_over() -> None:
    for step, expected in ((3, True), (4, False)):
        stop = StopOnSignal()
        before = signal.getsignal(signal.SIGUSR1)
        stop.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(None, SimpleNamespace(global_step=step, max_steps=4), control)
        stop.close()
        assert signal.getsignal(signal.SIGUSR1) is before
        assert control.should_save is control.should_training_stop is expected
        assert stop.caught == ("SIGUSR1" if expected else None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nonfinite": "skip"}, "did you mean 'skip_task'"),
        ({"nonfinite_limit": 0}, "nonfinite_limit = 0"),
        ({"stall_timeout": -1.0}, "stall_timeout"),
        ({"hub_token": "hf_123"}, "HF_TOKEN"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, given: dict, message: str) -> None:
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    with pytest.raises(ConfigError, match=message):
        AllInOneArguments(**{**usual, **given})


def test_the_error_of_a_step_not_taken_names_its_tasks() -> None:
    assert "a, b" in str(NonFinite(("a", "b"))) and NonFinite(("a",)).tasks == ("a",)


def test_the_command_hands_a_signal_on_and_ends_with_the_requeue_status(home: Path) -> None:
    """Through the DeepSpeed launcher, which would itself end with 1."""
    folder = home / "stopped"
    command = [sys.executable, "-m", "allinone_ds.cli", "train", "tiny.yaml", "--nproc", "2", f"output_dir={folder}"]
    command += ["trainer.max_steps=4000", "trainer.save_steps=4000", "trainer.eval_strategy=no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        events = folder / "log.jsonl"
        while process.poll() is None and not (events.exists() and '"log"' in events.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode == REQUEUE, said
    assert "--resume" in said
    last = json.loads(events.read_text().splitlines()[-1])
    assert last["event"] == "stopped" and last["signal"] == "SIGTERM"
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{last['step']}"]
    assert faults_of(folder / f"checkpoint-{last['step']}") == []
