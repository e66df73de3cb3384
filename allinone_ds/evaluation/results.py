"""The files that `allinone-ds predict` writes: records, and pictures and videos with the predictions drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.inputs import Input, results_of
from allinone_ds.evaluation.video import Frame, VideoWriter, frame_rate
from allinone_ds.tasks import Prediction, Task
from allinone_ds.tasks.drawing import sheet, to_pil

RECORDS = "predictions.jsonl"


class Results:
    """Writes the predictions of several tasks on images and videos to a folder.

    Args:
        folder: the folder; it is created.
        tasks: the tasks by name.
        groups: joint group -> its tasks, whose drawings of an image are put on one sheet.
        every: of a video, each `every`-th frame is added; the written video has the speed of the original.

    Attributes:
        written: the files written for single inputs, in the order of the inputs.

    Raises:
        ConfigError: the folder cannot be written to.

    Example::

        with Results(Path("out"), predictor.tasks) as results:
            results.add_image(Input(Path("a.jpg"), "a"), image, {"det": predictor.predict(image, "det")[0]})
    """

    def __init__(
        self,
        folder: Path,
        tasks: Mapping[str, Task],
        groups: Mapping[str, Sequence[str]] | None = None,
        every: int = 1,
    ) -> None:
        self.folder, self.tasks, self.groups, self.every = folder, dict(tasks), dict(groups or {}), every
        self.written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = (folder / RECORDS).open("w")
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written to: {error.strerror}") from error
        self._videos: dict[str, VideoWriter] = {}
        self._open = ExitStack()

    def add_image(self, item: Input, image: Tensor, predictions: Mapping[str, Prediction]) -> None:
        """Write a record, NAME.json, and a picture per task and joint group.

        Args:
            item: the input.
            image: uint8 (3, H, W).
            predictions: {task: prediction}.
        """
        record = self._record({"image": str(item.file)}, predictions)
        report, *pictures = (self.folder / name for name in results_of(item.name, [*self.tasks, *self.groups]))
        report.parent.mkdir(parents=True, exist_ok=True)
        drawn = {name: task.draw(image, predictions[name]) for name, task in self.tasks.items()}
        drawn |= {group: sheet(image, {name: drawn[name] for name in names}) for group, names in self.groups.items()}
        for picture, drawing in zip(pictures, drawn.values(), strict=True):
            to_pil(drawing).save(picture)
        report.write_text(json.dumps(record) + "\n")
        self.written += [*pictures, report]

    def add_frame(self, item: Input, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        """Write a record of a frame, and append it to the video of each task."""
        self._record({"video": str(item.file), "frame": frame.number, "seconds": frame.seconds}, predictions)
        _, *pictures = (self.folder / name for name in results_of(item.name, list(self.tasks)))
        for picture, (name, task) in zip(pictures, self.tasks.items(), strict=True):
            if name not in self._videos:
                target = picture.with_suffix(".mp4")
                target.parent.mkdir(parents=True, exist_ok=True)
                rate = frame_rate(item.file) / self.every
                self._videos[name] = self._open.enter_context(VideoWriter(target, rate))
                self.written.append(target)
            self._videos[name].add(to_pil(task.draw(frame.image, predictions[name])))

    def end_video(self) -> None:
        """Finish the videos that frames were added to."""
        self._videos = {}
        self._open.close()

    def _record(self, about: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
        record = {**about, **{name: task.to_json(predictions[name]) for name, task in self.tasks.items()}}
        self._records.write(json.dumps(record) + "\n")
        return record

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._records.close()
