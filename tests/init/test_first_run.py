"""`allinone-ds init`: layouts that people have on disk are recognised, and the file that is written passes `check`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from allinone_ds import cli
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.init.first_run import write_first_run
from allinone_ds.init.layouts.voc import palette
from allinone_ds.init.recognise import recognise
from allinone_ds.run_config.arguments import arguments_from_config
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_config.yaml_files import read_deepspeed
from tests.init.layouts import (
    LAYOUTS,
    coco_one_json,
    folders_plain,
    folders_split,
    maps_two_folders,
    picture,
    voc_official,
    write_coco,
    write_maps,
    write_pictures,
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_its_file_passes_check(name: str, tmp_path: Path, capsys) -> None:
    write, kind, train, test, classes = LAYOUTS[name]
    folder = tmp_path / name
    folder.mkdir()
    write(folder)
    output = tmp_path / "out" / "mine.yaml"
    assert cli.main(["init", str(folder), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"{train} train and {test} test images, {len(classes)} class" in said
    assert cli.main(["check", str(output)]) == 0, capsys.readouterr().out
    config = load_config(output)
    [(task_name, task)] = config.tasks.items()
    assert task_name == name and task.type == kind and task.image_size[0] % 8 == task.image_size[1] % 8 == 0
    opened = open_source(task.train_source, config.data_root)
    assert opened.classes == classes and len(opened) == train
    tested = open_source(task.test_source, config.data_root, classes)
    assert len(tested) == test and {tested.path(i) for i in range(test)}.isdisjoint(map(opened.path, range(train)))
    for note in re.findall("not sure: (.*)", said):  # what the terminal says is in the file as well
        assert note.split()[0] in output.read_text()


def test_every_layout_differs_and_there_are_at_least_ten() -> None:
    assert len({write for write, *_ in LAYOUTS.values()}) >= 10


def test_several_folders_are_several_tasks(tmp_path: Path, capsys) -> None:
    writers = {"signs": coco_one_json, "streets": maps_two_folders, "pets": folders_plain}
    for name, write in writers.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        write(tmp_path / "data" / name)
    given = [str(tmp_path / "data" / name) for name in writers]
    assert cli.main(["init", *given, "--output", str(tmp_path / "each.yaml")]) == 0
    # a task whose test images are split off is evaluated too
    assert cli.main(["check", str(tmp_path / "each.yaml"), "trainer.metric_for_best_model=pets_top1"]) == 0
    assert list(load_config(tmp_path / "each.yaml").tasks) == ["signs", "streets", "pets"]
    # the folder above gives the same tasks
    assert cli.main(["init", str(tmp_path / "data"), "--output", str(tmp_path / "above.yaml")]) == 0
    each, above = (load_config(tmp_path / f"{name}.yaml") for name in ("each", "above"))
    assert above.tasks == each.tasks and above.data_root == each.data_root
    capsys.readouterr()
    (tmp_path / "other" / "signs").mkdir(parents=True)
    folders_split(tmp_path / "other" / "signs")
    same = [str(tmp_path / folder / "signs") for folder in ("data", "other")]
    assert cli.main(["init", *same, "--output", str(tmp_path / "same.yaml")]) == 2
    assert "two data sets give the task name 'signs'" in capsys.readouterr().err


def test_pascal_voc_with_masks_is_two_tasks(tmp_path: Path, capsys) -> None:
    voc_official(tmp_path / "voc")
    base = tmp_path / "voc" / "VOCdevkit" / "VOC2012"
    write_maps(base / "SegmentationClass", [f"p{i}.jpg" for i in range(6)], values=(0, 8, 12, 255))
    (base / "ImageSets" / "Segmentation").mkdir()
    for part, chosen in (("train", range(4)), ("val", range(4, 6))):
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"p{i}\n" for i in chosen))
    assert cli.main(["init", str(tmp_path / "voc"), "--output", str(tmp_path / "voc.yaml")]) == 0
    assert "the classes of the label maps are taken to be those of Pascal VOC" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "voc.yaml")]) == 0
    tasks = load_config(tmp_path / "voc.yaml").tasks
    read = open_source(tasks["voc_segmentation"].train_source, tmp_path / "voc")
    masks = [read[i]["mask"] for i in range(len(read))]
    assert {name: task.type for name, task in tasks.items()} == {
        "voc_detection": "detection",
        "voc_segmentation": "segmentation",
    }
    assert tasks["voc_segmentation"].classes[8] == "cat" and len(tasks["voc_segmentation"].classes) == 21
    for file in (base / "SegmentationClass").iterdir():  # the same in the colours of its palette
        with Image.open(file) as picture:
            picture.putpalette([c for k in palette(256) for c in (k >> 16, k >> 8 & 255, k & 255)])
            picture.convert("RGB").save(file)
    found = recognise(tmp_path / "voc")["voc_segmentation"]
    assert len(found.train["class_colors"]) == 21 and found.train["ignore_colors"] == ["#e0e0c0"]
    again = open_source(TypeAdapter(Source).validate_python(found.train), tmp_path / "voc", found.classes)
    assert all((again[i]["mask"] == mask).all() for i, mask in enumerate(masks))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    folders_plain(tmp_path / "pets")
    output = tmp_path / "run.yaml"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="run.yaml exists and is not overwritten; choose a different --output"):
        write_first_run([tmp_path / "pets"], output)
    assert output.read_text() == "mine"
    with pytest.raises(ConfigError, match="below.yaml: cannot be written: .*; choose a different file"):
        write_first_run([tmp_path / "pets"], output / "below.yaml")


def test_a_folder_of_something_else_is_described(tmp_path: Path, capsys) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "notes.docx").touch()
    (tmp_path / "boxes.json").write_text(
        '{"images": [{"file_name": "x.jpg"}], "annotations": [{"bbox": [1]}], "categories": []}'
    )
    assert cli.main(["init", str(tmp_path), "--output", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert "holds 5 files: 3 .jpg, 1 .json, 1 .docx" in said.replace("1 .docx, 1 .json", "1 .json, 1 .docx")
    assert "boxes.json is a COCO json, but its images are not here" in said
    for layout in ("COCO", "label maps", "list", "csv", "class folders", "datasets", "YOLO", "Pascal VOC"):
        assert layout in said
    assert not (tmp_path / "run.yaml").exists()
    with pytest.raises(DataError, match="is not a folder"):
        write_first_run([tmp_path / "nowhere"], tmp_path / "run.yaml")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for j, part in enumerate((name, "bar")):
        write_pictures(tmp_path / "places" / part, 3, 10 * j)
    with pytest.raises(DataError, match="class name .* is not UTF-8; rename it"):
        write_first_run([tmp_path / "places"], tmp_path / "run.yaml")
    (tmp_path / "places" / name).rename(tmp_path / "places" / "cafe")
    (tmp_path / "places").rename(tmp_path / name)
    with pytest.raises(DataError, match="the name is not UTF-8, which a YAML file cannot hold; rename the folder"):
        write_first_run([tmp_path / name], tmp_path / "other.yaml")


def test_objects_that_resizing_hides_are_said(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "far" / "images", 4)
    write_coco(tmp_path / "far" / "boxes.json", names, width=800)
    for name in names:
        Image.new("RGB", (800, 600)).save(tmp_path / "far" / "images" / name)
    first = write_first_run([tmp_path / "far"], tmp_path / "far.yaml")
    said = "of 3 objects that were looked at are smaller than 8 pixels when images are resized to 96 x 128"
    assert said in first.tasks["far"].found.notes[0] and "NOT SURE: 3 of 3 objects" in first.file.read_text()


def test_the_file_for_a_gpu_is_valid(tmp_path: Path) -> None:
    writers = {"signs": coco_one_json, "streets": maps_two_folders, "no": folders_plain}
    for name, write in writers.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    first = write_first_run([tmp_path / name for name in writers], tmp_path / "gpu.yaml", gpu=True)
    config = load_config(first.file)
    assert config.model.backbone.checkpoint == "facebook/dinov2-small" and list(config.tasks) == list(writers)
    assert config.tasks["streets"].image_size == (56, 84) and config.deepspeed["bf16"] == {"enabled": True}
    config.model.backbone.checkpoint = None
    config.model.backbone.config = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 14,
    }
    classes = {name: task.classes for name, task in first.tasks.items()}
    model = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))
    assert sorted(model.tasks) == sorted(writers)
    arguments_from_config(config.model_copy(update={"deepspeed": read_deepspeed("configs/deepspeed/zero2.json")}))


def test_classes_and_names_that_yaml_would_change_survive(tmp_path: Path) -> None:
    for name in ("no", "1", "1e3", "a: b", "# c", "null"):
        write_pictures(tmp_path / "on" / name, 3)
    first = write_first_run([tmp_path / "on"], tmp_path / "run.yaml")
    [(name, task)] = load_config(first.file).tasks.items()
    assert name == "on"
    assert open_source(task.train_source, tmp_path / "on").classes == ["# c", "1", "1e3", "a: b", "no", "null"]


def test_no_file_remains_that_cannot_be_read(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pets" / "images", 6)
    rows = "".join(f"{name},a{i % 2}\x00\n" for i, name in enumerate(names))
    (tmp_path / "pets" / "t.csv").write_text(f"image,label\n{rows}")
    with pytest.raises(DataError, match=r"class name 'a0\\x00' holds a control character; rename it"):
        write_first_run([tmp_path / "pets"], tmp_path / "run.yaml")
    assert not (tmp_path / "run.yaml").exists()
