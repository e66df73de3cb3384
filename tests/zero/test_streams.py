"""Training on an accelerator with streams; each check is a function of `ranks_streams.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks
from tests.zero.ranks_streams import all_checks

SCRIPT = Path(__file__).with_name("ranks_streams.py")
_results: dict[int, dict[str, str]] = {}


@pytest.mark.parametrize(("world", "check"), [(world, check) for world in (1, 2) for check in all_checks(world)])
def test_on_a_fake_device(world: int, check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if world not in _results:
        _results[world] = run_ranks(SCRIPT, world, tmp_path_factory.mktemp("ranks"), str(world))
    assert _results[world][check] == ""
