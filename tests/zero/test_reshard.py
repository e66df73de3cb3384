"""A checkpoint resumes bitwise with other numbers of ranks and other ZeRO stages, in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allinone_ds.zero.checkpoint.layout import SavedShards
from allinone_ds.zero.checkpoint.reshard import kinds_of_state, load_number
from allinone_ds.zero.support import UnsupportedEngine
from tests.launcher import run_ranks
from tests.zero.test_layout import saved_shards

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reshard")
    return {world: run_ranks(HERE / "ranks_reshard.py", world, folder, str(folder)) for world in (2, 4, 1)}


@pytest.mark.parametrize("world", [2, 4, 1])
def test_masters_moments_averages_and_losses_stay(results: dict[int, dict[str, str]], world: int) -> None:
    wrong = {name: problem for name, problem in results[world].items() if problem}
    assert len(results[world]) >= 24 and not wrong, "\n".join(f"{n}:\n{p}" for n, p in list(wrong.items())[:3])


def test_a_factored_optimizer_state_is_refused(tmp_path: Path) -> None:
    saved = SavedShards(saved_shards(tmp_path / "shards", 2, row=torch.zeros(2), step=torch.tensor(1.0)))
    with pytest.raises(UnsupportedEngine, match=r"'row' of shape \(2,\) for 4 weights.*2 ranks"):
        kinds_of_state(saved)


def test_numbers_of_a_fused_optimizer_go_beside_its_weights() -> None:
    """AdamW's number of steps is on the device of the weights where it is fused, else on the CPU."""
    saved, meta = torch.tensor(3.0), torch.device("meta")
    assert load_number(saved, None, meta).device == meta
    assert load_number(saved, None, None).device.type == "cpu" and load_number(saved, None, None) is not saved
    assert load_number(saved, torch.zeros((), device="meta"), None).device == meta
    assert load_number(0.9, None, meta) == 0.9
