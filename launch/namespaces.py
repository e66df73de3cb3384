"""Two hosts on one machine: network namespaces joined by a virtual cable, gone when the process ends that made them."""

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

ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}
ETC = Path("/etc/netns")
"""`ip netns exec NAME` shows what lies in its folder NAME as /etc."""


class Hosts:
    """Two namespaces `aioPIDa` and `aioPIDb`; each host knows both as node-a and node-b.

    Args:
        folder: for what the hosts need; it is deleted with them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {host: f"aio{os.getpid()}{host}" for host in ADDRESSES}
        self.started: dict[str, list[subprocess.Popen]] = {host: [] for host in ADDRESSES}

    def make(self) -> None:
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
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def start(self, host: str, *command: str, log: Path, **options: object) -> subprocess.Popen:
        """Start a command on a host; its output is appended to `log`."""
        with log.open("ab") as sink:
            process = subprocess.Popen(
                self.inside(host, *command), stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
            )  # type: ignore[call-overload]
        self.started[host].append(process)
        return process

    def kill_all(self, host: str) -> int:
        """Kill every process of a host, by its number; returns how many there were."""
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
        """Cut the cable, so that nobody hears of it, then kill what runs there."""
        run("ip", "-n", self.names[host], "link", "set", "eth0", "down")
        return self.kill_all(host)

    def remove(self) -> None:
        known = run("ip", "netns", "list").split()
        for host, name in self.names.items():
            if name in known:
                self.kill_all(host)
                run("ip", "netns", "del", name)
            shutil.rmtree(ETC / name, ignore_errors=True)


@contextlib.contextmanager
def two_hosts(kind: type[Hosts] = Hosts) -> Iterator[Hosts]:
    """Hosts that are not made yet, with an empty folder.

    Both, and all that runs on the hosts, are removed at the end of the block by a process of its own; also when this
    process is killed before.
    """
    hosts = kind(Path(tempfile.mkdtemp(prefix="two-hosts-")))
    ear, mouth = os.pipe()  # nothing is said: the pipe closes when this process ends
    keeper = os.fork()
    if keeper == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.setsid()  # a signal to this process's group is not for the keeper
            os.close(mouth)
            os.read(ear, 1)
            hosts.remove()
            shutil.rmtree(hosts.folder)
            status = 0
        finally:
            os._exit(status)
    os.close(ear)
    try:
        yield hosts
    finally:
        os.close(mouth)
        os.waitpid(keeper, 0)


def run(*command: str, **options: object) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def what_is_missing(programs: Sequence[str], packages: str) -> str:
    """Why this machine cannot do it; empty when it can."""
    missing = [name for name in ("ip", *programs) if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, {packages})"
    probe = f"aio{os.getpid()}x"
    try:
        run("ip", "netns", "add", probe)
        run("ip", "netns", "exec", probe, "true")
        run("ip", "netns", "del", probe)
    except RuntimeError as error:
        return f"network namespaces are not allowed here ({error}); run it as root"
    return ""


def wait_for(condition: Callable[[], bool], seconds: float, what: str, log: Path) -> None:
    """Wait until something holds; ends the program with the end of `log` when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            said = log.read_text()[-3000:] if log.exists() else "nothing"
            raise SystemExit(f"{what} did not happen in {seconds:.0f} s; the end of {log.name}:\n{said}")
        time.sleep(0.05)
