"""Predictions on what users have: files, folders, patterns, videos, arrays; with one bad file among them."""

from __future__ import annotations

import importlib.util
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allinone_ds
from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation import video
from allinone_ds.evaluation.inputs import find_inputs
from allinone_ds.evaluation.predictor import Predictor, predict_images
from allinone_ds.export.folders import export_run
from allinone_ds.tasks.test_time import TestTime
from tests.export.untrained import untrained_run
from tests.tiny import LIGHT, tiny_model


def photo(file: Path, seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """Write a picture of W x H noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(file)
    return Image.open(file)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """A model whose detector gives some boxes on noise."""
    model = tiny_model()
    torch.nn.init.constant_(model.tasks["det"].detector.fcos.head.classification_head.cls_logits.bias, 0.0)
    return Predictor(model)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with export/."""
    folder = tmp_path_factory.mktemp("run")
    untrained_run(folder, "conv")
    export_run(folder)
    return folder


def names(inputs: list) -> list[str]:
    return [item.name for item in inputs]


def test_every_kind_of_image_gives_the_same_prediction(predictor: Predictor, tmp_path: Path) -> None:
    picture = photo(tmp_path / "a.png")
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), picture, array, np.asfortranarray(array), tensor]
    expected = predictor.predict(array, "cls")[0]["scores"]
    for given in [*kinds, kinds, tuple(kinds), iter(kinds)]:
        for prediction in predictor.predict(given, "cls"):
            torch.testing.assert_close(prediction["scores"], expected)
    assert predictor.predict([], "cls") == []
    assert len(predictor.predict(array[None].repeat(2, 0).__iter__(), "seg")) == 2


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        3.5,
        None,
    ],
)
def test_an_image_of_another_form_is_refused(predictor: Predictor, image: object) -> None:
    with pytest.raises(ConfigError, match="give .*uint8"):
        predictor.predict([image], "cls")  # type: ignore[list-item]


def test_several_tasks_need_a_name(predictor: Predictor) -> None:
    with pytest.raises(ConfigError, match="3 tasks; give task= one of det, seg, cls"):
        predictor.predict(np.zeros((4, 4, 3), np.uint8))


def test_a_threshold_keeps_the_boxes_at_or_above_it(predictor: Predictor, tmp_path: Path) -> None:
    picture = photo(tmp_path / "a.png")
    all_boxes = predictor.predict(picture, "det")[0]
    cut = float(all_boxes["scores"].median())
    kept = predictor.predict(picture, "det", threshold=cut)[0]
    assert 0 < len(kept["boxes"]) == int((all_boxes["scores"] >= cut).sum()) < len(all_boxes["boxes"])
    with pytest.raises(ConfigError, match="no score to compare"):
        predictor.predict(picture, "seg", threshold=0.5)
    with pytest.raises(ConfigError, match=r"score_threshold = 0.05"):
        predictor.predict(picture, "det", threshold=0.01)
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        predictor.predict(picture, "det", threshold=30)


def test_folders_patterns_and_files_become_inputs(tmp_path: Path) -> None:
    for name in ("in/1.png", "in/deep/2.jpg", "in/.hidden/3.png", "in/.4.png", "in/out/old.png", "else/5.png"):
        photo(tmp_path / name)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "clip.MP4").write_bytes(b"")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    output = tmp_path / "in" / "out"
    found, missing = find_inputs([tmp_path / "in"], ["det"], output)
    assert names(found) == ["1", "clip", "deep/2"] and missing == {}
    found, missing = find_inputs([f"{tmp_path}/in/**/*.*g", tmp_path / "else" / "5.png"], ["det"], tmp_path / "out")
    assert names(found)[-1] == "5" and {"1", "deep/2", "out/old"} < set(names(found))
    _, missing = find_inputs([tmp_path / "no.png", f"{tmp_path}/*.webp", tmp_path / "empty"], ["det"], output)
    assert list(missing.values()) == ["does not exist", "no image and no video matches the pattern", "does not exist"]
    (tmp_path / "empty").mkdir()
    _, missing = find_inputs([tmp_path / "empty"], ["det"], output)
    assert ".png" in missing[str(tmp_path / "empty")]
    with pytest.raises(ConfigError, match="also a folder of images"):
        find_inputs([tmp_path / "in"], ["det"], tmp_path / "else" / ".." / "in")


@pytest.mark.parametrize("order", [1, -1])
def test_no_two_inputs_share_a_result(tmp_path: Path, order: int) -> None:
    files = {"a/1.png": "a/1", "b/1.png": "b/1", "b/2.png": "2", "c/3.png": "3.png", "c/3.jpg": "3.jpg"}
    for name in files:
        photo(tmp_path / name)
    given = list(files)[::order]
    found, _ = find_inputs([tmp_path / name for name in given], ["det"], tmp_path / "out")
    assert names(found) == [files[name] for name in given]
    for name in ("x.png", "x-det.png", "y.png", "Y.jpg"):
        photo(tmp_path / "d" / name)
    # x-det.png of the task "a" would be the picture of x.png of the task "det-a"; case does not tell files apart
    found, _ = find_inputs([tmp_path / "d"], ["det-a", "a"], tmp_path / "out")
    assert sorted(names(found)) == ["Y.jpg", "x-det.png", "x.png", "y.png"]
    found, _ = find_inputs([tmp_path / "a/1.png"] * 2, ["det"], tmp_path / "out")
    assert names(found) == ["1", "1-2"]


def test_one_bad_file_does_not_stop_the_others(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [tmp_path / "in" / f"{i}.png" for i in range(11)]
    for i, file in enumerate(good):
        photo(file, i, (30 + i, 40))
    (tmp_path / "in" / "4.png").write_bytes(good[4].read_bytes()[:60])
    arguments = [str(tmp_path / "in"), str(tmp_path / "gone.jpg"), "--output", str(tmp_path / "out")]
    assert cli.main(["predict", str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert "2 of 12 inputs" in said and "4.png" in said and "gone.jpg: does not exist" in said
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {Path(record["image"]).name for record in records} == {file.name for file in good} - {"4.png"}
    for record in records:
        assert json.loads((tmp_path / "out" / f"{Path(record['image']).stem}.json").read_text()) == record
    assert len(list((tmp_path / "out").glob("*-seg.png"))) == 10
    alone = predict_images(allinone_ds.load(run), [good[7]], tmp_path / "alone")
    for file in alone:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()  # the same as within a batch


def test_predict_reads_exported_folders_and_chosen_tasks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "a.png")
    output = ["--output", str(tmp_path / "out")]
    assert cli.main(["predict", str(run / "export" / "model"), str(tmp_path / "a.png"), "--task", "cls", *output]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a-cls.png", "a.json", "predictions.jsonl"]
    from_export = (tmp_path / "out" / "a.json").read_text()
    assert cli.main(["predict", str(run), str(tmp_path / "a.png"), "--task", "cls", "--task", "seg", *output]) == 0
    from_run = json.loads((tmp_path / "out" / "a.json").read_text())
    assert set(from_run) == {"image", "cls", "seg"} and from_run["cls"] == json.loads(from_export)["cls"]
    capsys.readouterr()
    for arguments, message in (
        (["--task", "clss"], "did you mean 'cls'"),
        (["--task", "cls", "--threshold", "0.5"], "no prediction of cls"),
        (["--threshold", "1.5"], "0..1"),
        (["--set", "tasks.cls.test_time.flip=true"], "no configuration to override"),
    ):
        assert cli.main(["predict", str(run / "export" / "model"), str(tmp_path / "a.png"), *arguments, *output]) == 2
        assert message in capsys.readouterr().err


def test_the_threshold_decides_what_is_written(predictor: Predictor, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    scores = predictor.predict(tmp_path / "a.png", "det")[0]["scores"]
    for threshold in (0.05, float(scores.median()), 1.0):
        predict_images(predictor, [tmp_path / "a.png"], tmp_path / "out", tasks=["det", "seg"], threshold=threshold)
        record = json.loads((tmp_path / "out" / "a.json").read_text())
        assert len(record["det"]["objects"]) == int((scores >= threshold).sum())


def test_a_task_with_a_slash_in_its_name_has_a_file(tmp_path: Path) -> None:
    model = tiny_model({"cls": LIGHT["cls"]})
    model.tasks["a/b"] = model.tasks.pop("cls")
    model.tasks["a/b"].name = "a/b"
    photo(tmp_path / "x.png")
    written = predict_images(Predictor(model), [tmp_path / "x.png"], tmp_path / "out")
    assert [file.name for file in written] == ["x-a%2Fb.png", "x.json"]


def test_a_folder_that_cannot_be_written_is_named(predictor: Predictor, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="--output .*out: cannot be written to: File exists"):
        predict_images(predictor, [tmp_path / "a.png"], tmp_path / "out")


def test_progress_counts_every_input(predictor: Predictor, tmp_path: Path) -> None:
    for i in range(9):
        photo(tmp_path / "in" / f"{i}.png", i)
    seen: list[tuple[int, int]] = []
    predict_images(
        predictor, [tmp_path / "in"], tmp_path / "out", tasks=["cls"], progress=lambda d, t, _: seen.append((d, t))
    )
    assert seen == [(0, 9), (8, 9)]


def test_a_video_without_its_package_says_what_to_install(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_bytes(b"video")
    missing = SimpleFind()
    monkeypatch.setattr(video.importlib.util, "find_spec", missing)
    with pytest.raises(ConfigError, match=r"1 of 2 inputs[^$]*b.mp4: .*pip install 'allinone_ds\[video\]'"):
        predict_images(predictor, [tmp_path / "b.mp4", tmp_path / "a.png"], tmp_path / "out", tasks=["cls"])
    assert (tmp_path / "out" / "a.json").is_file()
    with pytest.raises(ConfigError, match="is a video"):
        predictor.predict(tmp_path / "b.mp4", "cls")


class SimpleFind:
    """`find_spec` of an installation without PyAV."""

    def __init__(self) -> None:
        self.find = importlib.util.find_spec

    def __call__(self, name: str, package: str | None = None) -> object:
        return None if name == "av" else self.find(name, package)


def test_a_video_is_predicted_frame_by_frame(predictor: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [np.full((48, 64, 3), value, np.uint8) for value in (20, 120, 220)]
    with video.VideoWriter(tmp_path / "clip.mp4", Fraction(5)) as writer:
        for frame in frames:
            writer.add(Image.fromarray(frame))
    read = list(video.read_frames(tmp_path / "clip.mp4"))
    assert [frame.number for frame in read] == [0, 1, 2] and [f.seconds for f in read] == [0.0, 0.2, 0.4]
    for frame, value in zip(read, (20, 120, 220), strict=True):
        assert frame.image.shape == (3, 48, 64) and abs(float(frame.image.float().mean()) - value) < 6
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:200])
    with pytest.raises(ConfigError, match="1 of 2 inputs[^$]*broken.mp4.*cannot be decoded as a video"):
        predict_images(predictor, [tmp_path / "broken.mp4", tmp_path / "clip.mp4"], tmp_path / "out", tasks=["seg"])
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [record["frame"] for record in records] == [0, 1, 2]
    expected = [predictor.tasks["seg"].to_json(predictor.predict(frame.image, "seg")[0]) for frame in read]
    assert [record["seg"] for record in records] == expected
    drawn = list(video.read_frames(tmp_path / "out" / "clip-seg.mp4"))
    assert len(drawn) == 3 and {frame.image.shape for frame in drawn} == {drawn[0].image.shape}


def test_only_every_nth_frame_of_a_video(predictor: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("av")
    with video.VideoWriter(tmp_path / "clip.mp4", Fraction(6)) as writer:
        for value in range(0, 200, 30):
            writer.add(Image.fromarray(np.full((48, 64, 3), value, np.uint8)))
    every = dict(zip(range(7), video.read_frames(tmp_path / "clip.mp4"), strict=True))
    found = list(predictor.predict_video(tmp_path / "clip.mp4", "seg", every=3))
    assert [frame.number for frame, _ in found] == [0, 3, 6] and found[1][0].seconds == 0.5
    for frame, prediction in found:
        expected = predictor.predict(every[frame.number].image, "seg")[0]
        assert torch.equal(prediction["mask"], expected["mask"])
    predict_images(predictor, [tmp_path / "clip.mp4"], tmp_path / "out", tasks=["seg"], every=3)
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [record["frame"] for record in records] == [0, 3, 6]
    drawn = list(video.read_frames(tmp_path / "out" / "clip-seg.mp4"))
    assert len(drawn) == 3 and drawn[1].seconds == 0.5  # the speed of the original
    for start in (lambda: predict_images(predictor, [tmp_path / "clip.mp4"], tmp_path, every=0),
                  lambda: predictor.predict_video(tmp_path / "clip.mp4", "seg", every=0)):  # fmt: skip
        with pytest.raises(ConfigError, match="every = 0: give 1"):
            start()


def test_a_run_predicts_with_the_views_of_its_file(predictor: Predictor, run: Path, tmp_path: Path) -> None:
    image, views = photo(tmp_path / "a.png"), TestTime(flip=True)
    alone, merged = predictor.predict(image, "det")[0], predictor.predict(image, "det", test_time=views)[0]
    assert not torch.equal(alone["scores"], merged["scores"])
    merging = Predictor(predictor.model, {"det": views})
    assert torch.equal(merging.predict(image, "det")[0]["scores"], merged["scores"])
    assert torch.equal(merging.predict(image, "det", test_time=None)[0]["scores"], alone["scores"])
    loaded = allinone_ds.load(run, overrides=["tasks.seg.test_time.flip=true"])
    assert loaded.test_time["seg"] == views


@pytest.mark.parametrize(
    ("matrix", "bright"), [((0, 1, -1, 0), "top"), ((-1, 0, 0, -1), "right"), ((0, -1, 1, 0), "bottom")]
)
def test_a_video_held_sideways_is_turned_upright(tmp_path: Path, matrix: tuple[int, ...], bright: str) -> None:
    """A player shows the frame rotated by the matrix of its track: (0, 1, -1, 0) is 90 degrees clockwise."""
    pytest.importorskip("av")
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :32] = 250  # the left half
    with video.VideoWriter(tmp_path / "a.mp4", Fraction(5)) as writer:
        writer.add(Image.fromarray(frame))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    where = content.index(unit, content.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    content[where : where + len(unit)] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    image = next(video.read_frames(tmp_path / "a.mp4")).image.float().mean(0)
    H, W = image.shape
    assert (H, W) == ((32, 64) if bright == "right" else (64, 32))
    parts = {"top": image[: H // 2], "bottom": image[H // 2 :], "right": image[:, W // 2 :]}
    assert float(parts[bright].mean()) > 200 and float(image.mean()) < 150
