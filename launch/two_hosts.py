"""Two hosts on one machine: train on both with `deepspeed --hostfile`, lose one, and resume from the checkpoint.

    sudo python launch/two_hosts.py                   # a minute or two on 2 cores

The hosts are two connected network namespaces, each with an sshd; they share the file system of this machine. The
DeepSpeed launcher starts a shortened demo on both over ssh (pdsh). After the second checkpoint host B is disconnected
and all of its processes are killed: the run must report that rank 1 does not answer, and the second start must resume
from the last checkpoint and finish. A separate process removes the namespaces, their processes and the keys when this
process ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from namespaces import ADDRESSES, Hosts, run, two_hosts, wait_for, what_is_missing

from allinone_ds.data.demo import DemoSizes, make_demo_data
from allinone_ds.run_folder.checkpoints import checkpoints

ROOT = Path(__file__).resolve().parent.parent


class SshHosts(Hosts):
    """Two hosts, each with an sshd on port 2222."""

    def make(self) -> None:
        super().make()
        for key in ("user", "host"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        (self.folder / "ssh_config").write_text(
            f"Host *\n Port 2222\n IdentityFile {self.folder}/user\n IdentitiesOnly yes\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
            " ServerAliveInterval 3\n ServerAliveCountMax 3\n"  # else ssh, and so pdsh, waits for a lost host forever
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
        self.start(host, str(shutil.which("sshd")), "-D", "-e", "-f", str(file), log=self.folder / "sshd.log")

    def reconnect(self, host: str) -> None:
        """Connect a lost host again and start its sshd."""
        run("ip", "-n", self.names[host], "link", "set", "eth0", "up")
        self.start_sshd(host)


def start(hosts: SshHosts, folder: Path, log: Path, *flags: str) -> subprocess.Popen:
    """Start the DeepSpeed launcher on host A for both hosts."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    variables = {
        "GLOO_SOCKET_IFNAME": "eth0",  # else gloo listens on 127.0.0.1 and the ranks cannot connect
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
    return hosts.start("a", *deepspeed, log=log, cwd=folder, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="file to copy the log of the run to")
    args = parser.parse_args()
    if missing := what_is_missing(("sshd", "ssh-keygen", "pdsh"), "openssh-server, pdsh"):
        print(f"skipped: {missing}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    print("two hosts in two network namespaces", flush=True)
    with two_hosts(SshHosts) as hosts:
        log = hosts.folder / "log"
        try:
            return lose_one_and_resume(hosts, hosts.folder, log)
        finally:
            if args.keep and log.exists():
                shutil.copy(log, args.keep)


def lose_one_and_resume(hosts: SshHosts, folder: Path, log: Path) -> int:
    started, output = time.monotonic(), folder / "run"
    sizes = DemoSizes(detection=(24, 4), segmentation=(24, 4), classification=(24, 4))
    make_demo_data(folder / "data", sizes=sizes, progress=False)
    hosts.make()
    first = start(hosts, folder, log)
    wait_for(lambda: len(checkpoints(output)) >= 2 or first.poll() is not None, 600, "the second checkpoint", log)
    lost = time.monotonic()
    killed = hosts.lose("b")
    wait_for(lambda: first.poll() is not None, 300, "the end of the run that lost a host", log)
    seconds = time.monotonic() - lost
    at = checkpoints(output)[-1].name
    message = next((s for s in log.read_text().splitlines() if "error: " in s and "rank" in s), "(no error message)")
    print(f"host B lost ({killed} processes killed); the run ended after {seconds:.1f} s and printed:\n  {message}")
    hosts.kill_all("a")
    hosts.start_sshd("a")
    hosts.reconnect("b")
    second = start(hosts, folder, log, "--resume")
    wait_for(lambda: second.poll() is not None, 600, "the end of the resumed run", log)
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "begin"]
    finished = (output / "metrics.json").is_file() and second.returncode == 0
    print(f"resumed from {at} at step {steps[-1]}; {'finished' if finished else 'FAILED'}", end=" ")
    print(f"after {time.monotonic() - started:.0f} s in total")
    passed = finished and len(steps) == 2 and at == f"checkpoint-{steps[1]}" and "rank 1" in message
    if not passed:
        print(log.read_text()[-3000:])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
