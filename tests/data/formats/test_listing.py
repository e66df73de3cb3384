"""Files and folders that a source names: those that do not exist, links in circles, files that are not read."""

import json
import os
import re

import pytest

from allinone_ds.data.formats.common.listing import walk_files
from allinone_ds.errors import DataError
from tests.data.tiny_sets import (
    CLASSES,
    COCO,
    COUNT,
    FOLDERS,
    LIST,
    MAPS,
    coco_content,
    errors,
    opened,
    source,
    warnings,
    write_images,
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COCO, "annotations": "no.json"}, r"no\.json: file is missing"),
        ({**COCO, "images": "no"}, "no: 'images' must be a folder, it does not exist"),
        ({**COCO, "images": "boxes.json"}, "'images' must be a folder, it is a file"),
        ({**MAPS, "label_maps": "no"}, "'label_maps' must be a folder"),
        ({**LIST, "list": "no.txt"}, r"no\.txt: file is missing"),
        ({**LIST, "list": "boxes.json", "classes": "no.txt"}, r"no\.txt: file is missing"),
        ({**FOLDERS, "images": "no"}, "'images' must be a folder"),
    ],
)
def test_a_wrong_path_is_named_with_its_field(coco_root, config, message):
    with pytest.raises(DataError, match=message):
        opened(config, coco_root)
    assert len(errors(config, coco_root)) == 1


# ---- paths


@pytest.mark.parametrize("start", ["~", "$DATA", "${DATA}"])
@pytest.mark.parametrize(
    ("config", "fixture"),
    [
        (COCO, "coco_root"),
        (MAPS, "maps_root"),
        ({**LIST, "classes": "names.txt"}, "list_root"),
        (FOLDERS, "folders_root"),
    ],
)
def test_every_path_of_a_source_is_expanded(config, fixture, start, request, monkeypatch, tmp_path):
    root = request.getfixturevalue(fixture)
    (root / "names.txt").write_text("\n".join(CLASSES))
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("DATA", str(root))
    paths = {k: f"{start}/{v}" for k, v in config.items() if k not in ("format",) and isinstance(v, str)}
    read = source({**config, **paths})
    assert [getattr(read, key) for key in paths] == [str(root / config[key]) for key in paths]
    assert len(opened({**config, **paths}, tmp_path / "elsewhere")) > 0


def test_a_variable_that_is_not_set_is_refused():
    with pytest.raises(ValueError, match=re.escape("$NO_SUCH/x: $NO_SUCH is not set in the environment")):
        source({**COCO, "images": "$NO_SUCH/x"})


# ---- links


def test_every_folder_is_visited_once_under_its_own_path(tmp_path):
    root = tmp_path / "images"
    write_images(root / "z" / "deep", 1)
    write_images(root / "a", 2)
    write_images(tmp_path / "outside", 1)
    for link, target in (("a/up", ".."), ("a/self", "."), ("b", "z/deep"), ("out", "../outside"), ("z/loop", "../a")):
        (root / link).symlink_to(target, target_is_directory=True)
    (root / "dangling").symlink_to("nowhere")
    (root / "circle").symlink_to("circle")
    expected = ["a/0.png", "a/1.png", "circle", "dangling", "out/0.png", "z/deep/0.png"]
    assert walk_files(root) == expected


def test_links_in_circles_add_no_images(folders_root):
    images = folders_root / "images"
    for name in CLASSES:
        (images / name / "again").symlink_to("..", target_is_directory=True)
    (images / "all").symlink_to(".", target_is_directory=True)
    (images / "circle").symlink_to("circle")
    dataset = opened(FOLDERS, folders_root)
    assert len(dataset) == 6 and dataset.classes == CLASSES
    assert "all: is a link" in str(dataset.structural[0])


def test_links_in_circles_add_no_label_maps(maps_root):
    for folder in ("images", "maps"):
        (maps_root / folder / "loop").symlink_to(".", target_is_directory=True)
    assert len(opened(MAPS, maps_root)) == COUNT


# ---- files that are not read


def test_files_that_are_not_read_are_counted(folders_root):
    images = folders_root / "images"
    (images / "ant" / "0.png").rename(images / "ant" / "0.heic")
    (images / "bee" / "0.png").rename(images / "bee" / "noname")
    (images / "bee" / "notes.txt").write_text("text is not counted")
    (images / "bee" / ".DS_Store").write_text("nor is a hidden file")
    reported = warnings(FOLDERS, folders_root)
    assert "images: 2 of 8 files are not read (1 with .heic, 1 with no suffix; ant/0.heic)" in reported


def test_label_map_folders_report_files_that_are_not_read(maps_root):
    for file in sorted((maps_root / "images").iterdir())[:2]:
        file.rename(file.with_suffix(".raw"))
        (maps_root / "maps" / file.name).unlink()
    assert "images: 2 of 7 files are not read (2 with .raw; 0.raw)" in warnings(MAPS, maps_root)


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".jpe", ".avif"])
def test_less_usual_suffixes_of_images_are_read(folders_root, suffix):
    kind = {".avif": "AVIF"}.get(suffix, "JPEG")
    from PIL import Image

    for name in CLASSES:
        for file in (folders_root / "images" / name).iterdir():
            Image.open(file).save(file.with_suffix(suffix), kind)
            file.unlink()
    assert len(opened(FOLDERS, folders_root)) == 6


# ---- encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_may_be_utf_16_or_begin_with_a_mark(list_root, encoding):
    (list_root / "list.txt").write_text((list_root / "list.txt").read_text(), encoding=encoding)
    (list_root / "names.txt").write_text("Ameise\nBiene\nKäfer", encoding=encoding)
    dataset = opened({**LIST, "classes": "names.txt"}, list_root)
    assert len(dataset) == COUNT and dataset.classes[2] == "Käfer"
    (list_root / "boxes.json").write_text(json.dumps(coco_content()), encoding=encoding)
    assert len(opened(COCO, list_root)) == COUNT


def test_class_names_that_are_not_utf_8_are_refused(list_root):
    (list_root / "names.txt").write_bytes("a\nb\nKäfer".encode("latin-1"))
    with pytest.raises(DataError, match=r"names\.txt: cannot be read as text.*save it as UTF-8"):
        opened({**LIST, "classes": "names.txt"}, list_root)


def test_a_class_folder_whose_name_is_not_utf_8_is_refused(folders_root):
    os.rename(os.fsencode(folders_root / "images" / "cow"), os.fsencode(folders_root / "images") + b"/k\xe4fer")
    with pytest.raises(DataError, match=r"class name 'k\\udce4fer' is not UTF-8; rename it"):
        opened(FOLDERS, folders_root)


def test_image_files_whose_names_are_not_utf_8_are_read_and_can_be_printed(list_root):
    for folder in ("images",):
        os.rename(os.fsencode(list_root / folder / "0.png"), os.fsencode(list_root / folder) + b"/caf\xe9.png")
    (list_root / "list.txt").write_bytes(b"caf\xe9.png 0\n1.png 1\ncaf\xe8.png 2\n")
    with pytest.raises(DataError) as caught:
        opened(LIST, list_root)
    assert "caf\\udce8.png: file is missing" in str(caught.value)
    str(caught.value).encode()
    (list_root / "list.txt").write_bytes(b"caf\xe9.png 0\n1.png 1\n2.png 2\n")
    dataset = opened(LIST, list_root)
    assert dataset[0]["image"].shape == (3, 24, 32)
    content = coco_content()
    content["images"][0]["file_name"] = "caf\udce9.png"
    (list_root / "boxes.json").write_text(json.dumps(content))
    assert len(opened(COCO, list_root)[0]["boxes"]) == 1
