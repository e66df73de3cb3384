"""The files in launch/ pass their checkers and start the run that they describe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("name", ["ssh.sh", "torchrun.sh", "slurm.sbatch"])
def test_shell_files_pass_shellcheck(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_train_job_fits_its_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    content = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(content).to_dict() == content  # unknown keys would be lost


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_ssh_and_torchrun_start_the_run_and_resume_it_when_there_is_something(tmp_path: Path, flags: list) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if flags:
        (run / "checkpoint-5").mkdir()
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\n\nnode-1 slots=8\nnode-2 slots=8\n")
    for command in ("deepspeed", "torchrun"):
        (tmp_path / command).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / command).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    train = ["allinone_ds.train", "a.yaml", f"output_dir={run}", "trainer.max_steps=5", *flags]
    for script, first in ((["ssh.sh", str(hosts)], "node-1"), (["torchrun.sh"], "127.0.0.1:29500")):
        command = ["bash", str(LAUNCH / script[0]), *script[1:], "a.yaml", str(run), "trainer.max_steps=5"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said[-len(train) :] == train
        assert first in said


def test_torchrun_is_not_the_first_to_give_up_on_a_network_that_is_down_for_a_minute() -> None:
    """TCP tries again 102 s after the last packet before a cut of 60 s; torchrun would give up after 60 s."""
    patience = re.search(r"--rdzv_conf read_timeout=(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert patience and int(patience[1]) > 2 * 102


def test_variables_of_the_example_are_lines_of_name_and_value() -> None:
    for line in (LAUNCH / "deepspeed_env.example").read_text().splitlines():
        assert re.fullmatch(r"[A-Z_]+=\S+", line), line


def test_two_hosts_names_the_programs_that_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "two_hosts.py")],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped: needs ip, sshd" in done.stdout, done.stderr
