"""ImageListSource."""

from pathlib import Path

import pytest
from PIL import Image

from allinone_ds.errors import BrokenSample, DataError
from tests.data.tiny_sets import CLASSES, COUNT, LIST, errors, opened, pixels, warnings, write_images


def test_a_list_may_have_spaces_comments_and_a_file_of_class_names(list_root):
    (list_root / "images" / "0.png").rename(list_root / "images" / "a b.png")
    lines = (list_root / "list.txt").read_text().replace("0.png", "a b.png")
    (list_root / "list.txt").write_text("# file class\n\n" + lines)
    (list_root / "names.txt").write_text("\n".join(CLASSES) + "\n")
    dataset = opened({**LIST, "classes": "names.txt"}, list_root)
    assert [dataset[i]["label"] for i in range(COUNT)] == [i % 3 for i in range(COUNT)]
    assert dataset.classes == CLASSES and dataset.path(0).endswith("a b.png")
    assert opened({k: v for k, v in LIST.items() if k != "classes"}, list_root).classes == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_file_is_found_by_the_check_and_by_reading(list_root, suffix):
    write_images(list_root / "images", suffix=suffix)
    (list_root / "list.txt").write_text("".join(f"{i}{suffix} 0\n" for i in range(COUNT)))
    file = list_root / "images" / f"3{suffix}"
    file.write_bytes(file.read_bytes()[:-300])
    dataset = opened(LIST, list_root)  # opening does not decode
    with pytest.raises(BrokenSample, match=f"3{suffix}: cannot be decoded"):
        dataset[3]
    assert [Path(p.file).name for p in errors(LIST, list_root)] == [f"3{suffix}"]
    assert [Path(p.file).name for p in dataset.problems() if p and p.level == "error"] == [f"3{suffix}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0.png 3", r"line 1: class id 3 must lie in 0\.\.2 \(ids count from first_id, which is 0\)"),
        ("0.png -1", "class id -1 must lie in"),
        ("0.png", "line 1: '0.png' must be `file class-id`"),
        ("0.png ant", "must be `file class-id`"),
        ("0.png ²", "must be `file class-id`"),
        ("0.png --1", "must be `file class-id`"),
        ("no.png 0", r"no\.png: file is missing"),
        ("# nothing", "contains no sample"),
    ],
)
def test_a_faulty_line_is_an_error(list_root, line, message):
    (list_root / "list.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        opened(LIST, list_root)
    assert errors(LIST, list_root)


def test_unlisted_files_duplicates_and_off_by_one_ids_are_warnings(list_root):
    Image.fromarray(pixels(50)).save(list_root / "images" / "left.png")
    (list_root / "images" / "5.png").write_bytes((list_root / "images" / "4.png").read_bytes())
    (list_root / "list.txt").write_text("".join(f"{i}.png {i % 3 + 1}\n" for i in range(COUNT)) + "0.png 1\n")
    config = {k: v for k, v in LIST.items() if k != "classes"}
    assert len(opened(config, list_root)) == COUNT + 1  # warnings do not stop a run
    reported = warnings(config, list_root)
    assert "not used: 1 (left.png)" in reported
    assert "5.png: has the same content as" in reported
    assert "0.png: is listed more than once" in reported
    assert "no image has class id 0" in reported
    assert errors(config, list_root) == []


def test_a_test_set_follows_the_class_order_of_its_train_set(list_root):
    (list_root / "list.txt").write_text("0.png 0\n1.png 2\n")
    dataset = opened(LIST, list_root, classes=CLASSES[::-1])
    assert [dataset[i]["label"] for i in range(2)] == [2, 0]


def test_ids_with_gaps_become_contiguous(list_root):
    ids = [1440764 + 931 * (i % 3) for i in range(COUNT)]
    (list_root / "list.txt").write_text("".join(f"{i}.png {ids[i]}\n" for i in range(COUNT)))
    config = {k: v for k, v in LIST.items() if k != "classes"}
    dataset = opened(config, list_root)
    assert dataset.classes == ["1440764", "1441695", "1442626"]
    assert [dataset[i]["label"] for i in range(COUNT)] == [i % 3 for i in range(COUNT)]
    reason = str(dataset.structural[0])
    assert "no image has class id 0, 1, 2, 3, 4, ... (1442624 ids up to 1442626)" in reason
    assert "the 3 ids that occur become classes 0..2" in reason
    (list_root / "test.txt").write_text("0.png 1442626\n")
    test = opened({**config, "list": "test.txt"}, list_root, classes=dataset.classes)
    assert test[0]["label"] == 2
    (list_root / "test.txt").write_text("0.png 1442627\n")
    with pytest.raises(DataError, match="line 1: class id 1442627 must be one of the 3 ids of the train set"):
        opened({**config, "list": "test.txt"}, list_root, classes=dataset.classes)


def test_a_test_list_without_names_counts_from_first_id(list_root):
    config = {k: v for k, v in LIST.items() if k != "classes"}
    (list_root / "list.txt").write_text("0.png 1\n1.png 3\n")
    dataset = opened({**config, "first_id": 1}, list_root, classes=CLASSES)
    assert [dataset[i]["label"] for i in range(2)] == [0, 2]
