"""`init` recognises several kinds of labels of one image set, and proposes a joint group for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allinone_ds import cli
from allinone_ds.init.recognise import recognise
from allinone_ds.run_config.schema import RunConfig, load_config
from tests.init.layouts import SIZE, box, maps_cityscapes, write_coco, write_maps, write_pictures

H, W = SIZE


def written(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[RunConfig, str, str]:
    """Return the configuration that `init` writes, which passes `check`; what it said; and the file."""
    output = folder.parent / "run.yaml"
    assert cli.main(["init", str(folder), "--output", str(output)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert cli.main(["check", str(output)]) == 0, capsys.readouterr().out
    return load_config(output), said, output.read_text()


def test_coco_with_boxes_masks_and_keypoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "coco"
    for part, count in (("train", 8), ("val", 4)):
        names = write_pictures(root / f"{part}2017", count, seed=100 * len(part), suffix=".jpg")
        file = root / "annotations" / f"instances_{part}2017.json"
        write_coco(file, names)
        content = json.loads(file.read_text())
        for number, each in enumerate(content["annotations"]):
            x, y, w, h = each["bbox"]
            each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if number == 0:  # run lengths, as COCO has them for crowds
                each |= {"iscrowd": 1, "segmentation": {"size": [H, W], "counts": [200, H * W - 200]}}
        file.write_text(json.dumps(content))
        cats = [{"id": 1, "name": "cat", "keypoints": ["nose", "left_ear", "right_ear"], "skeleton": []}]
        own = [{**a, "keypoints": [box(a["id"])[0] + 3, box(a["id"])[1] + 3, 2] * 3, "num_keypoints": 3}
               for a in content["annotations"] if a["category_id"] == 1]  # fmt: skip
        content |= {"annotations": own, "categories": cats}
        (root / "annotations" / f"cat_keypoints_{part}2017.json").write_text(json.dumps(content))
    config, said, text = written(root, capsys)
    assert {name: task.type for name, task in config.tasks.items()} == {
        f"coco_{kind}": kind for kind in ("detection", "instances", "keypoints")
    }
    [group] = config.joint.values()
    assert group.tasks == list(config.tasks) and list(config.joint) == ["coco"]
    labels = group.test.labels  # type: ignore[union-attr]
    assert labels["coco_keypoints"].annotations == "annotations/cat_keypoints_val2017.json"
    assert labels["coco_instances"].kind == "instances" and group.test.images == "val2017"  # type: ignore[union-attr]
    assert config.tasks["coco_keypoints"].options["points"] == ["nose", "left_ear", "right_ear"]
    assert "coco_detection, coco_instances, coco_keypoints read the same images" in said
    assert "one forward serves them all" in text


def test_all_maps_and_a_table_of_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "rooms"
    names = write_pictures(root / "images", 10, suffix=".jpg")
    write_maps(root / "masks", names, values=(0, 1, 2))
    grey = np.random.default_rng(0).integers(1, 256, SIZE).astype(np.uint8)
    for folder in ("depth", "normals", "edges", "saliency"):
        (root / folder).mkdir()
    for i, name in enumerate(names):
        stem = Path(name).stem
        Image.fromarray(1000 + 16 * grey.astype(np.uint16)).save(root / "depth" / f"{stem}.png")
        vectors = np.stack([np.full(SIZE, 0.2 * i), grey / 90, np.ones(SIZE)], -1)
        np.save(root / "normals" / f"{stem}.npy", vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
        Image.fromarray((grey > 200).astype(np.uint8)).save(root / "edges" / f"{stem}.png")
        if i > 2:  # not every image has a saliency map
            Image.fromarray(grey).save(root / "saliency" / f"{stem}.png")
    rows = [f"{n},{i % 2},{int(i % 3 == 0)},{1.5 * i}" for i, n in enumerate(names[:8])]
    (root / "table.csv").write_text("\n".join(["file;sunny;messy;price".replace(";", ","), *rows]))
    config, said, text = written(root, capsys)
    kinds = ["segmentation", "depth", "normals", "edges", "saliency", "attributes", "regression"]
    assert sorted(task.type for task in config.tasks.values()) == sorted(kinds)
    [group] = config.joint.values()
    assert len(group.tasks) == 7 and group.train.partial and group.split is not None  # type: ignore[union-attr]
    labels = group.train.labels  # type: ignore[union-attr]
    assert labels["rooms_attributes"].columns == ["sunny", "messy"] and labels["rooms_depth"].scale == 0.001
    assert labels["rooms_regression"].columns == ["price"] and "price are taken for numbers" in said
    assert "of the 10 images of the joint group have no label of it" in " ".join(text.replace("#", " ").split())


def test_files_of_celeba(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "celeba"
    names = write_pictures(root / "img_align_celeba", 12, suffix=".jpg")
    values = np.random.default_rng(0).choice([-1, 1], (12, 5))
    rows = [f"{n} {' '.join(str(v).rjust(2) for v in row)}" for n, row in zip(names, values, strict=True)]
    header = "Bald Bangs Male Smiling Young "
    (root / "list_attr_celeba.txt").write_text("\n".join(["12", header, *rows, ""]))
    (root / "list_eval_partition.txt").write_text("".join(f"{n} {i // 4}\n" for i, n in enumerate(names)))
    (root / "identity_CelebA.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    (root / "list_landmarks_align_celeba.txt").write_text(
        "\n".join(["12", "eye_x eye_y", *(f"{n} {i + 3} 55" for i, n in enumerate(names))])
    )
    config, said, _ = written(root, capsys)
    [task] = config.tasks.values()
    assert task.type == "attributes" and task.train.absent == -1 and not config.joint  # type: ignore[union-attr]
    assert (task.train.part, task.test.part) == (0, 1) and "4 train and 4 test images, 5 attributes" in said  # type: ignore
    assert "-1 is read as an attribute that an image does not have" in said


def test_segmentation_and_disparity_of_cityscapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "streets"
    maps_cityscapes(root)
    for i, file in enumerate(sorted((root / "leftImg8bit").rglob("*.png"))):
        name = Path(str(file).replace("leftImg8bit", "disparity"))
        name.parent.mkdir(parents=True, exist_ok=True)
        stored = np.random.default_rng(i).integers(0, 30000, SIZE).astype(np.uint16)
        Image.fromarray(stored).save(name)
    config, said, _ = written(root, capsys)
    [group] = config.joint.values()
    assert group.tasks == ["streets_segmentation", "streets_depth"] and not group.train.partial  # type: ignore
    depth = group.train.labels["streets_depth"]  # type: ignore[union-attr]
    assert (
        depth.image_suffix.endswith("_leftImg8bit") and depth.map_suffix.endswith("_disparity") and depth.offset == -1
    )
    assert "taken for those of Cityscapes" in said


def test_identities_in_folders_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "faces"
    for k, (part, people) in enumerate((("train", "ab"), ("test", "cd"))):
        for j, person in enumerate(people):
            write_pictures(root / part / person, 3, 50 * k + 10 * j)
    config, said, _ = written(root, capsys)
    [task] = config.tasks.values()
    assert task.type == task.train.kind == "retrieval"  # type: ignore[union-attr]
    assert "have no folder in common, so the folders are taken for identities" in said
    names = write_pictures(tmp_path / "shop" / "images", 8)
    rows = [f"{n};{100 + i // 2};{2.5 * i}" for i, n in enumerate(names)]
    (tmp_path / "shop" / "items.csv").write_text("\n".join(["image;product_id;price", *rows]))
    tasks = recognise(tmp_path / "shop")
    assert {name: task.kind for name, task in tasks.items()} == {
        "shop_retrieval": "retrieval", "shop_regression": "regression",
    }  # fmt: skip
    assert tasks["shop_retrieval"].train["label_column"] == "product_id"
    assert "taken for identities (retrieval); for classes set" in tasks["shop_retrieval"].notes[0]


def test_attributes_numbers_and_classes_in_one_file_of_json_objects(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 6)
    records = [
        {"file": n, "label": "ab"[i % 2], "new": i % 2 == 0, "sold": i < 3, "age": i} for i, n in enumerate(names)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = {task.kind: task.train for task in recognise(tmp_path).values()}
    assert found["classification"]["label_column"] == "label" and found["regression"]["columns"] == ["age"]
    assert found["attributes"]["columns"] == ["new", "sold"] and "delimiter" not in found["attributes"]


def test_a_table_of_other_images_is_no_part_of_the_group(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "data" / "images", 4, suffix=".jpg")
    write_maps(tmp_path / "data" / "masks", names)
    others = write_pictures(tmp_path / "data" / "other", 4, seed=30)
    (tmp_path / "data" / "t.csv").write_text("image,a,b\n" + "".join(f"{n},1,{i % 2}\n" for i, n in enumerate(others)))
    assert [task.kind for task in recognise(tmp_path / "data").values()] == ["segmentation"]
