"""Trains a run of a file on each rank: the arguments are a file of the result, the run's file and overrides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from allinone_ds.distributed import leave, rank
from allinone_ds.run_config.schema import load_config
from allinone_ds.training.run import train_run
from tests.launcher import join_ranks

if __name__ == "__main__":
    join_ranks()
    out, config, *overrides = sys.argv[1:]
    metrics = train_run(load_config(config, overrides))
    if rank() == 0:
        Path(out).write_text(json.dumps(metrics))
    leave()
