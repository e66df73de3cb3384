"""Images per processor second of several loaders on the same files, with the same decoder, resize and flip."""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

BATCH = 8
_WARM_UP = 4  # batches that are not timed


def photo(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG cut out of a photo, with the noise of a camera, of quality 90."""
    from allinone_ds.data.demo.scenes import load_pool

    rng = np.random.default_rng(seed)
    pool = load_pool("train")
    picture = pool.photos[seed % len(pool.photos)].resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32) + rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class PlainDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The usual dataset of files: decode, flip, resize."""

    def __init__(self, files: Sequence[str], side: int, decode: Callable[[str], torch.Tensor]) -> None:
        from torchvision.transforms import v2

        self.files, self.decode = list(files), decode
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), v2.Resize([side, side], antialias=True)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.decode(self.files[index]))


def with_torchvision(file: str) -> torch.Tensor:
    """Decode a JPEG with torchvision."""
    from torchvision import io as torchvision_io

    return torchvision_io.decode_jpeg(torchvision_io.read_file(file), torchvision_io.ImageReadMode.RGB)


def with_pillow(file: str) -> torch.Tensor:
    """Decode an image with Pillow."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def _package(files: Sequence[str], side: int, batches: int) -> Iterator[Any]:
    from allinone_ds.data.augmentation.transforms import stack_pixels, train_transform
    from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
    from allinone_ds.data.loading.loader import train_loader
    from allinone_ds.data.loading.schedule import Schedule
    from allinone_ds.data.loading.task_data import TaskData

    dataset = ClassifiedDataset("photos", Path("/"), list(files), [0] * len(files), ["one"])
    transform = train_transform(["RandomHorizontalFlip"], (side, side))

    def collate(samples: Any) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(samples)}

    data = {"photos": TaskData(dataset, transform, collate, BATCH)}
    schedule = Schedule(0, {"photos": len(files)}, {"photos": (BATCH, 1)}, world_size=1)
    return iter(train_loader(data, schedule, 0, 0, batches, num_workers=1))


def _plain(decode: Callable[[str], torch.Tensor], loader: Any) -> Callable[[Sequence[str], int, int], Iterator[Any]]:
    def batches(files: Sequence[str], side: int, count: int) -> Iterator[Any]:
        dataset = PlainDataset([*files] * -(-count * BATCH // len(files)), side, decode)
        return iter(loader(dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=1))

    return batches


def loaders() -> dict[str, Callable[[Sequence[str], int, int], Iterator[Any]]]:
    """Return name -> function of files, side and number of batches that returns the batches; each has one worker."""
    from torch.utils.data import DataLoader

    found = {
        "this package": _package,
        "DataLoader": _plain(with_torchvision, DataLoader),
        "DataLoader, Pillow": _plain(with_pillow, DataLoader),
    }
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        print("torchdata is not installed: its loader is left out")
    else:
        found["torchdata's StatefulDataLoader"] = _plain(with_torchvision, StatefulDataLoader)
    return found


def rate(batches: Iterator[Any], count: int) -> float:
    """Return the images per second of a processor, of which the worker and this process use some.

    Args:
        batches: of a loader with one worker.
        count: number of batches in all.
    """
    for _ in range(_WARM_UP):
        next(batches)
    [worker] = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    before = time.process_time() + sum(worker.cpu_times()[:2])
    for _ in range(count - _WARM_UP - 1):  # the worker lives until the last batch
        next(batches)
    used = time.process_time() + sum(worker.cpu_times()[:2]) - before
    for _ in batches:
        pass
    return (count - _WARM_UP - 1) * BATCH / used
