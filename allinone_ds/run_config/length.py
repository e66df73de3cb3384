"""The length of a run in optimizer steps, from its length in epochs of a task."""

from __future__ import annotations

import math
from collections.abc import Mapping

from allinone_ds.data.loading.sampling import TaskSampling
from allinone_ds.run_config.schema import RunConfig


def steps_of_epochs(config: RunConfig, samples: Mapping[str, int], ranks: int, seed: int = 0) -> int | None:
    """Return the optimizer steps that the key `epochs` stands for; None without the key.

    With `sampling` these are the steps after which the task has run often enough.

    Args:
        config: configuration of the run.
        samples: task or joint group -> number of its training samples.
        ranks: number of ranks R.
        seed: seed of the run's data.

    Example:
        >>> from allinone_ds.run_config.schema import load_config
        >>> run = load_config("configs/runs/demo.yaml", ["trainer=null", "epochs={detection: 3}"])
        >>> steps_of_epochs(run, {"detection": 40}, ranks=2)    # 6 images per rank and step
        10
        >>> run = load_config("configs/runs/demo.yaml", ["epochs={detection: 3}", "sampling={every: {detection: 4}}"])
        >>> steps_of_epochs(run, {"detection": 40, "segmentation": 8, "classification": 8}, ranks=2)
        37
    """
    if config.epochs is None:
        return None
    [(name, count)] = config.epochs.items()
    images = config.images[name]
    runs = math.ceil(count * samples[name] / (images.batch_size * images.micro_steps * ranks))
    if config.sampling is None:
        return runs
    return TaskSampling(config.sampling, {name: samples[name] for name in config.images}, seed).steps_for(name, runs)
