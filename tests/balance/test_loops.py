"""The loops of docs/loops.md run and train right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_loops.py")
LOOPS = ("DeepSpeed", "accelerate", "Trainer of transformers", "Lightning, manual optimization")
_results: dict[str, str] = {}


@pytest.mark.parametrize("heading", LOOPS)
def test_a_documented_loop_trains_as_the_reference_does(heading: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not _results:
        folder = tmp_path_factory.mktemp("loops")
        _results.update(run_ranks(SCRIPT, 2, folder, str(folder / "runs")))
    assert _results[heading] == ""
