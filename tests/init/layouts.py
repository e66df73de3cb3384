"""Small data sets in the layouts that `init` is tried on: one function each, which writes it below a folder."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 80)  # (H, W)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def write_pictures(folder: Path, count: int, seed: int = 0, suffix: str = ".png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"p{seed + i}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        picture(seed + i).save(folder / name)
    return names


def box(i: int) -> list[int]:
    """x, y, width, height in pixels."""
    return [5 + i % 7, 4 + i % 5, 20 + i % 3, 16]


def write_coco(file: Path, names: list[str], classes: tuple[str, ...] = ("cat", "dog"), width: int = SIZE[1]) -> None:
    H, W = SIZE[0] * width // SIZE[1], width
    content = {
        "images": [{"id": i, "file_name": n, "height": H, "width": W} for i, n in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % len(classes), "bbox": box(i), "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(classes)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_maps(folder: Path, names: list[str], values: tuple[int, ...] = (0, 1, 2, 255), end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        stored = np.full(SIZE, values[0], dtype=np.uint8)
        for k, value in enumerate(values):
            stored[k * 8 : k * 8 + 8, i % 9 :] = value
        Image.fromarray(stored).save(folder / f"{Path(name).stem}{end}.png")


# ---- COCO


def coco_official(root: Path) -> None:
    """annotations/instances_{train,val}2017.json, captions beside them, train2017/, val2017/."""
    for part, count in (("train", 10), ("val", 4)):
        names = write_pictures(root / f"{part}2017", count, seed=100 * len(part), suffix=".jpg")
        write_coco(root / "annotations" / f"instances_{part}2017.json", names)
        captions = {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}], "categories": []}
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(captions))


def coco_one_json(root: Path) -> None:
    """images/*.png and labels.json, no split."""
    write_coco(root / "labels.json", write_pictures(root / "images", 12))


def coco_roboflow(root: Path) -> None:
    """train/, valid/, test/, each with its images and _annotations.coco.json."""
    for k, part in enumerate(("train", "valid", "test")):
        names = write_pictures(root / part, 6, seed=50 * k)
        write_coco(root / part / "_annotations.coco.json", names)


# ---- label maps


def maps_two_folders(root: Path) -> None:
    """images/ and masks/ with classes.txt."""
    write_maps(root / "masks", write_pictures(root / "images", 10, suffix=".jpg"))
    (root / "classes.txt").write_text("road\ncar\nsky\n")


def maps_split_inside(root: Path) -> None:
    """images/{training,validation}, annotations/{training,validation}, ids from 1 on as in ADE20K, without 0."""
    for k, part in enumerate(("training", "validation")):
        names = write_pictures(root / "images" / part, 6, seed=50 * k, suffix=".jpg")
        write_maps(root / "annotations" / part, names, values=(1, 2, 3))


def maps_cityscapes(root: Path) -> None:
    """leftImg8bit/{train,val}/CITY/X_leftImg8bit.png and gtFine/.../X_gtFine_labelTrainIds.png."""
    for k, (part, city) in enumerate((("train", "aachen"), ("train", "bonn"), ("val", "ulm"))):
        names = [f"{city}_{i:06d}_000019" for i in range(4)]
        folder = root / "leftImg8bit" / part / city
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            picture(50 * k + i).save(folder / f"{name}_leftImg8bit.png")
        write_maps(root / "gtFine" / part / city, names, values=(0, 1, 255), end="_gtFine_labelTrainIds")


def maps_binary(root: Path) -> None:
    """train/{image,mask} with masks of 0 and 255."""
    for k, part in enumerate(("train", "test")):
        write_maps(root / part / "mask", write_pictures(root / part / "image", 5, seed=50 * k), values=(0, 255))


# ---- classification


def folders_split(root: Path) -> None:
    """{train,val}/{ant,bee}/*.png."""
    for k, part in enumerate(("train", "val")):
        for j, name in enumerate(("ant", "bee")):
            write_pictures(root / part / name, 5, seed=100 * k + 10 * j)


def folders_plain(root: Path) -> None:
    """PetImages/{Cat,Dog}/*.jpg."""
    for j, name in enumerate(("Cat", "Dog")):
        write_pictures(root / "PetImages" / name, 6, seed=10 * j, suffix=".jpg")


def lists(root: Path) -> None:
    """images/, train.txt and test.txt with ids from 1, names.txt."""
    names = write_pictures(root / "images", 12)
    for part, chosen in (("train", names[:8]), ("test", names[8:])):
        (root / f"{part}.txt").write_text("".join(f"{n} {1 + i % 2}\n" for i, n in enumerate(chosen)))
    (root / "names.txt").write_text("small\nlarge\n")


def table(root: Path) -> None:
    """train/*.jpg and labels.csv with ids that have no suffix, as in the dog breeds of Kaggle."""
    names = write_pictures(root / "train", 12, suffix=".jpg")
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "breed"])
        writer.writerows((Path(n).stem, ("pug", "boxer", "great dane")[i % 3]) for i, n in enumerate(names))


def table_one_hot(root: Path) -> None:
    """images/*.jpg and truth.csv with a column of 0.0 and 1.0 per class, as in ISIC; one class does not occur."""
    names = write_pictures(root / "images", 12, suffix=".jpg")
    rows = [f"{Path(n).stem},{float(i % 2 == 0)},{float(i % 2 == 1)},0.0" for i, n in enumerate(names)]
    (root / "truth.csv").write_text("\n".join(["image,MEL,NV,BCC", *rows]))


# ---- tables of boxes


def corners(i: int) -> str:
    x, y, w, h = box(i)
    return f"{x},{y},{x + w},{y + h}"


def boxes_tensorflow(root: Path) -> None:
    """{train,test}/*.jpg with labels of the image's size and corners; some images have no box."""
    for k, part in enumerate(("train", "test")):
        names = write_pictures(root / part, 6, 50 * k, suffix=".jpg")
        rows = [f"{n},{SIZE[1]},{SIZE[0]},{('cat', 'dog')[i % 2]},{corners(i)}" for i, n in enumerate(names)]
        header = "filename,width,height,class,xmin,ymin,xmax,ymax"
        (root / f"{part}_labels.csv").write_text("\n".join([header, *rows]))


def boxes_headless(root: Path) -> None:
    """images/*.png and a csv without a header, in which an image without objects has an empty row (RetinaNet)."""
    names = write_pictures(root / "images", 10)
    rows = [
        f"images/{n},{corners(i)},{('cat', 'dog')[i % 2]}" if i else f"images/{n},,,,," for i, n in enumerate(names)
    ]
    (root / "annotations.csv").write_text("\n".join([rows[1], rows[0], *rows[2:]]))


def boxes_one_column(root: Path) -> None:
    """train/*.jpg and train.csv with "[x, y, w, h]" in one column and no classes, as in Kaggle's wheat."""
    names = write_pictures(root / "train", 10, suffix=".jpg")
    rows = [f'{Path(n).stem},{SIZE[1]},{SIZE[0]},"{list(map(float, box(i + k)))}",usask' for i, n in enumerate(names)
            for k in range(2)]  # fmt: skip
    (root / "train.csv").write_text("\n".join(["image_id,width,height,bbox,source", *rows]))


def boxes_open_images(root: Path) -> None:
    """data/*.jpg and a csv of fractions with ids of classes, as in Open Images."""
    names = write_pictures(root / "data", 10, suffix=".jpg")
    rows = []
    for i, name in enumerate(names):
        x, y, w, h = box(i)
        numbers = (x / SIZE[1], (x + w) / SIZE[1], y / SIZE[0], (y + h) / SIZE[0])
        rows.append(f"{Path(name).stem},xclick,/m/0{i % 2},1,{','.join(map(str, numbers))},0")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded"
    (root / "annotations-bbox.csv").write_text("\n".join([header, *rows]))


# ---- label maps of colours


def write_colors(folder: Path, names: list[str], colors: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        drawn = Image.new("RGB", SIZE[::-1], colors[0])
        for k, color in enumerate(colors):
            drawn.paste(color, (i % 9, k * 8, SIZE[1], k * 8 + 8))
        drawn.save(folder / f"{Path(name).stem}.png")


def colors_camvid(root: Path) -> None:
    """{train,val}, {train,val}_labels with RGB masks, and class_dict.csv, with a class Void."""
    for k, part in enumerate(("train", "val")):
        names = write_pictures(root / part, 5, 50 * k)
        write_colors(root / f"{part}_labels", names, ("#404040", "#800040", "#000000"))
    rows = ["Road,128,0,64", "Sky,128,128,128", "Wall,64,64,64", "Void,0,0,0"]
    (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *rows]))


def colors_cvat(root: Path) -> None:
    """JPEGImages, SegmentationClass and SegmentationObject in colours, labelmap.txt."""
    names = write_pictures(root / "JPEGImages", 10, suffix=".jpg")
    write_colors(root / "SegmentationClass", names, ("#000000", "#fa3253"))
    write_colors(root / "SegmentationObject", names, ("#000000", "#800000", "#008000"))
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\n")


# ---- YOLO and Pascal VOC


def yolo_line(i: int, classes: int = 2) -> str:
    (H, W), (x, y, w, h) = SIZE, box(i)
    return f"{i % classes} {(x + w / 2) / W:.6f} {(y + h / 2) / H:.6f} {w / W:.6f} {h / H:.6f}\n"


def write_yolo(images: Path, labels: Path, count: int, seed: int = 0) -> None:
    labels.mkdir(parents=True)
    for i, name in enumerate(write_pictures(images, count, seed)):
        (labels / f"{Path(name).stem}.txt").write_text(yolo_line(i))


def yolo_roboflow(root: Path) -> None:
    """data.yaml written for a folder deeper, {train,valid,test}/{images,labels}."""
    for k, part in enumerate(("train", "valid", "test")):
        write_yolo(root / part / "images", root / part / "labels", 5, 50 * k)
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    (root / "data.yaml").write_text(text)


def yolo_coco8(root: Path) -> None:
    """signs.yaml with a `path` of another machine, images/{train,val}, labels/{train,val} with outlines."""
    for k, part in enumerate(("train", "val")):
        write_yolo(root / "images" / part, root / "labels" / part, 4, 50 * k)
        (root / "labels" / part / f"p{50 * k}.txt").write_text("1 0.1 0.1 0.5 0.1 0.5 0.6 0.2 0.7\n")
    (root / "signs.yaml").write_text(
        "path: ../datasets/signs\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    )


def yolo_without_yaml(root: Path) -> None:
    """images/, labels/ with classes.txt, as labelImg writes them."""
    write_yolo(root / "images", root / "labels", 10)
    (root / "labels" / "classes.txt").write_text("cat\ndog\nmouse\n")


def yolo_beside_images(root: Path) -> None:
    """{train,test}/*.png with *.txt beside them and no names."""
    for k, part in enumerate(("train", "test")):
        for i, name in enumerate(write_pictures(root / part, 5, 50 * k)):
            (root / part / f"{Path(name).stem}.txt").write_text(yolo_line(i))


def write_xml(file: Path, i: int, suffix: str = ".jpg") -> None:
    H, W = SIZE
    x, y, w, h = box(i)
    corners = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<annotation><filename>{file.stem}{suffix}</filename>"
        f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size>"
        f"<object><name>{('cat', 'dog')[i % 2]}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
        "</annotation>"
    )


def voc_official(root: Path) -> None:
    """VOCdevkit/VOC2012 with lists for boxes."""
    base = root / "VOCdevkit" / "VOC2012"
    names = write_pictures(base / "JPEGImages", 12, suffix=".jpg")
    for i, name in enumerate(names):
        write_xml(base / "Annotations" / f"{Path(name).stem}.xml", i)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    lists = {"train": names[:8], "val": names[8:], "trainval": names, "cat_train": names[:8]}
    for part, chosen in lists.items():
        (base / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{Path(n).stem}\n" for n in chosen))


def voc_kaggle(root: Path) -> None:
    """images/*.png and annotations/*.xml, no lists."""
    for i, name in enumerate(write_pictures(root / "images", 10)):
        write_xml(root / "annotations" / f"{Path(name).stem}.xml", i, ".png")


def voc_roboflow(root: Path) -> None:
    """{train,valid}/*.jpg with *.xml beside them."""
    for k, part in enumerate(("train", "valid")):
        for i, name in enumerate(write_pictures(root / part, 5, 50 * k, suffix=".jpg")):
            write_xml(root / part / f"{Path(name).stem}.xml", i)


# ---- datasets


def metadata_boxes(root: Path) -> None:
    """{train,test}/*.png with metadata.jsonl that holds boxes and category ids."""
    for k, part in enumerate(("train", "test")):
        names = write_pictures(root / part, 6, seed=50 * k)
        rows = [{"file_name": n, "objects": {"bbox": [box(i)], "categories": [i % 2]}} for i, n in enumerate(names)]
        (root / part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metadata_classes(root: Path) -> None:
    """*.png with metadata.csv that holds a class name."""
    names = write_pictures(root, 10)
    (root / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(names))
    )


def saved_to_disk(root: Path) -> None:
    """A DatasetDict of save_to_disk with a ClassLabel."""
    import datasets

    write_pictures(root.parent / "pictures", 16)
    label = datasets.ClassLabel(names=["lo", "hi"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    parts = {
        part: datasets.Dataset.from_dict(
            {"image": [str(root.parent / "pictures" / f"p{i}.png") for i in chosen], "label": [i % 2 for i in chosen]},
            features=features,
        )
        for part, chosen in (("train", range(12)), ("validation", range(12, 16)))
    }
    datasets.DatasetDict(parts).save_to_disk(str(root))


# ---- tar files


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def file_of(image: Image.Image, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, count: int, seed: int, *members: Callable[[int], tuple[str, bytes]]) -> None:
    """Samples of a picture and what the functions return for their number: an ending and a content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for ending, content in (("jpg", file_of(picture(seed + i))), *(member(i) for member in members)):
                add_member(archive, f"sample_{seed + i:05}.{ending}", content)


def class_id(i: int) -> tuple[str, bytes]:
    return "cls", str(i % 2).encode()


def class_map(i: int) -> tuple[str, bytes]:
    stored = np.full(SIZE, 255, dtype=np.uint8)
    stored[: 10 + i] = 0
    stored[40:] = 1
    return "seg.png", file_of(Image.fromarray(stored), "PNG")


def boxes_of(i: int) -> tuple[str, bytes]:
    return "json", json.dumps({"annotations": [{"bbox": box(i), "category_id": i % 2}], "width": SIZE[1]}).encode()


def tar_classes(root: Path) -> None:
    """train-{000000..000001}.tar and val-000000.tar of jpg and cls, classes.txt."""
    for number in range(2):
        write_tar(root / f"train-{number:06}.tar", 4, 10 * number, class_id)
    write_tar(root / "val-000000.tar", 4, 50, class_id)
    (root / "classes.txt").write_text("cat\ndog\n")


def tar_boxes(root: Path) -> None:
    """shards/x.tar and y.tar of jpg and json with a list of boxes."""
    for number, name in enumerate("xy"):
        write_tar(root / "shards" / f"{name}.tar", 5, 10 * number, boxes_of)


def tar_maps(root: Path) -> None:
    """{train,test}/0.tar of jpg and seg.png."""
    for number, part in enumerate(("train", "test")):
        write_tar(root / part / "0.tar", 4, 10 * number, class_map)


LAYOUTS = {
    # name: (function, kind, train samples, test samples, classes)
    "coco_official": (coco_official, "detection", 10, 4, ["cat", "dog"]),
    "coco_one_json": (coco_one_json, "detection", 10, 2, ["cat", "dog"]),
    "coco_roboflow": (coco_roboflow, "detection", 6, 6, ["cat", "dog"]),
    "maps_two_folders": (maps_two_folders, "segmentation", 8, 2, ["road", "car", "sky"]),
    "maps_split_inside": (maps_split_inside, "segmentation", 6, 6, ["class_1", "class_2", "class_3"]),
    "maps_cityscapes": (maps_cityscapes, "segmentation", 8, 4, ["class_0", "class_1"]),
    "maps_binary": (maps_binary, "segmentation", 5, 5, ["background", "foreground"]),
    "folders_split": (folders_split, "classification", 10, 10, ["ant", "bee"]),
    "folders_plain": (folders_plain, "classification", 10, 2, ["Cat", "Dog"]),
    "lists": (lists, "classification", 8, 4, ["small", "large"]),
    "table": (table, "classification", 9, 3, ["boxer", "great dane", "pug"]),
    "table_one_hot": (table_one_hot, "classification", 10, 2, ["MEL", "NV", "BCC"]),
    "boxes_tensorflow": (boxes_tensorflow, "detection", 6, 6, ["cat", "dog"]),
    "boxes_headless": (boxes_headless, "detection", 8, 2, ["cat", "dog"]),
    "boxes_one_column": (boxes_one_column, "detection", 8, 2, ["object"]),
    "boxes_open_images": (boxes_open_images, "detection", 8, 2, ["/m/00", "/m/01"]),
    "colors_camvid": (colors_camvid, "segmentation", 5, 5, ["Road", "Sky", "Wall"]),
    "colors_cvat": (colors_cvat, "segmentation", 8, 2, ["background", "car"]),
    "yolo_roboflow": (yolo_roboflow, "detection", 5, 5, ["cat", "dog"]),
    "yolo_coco8": (yolo_coco8, "detection", 4, 4, ["cat", "dog"]),
    "yolo_without_yaml": (yolo_without_yaml, "detection", 8, 2, ["cat", "dog", "mouse"]),
    "yolo_beside_images": (yolo_beside_images, "detection", 5, 5, ["class_0", "class_1"]),
    "voc_official": (voc_official, "detection", 8, 4, ["cat", "dog"]),
    "voc_kaggle": (voc_kaggle, "detection", 8, 2, ["cat", "dog"]),
    "voc_roboflow": (voc_roboflow, "detection", 5, 5, ["cat", "dog"]),
    "metadata_boxes": (metadata_boxes, "detection", 6, 6, ["class_0", "class_1"]),
    "metadata_classes": (metadata_classes, "classification", 8, 2, ["a", "b"]),
    "tar_classes": (tar_classes, "classification", 8, 4, ["cat", "dog"]),
    "tar_boxes": (tar_boxes, "detection", 8, 2, ["class_0", "class_1"]),
    "tar_maps": (tar_maps, "segmentation", 4, 4, ["class_0", "class_1"]),
    "saved_to_disk": (saved_to_disk, "classification", 12, 4, ["lo", "hi"]),
}
