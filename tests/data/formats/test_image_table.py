"""ImageTableSource."""

import pytest

from allinone_ds.errors import DataError
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
    with pytest.raises(DataError, match="image_column = 'id', which is not a column; .*allowed: id\tbreed"):
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
