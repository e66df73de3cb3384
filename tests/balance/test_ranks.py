"""The balancer on 1, 2 and 4 gloo ranks, started by torchrun; what each check demands is in `checks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

from .checks import all_checks

WORLDS = (1, 2, 4)
_results: dict[int, dict[str, str]] = {}


@pytest.mark.parametrize(("world", "check"), [(w, c) for w in WORLDS for c in all_checks(w)])
def test_on_ranks(world: int, check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if world not in _results:
        _results[world] = run_ranks(Path(__file__).with_name("checks.py"), world, tmp_path_factory.mktemp("ranks"))
    assert _results[world][check] == ""
