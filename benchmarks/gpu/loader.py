"""Part `loader`: images per second from JPEG files of 1024 pixels to the device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg, read_file

from benchmarks.gpu.part import Run


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per way to decode, and one of the train loader."""
    side, count = run.pick(1024, 64), run.pick(64, 8)
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder), side, count)
        data = [read_file(str(file)) for file in files]
        for device in ("cpu", "cuda")[: 1 + run.on_gpu]:
            try:
                seconds = run.time(lambda device=device: decoded(data, device), repeats=3, warm_up=1)
                yield {"what": f"decode_jpeg on {device}, one process", "side": side, "images_per_s": count / seconds}
            except RuntimeError as error:
                yield {"what": f"decode_jpeg on {device}", "error": str(error)[:300]}
        host = torch.stack(decoded(data, "cpu"))
        host = host.pin_memory() if run.on_gpu else host
        seconds = run.time(lambda: host.to(run.device, non_blocking=True))
        yield {"what": "copy to the device, pinned", "side": side, "images_per_s": count / seconds}
    yield from loaded(run)


def photos(folder: Path, side: int, count: int) -> list[Path]:
    """Write JPEG files of smooth noise, which compresses as photos do, and return them."""
    files = []
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)[0]
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(bytes(encode_jpeg((image * 255).byte(), quality=90).numpy()))
    return files


def decoded(data: list[Any], device: str) -> list[Any]:
    """Return the images of JPEG files as tensors on a device."""
    if device == "cpu":
        return [decode_jpeg(one, mode=ImageReadMode.RGB) for one in data]
    return decode_jpeg(data, mode=ImageReadMode.RGB, device=device)  # type: ignore[return-value]


def loaded(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the images per second of the train loader with the transforms of configs/augment, for detection."""
    from allinone_ds.data.demo import DemoSizes, SceneLook, make_demo_data
    from benchmarks.speed.data_loader import SIDES, loader

    side, cores = run.pick(1024, 64), len(os.sched_getaffinity(0))
    SIDES["detection"] = side
    with tempfile.TemporaryDirectory() as folder:
        counts = {"detection": (run.pick(64, 4), 1), "segmentation": (1, 1), "classification": (1, 1)}
        sizes = DemoSizes(**counts, detection_look=SceneLook(size=side))  # type: ignore[arg-type]
        root = Path(folder) / "data"
        make_demo_data(root, sizes=sizes, progress=False)
        branch = next(iter(_branches()))
        images = run.pick(256, 8)
        yield {"what": f"train loader, detection, branch {branch}, {cores} workers", "side": side,
               "images_per_s": loader("detection", root, branch, images, cores)}  # fmt: skip


def _branches() -> list[str]:
    from allinone_ds.run_config.yaml_files import read_yaml

    return list(read_yaml("configs/augment/detection.yaml")["branches"])
