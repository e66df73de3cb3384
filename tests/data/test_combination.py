"""Several sources per task, splits and classes of a task: what is opened, drawn and resumed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.check import check_sources
from allinone_ds.data.combination import CombinedDataset, Split, combine
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.loading.cache import CachedDataset
from allinone_ds.data.loading.further_samples import FurtherSamples
from allinone_ds.data.loading.loader import TaskData, train_loader
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.data.sources import open_source
from allinone_ds.errors import DataError
from allinone_ds.tasks.classification import ClassificationTask
from tests.data.tiny_sets import CLASSES, COCO, FOLDERS, LIST, MAPS, opened, pixels, source, write_images


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    """Write one folder per class, no two images of which are equal."""
    for number, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(1000 * number + i, 8, 8)).save(folder / f"{i}.png")
    return root


def paths(dataset) -> list[str]:
    return [dataset.path(i) for i in range(len(dataset))]


def both_parts(sources, root, split, classes=None):
    train = open_source(combine(sources, classes, split), root)
    return train, open_source(combine(sources, classes, split, "test"), root, train.classes)


# ---- several sources


def test_sources_are_concatenated(tmp_path):
    for name in ("photos", "drawings"):
        class_folders(tmp_path / name, {"ant": 2, "bee": 3})
    folders = [source({**FOLDERS, "images": name}) for name in ("photos", "drawings")]
    joined = open_source(combine(folders), tmp_path)
    single = [open_source(folder, tmp_path) for folder in folders]
    assert paths(joined) == paths(single[0]) + paths(single[1]) and joined.labels == single[0].labels * 2
    for i in range(len(joined)):
        expected = single[i // 5][i % 5]
        assert torch.equal(joined[i]["image"], expected["image"]) and joined[i]["label"] == expected["label"]
        assert joined[i]["index"] == i and joined[i]["path"] == expected["path"]
    assert combine(folders[0]) is folders[0] and combine(folders[:1]) is folders[0]


def test_the_first_source_numbers_the_classes_unless_the_task_lists_them(tmp_path):
    class_folders(tmp_path / "a", {"bee": 1, "cow": 1})
    class_folders(tmp_path / "b", {"ant": 1, "bee": 1})
    two = [source({**FOLDERS, "images": name}) for name in ("a", "b")]
    with pytest.raises(DataError, match="class 'ant' is not in the train set.*list all names in the task's 'classes'"):
        open_source(combine(two), tmp_path)
    joined = open_source(combine(two, ["cow", "bee", "ant"]), tmp_path)
    assert joined.classes == ["cow", "bee", "ant"]
    assert [Path(joined.path(i)).parent.name for i in range(4)] == [joined.classes[k] for k in joined.labels]


def test_sources_of_different_kinds_and_faults_of_any_source_are_refused(coco_root, tmp_path):
    class_folders(tmp_path / "a", {"ant": 1, "bee": 1, "cow": 1})
    folders = source({**FOLDERS, "images": "a"})
    with pytest.raises(DataError, match="holds classification data.*holds detection data"):
        open_source(combine([source(COCO), folders]), tmp_path)
    missing = source({**FOLDERS, "images": "a", "expect": {"samples": 4}})
    with pytest.raises(DataError, match="1 missing"):
        open_source(combine([folders, missing]), tmp_path)
    found = check_sources({"it": combine([folders, missing])}, tmp_path, progress=False)
    assert [p.reason.split(";")[0] for p in found if p.level == "error"] == [
        "holds 3 samples, expect.samples is 4: 1 missing"
    ]


def weighted(weights=(1, 3, 0.5), sizes=(6, 2, 8)) -> CombinedDataset:
    parts = [
        ClassifiedDataset(f"{n}", Path(f"/{n}"), [f"{i}.png" for i in range(size)], [0] * size, ["a"])
        for n, size in enumerate(sizes)
    ]
    return CombinedDataset(parts, weights)


def schedule_of(dataset, batch=(2, 1), world_size=1, seed=0) -> Schedule:
    return Schedule(seed, {"t": len(dataset)}, {"t": batch}, world_size, {"t": dataset.draw_parts})


def test_every_sample_is_drawn_as_often_as_the_weight_says():
    dataset = weighted()
    schedule = schedule_of(dataset)
    assert schedule.epoch_size("t") == 6 + 6 + 4 and schedule.epoch("t", step=8) == 1.0
    for epoch in range(0, 10, 2):
        drawn = Counter(schedule.at("t", epoch * 16 + i).index for i in range(32))  # two epochs
        assert drawn == {**dict.fromkeys(range(6), 2), **dict.fromkeys((6, 7), 6), **dict.fromkeys(range(8, 16), 1)}
    for epoch in range(10):
        drawn = Counter(schedule.at("t", epoch * 16 + i).index for i in range(16))
        assert {i: drawn[i] for i in range(8)} == {**dict.fromkeys(range(6), 1), 6: 3, 7: 3}
        assert sum(drawn[i] for i in range(8, 16)) == 4 and max(drawn[i] for i in range(8, 16)) == 1
    orders = [tuple(schedule.at("t", e * 16 + i).index for i in range(16)) for e in range(10)]
    assert len(set(orders)) == 10


def test_the_order_does_not_depend_on_what_was_drawn_before():
    """A resumed run, a worker process and another rank ask for other positions, in another order."""
    dataset = weighted((1, 7.3, 0.21), (5, 3, 11))
    fresh = [schedule_of(dataset).at("t", p).index for p in range(200)]
    schedule = schedule_of(dataset)
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    found = {p: schedule.at("t", p).index for p in shuffled}
    assert [found[p] for p in range(200)] == fresh
    four = schedule_of(dataset, batch=(1, 2), world_size=4)
    by_rank = [four.draw("t", s, k, r)[0].index for s in range(25) for k in range(2) for r in range(4)]
    assert by_rank == fresh


def test_equal_weights_keep_the_order_of_a_plain_dataset():
    dataset = weighted((1, 1, 1))
    plain = Schedule(0, {"t": 16}, {"t": (2, 1)}, 1)
    assert [schedule_of(dataset).at("t", p) for p in range(64)] == [plain.at("t", p) for p in range(64)]
    assert schedule_of(dataset).basis() == plain.basis()


def test_a_change_of_weight_or_split_changes_the_basis_that_a_resume_compares():
    bases = [schedule_of(weighted(w)).basis() for w in ((1, 1, 1), (1, 3, 0.5), (1, 3, 0.25))]
    splits = [
        CombinedDataset(weighted().datasets, (1, 1, 1), [np.arange(4), np.arange(2), np.arange(k, k + 2)])
        for k in (0, 1)
    ]
    bases += [schedule_of(dataset).basis() for dataset in splits]
    assert all(a != b for i, a in enumerate(bases) for b in bases[:i])


def test_further_samples_follow_the_weights():
    dataset = weighted((1, 30, 0.001), (6, 2, 8))
    assert [part.per_epoch for part in dataset.draw_parts] == [6, 60, 1]
    torch.manual_seed(0)
    drawn = Counter(CachedDataset(dataset).random_index() for _ in range(2000))
    assert 0.86 < (drawn[6] + drawn[7]) / 2000 < 0.93 and 0.07 < sum(drawn[i] for i in range(6)) / 2000 < 0.12
    further = FurtherSamples(dataset, [], max_broken=0)
    with pytest.raises(DataError, match="1 samples in a row cannot be read"):
        further()


def test_loaders_resume_in_the_middle_of_a_weighted_epoch(tmp_path):
    for name, count in (("a", 5), ("b", 3)):
        class_folders(tmp_path / name, {"ant": count, "bee": count})
    two = [source({**FOLDERS, "images": "a"}), source({**FOLDERS, "images": "b", "weight": 2.5})]
    dataset = open_source(combine(two, split=Split(test=0.2)), tmp_path)
    data = {"t": TaskData(dataset, eval_transform((8, 8)), ClassificationTask.collate, 2, 2, cache=True)}
    schedule = Schedule(3, {"t": len(dataset)}, {"t": (2, 2)}, 1, {"t": dataset.draw_parts})

    def batches(start, workers=0):
        steps = train_loader(data, schedule, 0, start, 9, workers)
        return {s.step: [b["pixel_values"] for b in s.batches["t"]] for s in steps}

    whole, resumed = batches(0), batches(5, workers=1)
    assert sorted(resumed) == [5, 6, 7, 8]
    for step, values in resumed.items():
        assert all(torch.equal(a, b) for a, b in zip(values, whole[step], strict=True))
    with pytest.raises(ValueError, match=r"parts=\{task: dataset.draw_parts\}"):
        train_loader(data, Schedule(3, {"t": len(dataset)}, {"t": (2, 2)}, 1), 0, 0, 9)


# ---- split


def test_a_split_is_disjoint_complete_stratified_and_reproducible(tmp_path):
    class_folders(tmp_path / "images", {"ant": 20, "bee": 10, "cow": 5, "dog": 2})
    train, test = both_parts(source(FOLDERS), tmp_path, Split(test=0.2))
    whole = paths(open_source(source(FOLDERS), tmp_path))
    assert sorted(paths(train) + paths(test)) == sorted(whole) and not set(paths(train)) & set(paths(test))
    assert Counter(test.labels) == {0: 4, 1: 2, 2: 1, 3: 1} and test.classes == train.classes
    assert [test[i]["label"] for i in range(len(test))] == test.labels
    again = both_parts(source(FOLDERS), tmp_path, Split(test=0.2))
    assert [paths(part) for part in again] == [paths(train), paths(test)]
    other = both_parts(source(FOLDERS), tmp_path, Split(test=0.2, seed=1))[1]
    assert Counter(other.labels) == Counter(test.labels) and paths(other) != paths(test)


def test_a_split_does_not_depend_on_where_the_data_lies_and_hardly_on_further_images(tmp_path):
    chosen = []
    for name, count in (("here", 40), ("there", 40), ("more", 44)):
        class_folders(tmp_path / name / "images", {"ant": count})
        test = both_parts(source(FOLDERS), tmp_path / name, Split(test=0.25))[1]
        chosen.append({str(Path(p).relative_to(tmp_path / name)) for p in paths(test)})
    assert chosen[0] == chosen[1] and len(chosen[0]) == 10 and len(chosen[2]) == 11
    assert len(chosen[0] & chosen[2]) >= 7


@pytest.mark.parametrize(("config", "fixture"), [(COCO, "coco_root"), (MAPS, "maps_root"), (LIST, "list_root")])
def test_every_format_can_be_split(config, fixture, request):
    root = request.getfixturevalue(fixture)
    train, test = both_parts(source(config), root, Split(test=0.3))
    assert sorted(paths(train) + paths(test)) == sorted(paths(opened(config, root)))
    assert len(test) == (3 if config is LIST else 2) and train.kind == test.kind
    assert [train[i]["index"] for i in range(len(train))] == list(range(len(train)))


def test_an_image_that_is_listed_twice_lies_in_one_part(tmp_path):
    write_images(tmp_path / "images", 10)
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {k}\n" for i in range(10) for k in (0, 1)))
    listed = {**LIST, "classes": ["ant", "bee"]}
    train, test = both_parts(source(listed), tmp_path, Split(test=0.3))
    assert not set(paths(train)) & set(paths(test)) and len(train) + len(test) == 20 and len(test) == 6
    # the same in two sources
    train, test = both_parts([source(listed), source(listed)], tmp_path, Split(test=0.3))
    assert not set(paths(train)) & set(paths(test)) and len(test) == 12


def test_what_cannot_be_divided_is_said(tmp_path):
    class_folders(tmp_path / "images", {"ant": 4, "bee": 1})
    train, test = both_parts(source(FOLDERS), tmp_path, Split(test=0.25))
    assert len(test) == 1 and [p.reason for p in train.structural if "one image" in p.reason] == [
        "1 of the classes or sources have one image, which is trained on and not tested: bee"
    ]
    class_folders(tmp_path / "few" / "images", {"ant": 1, "bee": 1})
    with pytest.raises(DataError, match=r"split.test = 0.25 of 2 images leaves no image to test on"):
        both_parts(source(FOLDERS), tmp_path / "few", Split(test=0.25))


def test_broken_files_are_found_in_both_parts(tmp_path):
    class_folders(tmp_path / "images", {"ant": 6})
    for i in range(6):
        (tmp_path / "images" / "ant" / f"{i}.png").write_bytes(f"no image {i}".encode())
    parts = {part: combine(source(FOLDERS), None, Split(test=0.5), part) for part in ("train", "test")}
    found = check_sources(parts, tmp_path, progress=False, classes_of={"test": "train"})
    assert len({p.file for p in found if "is not an image" in p.reason}) == 6


# ---- classes of the task


def test_classes_of_the_task_name_the_ids_of_sources_without_names(maps_root):
    unnamed = source({k: v for k, v in MAPS.items() if k != "classes"})
    assert open_source(combine(unnamed, CLASSES), maps_root).classes == CLASSES
    with pytest.raises(DataError, match="set 'classes' of the source or of the task"):
        open_source(unnamed, maps_root)
    (maps_root / "names.txt").write_text("\n".join(CLASSES))
    assert open_source(combine(unnamed, "names.txt"), maps_root).classes == CLASSES
    reordered = open_source(combine(source(MAPS), CLASSES[::-1]), maps_root)  # its own names say what the ids mean
    own = open_source(source(MAPS), maps_root)
    mask = own[0]["mask"].numpy()
    assert np.array_equal(reordered[0]["mask"].numpy(), np.where(mask == 255, 255, 2 - mask))
