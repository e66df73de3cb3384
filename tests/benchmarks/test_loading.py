"""The sets of the benchmark of loading are what it says, in a small size; its decoders agree with each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from allinone_ds.data.sources import Source, open_source
from benchmarks.speed.loading.decoders import decoders, measure_decoder
from benchmarks.speed.loading.rates import photo
from benchmarks.speed.loading.sets import SETS
from benchmarks.speed.loading.start import measure_start


@pytest.mark.parametrize("name", SETS)
def test_a_set_opens_without_a_fault_and_has_all_files(name: str, tmp_path: Path) -> None:
    sources = SETS[name](tmp_path, 80)
    sources = {"task": sources} if "format" in sources else sources
    sizes = []
    for one in sources.values():
        dataset = open_source(TypeAdapter(Source).validate_python(one), tmp_path)
        sizes.append(len(dataset))
        sample = dataset[sizes[-1] - 1]
        assert sample["image"].shape == (3, 32, 32)
        assert all(problem.unused for problem in dataset.structural)  # images of the other tasks
    assert sum(sizes) == (80 if name != "40 tasks, each of all files" else 40 * 80)


def test_a_start_is_measured(tmp_path: Path) -> None:
    figures = measure_start({"task": SETS["image_list"](tmp_path, 300)}, tmp_path, 1500)
    assert figures["files"] == 300 and figures["samples"] == 1500
    assert 0 < figures["worker_own_mb"] < figures["all_share_mb"]


def test_decoders_agree() -> None:
    for decode in decoders().values():
        found = measure_decoder(decode, [photo(96, 80, 0)], 64, 1)
        assert found["mean_difference"] is None or found["mean_difference"] < 1
