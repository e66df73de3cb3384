"""Runs that are broken on purpose lose nothing: each row of `benchmarks/faults` once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allinone_ds.errors import REQUEUE
from allinone_ds.run_folder.checkpoints import (
    checkpoints,
)
from allinone_ds.run_folder.manifest import faults_of

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
    rows = [
        line.split(" | ")
        for line in page.partition("| fault |")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| ")
    ]
    found = [(row[0].removeprefix("| "), int(row[2]), int(row[3].removesuffix(" |"))) for row in rows]
    assert found == [(row["fault"], row["tried"], row["kept"]) for row in record["rows"]]
    assert [fault for fault, _, _ in found] == FAULTS
    assert ("is not at its end" in page) == (not record["finished"])


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
