"""ImageTableSource."""

from pathlib import Path

import pytest

from allinone_ds.errors import ConfigError, DataError
from tests.data.tiny_sets import errors, opened, source, warnings, write_images

TABLE = {"format": "image_table", "images": "images", "table": "table.csv"}


@pytest.fixture
def root(tmp_path):
    names = write_images(tmp_path / "images")
    rows = [f'{name},"{label}",7' for name, label in zip(names, ("cow", "ant", "bee, wild") * 3, strict=False)]
    (tmp_path / "table.csv").write_text("\ufeffimage,label,weight\n" + "\n".join(rows) + "\n\n", encoding="utf-8")
    return tmp_path


def test_labels_are_names_in_alphabetical_order(root):
    dataset = opened(TABLE, root)
    assert dataset.classes == ["ant", "bee, wild", "cow"] and dataset.labels == [2, 0, 1, 2, 0, 1, 2]
    assert [dataset[i]["label"] for i in range(7)] == dataset.labels and dataset.kind == "classification"
    assert errors(TABLE, root) == [] and warnings(TABLE, root) == ""


def test_other_columns_delimiters_and_suffixes(root):
    (root / "t.tsv").write_text("id\tbreed\n0\tpug\n1\tboxer\n")
    config = {**TABLE, "table": "t.tsv", "image_column": "id", "label_column": "breed", "image_suffix": ".png"}
    dataset = opened({**config, "delimiter": "\t"}, root)
    assert dataset.classes == ["boxer", "pug"] and dataset.path(0) == str(root / "images" / "0.png")
    with pytest.raises(DataError, match=r"its first line is one column, 'id\tbreed'; set delimiter: '\\t'"):
        opened(config, root)
    with pytest.raises(ValueError, match="delimiter"):
        source({**config, "delimiter": ", "})


def test_ids_with_gaps_are_as_many_classes_as_there_are(root):
    (root / "table.csv").write_text("image,label\n0.png,1440764\n1.png,95\n2.png,1440764\n")
    assert opened(TABLE, root).classes == ["95", "1440764"]


def test_a_test_set_follows_its_train_set(root):
    train = ["cow", "bee, wild", "ant", "dog"]
    dataset = opened(TABLE, root, classes=train)
    assert dataset.classes == train and dataset.labels == [0, 2, 1, 0, 2, 1, 0]
    with pytest.raises(DataError, match="class 'cow' is not in the train set"):
        opened(TABLE, root, classes=["ant", "bee, wild"])


def test_faults_are_named_with_their_line(root):
    (root / "table.csv").write_text("image,label\n0.png,ant\n1.png,\n,bee\n2.png\ngone.png,ant\n0.png,ant\n")
    assert [(p.reason.split(";")[0]) for p in errors(TABLE, root)] == [
        "line 3: column 'label' is empty",
        "line 4: column 'image' is empty",
        "line 5: column 'label' is empty",
        "file is missing",
    ]
    assert "listed more than once" in warnings(TABLE, root)
    with pytest.raises(DataError, match="4 problems in the data"):
        opened(TABLE, root)
    (root / "table.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="contains no row with an image and a label"):
        opened(TABLE, root)
    (root / "table.csv").write_text("image,breed\n")
    with pytest.raises(DataError, match="label_column = 'label', which is not a column"):
        opened(TABLE, root)


ONE_HOT = {**TABLE, "label_columns": ["cow", "ant", "bee"]}


def test_one_column_per_class(root):
    (root / "table.csv").write_text("image,ant,bee,cow,age\n0.png,1,0,0,3\n1.png,0.0,0.0,1.0,\n2.png,0,1,0,5\n")
    dataset = opened(ONE_HOT, root)
    assert dataset.classes == ["cow", "ant", "bee"] and dataset.labels == [1, 0, 2]
    assert opened(ONE_HOT, root, classes=["bee", "cow", "ant"]).labels == [2, 1, 0]
    with pytest.raises(DataError, match="label_columns = 'dog', which is not a column"):
        opened({**ONE_HOT, "label_columns": ["ant", "dog"]}, root)


def test_rows_of_no_or_of_several_classes_are_named(root):
    (root / "table.csv").write_text("image,ant,bee,cow\n0.png,1,0,0\n1.png,0,0,0\n2.png,1,1,0\n3.png,0.3,0.7,0\n")
    reasons = [p.reason for p in errors(ONE_HOT, root)]
    assert "line 3: 0 of the columns of classes hold 1 (none)" in reasons[0]
    assert "line 4: 2 of the columns of classes hold 1 (ant, bee); an image has exactly one class" in reasons[1]
    assert "line 5: column 'ant' holds '0.3', allowed are 0 and 1" in reasons[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"label_column": "breed"}, "both set"), ({"label_columns": ["a", "a"]}, "names a column twice")],
)
def test_columns_of_classes_exclude_a_column_of_names(options, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        source({**ONE_HOT, **options})


def test_a_row_with_too_many_values_and_no_csv_at_all(root):
    (root / "table.csv").write_text("image,label\n0.png,ant\n1.png,bee,wild\n2.png,cow,\n")
    [problem] = [p for p in errors(TABLE, root) if "values for" in p.reason]
    assert problem.reason.startswith("line 3: has 3 values for 2 columns")
    (root / "table.csv").write_text("image,label\n0.png," + "a" * 200_000 + "\n")
    with pytest.raises(DataError, match="line 2: field larger than field limit.*write the file again as csv"):
        opened(TABLE, root)


def test_a_file_that_is_no_such_table_is_one_clear_line(root):
    for text, says in (
        ("", "t.csv: is empty; write the names of the columns"),
        ("image;label\n0.png;a\n", r"its first line is one column, 'image;label'; set delimiter: ';'"),
        ("name,label\n0.png,a\n", "image_column = 'image', which is not a column; allowed: label, name"),
    ):
        (root / "t.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            opened({**TABLE, "table": "t.csv"}, root)
    (root / "t.json").write_text('[{"image": "0.png", "label": "a"}]')
    with pytest.raises(DataError, match="a table is a csv file, or a .jsonl file with one json object per line"):
        opened({**TABLE, "table": "t.json"}, root)


def test_spaces_in_the_header_words_and_repeated_rows(root):
    (root / "t.csv").write_bytes(b"\xef\xbb\xbfimage, hat, old\r\n0.png, True, false\r\n1.png,0,1\r\n0.png,0,0\r\n")
    config = {**TABLE, "table": "t.csv", "kind": "attributes"}
    dataset = opened(config, root)
    assert dataset.classes == ["hat", "old"] and dataset[0]["attributes"].tolist() == [1, 0]
    assert "0.png: is listed more than once with different labels (1, 0, 0, 0); keep one entry" in warnings(
        config, root
    )
    (root / "t.csv").write_text("image,label\n0.png,a\n0.png,b\n1.png,b\n1.png,b\n")
    said = warnings({**TABLE, "table": "t.csv"}, root)
    assert "0.png: is listed more than once with different labels (a, b); keep one entry" in said
    assert "1.png: is listed more than once; keep one entry" in said


def test_names_that_differ_in_case_suffix_or_slash_only_are_named(root):
    (root / "t.csv").write_text("image,label\n0.PNG,a\n1,b\n.\\2.png,a\n3.png,b\n77.png,a\n")
    config = {**TABLE, "table": "t.csv"}
    assert [Path(p.file).name for p in errors(config, root)] == ["0.PNG", "1", ".\\2.png", "77.png"]  # each once
    said = (
        "3 of the missing files are there with another suffix, case or slash (0.PNG: 0.png, 1: 1.png, .\\2.png: 2.png)"
    )
    assert said in warnings(config, root)
