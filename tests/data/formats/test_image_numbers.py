"""ImageTableSource with attributes, numbers and identities, and CelebA's own files."""

import json
import math

import pytest
import torch

from allinone_ds.data.combination import combine
from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.errors import ConfigError, DataError
from tests.data.tiny_sets import errors, opened, source, warnings, write_images

ATTRIBUTES = {"format": "image_table", "kind": "attributes", "images": "images", "table": "t.csv"}
NUMBERS = {**ATTRIBUTES, "kind": "regression"}
SIZE = (24, 32)


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "images", 4)
    return tmp_path


def rows(dataset) -> list[list[float | None]]:
    key = "attributes" if dataset.kind == "attributes" else "value"
    return [[None if math.isnan(v) else v for v in dataset[i][key].tolist()] for i in range(len(dataset))]


def test_attributes_have_missing_entries_in_every_spelling(root):
    (root / "t.csv").write_text("image,hat,beard,old\n0.png,1,0,\n1.png,0.0,1.0,nan\n2.png,-1,NA,0\n3.png,1,null,1\n")
    dataset = opened(ATTRIBUTES, root)
    assert dataset.classes == ["hat", "beard", "old"] and dataset.kind == "attributes"
    assert rows(dataset) == [[1, 0, None], [0, 1, None], [None, None, 0], [1, None, 1]]
    assert dataset[0]["attributes"].dtype == torch.float32
    assert errors(ATTRIBUTES, root) == [] and warnings(ATTRIBUTES, root) == ""


def test_the_own_files_of_celeba(root):
    names = "5_o_Clock_Shadow Bald Male"
    values = ["-1  1 -1", " 1 -1  1", "-1 -1  1", " 1 -1  1"]
    lines = [f"{i}.png  {value}" for i, value in enumerate(values)]
    (root / "list_attr_celeba.txt").write_text("\n".join(["4", names + " ", *lines, ""]))
    (root / "list_eval_partition.txt").write_text("0.png 0\n1.png 0\n2.png 2\n3.png 1\n")
    config = {**ATTRIBUTES, "table": "list_attr_celeba.txt", "delimiter": " ", "absent": -1}
    assert opened(config, root).classes == names.split()
    assert rows(opened(config, root)) == [[0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1]]
    part = {**config, "partition": "list_eval_partition.txt", "part": 0}
    assert rows(opened(part, root)) == [[0, 1, 0], [1, 0, 1]]
    assert rows(opened({**part, "part": "2"}, root)) == [[0, 0, 1]]
    with pytest.raises(DataError, match="no line has the part '7'; it has 0, 1, 2"):
        opened({**part, "part": 7}, root)
    with pytest.raises(DataError, match="holds -1 and 1 but no 0.*'absent: -1'"):
        opened({**config, "absent": 0}, root)


def test_json_lines_hold_numbers_with_gaps(root):
    records = [{"image": f"{i}.png", "age": 20 + i, "height": 1.5e9 + i} for i in range(4)]
    records[2]["age"] = None
    del records[3]["height"]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    config = {**NUMBERS, "table": "t.jsonl", "columns": ["height", "age"]}
    dataset = opened(config, root)
    assert rows(dataset) == [[1.5e9, 20], [1.5e9 + 1, 21], [1.5e9 + 2, None], [None, 23]]  # float32 has no 1.5e9 + 1
    assert opened({**config, "columns": ["age"]}, root).classes == ["age"]
    (root / "t.jsonl").write_text('{"image": "0.png", "age": 1}\n{"image"')
    with pytest.raises(DataError, match="line 2: is not valid json"):
        opened(config, root)


def test_a_test_set_has_the_columns_of_its_train_set_in_their_order(root):
    (root / "t.csv").write_text("image,old,hat\n0.png,1,0\n1.png,0,1\n")
    dataset = opened(ATTRIBUTES, root, classes=["hat", "beard", "old"])
    assert dataset.classes == ["hat", "beard", "old"] and rows(dataset) == [[0, None, 1], [1, None, 0]]
    with pytest.raises(DataError, match="class 'hat' is not in the train set; .*allowed: old"):
        opened(ATTRIBUTES, root, classes=["old"])


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        ({"columns": ["hta"]}, "image,hat\n0.png,1\n", "columns = 'hta', which is not a column; did you mean 'hat'"),
        ({}, "image,hat,name\n0.png,1,bob\n", "line 2: column 'name' is 'bob'; allowed are 1 .* 'columns'"),
        ({"columns": ["hat"]}, "image,hat\n0.png,2\n", "line 2: column 'hat' is '2'; allowed are 1 .present., 0"),
        ({}, "image,hat,old\n0.png,1\n", "line 2: has 2 values for 3 columns"),
        ({}, "image,hat\n,1\n", "contains no row with an image"),
        ({}, "image\n0.png\n", "no column beside 'image'"),
        ({}, "image,hat,hat\n0.png,1,0\n", "column 'hat' stands twice"),
        ({"kind": "regression"}, "image,value\n0.png,12kg\n", "line 2: column 'value' is '12kg'; allowed are a number"),
        ({"kind": "regression"}, "image,value\n0.png,inf\n", "line 2: column 'value' is 'inf'"),
        ({"kind": "regression"}, "image,age\n0.png,1\n", "columns = 'value', which is not a column"),
    ],
)
def test_faults_are_named_with_line_and_column(root, config, text, message):
    (root / "t.csv").write_text(text)
    with pytest.raises(DataError, match=f"t.csv: .*(?s:.*){message}"):
        opened({**ATTRIBUTES, **config}, root)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "regression", "absent": -1}, "absent is an option of kind attributes, the kind is regression"),
        ({"kind": "classification", "columns": ["a"]}, "columns is an option of kind attributes and regression"),
        ({"label_column": "x"}, "label_column is an option of kind classification and retrieval"),
        ({"partition": "p.txt"}, "'partition' and 'part' belong together"),
        ({"columns": ["a", "a"]}, "columns names a column twice"),
    ],
)
def test_options_without_effect_are_refused(config, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        source({**ATTRIBUTES, **config})


def test_nothing_to_learn_is_an_error_and_constant_columns_a_warning(root):
    (root / "t.csv").write_text("image,hat,beard,old\n0.png,1,1,\n1.png,1,0,\n2.png,,,\n3.png,1,1,\n")
    [empty, constant] = target_problems(opened(ATTRIBUTES, root), SIZE)
    assert empty.level == constant.level == "warning"
    assert "1 of 4 images have no label at all" in empty.reason
    assert "2 of 3 columns have nothing to tell apart: hat (1 in all 3 images with a label), old (no label" in (
        constant.reason
    )
    (root / "t.csv").write_text("image,hat\n0.png,1\n1.png,1\n")
    [nothing] = target_problems(opened(ATTRIBUTES, root), SIZE)
    assert (
        nothing.level == "error" and "no column has two different values, in 2 images with 2 labels" in nothing.reason
    )
    assert target_problems(opened(ATTRIBUTES, root), SIZE, train=False)[0].level == "warning"
    (root / "t.csv").write_text("image,value\n0.png,4\n1.png,4\n2.png,\n3.png,4\n")
    assert "nothing can be learned" in target_problems(opened(NUMBERS, root), SIZE)[0].reason


def test_identities_of_a_test_set_may_differ_and_get_numbers_after_those_of_training(root):
    config = {**ATTRIBUTES, "kind": "retrieval", "label_column": "who"}
    (root / "t.csv").write_text("image,who\n0.png,eve\n1.png,ann\n2.png,eve\n3.png,ann\n")
    train = opened(config, root)
    assert train.kind == "retrieval" and train.classes == ["ann", "eve"] and train.labels == [1, 0, 1, 0]
    (root / "t.csv").write_text("image,who\n0.png,zoe\n1.png,eve\n2.png,zoe\n")
    test = opened(config, root, classes=train.classes)
    assert test.classes == ["ann", "eve", "zoe"] and test.labels == [2, 1, 2]
    [single] = target_problems(test, SIZE, train=False)
    assert "1 of 2 identities have one image only" in single.reason and single.level == "warning"
    (root / "t.csv").write_text("image,who\n0.png,zoe\n1.png,eve\n")
    [alone] = target_problems(opened(config, root), SIZE)
    assert "no two of 2 images show one identity: a loss on pairs is always 0" in alone.reason
    (root / "t.csv").write_text("image,who\n0.png,zoe\n1.png,zoe\n")
    assert "all 2 images show one identity" in target_problems(opened(config, root), SIZE)[0].reason


def test_several_sources_join_their_identities(root):
    for name in ("one/ann", "one/eve", "two/bob", "two/eve"):
        write_images(root / name, 2)
    sources = [source({"format": "class_folders", "kind": "retrieval", "images": f}) for f in ("one", "two")]
    joined = combine(sources).open(root)
    assert joined.classes == ["ann", "eve", "bob"]
    assert [joined[i]["label"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 1, 1]
    test = opened({"format": "class_folders", "kind": "retrieval", "images": "two"}, root, classes=["eve"])
    assert test.classes == ["eve", "bob"] and test.labels == [1, 1, 0, 0]
