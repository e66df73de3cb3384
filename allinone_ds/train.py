"""Train one run. A launcher starts this module once per rank.

deepspeed --module allinone_ds.train configs/runs/demo.yaml trainer.max_steps=50
torchrun --nproc_per_node 2 -m allinone_ds.train configs/runs/demo.yaml
allinone-ds train configs/runs/demo.yaml --nproc 2
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configuration of a run, train, evaluate and write the run's folder.

    Returns:
        Exit code: 0; 1 if the run cannot continue; 2 for an invalid configuration or invalid data; 75 if SIGTERM or
        SIGUSR1 ended the run after it saved a checkpoint: start it again with --resume.
    """
    parser = argparse.ArgumentParser(prog="allinone_ds.train", description="Train one run on this rank.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. trainer.max_steps=50")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the run's folder")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the DeepSpeed launcher")
    args = parser.parse_intermixed_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    overrides = [*args.overrides, *(["trainer.resume_from_checkpoint=true"] if args.resume else [])]

    from allinone_ds.training.ranks.command_watch import end_with_command
    from allinone_ds.training.ranks.failures import announce_rank, record_failure

    announce_rank()
    end_with_command()
    gc.disable()  # while modules are imported it frees nothing and takes a fifth of the time
    from allinone_ds.distributed import leave
    from allinone_ds.errors import REQUEUE, AllInOneError, print_every_name
    from allinone_ds.run_config.schema import load_config

    print_every_name()
    try:
        config = load_config(args.config, overrides)
        from allinone_ds.training.run import train_run

        gc.freeze()  # exempts the imported modules from all later collections
        gc.enable()
        status = 0 if train_run(config) is not None else REQUEUE
        leave()
    except AllInOneError as error:
        record_failure(error)
        if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        record_failure(error)
        raise
    return status


if __name__ == "__main__":
    sys.exit(main())
