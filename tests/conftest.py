"""The tiny run's folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from allinone_ds.data.demo import DemoSizes, make_demo_data
from tests.tiny_run import TEST_SAMPLES, tiny_run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and tiny.yaml."""
    folder = tmp_path_factory.mktemp("training")
    sizes = DemoSizes(
        detection=(24, TEST_SAMPLES["det"]),
        segmentation=(24, TEST_SAMPLES["seg"]),
        classification=(24, TEST_SAMPLES["cls"]),
    )
    make_demo_data(folder / "data", sizes=sizes, progress=False)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_run(folder)))
    return folder
