"""Start ranks quickly: a process that has imported every library forks the ranks of one script after another.

`tests.launcher` starts it, once per test session. Importing the libraries takes longer than most checks, and the forked
ranks share the imported modules. Each script gets fresh processes with the variables that torchrun would set, so a
script that fails, hangs or kills a rank leaves the next one undisturbed.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from typing import Any

LIBRARIES = (
    "deepspeed", "torch._dynamo", "torch._inductor.compile_fx", "torchjd.aggregation", "torchmetrics",
    "transformers.integrations", "allinone_ds.train", "allinone_ds.training.run", "tests.balance.engines", "tests.tiny",
)  # fmt: skip
GRACE = 5.0  # seconds that the other ranks have to end by themselves after one has failed


def import_libraries() -> None:
    """Import what ranks import, without starting a thread, which a forked process would lack."""
    for name in LIBRARIES:
        __import__(name)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage in each engine's constructor, which would visit every imported object
    if threading.active_count() > 1:
        raise RuntimeError(f"importing started {threading.enumerate()}; ranks cannot be forked beside a thread")


def fork_rank(rank: int, request: dict[str, Any]) -> int:
    """Fork one rank that runs the requested script as `__main__`; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ.clear()
        os.environ.update(request["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        os.chdir(request["folder"])
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run all ranks of a script to their end; return their exit statuses, negative for a signal."""
    running = {fork_rank(rank, request): rank for rank in range(request["world"])}
    statuses: dict[int, int] = {}
    end = time.monotonic() + request["timeout"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(statuses.values()):
                end = min(end, time.monotonic() + GRACE)
        elif time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            end += GRACE
        else:
            time.sleep(0.01)
    return {"statuses": [statuses[rank] for rank in range(request["world"])]}


def main() -> None:
    """Answer one request per line of standard input until it is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    import_libraries()
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
