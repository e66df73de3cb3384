"""Where the host waits for the device; each check is a function of `ranks_host_waits.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.balance.ranks_host_waits import CHECKS
from tests.launcher import run_ranks

_results: dict[str, str] = {}


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_fake_device(check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not _results:
        script = Path(__file__).with_name("ranks_host_waits.py")
        _results.update(run_ranks(script, 1, tmp_path_factory.mktemp("ranks")))
    assert _results[check] == ""
