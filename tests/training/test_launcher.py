"""The launcher follows a run and passes on why it failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from allinone_ds import commands
from allinone_ds.errors import RunFailed
from allinone_ds.training import launcher as launch
from allinone_ds.training.launcher import follow_run


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


def test_any_key_that_makes_trainer_compile_leaves_the_compiler_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(
        launch, "follow_run", lambda command, environment, *rest: seen.append("TORCHDYNAMO_DISABLE" in environment)
    )
    for trainer in ({}, {"torch_compile": True}, {"torch_compile_backend": "aot_eager"}):
        commands._run("run.yaml", [], {"name": "x", "trainer": trainer}, ranks=1)
    assert seen == [True, False, False]
