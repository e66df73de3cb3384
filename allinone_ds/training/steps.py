"""The data of a trainer's steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from allinone_ds.data.loader import StepBatch, train_loader


@dataclass
class Steps:
    """The train loader, opened only when the loop starts and the step to start from is known. It has no length."""

    trainer: Any

    def __iter__(self) -> Iterator[StepBatch]:
        trainer = self.trainer
        args = trainer.args
        data: Any = trainer.train_dataset
        return iter(
            train_loader(
                data,
                trainer.schedule,
                args.process_index,
                trainer.state.global_step,
                trainer.state.max_steps,
                args.dataloader_num_workers,
                args.max_broken_images,
                share=trainer.share,
            )
        )
