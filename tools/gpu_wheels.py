"""Collect the wheels that a GPU machine without a network needs besides torch and the usual scientific packages.

    make gpu-wheels                             # fills build/gpu-wheels for Python 3.12
    make gpu-wheels GPU_PYTHON=3.11             # for a different one

On the machine, in a checkout: python3 -m pip install --no-index --no-deps build/gpu-wheels/*.whl, then
python3 -m benchmarks.gpu --out DIR. Versions are those of this environment; DeepSpeed is built from its source, without
compiled kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LARGEST = 64 << 20
"""Bytes that the folder may have."""
THERE = set(
    """
accelerate aiohttp certifi charset-normalizer click contourpy cycler einops filelock fonttools fsspec hf-xet httpx
huggingface-hub idna jinja2 kiwisolver lightning-utilities markdown-it-py markupsafe matplotlib mpmath msgpack networkx
ninja numpy packaging pandas pillow psutil py-cpuinfo pyarrow pygments pyparsing python-dateutil pyyaml regex requests
rich safetensors scipy setuptools six sympy tokenizers torch torchmetrics torchvision tqdm transformers triton
typer typing-extensions tzdata urllib3 xxhash
""".split()
)
"""What such a machine has: torch, transformers, the scientific packages, and what they bring."""
FROM_SOURCE = {"deepspeed", "antlr4-python3-runtime"}
"""Packages without wheels."""


def needed(package: str) -> dict[str, str]:
    """Return name -> version here of every requirement of a package, and of theirs, that is not in `THERE`."""
    found: dict[str, str] = {}
    for line in requires(package) or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or name in THERE or name.startswith(("nvidia-", "cuda-")):
            continue
        try:
            found = {name: version(name), **needed(name), **found}
        except PackageNotFoundError as error:
            raise SystemExit(f"{package} needs {name}, which is not installed here; run make setup") from error
    return found


def main() -> int:
    """Fill the folder that is the first argument, for the Python that is the second; return the exit status."""
    folder, python = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_17", "manylinux_2_28")]
    for name, number in needed("allinone_ds").items():
        if name in FROM_SOURCE:
            command = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
        else:
            command = [*pip, "download", "--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms]
            command.append(f"--dest={folder}")
        subprocess.run([*command, f"{name}=={number}"], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    wheels = sorted(folder.glob("*.whl"), key=lambda file: -file.stat().st_size)
    total = sum(file.stat().st_size for file in wheels)
    for file in wheels:
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")
    print(f"{total / 2**20:6.2f} MiB  of {LARGEST >> 20} allowed, in {folder}")
    return int(total > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
