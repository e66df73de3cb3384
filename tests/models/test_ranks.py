"""Every architecture trains on two ranks of ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks
from tests.models.nets import needs_timm


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).parent / "ranks_architectures.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "check",
    [
        "check_vits",
        "check_windows",
        "check_convolutions",
        "check_folders",
        pytest.param("check_timm", marks=needs_timm),
    ],
)
def test_an_architecture_trains_in_partitions(results: dict[str, str], check: str) -> None:
    assert results[check] == ""
