"""Two hosts on one machine: connected network namespaces, which are removed when the process that uses them ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

AnyHosts = TypeVar("AnyHosts", bound="Hosts")
ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}
ETC = Path("/etc/netns")
"""`ip netns exec NAME` mounts the files in its folder NAME over /etc."""


class Hosts:
    """Two network namespaces, `aioPIDa` and `aioPIDb`, whose host names are node-a and node-b.

    Args:
        folder: folder for the files of the hosts; it is deleted with them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {host: f"aio{os.getpid()}{host}" for host in ADDRESSES}
        self.started: dict[str, list[subprocess.Popen]] = {host: [] for host in ADDRESSES}

    def make(self) -> None:
        """Create the namespaces and connect them."""
        for name in self.names.values():
            run("ip", "netns", "add", name)
            (ETC / name).mkdir(parents=True)
            known = "".join(f"{address} node-{host}\n" for host, address in ADDRESSES.items())
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        a, b = self.names["a"], self.names["b"]
        run("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host, name in self.names.items():
            run("ip", "-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "eth0", "up")

    def inside(self, host: str, *command: str) -> list[str]:
        """Return the command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def start(self, host: str, *command: str, log: Path, **options: object) -> subprocess.Popen:
        """Start a command on a host and append its output to `log`."""
        with log.open("ab") as sink:
            process = subprocess.Popen(
                self.inside(host, *command), stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
            )  # type: ignore[call-overload]
        self.started[host].append(process)
        return process

    def kill_all(self, host: str) -> int:
        """Kill every process on a host by its process id; return how many were killed."""
        killed = 0
        while pids := run("ip", "netns", "pids", self.names[host]).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            killed += len(pids)
            for process in self.started[host]:
                process.wait()
            self.started[host].clear()
            time.sleep(0.1)
        return killed

    def lose(self, host: str) -> int:
        """Disconnect a host, so that its connections are not closed, then kill its processes; return their number."""
        run("ip", "-n", self.names[host], "link", "set", "eth0", "down")
        return self.kill_all(host)

    def remove(self) -> None:
        """Kill all processes on the hosts and delete the namespaces."""
        known = run("ip", "netns", "list").split()
        for host, name in self.names.items():
            if name in known:
                self.kill_all(host)
                run("ip", "netns", "del", name)
            shutil.rmtree(ETC / name, ignore_errors=True)


@contextlib.contextmanager
def two_hosts(kind: Callable[[Path], AnyHosts]) -> Iterator[AnyHosts]:
    """Yield hosts that are not created yet, with an empty folder.

    A separate process removes both, and all processes on the hosts, at the end of the block, even if this process is
    killed.

    Args:
        kind: returns the hosts, given the folder.
    """
    hosts = kind(Path(tempfile.mkdtemp(prefix="two-hosts-")))
    reader, writer = os.pipe()  # nothing is written: the pipe closes when this process ends
    remover = os.fork()
    if remover == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.setsid()  # signals to the group of this process must not end the remover
            os.close(writer)
            os.read(reader, 1)
            hosts.remove()
            shutil.rmtree(hosts.folder)
            status = 0
        finally:
            os._exit(status)
    os.close(reader)
    try:
        yield hosts
    finally:
        os.close(writer)
        os.waitpid(remover, 0)


def run(*command: str, **options: object) -> str:
    """Run a command and return its output.

    Raises:
        RuntimeError: the command failed; the message holds its error output.
    """
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def what_is_missing(programs: Sequence[str], packages: str) -> str:
    """Return why this machine cannot run the test; empty if it can."""
    missing = [name for name in ("ip", *programs) if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian packages: iproute2, {packages})"
    probe = f"aio{os.getpid()}x"
    try:
        run("ip", "netns", "add", probe)
        run("ip", "netns", "exec", probe, "true")
        run("ip", "netns", "del", probe)
    except RuntimeError as error:
        return f"network namespaces are not allowed here ({error}); run this script as root"
    return ""


def wait_for(condition: Callable[[], bool], seconds: float, what: str, log: Path) -> None:
    """Wait until a condition holds; if it takes too long, exit with the end of `log`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            tail = log.read_text()[-3000:] if log.exists() else "(empty)"
            raise SystemExit(f"{what} did not happen within {seconds:.0f} s; the end of {log.name}:\n{tail}")
        time.sleep(0.05)
