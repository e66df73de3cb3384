"""Launch files pass their checkers; the doctor sees what is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from allinone_ds.machine import doctor
from tests.launcher import run_ranks

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


def test_a_key_in_deepspeed_env_is_refused_and_seen(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=8\n")
    (tmp_path / "deepspeed").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "deepspeed").chmod(0o755)
    for line, status in (("WANDB_API_KEY=4711", 2), ("hf_token=4711", 2), ("WANDB_MODE=offline", 0)):
        (tmp_path / ".deepspeed_env").write_text(f"HF_HOME=/shared\n{line}\n")
        done = subprocess.run(
            ["bash", str(LAUNCH / "ssh.sh"), "hosts", "a.yaml", "run"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status and ("started" in done.stdout) == (status == 0), done.stderr
        assert "4711" not in done.stdout + done.stderr
        found = doctor.secrets([tmp_path])
        assert bool(found) == bool(status) and "4711" not in str(found)
        assert not found or line.partition("=")[0] in found[0].found


def test_the_doctor_puts_a_bandwidth_into_words(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"all_reduce": 2.0, "reduce_scatter": 3.0}
    result = {"ranks": 2, "backend": "nccl", "GB/s": {str(2**26): speeds}, "clocks_differ_s": 7.0}
    found = {finding.what: finding for finding in doctor.bandwidth_findings(result)}
    assert "all-reduce 2.00 GB/s, reduce-scatter 3.00 GB/s (2 ranks, nccl)" in found["64 MiB"].found
    assert found["gradients"].level == "warning" and "0.6 s" in found["gradients"].found
    assert found["clocks"].level == "warning" and "7.0 s" in found["clocks"].found
    result |= {"clocks_differ_s": 0.1, "backend": "gloo"}
    assert [finding.level for finding in doctor.bandwidth_findings(result)] == ["ok", "ok"]
    said = "[rank1]: Traceback\n[rank1]: RuntimeError: Unable to find address for: nosuch0\n=======\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: failed)
    (ranks,) = doctor.bandwidth(2)
    assert ranks.level == "error" and ranks.found.endswith("RuntimeError: Unable to find address for: nosuch0")


def test_variables_of_the_example_are_lines_of_name_and_value() -> None:
    for line in (LAUNCH / "deepspeed_env.example").read_text().splitlines():
        assert re.fullmatch(r"[A-Z_]+=\S+", line), line


def test_two_hosts_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "two_hosts.py")],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped: needs ip, sshd" in done.stdout, done.stderr


def test_the_doctor_knows_the_supported_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(finding.level == "ok" for finding in doctor.versions() if finding.what in doctor.PACKAGES)
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "0.17.1" if name == "deepspeed" else real(name)
    )
    wrong = [finding for finding in doctor.versions() if finding.level == "error"]
    assert len(wrong) == 1 and "0.17.1" in wrong[0].found and "pip install 'deepspeed<0.20" in wrong[0].advice


def test_the_doctor_sees_a_wrong_interface_and_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    wrong = [finding for finding in doctor.network() if finding.level == "error"]
    assert len(wrong) == 1 and "nosuch0" in wrong[0].found and "lo" in wrong[0].advice
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert not [finding for finding in doctor.network() if finding.level == "error"]
    with doctor.socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert doctor.port().level == "warning"
    assert doctor.port().level == "ok"


def test_the_doctor_looks_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.what: finding for finding in doctor.disk(tmp_path / "not" / "yet")}
    assert set(found) == {"file system", "free disk", "writing", "clock"}
    assert str(tmp_path) in found["file system"].found and found["clock"].level == "ok"
    assert not list(tmp_path.iterdir())
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() - 100)
    assert {finding.what: finding for finding in doctor.disk(tmp_path)}["clock"].level == "warning"


def test_bandwidth_is_measured_between_ranks(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "import torch.distributed as dist\n"
        "from allinone_ds.machine import bandwidth\n"
        "bandwidth.SECONDS, bandwidth.SIZES = 0.05, (2**16,)\n"
        "dist.init_process_group('gloo')\n"
        "result = bandwidth.run()\n"
        "if dist.get_rank() == 0:\n"
        "    pathlib.Path(sys.argv[1]).write_text(json.dumps(result))\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    result = run_ranks(script, 2, tmp_path)
    assert result["ranks"] == 2 and abs(result["clocks_differ_s"]) < 60
    assert all(speed > 0 for speed in result["GB/s"][str(2**16)].values())
