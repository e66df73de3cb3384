"""Two hosts on one machine: train on both through `deepspeed --hostfile`, lose one, go on from the checkpoint.

    sudo python launch/two_hosts.py                   # a minute or two on 2 cores

The hosts are two network namespaces joined by a virtual cable, each with an sshd of its own; the shared file system is
this machine's. The DeepSpeed launcher starts a shortened demo on both over ssh (pdsh). After the second checkpoint the
cable of host B is cut and all of its processes are killed: the run must say that rank 1 is gone, and the second start
must go on from the last checkpoint to the end. Everything made here (namespaces, what runs in them, keys) is removed
again by a process of its own that waits for this one to end, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from allinone_ds.data.demo import DemoSizes, make_demo_data
from allinone_ds.training.folder import checkpoints

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("ip", "sshd", "ssh-keygen", "pdsh")
ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}


class Hosts:
    """Two namespaces `aioPIDa` and `aioPIDb` with one sshd each.

    Args:
        folder: for keys and configurations.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {host: f"aio{os.getpid()}{host}" for host in ADDRESSES}
        self.daemons: dict[str, subprocess.Popen] = {}

    def make(self) -> None:
        for name in self.names.values():
            run("ip", "netns", "add", name)
        a, b = self.names["a"], self.names["b"]
        run("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host, name in self.names.items():
            run("ip", "-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "eth0", "up")
        for key in ("user", "host"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        (self.folder / "ssh_config").write_text(
            f"Host *\n Port 2222\n IdentityFile {self.folder}/user\n IdentitiesOnly yes\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
            " ServerAliveInterval 3\n ServerAliveCountMax 3\n"  # else ssh, and pdsh, wait for a lost host for ever
        )
        for host in ADDRESSES:
            self.start_sshd(host)

    def start_sshd(self, host: str) -> None:
        file = self.folder / f"sshd_{host}"
        file.write_text(
            f"Port 2222\nListenAddress {ADDRESSES[host]}\nHostKey {self.folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/authorized\nStrictModes no\nPermitRootLogin prohibit-password\n"
            "UsePAM no\nPasswordAuthentication no\nLogLevel ERROR\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        command = self.inside(host, str(shutil.which("sshd")), "-D", "-e", "-f", str(file))
        self.daemons[host] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def inside(self, host: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]

    def kill_all(self, host: str) -> int:
        """Kill every process of a host, by its number; returns how many there were."""
        killed = 0
        while pids := run("ip", "netns", "pids", self.names[host]).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            killed += len(pids)
            if host in self.daemons:
                self.daemons.pop(host).wait()
            time.sleep(0.1)
        return killed

    def lose(self, host: str) -> int:
        """Cut the cable, so that nobody hears of it, then kill what runs there."""
        run("ip", "-n", self.names[host], "link", "set", "eth0", "down")
        return self.kill_all(host)

    def bring_back(self, host: str) -> None:
        run("ip", "-n", self.names[host], "link", "set", "eth0", "up")
        self.start_sshd(host)

    def remove(self) -> None:
        known = run("ip", "netns", "list").split()
        for host, name in self.names.items():
            if name in known:
                self.kill_all(host)
                run("ip", "netns", "del", name)

    @contextlib.contextmanager
    def removed_at_the_end(self) -> Iterator[None]:
        """Remove the hosts and the folder at the end of the block, or of this process if it is killed before."""
        ear, mouth = os.pipe()  # nothing is said: the pipe closes when this process ends
        keeper = os.fork()
        if keeper == 0:
            status = 1
            try:
                os.setsid()  # a signal to this process's group is not for the keeper
                os.close(mouth)
                os.read(ear, 1)
                self.daemons.clear()  # children of the other process
                self.remove()
                shutil.rmtree(self.folder)
                status = 0
            finally:
                os._exit(status)
        os.close(ear)
        try:
            yield
        finally:
            os.close(mouth)
            os.waitpid(keeper, 0)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def what_is_missing() -> str:
    """Why this machine cannot do it; empty when it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, openssh-server, pdsh)"
    probe = f"aio{os.getpid()}x"
    try:
        run("ip", "netns", "add", probe)
        run("ip", "netns", "del", probe)
    except RuntimeError as error:
        return f"network namespaces are not allowed here ({error}); run it as root"
    return ""


def start(hosts: Hosts, folder: Path, log: Path, *flags: str) -> subprocess.Popen:
    """The DeepSpeed launcher on host A, for both hosts."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    variables = {
        "GLOO_SOCKET_IFNAME": "eth0",  # else gloo listens at 127.0.0.1 and the ranks never meet
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    (folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh_check"]
    deepspeed += ["--master_addr", ADDRESSES["a"], "--module", "allinone_ds.train", "configs/runs/demo.yaml"]
    deepspeed += [f"data_root={folder / 'data'}", f"output_dir={folder / 'run'}", "trainer.max_steps=30"]
    deepspeed += ["trainer.save_steps=5", "trainer.save_total_limit=2", "trainer.stall_timeout=8", *flags]
    environment = {
        **os.environ,
        **variables,
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config",
    }
    with log.open("ab") as sink:
        return subprocess.Popen(
            hosts.inside("a", *deepspeed), cwd=folder, env=environment, stdout=sink, stderr=subprocess.STDOUT
        )


def wait_for(condition, seconds: float, what: str, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(
                f"{what} did not happen in {seconds:.0f} s; the end of the log:\n{log.read_text()[-3000:]}"
            )
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="copy the run's log there")
    args = parser.parse_args()
    if missing := what_is_missing():
        print(f"skipped: {missing}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    print("two hosts in two network namespaces", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    hosts, log = Hosts(folder), folder / "log"
    with hosts.removed_at_the_end():
        try:
            return lose_one_and_go_on(hosts, folder, log)
        finally:
            if args.keep and log.exists():
                shutil.copy(log, args.keep)


def lose_one_and_go_on(hosts: Hosts, folder: Path, log: Path) -> int:
    begun, output = time.monotonic(), folder / "run"
    sizes = DemoSizes(detection=(24, 4), segmentation=(24, 4), classification=(24, 4))
    make_demo_data(folder / "data", sizes=sizes, progress=False)
    hosts.make()
    first = start(hosts, folder, log)
    wait_for(lambda: len(checkpoints(output)) >= 2 or first.poll() is not None, 240, "the second checkpoint", log)
    lost = time.monotonic()
    killed = hosts.lose("b")
    wait_for(lambda: first.poll() is not None, 120, "the end of the run that lost a host", log)
    seconds = time.monotonic() - lost
    at = checkpoints(output)[-1].name
    said = next((s for s in log.read_text().splitlines() if "error: " in s and "rank" in s), "nothing was said")
    print(f"host B lost ({killed} processes killed); the run ended after {seconds:.1f} s and said:\n  {said}")
    hosts.kill_all("a")
    hosts.start_sshd("a")
    hosts.bring_back("b")
    second = start(hosts, folder, log, "--resume")
    wait_for(lambda: second.poll() is not None, 240, "the end of the resumed run", log)
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "begin"]
    whole = (output / "metrics.json").is_file() and second.returncode == 0
    print(f"resumed from {at} at step {steps[-1]}; {'ended whole' if whole else 'FAILED'}", end=" ")
    print(f"after {time.monotonic() - begun:.0f} s in all")
    good = whole and len(steps) == 2 and at == f"checkpoint-{steps[1]}" and "rank 1" in said
    if not good:
        print(log.read_text()[-3000:])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
