"""Fixtures that several folders share, the order of the tests, and the marker `quick`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from allinone_ds.data.demo import DemoSizes, make_demo_data
from tests.tiny_run import TEST_SAMPLES, tiny_run

ROOT = Path(__file__).parent

FIRST = (
    "balance/test_balancer.py",
    "integration/test_faults.py",
    "zero/test_reshard.py",
    "integration/test_runs.py",
    "integration/test_faults_in_background.py",
    "integration/test_examples.py",
    "export/test_onnx.py",
)
"""The files that take longest, longest first: whole files are dealt out to the processes of pytest-xdist."""

LAUNCHERS = ("run_ranks", "run_faults", "launch", "torchrun")
"""Functions that start ranks; the tests of a module that imports one are not quick."""

SLOW = (
    "integration/",
    "benchmarks/",
    "export/test_onnx.py",
    "evaluation/test_leaderboard.py",
    "data/test_loader.py",
    "planning/test_plan.py",
    "tasks/test_own_task.py",
)
"""Files that start ranks in other ways, or that compute for long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick tests, and put the files that take longest first."""
    places = {ROOT / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))  # stable
    for item in items:
        slow = item.path.is_relative_to(ROOT) and item.path.relative_to(ROOT).as_posix().startswith(SLOW)
        if not slow and not any(hasattr(getattr(item, "module", None), name) for name in LAUNCHERS):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the data of the tiny run."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    sizes = DemoSizes(
        detection=(24, TEST_SAMPLES["det"]),
        segmentation=(24, TEST_SAMPLES["seg"]),
        classification=(24, TEST_SAMPLES["cls"]),
    )
    make_demo_data(folder, sizes=sizes, progress=False)
    return folder


@pytest.fixture(scope="module")
def home(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a test file's own, for its runs, with the data of the tiny run and its file, tiny.yaml."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").symlink_to(demo_data)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_run(folder)))
    return folder
