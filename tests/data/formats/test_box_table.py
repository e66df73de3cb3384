"""BoxTableSource."""

import numpy as np
import pytest

from allinone_ds.errors import DataError
from tests.data.tiny_sets import HEIGHT, WIDTH, errors, opened, source, warnings, write_images

TABLE = {"format": "box_table", "images": "images", "table": "boxes.csv"}


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path


def write(root, *lines):
    (root / "boxes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def boxes(dataset, index=0):
    sample = dataset[index]
    return np.asarray(sample["boxes"]).tolist(), sample["labels"].tolist()


def test_a_row_is_a_box_and_a_row_without_numbers_an_image_without_objects(root):
    write(root, "image,x1,y1,x2,y2,label", "0.png,1,2,11,12,cow", "1.png,,,,,", "0.png, 3 ,4,9.5,8,ant")
    dataset = opened(TABLE, root)
    assert dataset.kind == "detection" and dataset.classes == ["ant", "cow"] and len(dataset) == 2
    assert boxes(dataset) == ([[1, 2, 11, 12], [3, 4, 9.5, 8]], [1, 0])
    assert boxes(dataset, 1) == ([], [])
    assert errors(TABLE, root) == [] and "images in no annotation, not used: 5" in warnings(TABLE, root)
    assert opened(TABLE, root, classes=["cow", "bee", "ant"])[0]["labels"].tolist() == [0, 2]
    with pytest.raises(DataError, match="class 'cow' is not in the train set"):
        opened(TABLE, root, classes=["ant"])


@pytest.mark.parametrize(
    ("kind", "row", "fractions"),
    [
        ("xyxy", "8,6,16,18", False),
        ("xywh", "8,6,8,12", False),
        ("cxcywh", "12,12,8,12", False),
        ("cxcywh", "0.375,0.5,0.25,0.5", True),
    ],
)
def test_all_formats_give_the_same_box(root, kind, row, fractions):
    assert (HEIGHT, WIDTH) == (24, 32)
    config = {**TABLE, "boxes": kind, "fractions": fractions, "label_column": None}
    write(root, "image,x1,y1,x2,y2", f"0.png,{row}")
    assert boxes(opened(config, root)) == ([[8, 6, 16, 18]], [0])
    write(root, "image;box", f'0;"[{row}]"')
    config |= {"box_columns": ["box"], "image_suffix": ".png", "delimiter": ";"}
    dataset = opened(config, root, classes=["cell"])
    assert boxes(dataset) == ([[8, 6, 16, 18]], [0]) and dataset.classes == ["cell"]
    with pytest.raises(DataError, match="label_column is null, so all boxes have one class, but there are 2"):
        opened(config, root, classes=["a", "b"])


def test_a_table_without_a_header_and_ids_as_classes(root):
    write(root, "0.png,1,2,11,12,10", "1.png,1,2,11,12,9")
    with pytest.raises(DataError, match="image_column = 'image', which is not a column"):
        opened(TABLE, root)
    dataset = opened({**TABLE, "columns": ["image", "x1", "y1", "x2", "y2", "label"]}, root)
    assert dataset.classes == ["9", "10"] and len(dataset) == 2


def test_faults_are_named_with_their_line(root):
    write(
        root,
        "image,x1,y1,x2,y2,label",
        "0.png,1,2,11,12,cow",
        "0.png,1,2,x,12,cow",
        "0.png,1,2,,12,cow",
        "0.png,9,2,5,12,cow",
        "0.png,1,2,nan,12,cow",
        "0.png,1,2,5,12,",
        ",1,2,5,12,cow",
        "0.png,1,2,5,12,cow,extra",
        "gone.png,1,2,5,12,cow",
        "1.png,1,2,500,12,cow",
    )
    reasons = "\n".join(p.reason for p in errors(TABLE, root))
    for line, words in ((3, "four numbers"), (4, "four numbers"), (5, "has no area"), (6, "four numbers"),
                        (7, "'label' is empty"), (8, "'image' is empty"), (9, "7 values for 6")):  # fmt: skip
        assert any(f"line {line}:" in reason and words in reason for reason in reasons.splitlines()), (line, reasons)
    assert "file is missing" in reasons and "lies outside its image of 32 x 24" in reasons


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["image,x1,y1,x2,y2,label", "0.png,.1,.2,.3,.4,a"], {}, "set fractions: true"),
        (["image,x1,y1,x2,y2,label", "0.png,,,,,"], {}, "contains no box"),
        (["image,x,y,w,h,label", "0.png,1,2,3,4,a"], {}, "box_columns = 'x1', which is not a column"),
        (["image,x1,y1,x2,x1,y2,label", "0.png,1,2,3,4,5,a"], {}, "2 columns have this name"),
        (["image,x1,y1,x2,y2,label", '0.png,1,2,3,4,"' + "a" * 200_000 + '"'], {}, "line 2: field larger"),
    ],
)
def test_tables_that_mean_something_else_are_refused(root, lines, options, words):
    write(root, *lines)
    with pytest.raises(DataError, match=words):
        opened({**TABLE, **options}, root)


def test_four_columns_or_one(root):
    with pytest.raises(ValueError, match="four different columns"):
        source({**TABLE, "box_columns": ["x", "y"]})
    with pytest.raises(ValueError, match="boxes"):
        source({**TABLE, "boxes": "yolo"})


def test_decimal_commas_where_other_characters_separate_columns(root):
    write(root, "image;x1;y1;x2;y2;label", "0.png;1,5;2;11,25;12;cow")
    assert boxes(opened({**TABLE, "delimiter": ";"}, root)) == ([[1.5, 2, 11.25, 12]], [0])
