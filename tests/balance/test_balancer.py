"""The balancer on 1, 2 and 4 gloo ranks; each check is a function of the `ranks_*.py` scripts of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.balance.ranks_balancer import all_checks
from tests.launcher import run_ranks

WORLDS = (1, 2, 4)
SCRIPT = Path(__file__).with_name("ranks_balancer.py")
_results: dict[int, dict[str, str]] = {}


@pytest.mark.parametrize(("world", "check"), [(w, c) for w in WORLDS for c in all_checks(w)])
def test_on_ranks(world: int, check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if world not in _results:
        _results[world] = run_ranks(SCRIPT, world, tmp_path_factory.mktemp("ranks"), fork=world != 4)
    assert _results[world][check] == ""
