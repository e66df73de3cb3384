"""Starts each wrong run of `wrong_runs` and writes what the training of each says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from allinone_ds.errors import AllInOneError
from allinone_ds.run_config.schema import load_config
from allinone_ds.training.run import train_run
from tests.launcher import join_ranks
from tests.training.wrong_runs import WRONG


def start(overrides: list[str], config: str) -> str:
    try:
        train_run(load_config(config, overrides))
    except AllInOneError as error:
        return str(error)
    except Exception as error:
        return f"not an error for users: {error!r}"
    return "trained"


if __name__ == "__main__":
    join_ranks()
    out, config, folder = sys.argv[1:4]
    said = {}
    for number, (what, overrides) in enumerate(WRONG.items()):
        said[what] = start([f"output_dir={folder}/{number}", *overrides], config)
    Path(out).write_text(json.dumps(said))
