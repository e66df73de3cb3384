"""The parts of the GPU benchmark on a CPU: what is counted and written, and that a part ends in time."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.gpu import machine, steps, table, trace
from benchmarks.gpu.__main__ import run_part, start_part
from benchmarks.gpu.machine import datasheet_flops
from benchmarks.gpu.part import PARTS, Run, run_command
from benchmarks.gpu.vit import TASKS, Vit, tiny
from benchmarks.gpu.waits import rows


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_its_module_and_columns(part: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.gpu.{part}").measure)
    assert table.COLUMNS[part]


def test_a_part_writes_its_rows_and_the_page_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_part("machine", Run("cpu", tmp_path)) == 0
    written = [json.loads(line) for line in (tmp_path / "machine.jsonl").read_text().splitlines()]
    assert [row["what"] for row in written][0] == "machine" and all(row["part"] == "machine" for row in written)
    assert all(row["flops"] > 0 for row in written if row["what"].startswith("matmul"))
    trials = (("a|b", 0.5), ("c", 2e-7), ("d", 3e-7))
    (tmp_path / "exact.jsonl").write_text("".join(
        json.dumps({"case": case, "norm": "exact", "difference": value, "limit": 1e-4, "passed": value < 1e-4}) + "\n"
        for case, value in trials
    ))  # fmt: skip
    (tmp_path / "parts.jsonl").write_text(json.dumps({"part": "exact", "status": "ok", "seconds": 1.5}))
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    table.write_page(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert written[0]["processor"] in page and "|  | exact | 2 | 3.00e-07 | 1.00e-04 | yes |" in page
    assert "| a/b | exact |  | 0.5 | 1.00e-04 | no |" in page
    assert PARTS["exact"].question in page and PARTS["loader"].question not in page


def test_a_part_with_an_error_in_a_row_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ({"error": "KeyError"}, {"passed": False}, {"status": 2}):
        monkeypatch.setattr(machine, "measure", lambda run, row=row: iter([row, {"what": "more"}]))
        assert run_part("machine", Run("cpu", tmp_path)) == 1
        assert len((tmp_path / "machine.jsonl").read_text().splitlines()) == 2


def test_a_part_ends_at_its_time_limit(tmp_path: Path) -> None:
    assert start_part("machine", "cpu", tmp_path, seconds=0.5)["status"] == "time limit"


def test_a_command_that_takes_too_long_ends_with_all_that_it_has_started() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = f"import subprocess; job = subprocess.Popen({sleep}, start_new_session=True); print(job.pid, flush=True)"
    status, output, errors = run_command([sys.executable, "-c", f"{start}; job.wait()"], seconds=1)
    assert status == 124 and "ended after 1 s" in errors
    assert not psutil.pid_exists(int(output)) or psutil.Process(int(output)).status() == psutil.STATUS_ZOMBIE


def test_a_mode_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(vit: Vit, run: Run) -> dict:
        if vit.mode == "exact":
            raise RuntimeError("out of memory")
        return {"mode": vit.mode, "seconds": 2.0 if vit.mode == "plain" else 3.0, "flops_per_s": 4.0}

    monkeypatch.setattr(Run, "join", lambda self: None)
    monkeypatch.setattr(steps, "product_flops", lambda run: 8.0)
    monkeypatch.setattr(steps, "timed", timed)
    found = {row["mode"]: row for row in steps.measure(Run("cpu", tmp_path))}
    assert found["exact"]["error"] == "RuntimeError: out of memory" and set(found) == set(steps.MODES)
    assert found["delayed"]["ratio"] == 1.5 and found["delayed"]["of_matmul"] == 0.5


def test_the_plan_of_a_vit_counts_what_its_engine_holds(tmp_path: Path) -> None:
    run = Run("cpu", tmp_path)
    plain, exact = (Vit(run, tiny(), 32, 2, stage=2, mode=mode).planned() for mode in ("plain", "exact"))
    assert exact.pop("balancer") > 0 and plain == exact
    assert Vit(run, tiny(), 32, 2, stage=2, mode="plain").engine_config()["gradient_accumulation_steps"] == len(TASKS)


def test_the_time_in_kernels_is_the_union_of_their_ranges() -> None:
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b)) for a, b in ((0, 10), (5, 12), (40, 50))]
    assert trace.busy(events) == {"ms": 0.05, "busy_ms": 0.022, "longest_gap_ms": 0.028}
    assert trace.busy([])["busy_ms"] == 0


def test_our_waits_come_first_and_are_counted() -> None:
    found = {("deepspeed", "deepspeed/a.py:1"): 5, ("allinone_ds", "allinone_ds/b.py:2"): 1}
    first, *places = rows("step", found)
    assert (first["ours"], first["all"]) == (1, 6) and places[0]["owner"] == "allinone_ds"


def test_devices_have_the_peak_of_their_datasheet() -> None:
    assert datasheet_flops("NVIDIA H100 80GB HBM3") == 989e12 and datasheet_flops("NVIDIA GeForce RTX 4090") is None
    assert datasheet_flops("NVIDIA L40S") == 362e12
