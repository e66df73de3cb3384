"""`allinone-ds doctor`: check this machine, and say what is wrong and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from allinone_ds.machine.findings import Finding, bandwidth_findings

PACKAGES = ("torch", "torchvision", "transformers", "deepspeed", "accelerate")
LOCAL_FILE_SYSTEMS = ("overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


def versions() -> list[Finding]:
    """Compare the installed versions with the ranges that this package supports."""
    found = [Finding("python", platform.python_version())]
    try:
        wanted = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("allinone_ds") or [])}
    except importlib.metadata.PackageNotFoundError:
        wanted = {}
        found.append(Finding("allinone_ds", "not installed", "warning", "install it to check the versions"))
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "not installed", "error", f"pip install '{name}{wanted.get(name, '')}'"))
            continue
        allowed = wanted.get(name)
        if allowed is not None and not allowed.contains(version, prereleases=True):
            found.append(Finding(name, f"{version}, supported {allowed}", "error", f"pip install '{name}{allowed}'"))
        else:
            found.append(Finding(name, f"{version}{f' (supported {allowed})' if allowed is not None else ''}"))
    return found


def accelerators() -> list[Finding]:
    """List the GPUs and their free memory, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        cpu = f"none; {os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
        if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
            advice = "there is a GPU driver, but torch cannot use it: install the torch build for it"
            return [Finding("accelerator", cpu, "error", advice)]
        return [Finding("accelerator", cpu, "warning", "runs train on the CPU and communicate over gloo")]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        in_use = ("warning", "a different process uses it") if free < 0.9 * total else ()
        found.append(Finding(f"GPU {index}", text, *in_use))
    if not torch.cuda.is_bf16_supported():
        found.append(Finding("bf16", "not supported by these GPUs", "warning", "use fp16 or fp32"))
    return found


def compilers() -> list[Finding]:
    """Find the compiler and ninja, which DeepSpeed builds its kernels with."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    ninja = shutil.which("ninja") or shutil.which(str(Path(sys.executable).with_name("ninja")))
    need = "only the optimizers of DeepSpeed (CPU offload) need it"
    return [
        Finding("C++ compiler", compiler or "none", "ok" if compiler else "warning", "" if compiler else need),
        Finding("ninja", ninja or "none", "ok" if ninja else "warning", "" if ninja else f"pip install ninja; {need}"),
    ]


def network() -> list[Finding]:
    """Check the network interfaces, those that NCCL and gloo are configured to use, and the host name."""
    stats = psutil.net_if_stats()
    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
        if stats.get(name) and stats[name].isup
    }
    outer = {name: ips for name, ips in addresses.items() if ips and not ips[0].startswith("127.")}
    shown = ", ".join(f"{name} {ips[0]} ({stats[name].speed or '?'} Mbit/s)" for name, ips in outer.items())
    alone = () if outer else ("warning", "other hosts cannot be reached; runs on this host work")
    found = [Finding("interfaces", shown or "only loopback", *alone)]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        configured = os.environ.get(variable)
        names = [n.lstrip("^=") for n in (configured or "").split(",") if n]
        wrong = [n for n in names if not any(have.startswith(n) for have in addresses)]
        if wrong:
            found.append(
                Finding(
                    variable, f"{configured}: there is no such interface", "error", f"use one of {', '.join(addresses)}"
                )
            )
        elif configured:
            found.append(Finding(variable, configured))
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "unknown"
    name = f"{socket.gethostname()} is {own}"
    if not own.startswith("127.") and own != "unknown":
        found.append(Finding("host name", name))
    elif outer and "GLOO_SOCKET_IFNAME" not in os.environ:
        advice = (
            "gloo would listen on an address that other hosts cannot reach: for runs on several hosts set "
            f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to {next(iter(outer))}, for the DeepSpeed launcher in "
            "./.deepspeed_env"
        )
        found.append(Finding("host name", name, "warning", advice))
    return found


def port() -> Finding:
    """Check whether the port at which the ranks connect (MASTER_PORT) is free."""
    number = int(os.environ.get("MASTER_PORT", 29500))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            advice = "set MASTER_PORT, or end the run that uses it"
            return Finding("port", f"{number}: {error.strerror}", "warning", advice)
    return Finding("port", f"{number} is free")


def disk(folder: Path) -> list[Finding]:
    """Check the folder that runs write to: file system, free space, write speed and clock."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint))
    inside = [mount for mount in mounts if place == Path(mount.mountpoint) or Path(mount.mountpoint) in place.parents]
    kind = inside[-1].fstype if inside else "unknown"
    if kind in ("tmpfs", "ramfs"):
        advice = "its content is lost when the machine stops"
    else:
        advice = "it is local: a run on several hosts needs a shared one" if kind in LOCAL_FILE_SYSTEMS else ""
    level: Literal["ok", "warning"] = "warning" if kind in ("tmpfs", "ramfs") else "ok"
    found = [Finding("file system", f"{place} is {kind}", level, advice)]
    free = shutil.disk_usage(place).free / 2**30
    low = free < 20
    space = f"{free:.0f} GiB" if free >= 1 else f"{free * 1024:.0f} MiB"
    advice = "a checkpoint takes about 16 bytes per parameter (Adam, fp32): set trainer.save_total_limit" if low else ""
    found.append(Finding("free disk", space, "warning" if low else "ok", advice))
    probe = place / f".doctor-{os.getpid()}"
    try:
        start = time.time()
        with probe.open("wb") as file:
            file.write(os.urandom(2**20) * 64)
            file.flush()
            os.fsync(file.fileno())
        end = time.time()
        found.append(Finding("writing", f"{64 / (end - start):.0f} MiB/s, synced"))
        stamp = probe.stat().st_mtime
        off = min(stamp - start, 0.0) + max(stamp - end, 0.0)
        wrong = abs(off) > 5
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        advice = "synchronize the clocks with NTP: times in logs and times of files do not agree"
        words = f"{now}; the clock of the file system differs by {off:+.1f} s"
        found.append(Finding("clock", words, "warning" if wrong else "ok", advice if wrong else ""))
    except OSError as error:
        found.append(Finding("writing", f"{place}: {error.strerror}", "error", "choose a different output_dir"))
    finally:
        probe.unlink(missing_ok=True)
    return found


def limits() -> list[Finding]:
    """Check the limits of shared memory and open files."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = [Finding("open files", str(files), *(("warning", "ulimit -n 65536") if files < 4096 else ()))]
    if Path("/dev/shm").exists():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        small = size < 1
        advice = "data workers and NCCL need more: docker run --shm-size 16g, or an emptyDir of medium Memory"
        found.append(Finding("/dev/shm", f"{size:.1f} GiB", "warning" if small else "ok", advice if small else ""))
    return found


def bandwidth(ranks: int) -> list[Finding]:
    """Measure all-reduce and reduce-scatter between `ranks` ranks on this machine, for up to ten seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    try:
        done = subprocess.run(
            [*command, "-m", "allinone_ds.bandwidth"], env=environment, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return [Finding("ranks", "did not connect within 2 minutes", "error", "check interfaces and host name above")]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = re.findall(r"\w+(?:Error|Exception): .*", done.stderr)
        words = errors[0] if errors else (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding("ranks", f"could not communicate: {words}", "error", "check interfaces above")]
    return bandwidth_findings(json.loads(lines[-1]))


def secrets(folders: Sequence[Path]) -> list[Finding]:
    """Find keys in .deepspeed_env, whose lines the launcher writes to its log and on command lines."""
    found = []
    for file in (folder / ".deepspeed_env" for folder in folders):
        lines = file.read_text().splitlines() if file.is_file() else []
        names = [name for name in (line.partition("=")[0] for line in lines) if _SECRET.search(name)]
        if names:
            advice = "remove it; use `wandb login` and `hf auth login` on the hosts instead"
            words = f"{file} holds {', '.join(names)}: the DeepSpeed launcher makes its lines public"
            found.append(Finding("secrets", words, "error", advice))
    return found


def examine(folder: Path, ranks: int) -> list[Finding]:
    """Run all checks.

    Args:
        folder: folder that runs will write to.
        ranks: ranks of the bandwidth test; below 2 there is no test.
    """
    found = [*versions(), *accelerators(), *compilers(), *network(), port(), *disk(folder), *limits()]
    found += secrets([Path(), Path.home()])  # the folders in which the launcher looks for it
    return found + (bandwidth(ranks) if ranks > 1 else [])
