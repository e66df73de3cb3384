"""The doctor finds what is wrong on a machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from allinone_ds.machine import doctor

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


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
