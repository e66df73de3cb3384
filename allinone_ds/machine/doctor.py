"""`allinone-ds doctor`: what this machine offers a run, what is wrong with it, and what to do, in words."""

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

import psutil
from packaging.requirements import Requirement

from allinone_ds.machine.findings import Finding, between_ranks

PACKAGES = ("torch", "torchvision", "transformers", "deepspeed", "accelerate")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")


def versions() -> list[Finding]:
    """Installed versions against the ranges that this package supports."""
    found = [Finding("python", platform.python_version())]
    try:
        wanted = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("allinone_ds") or [])}
    except importlib.metadata.PackageNotFoundError:
        wanted = {}
        found.append(Finding("allinone_ds", "not installed", "warning", "install it: ranges of versions are not known"))
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
    """GPUs with their memory, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        memory = psutil.virtual_memory().total / 2**30
        driver = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
        return [
            Finding(
                "accelerator",
                f"none; {os.cpu_count()} CPU cores, {memory:.0f} GiB",
                "error" if driver else "warning",
                "a GPU driver is here but torch cannot use it: install the torch build for it"
                if driver
                else "runs train on the CPU, through gloo",
            )
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.9 * total
        found.append(
            Finding(
                f"GPU {index}",
                f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
                "warning" if busy else "ok",
                "somebody else uses it" if busy else "",
            )
        )
    if not torch.cuda.is_bf16_supported():
        found.append(Finding("bf16", "not supported by these GPUs", "warning", "use fp16 or fp32 DeepSpeed files"))
    return found


def compilers() -> list[Finding]:
    """What DeepSpeed builds its kernels with."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    ninja = shutil.which("ninja") or shutil.which(str(Path(sys.executable).with_name("ninja")))
    need = "only DeepSpeed's own optimizers (CPU offload) need it"
    return [
        Finding("C++ compiler", compiler or "none", "ok" if compiler else "warning", "" if compiler else need),
        Finding("ninja", ninja or "none", "ok" if ninja else "warning", "" if ninja else f"pip install ninja; {need}"),
    ]


def network() -> list[Finding]:
    """Interfaces that NCCL and gloo may use, and what they are told to use."""
    stats = psutil.net_if_stats()
    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
        if stats.get(name) and stats[name].isup
    }
    outer = {name: ips for name, ips in addresses.items() if ips and not ips[0].startswith("127.")}
    shown = ", ".join(f"{name} {ips[0]} ({stats[name].speed or '?'} Mbit/s)" for name, ips in outer.items())
    found = [
        Finding(
            "interfaces",
            shown or "only loopback",
            "ok" if outer else "warning",
            "" if outer else "other hosts cannot be reached; one host is fine",
        )
    ]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        told = os.environ.get(variable)
        names = [n.lstrip("^=") for n in (told or "").split(",") if n]
        wrong = [n for n in names if not any(have.startswith(n) for have in addresses)]
        if wrong:
            found.append(
                Finding(variable, f"{told}: there is no such interface", "error", f"use one of {', '.join(addresses)}")
            )
        elif told:
            found.append(Finding(variable, told))
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "unknown"
    if not own.startswith("127.") and own != "unknown":
        found.append(Finding("host name", f"{socket.gethostname()} is {own}"))
    elif outer and "GLOO_SOCKET_IFNAME" not in os.environ:
        found.append(
            Finding(
                "host name",
                f"{socket.gethostname()} is {own}",
                "warning",
                "gloo would listen where other hosts cannot reach it: on several hosts set GLOO_SOCKET_IFNAME (and "
                f"NCCL_SOCKET_IFNAME) to {next(iter(outer))}, in ./.deepspeed_env for the DeepSpeed launcher",
            )
        )
    return found


def port() -> Finding:
    """Whether the ranks' meeting point is free."""
    number = int(os.environ.get("MASTER_PORT", 29500))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            return Finding(
                "port", f"{number}: {error.strerror}", "warning", "set MASTER_PORT, or end the run that uses it"
            )
    return Finding("port", f"{number} is free")


def disk(folder: Path) -> list[Finding]:
    """The folder that runs are written to: kind, room, speed, and its clock."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint))
    inside = [mount for mount in mounts if place == Path(mount.mountpoint) or Path(mount.mountpoint) in place.parents]
    kind = inside[-1].fstype if inside else "unknown"
    local = kind in LOCAL_FILE_SYSTEMS
    found = [
        Finding(
            "file system",
            f"{place} is {kind}",
            "warning" if kind in ("tmpfs", "ramfs") else "ok",
            "it is lost with the machine"
            if kind in ("tmpfs", "ramfs")
            else ("it is this machine's own: a run on several hosts needs a shared one" if local else ""),
        )
    ]
    free = shutil.disk_usage(place).free / 2**30
    few = free < 20
    room = f"{free:.0f} GiB" if free >= 1 else f"{free * 1024:.0f} MiB"
    advice = "a checkpoint takes about 16 bytes a parameter (Adam, fp32): set trainer.save_total_limit" if few else ""
    found.append(Finding("free disk", room, "warning" if few else "ok", advice))
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
        advice = "let NTP set the clocks: times in logs will not agree, and the newest file is mistaken"
        words = f"{now}; the file system's is {off:+.1f} s off"
        found.append(Finding("clock", words, "warning" if wrong else "ok", advice if wrong else ""))
    except OSError as error:
        found.append(Finding("writing", f"{place}: {error.strerror}", "error", "choose another output_dir"))
    finally:
        probe.unlink(missing_ok=True)
    return found


def limits() -> list[Finding]:
    """Shared memory and open files."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = [Finding("open files", str(files), *(("warning", "ulimit -n 65536") if files < 4096 else ()))]
    if Path("/dev/shm").exists():
        room = shutil.disk_usage("/dev/shm").total / 2**30
        small = room < 1
        advice = "data workers and NCCL need more: docker run --shm-size 16g, or an emptyDir of medium Memory"
        found.append(Finding("/dev/shm", f"{room:.1f} GiB", "warning" if small else "ok", advice if small else ""))
    return found


def bandwidth(ranks: int) -> list[Finding]:
    """All-reduce and reduce-scatter between `ranks` ranks on this machine, ten seconds at most."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    try:
        done = subprocess.run(
            [*command, "-m", "allinone_ds.bandwidth"], env=environment, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return [Finding("ranks", "did not meet in 2 minutes", "error", "look at interfaces and host name above")]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = re.findall(r"\w+(?:Error|Exception): .*", done.stderr)
        words = errors[0] if errors else (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding("ranks", f"could not talk to each other: {words}", "error", "look at interfaces above")]
    return between_ranks(json.loads(lines[-1]))


def secrets(folders: Sequence[Path]) -> list[Finding]:
    """Names of keys in .deepspeed_env, whose lines the launcher writes into its log and onto command lines."""
    found = []
    for file in (folder / ".deepspeed_env" for folder in folders):
        lines = file.read_text().splitlines() if file.is_file() else []
        names = [name for name in (line.partition("=")[0] for line in lines) if _SECRET.search(name)]
        if names:
            advice = "take it out; `wandb login` and `hf auth login` on the hosts do without"
            words = f"{file} holds {', '.join(names)}: the DeepSpeed launcher shows its lines to everybody"
            found.append(Finding("secrets", words, "error", advice))
    return found


def examine(folder: Path, ranks: int) -> list[Finding]:
    """Everything.

    Args:
        folder: that runs are to be written to.
        ranks: to measure the bandwidth with; below 2 nothing is measured.
    """
    found = [*versions(), *accelerators(), *compilers(), *network(), port(), *disk(folder), *limits()]
    found += secrets([Path(), Path.home()])  # where the launcher looks for it
    return found + (bandwidth(ranks) if ranks > 1 else [])
