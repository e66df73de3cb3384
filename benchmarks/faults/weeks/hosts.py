"""The two hosts of the run: network namespaces with a launcher each, a disk of their own, and what they use of both."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from allinone_ds.run_folder.names import EVENTS_FILE
from allinone_ds.training.launcher import quiet_environment
from benchmarks.common.launch import ROOT
from launch.namespaces import ADDRESSES, Hosts, run

RANKS = 4
DISK = "768M"
STATE_FILE = "trainer_state.json"


class TwoHosts(Hosts):
    """Starts `launch/torchrun.sh` on two hosts that share the folder of the run.

    Args:
        folder: for the files of the hosts; it is deleted with them.
        out: folder of the command, which stays: OUT/disk is a file system of its own, OUT/disk.img, OUT/shm the
            /dev/shm of both hosts, and OUT/tmp their folder for temporary files.

    Attributes:
        launchers: host -> the process of its launcher.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        super().__init__(folder)
        self.out = out
        self.disk, self.shm, self.tmp = (out / name for name in ("disk", "shm", "tmp"))
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}
        self.logs = {host: out / f"host-{host}.log" for host in ADDRESSES}
        self._log_starts = dict.fromkeys(ADDRESSES, 0)
        self._ranks: dict[int, psutil.Process] = {}

    def make(self) -> None:
        """Create the namespaces, connect them, and mount what the hosts share."""
        super().make()
        for folder in (self.disk, self.shm, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)
        image = self.out / "disk.img"
        if not image.exists():
            run("truncate", "-s", DISK, str(image))
            run("mkfs.ext4", "-q", "-m", "0", str(image))
        run("mount", "-o", "loop", str(image), str(self.disk))
        run("mount", "-t", "tmpfs", "-o", "size=2g", "weeks", str(self.shm))

    def remove(self) -> None:
        if os.path.ismount(self.disk):  # a process that waits for a frozen file system cannot be killed
            self.freeze(False)
        super().remove()
        for folder in (self.disk, self.shm):
            for _ in range(100):
                if (
                    not os.path.ismount(folder)
                    or not subprocess.run(["umount", folder], capture_output=True).returncode
                ):
                    break
                time.sleep(0.1)

    def freeze(self, frozen: bool) -> None:
        """Suspend or continue all writes to the file system of the run's folder."""
        subprocess.run(["fsfreeze", "-f" if frozen else "-u", str(self.disk)], capture_output=True)

    def connect(self, connected: bool) -> None:
        """Take down or up the link between the hosts."""
        for name in self.names.values():
            run("ip", "-n", name, "link", "set", "eth0", "up" if connected else "down")

    # ---- the run ----

    def launch(self, config: Path, output: Path, *overrides: str) -> None:
        """Run launch/torchrun.sh on both hosts, as a user or a scheduler does after every end of the run."""
        environment = {
            **os.environ,
            **quiet_environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.tmp),
            "NNODES": "2",
            "NPROC": str(RANKS // 2),
            "MASTER_ADDR": ADDRESSES["a"],
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        self._ranks = {}
        script = 'hostname "$0"; mount --bind "$1" /dev/shm; shift; exec "$@"'
        for host, log in self.logs.items():
            self._log_starts[host] = log.stat().st_size if log.exists() else 0
            command = ["unshare", "--uts", "sh", "-c", script, f"node-{host}", str(self.shm)]
            command += ["bash", "launch/torchrun.sh", str(config), str(output), *overrides]
            self.launchers[host] = self.start(host, *command, log=log, cwd=ROOT, env=environment)

    def running(self) -> list[str]:
        """Return the hosts whose launcher runs."""
        return [host for host, launcher in self.launchers.items() if launcher.poll() is None]

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of the ranks that the launchers have started."""
        if len(self._ranks) < RANKS:
            for host in self.running():
                for child in psutil.Process(self.launchers[host].pid).children():
                    with contextlib.suppress(psutil.Error):
                        if number := child.environ().get("RANK"):
                            self._ranks[int(number)] = child
        return self._ranks

    def processes(self) -> list[psutil.Process]:
        """Return every process on the hosts."""
        pids = [pid for name in self.names.values() for pid in run("ip", "netns", "pids", name).split()]
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def signal(self, number: signal.Signals, *processes: psutil.Process) -> None:
        """Send a signal to processes, if they still run."""
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def printed(self) -> dict[str, str]:
        """Return what each host has printed since the last launch."""
        found = {}
        for host, log in self.logs.items():
            with log.open("rb") as file:
                file.seek(self._log_starts[host])
                found[host] = file.read().decode(errors="replace")
        return found

    # ---- what they use ----

    def usage(self, output: Path) -> dict[str, dict[str, float]]:
        """Return {who: {quantity: value}}: of each rank with its data worker, of each launcher, and of the folder.

        Args:
            output: folder of the run. What it logs, also in its checkpoints, grows with every log, and is left out.
        """
        trees: dict[str, psutil.Process] = {f"rank {number}": process for number, process in self.ranks().items()}
        trees |= {f"launcher {host}": psutil.Process(self.launchers[host].pid) for host in self.running()}
        used: dict[str, dict[str, float]] = {}
        for who, process in trees.items():
            with contextlib.suppress(psutil.Error):
                children = process.children(recursive=True) if who.startswith("rank") else []
                used[who] = {"descriptors": 0.0, "threads": 0.0, "memory": 0.0}
                for one in (process, *children):
                    used[who]["descriptors"] += one.num_fds()
                    used[who]["threads"] += one.num_threads()
                    used[who]["memory"] += one.memory_info().rss
        logs = sum(size for path, size in _sizes(output) if path.name in (EVENTS_FILE, STATE_FILE))
        used[f"folder of {output.name}"] = {
            "checkpoints": sum(size for _, size in _sizes(output)) - logs,
            "temporary files": sum(size for _, size in _sizes(self.tmp)),
            "shared memory": sum(size for _, size in _sizes(self.shm)),
        }
        return used


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                yield Path(root) / name, os.lstat(os.path.join(root, name)).st_size
