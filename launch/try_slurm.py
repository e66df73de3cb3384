"""SLURM on one machine: submit slurm.sbatch, preempt it, let it reach its time limit, and check that it resumes.

    sudo python launch/try_slurm.py                   # a few minutes on 2 cores

The cluster consists of two network namespaces, each with a slurmd that reports 64 CPUs and 8 GPUs (empty files; the
ranks train a shortened demo on the CPU), a controller and a munged. slurm.sbatch is submitted unchanged. A job of a
partition with a higher priority preempts it; later its time limit is reduced, so that SLURM sends SIGUSR1. Both times
it must save a checkpoint, be requeued and resume. A separate process removes everything when this one ends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import yaml
from namespaces import ADDRESSES, Hosts, run, two_hosts, wait_for, what_is_missing

from allinone_ds.data.demo import DemoSizes, make_demo_data
from allinone_ds.run_folder.checkpoints import checkpoints

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")


class SlurmHosts(Hosts):
    """Two hosts of a SLURM cluster: the controller on host A, and one node on each."""

    def make(self) -> None:
        super().make()
        folder = self.folder
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        (folder / "state").mkdir()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        nodes = "".join(
            f"NodeName=node-{host} NodeAddr={address} CPUs=64 RealMemory=1000 Gres=gpu:8\n"
            for host, address in ADDRESSES.items()
        )
        (folder / "slurm.conf").write_text(
            f"ClusterName=try\nSlurmctldHost=node-a({ADDRESSES['a']})\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.sock,cred_expire=20\nStateSaveLocation={folder}/state\n"
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n"
            f"SlurmdSpoolDir={folder}/spool-%n\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            "MpiDefault=none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nGresTypes=gpu\n"
            "SlurmdParameters=config_overrides\nPreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
            f"{nodes}PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=300 State=UP\n"
            "PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP\n"
        )
        gpus = f"File={folder}/gpu[0-7]"
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=node-a,node-b Name=gpu {gpus}\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # required by SLURM, but not used
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun, for the job
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "NPROC": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        munge = [f"--socket={folder}/munge.sock", f"--key-file={folder}/key", f"--pid-file={folder}/munge.pid"]
        munge += [f"--seed-file={folder}/seed", f"--log-file={folder}/munged.log"]
        self.daemon("a", "munged", "--foreground", "--force", *munge)
        wait_for(lambda: (folder / "munge.sock").exists(), 30, "munge's socket", folder / "munged.log")
        self.daemon("a", "slurmctld", "-D", "-i")
        for host in ADDRESSES:
            self.daemon(host, "slurmd", "-D")
        idle = r"node-a +idle\nnode-b +idle\n"
        wait_for(
            lambda: bool(re.fullmatch(idle, self.ask("sinfo", "-hN", "-p", "low", "-o", "%10N %T"))),
            60,
            "two idle nodes",
            folder / "slurmd.log",
        )

    def daemon(self, host: str, name: str, *flags: str) -> None:
        # /sys/fs/cgroup is empty in a namespace, and slurmd requires a mount there
        script = 'hostname "$0"; mount -t tmpfs none /sys/fs/cgroup; exec "$@"'
        command = ["unshare", "--uts", "sh", "-c", script, f"node-{host}", name, *flags]
        self.start(host, *command, log=self.folder / f"{name}.log", env=self.environment)

    def ask(self, *command: str) -> str:
        """Return the output of a SLURM command on host A; empty while the controller does not answer."""
        try:
            return run(*self.inside("a", *command), env=self.environment, cwd=ROOT)
        except RuntimeError as error:
            if "Unable to contact slurm controller" in str(error):
                return ""
            raise


class Job:
    """The submitted job and its run."""

    def __init__(self, hosts: SlurmHosts) -> None:
        self.hosts, self.run, self.log = hosts, hosts.folder / "run", hosts.folder / "job.log"
        self.config = hosts.folder / "run.yaml"
        self.content = yaml.safe_load((ROOT / "configs/runs/demo.yaml").read_text())
        self.content["data_root"] = str(hosts.folder / "data")
        self.write_config(10**5)
        variables = f"ALL,CONFIG={self.config},RUN={self.run}"
        output = hosts.ask(
            "sbatch", "--parsable", f"--output={self.log}", f"--export={variables}", "launch/slurm.sbatch"
        )
        self.number = output.strip()

    def write_config(self, steps: int) -> None:
        trainer = {**self.content["trainer"], "max_steps": steps, "save_steps": 10, "save_total_limit": 2}
        self.config.write_text(yaml.safe_dump({**self.content, "trainer": trainer}))

    def details(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.hosts.ask("scontrol", "show", "job", self.number)))

    def events(self, kind: str) -> list[dict]:
        """Return the events of one kind in the log of the run."""
        log = self.run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def starts(self, count: int) -> None:
        """Wait until the run has started `count` times and has saved a new checkpoint."""
        self.wait(lambda: len(self.events("begin")) == count, 300, f"start {count} of the run")
        started = self.events("begin")[-1]["step"]
        self.wait(lambda: self.last() > started, 300, f"a checkpoint after start {count}")

    def last(self) -> int:
        """Return the step of the last checkpoint."""
        return max([0, *(int(path.name.rpartition("-")[2]) for path in checkpoints(self.run))])

    def stops(self, count: int, why: str) -> None:
        """Wait until the run has stopped `count` times and the job is requeued."""
        started = time.monotonic()
        self.wait(lambda: len(self.events("stopped")) == count, 300, f"a stop after {why}")
        seconds, event = time.monotonic() - started, self.events("stopped")[-1]
        self.wait(lambda: self.details().get("Restarts") == str(count), 120, f"requeue {count}")
        print(f"{why}: saved and stopped at step {event['step']} after {seconds:.0f} s; requeued", flush=True)

    def wait(self, condition, seconds: float, what: str) -> None:
        wait_for(condition, seconds, what, self.log)


def main() -> int:
    if missing := what_is_missing(PROGRAMS, "slurmctld, slurmd, slurm-client, munge"):
        print(f"skipped: {missing}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with two_hosts(SlurmHosts) as hosts:
        sizes = DemoSizes(detection=(24, 4), segmentation=(24, 4), classification=(24, 4))
        make_demo_data(hosts.folder / "data", sizes=sizes, progress=False)
        hosts.make()
        job = Job(hosts)
        print(f"submitted launch/slurm.sbatch as job {job.number}: {hosts.ask('slurmd', '-V').strip()}, two nodes")
        job.starts(1)
        other = ["--partition=high", "--nodes=2", "--exclusive", f"--output={hosts.folder}/other.log"]
        hosts.ask("sbatch", *other, "--wrap=sleep 3")
        job.stops(1, "preempted by a job of a higher priority")
        job.starts(2)
        ran = job.details()["RunTime"].split(":")  # [days-]hours, minutes, seconds
        hosts.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(ran[-2]) + 2}")
        job.stops(2, "less than 300 s left (SIGUSR1)")
        job.write_config(job.last() + 20)
        hosts.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        job.wait(lambda: job.details().get("JobState") in states, 300, "the end of the job")
        started = [event["step"] for event in job.events("begin")]
        stopped = [event["step"] for event in job.events("stopped")]
        state, finished = job.details()["JobState"], (job.run / "metrics.json").is_file()
        print(f"starts at steps {started}, stops at steps {stopped}; the job is {state}")
        passed = state == "COMPLETED" and finished and started == [0, *stopped] and len(stopped) == 2
        if not passed:
            print(job.log.read_text()[-3000:])
        return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
