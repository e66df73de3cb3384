"""The ladder of methods: its plan, its records, its statistics, and runs of two steps."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allinone_ds.balance.options import BalancerConfig
from benchmarks.common.launch import ROOT
from benchmarks.ladder import data as ladder_data
from benchmarks.ladder import plots, runs, stats, table
from benchmarks.ladder.plan import BLOCKS, CHOICE_SEED, METHODS, SEEDS, TASKS, Spec
from benchmarks.ladder.records import Records, base_runs

BASES = base_runs("cpu")


def changed(**trainer: Any) -> dict[str, dict[str, Any]]:
    """Return the base runs with other settings of the trainer."""
    return {data: {**base, "trainer": {**base["trainer"], **trainer}} for data, base in BASES.items()}


ADAMW = ("composed", "adamw")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"tbgc_own_heads", "equal_updates"}))
def test_every_method_of_the_package_has_the_options_that_it_needs(method: str) -> None:
    """Else the runs before it are trained for hours until it fails."""
    options = {"weights": dict.fromkeys(TASKS, 1.0)} if method == "static" else {}
    BalancerConfig(**METHODS[method], **options).weighting()
    assert any(method in methods for methods in BLOCKS.values())


def record(records: Records, spec: Spec, score: float, **values: Any) -> None:
    """Append a record whose metrics are all `score`."""
    curve = dict.fromkeys(spec.tasks, [1.0, 1.0, 1.0])
    curve |= {"detection": [1.0, 2.0, 3.0], "classification": [4.0, 4.0, 9.0]}
    records.append(spec, {
        "metrics": {task: float(score) for task in spec.tasks},
        "norms": {task: {"median": sorted(curve[task])[1], "curve": curve[task]} for task in spec.tasks},
        "scaled": {task: curve[task] for task in spec.tasks},
        "shares": {task: 1 / len(spec.tasks) for task in spec.tasks},
        "diverged": False, "steps": records.bases[spec.data]["trainer"]["max_steps"], "logging_steps": 20,
        "wall_seconds": 9.0, "cpu_seconds": 8.0, "settings": records.settings(spec.data), **values,
    })  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "records.jsonl", BASES, "cpu")


def spec_of(line: str) -> Spec:
    """Return the run of a line of the records."""
    record = json.loads(line)
    return Spec(**{field.name: record[field.name] for field in fields(Spec)})


def remove(records: Records, *specs: Spec) -> None:
    """Delete the lines of these runs."""
    lines = records.file.read_text().splitlines(keepends=True)
    records.file.write_text("".join(line for line in lines if spec_of(line) not in specs))


# ---- the plan ----


def fill(records: Records, blocks: list[tuple[str, str]]) -> list[Spec]:
    """Append records of all planned runs, with scores that favour the middle rate; return the order of the runs."""
    done: list[Spec] = []
    while True:
        todo = (s for block in blocks for s in records.planned(*block) if records.read(s) is None)
        spec = next(todo, None)
        if spec is None:
            return done
        middle = records.rates(spec.optimizer, spec.method)[1]
        record(records, spec, 0.5 if spec.lr == middle else 0.4)
        done.append(spec)


def test_rates_are_chosen_before_seeds_and_seeds_are_done_one_by_one(records: Records) -> None:
    order = fill(records, [ADAMW])
    methods = BLOCKS[ADAMW]
    assert len(order) == len(set(order)) == len(methods) * (3 + len(SEEDS["composed"]))
    choice, seeds = order[: 3 * len(methods)], order[3 * len(methods) :]
    assert {spec.split for spec in choice} == {"validation"} and {spec.seed for spec in choice} == {CHOICE_SEED}
    assert CHOICE_SEED not in SEEDS["composed"] and {spec.split for spec in seeds} == {"test"}
    assert [spec.seed for spec in seeds] == sorted(spec.seed for spec in seeds)
    assert all(spec.lr == records.rates("adamw", spec.method)[1] for spec in seeds)
    assert fill(records, [ADAMW]) == []


def test_static_weights_make_median_norms_equal_and_keep_their_root_mean_square(records: Records) -> None:
    assert records.static_weights(*ADAMW) is None
    fill(records, [ADAMW])
    weights = records.static_weights(*ADAMW)
    assert weights is not None
    medians = {"detection": 2.0, "segmentation": 1.0, "classification": 4.0}
    assert [weights[task] * medians[task] for task in TASKS] == pytest.approx([math.sqrt(7)] * 3, rel=1e-3)


def test_a_record_is_valid_only_if_complete_and_of_the_same_settings(records: Records) -> None:
    spec = Spec(*ADAMW, "sum", 1e-3, 0, "test")
    assert records.read(spec) is None
    record(records, spec, 0.5)
    assert records.read(spec) is not None
    good = records.file.read_text()
    content = json.loads(good)
    for bad in (
        good[: len(good) // 2],
        "[]",
        json.dumps({**content, "settings": "other"}),
        json.dumps({**content, "steps": 3}),
        json.dumps({**content, "metrics": {"detection": 0.5}}),
        json.dumps({**content, "metrics": {**content["metrics"], "segmentation": None}}),
    ):
        records.file.write_text(bad)
        assert records.read(spec) is None, bad
        records.append(spec, content)
        assert records.read(spec) == content, "a bad line must not affect the next one"
        with records.file.open("a") as file:
            file.write(bad)
        assert records.read(spec) == content, "a bad line must not affect the one before"
    assert records.read(replace(spec, seed=1)) is None


def test_settings_depend_on_the_base_run_and_the_data(records: Records) -> None:
    longer = Records(records.file, changed(weight_decay=0.1), "cpu")
    digests = {records.settings("composed"), records.settings("native"), longer.settings("composed")}
    assert len(digests) == 3


def test_the_recorded_runs_of_the_earlier_head_stay_valid() -> None:
    earlier = Records(ROOT / "benchmarks/results/ladder_cpu.jsonl", BASES, "cpu").earlier()
    for data, optimizer in (ADAMW, ("composed", "sgd"), ("native", "adamw")):
        assert len(table.Block(earlier, data, optimizer).runs["tbgc"]) == len(SEEDS[data]), (data, optimizer)


# ---- statistics ----


def test_relative_change_by_hand() -> None:
    single = {"detection": 0.5, "segmentation": 0.4, "classification": 0.8}
    multi = {"detection": 0.6, "segmentation": 0.3, "classification": 0.8}
    assert stats.relative_change(multi, single) == pytest.approx((0.2 - 0.25 + 0.0) / 3)
    assert stats.relative_change({"r2": 0.31}, {"r2": -0.01}, ["r2"]) == pytest.approx(0.32)


def test_paired_t_test_by_hand() -> None:
    found = stats.compare([1.0, 2.0, 3.0, 4.0, 5.0])
    # mean 3, standard deviation sqrt(2.5), t = 3 / sqrt(0.5), 4 degrees of freedom; with z = t / sqrt(4 + t^2)
    # Student's distribution function is 1/2 + (3 z - z^3) / 4 there
    z = (3 / math.sqrt(0.5)) / math.sqrt(4 + 18)
    assert (found.n, found.mean) == (5, 3.0)
    assert found.p == pytest.approx(2 * (0.5 - (3 * z - z**3) / 4), rel=1e-6)
    assert found.high - found.mean == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)  # t's 97.5 % point
    assert found.low + found.high == pytest.approx(6)


def test_the_detectable_effect_is_detected_with_its_power() -> None:
    effect = stats.smallest_effect(5)
    rng = np.random.default_rng(0)
    draws = rng.normal(effect, 1, (20_000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    assert np.mean(np.abs(t) > 2.776445) == pytest.approx(0.8, abs=0.01)
    assert stats.smallest_effect(20) < effect


def test_holm_by_hand() -> None:
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_the_report_names_what_is_missing_and_what_is_significant(records: Records, tmp_path: Path) -> None:
    assert "96 of 96" not in table.report(records, [ADAMW])
    assert "**96 are missing**" in table.report(records, [ADAMW])
    fill(records, [ADAMW])
    steps = [0.00, 0.01, -0.01, 0.02, 0.01]
    for seed, step in enumerate(steps):
        lr = records.rates("adamw", "tbgc")[1]
        record(records, Spec(*ADAMW, "tbgc", lr, seed, "test"), 0.6 + step)  # single-task and all others: 0.5
        record(records, Spec(*ADAMW, "task_clip", lr, seed, "test"), 0.5 + step)
    text = table.report(records, [ADAMW])
    assert "96 of 96 runs are done." in text and "missing**" not in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| +21.2 ± 2.3 |" in next(line for line in text.splitlines() if line.startswith("| tbgc | 5 |"))
    assert "| significant |" in rows["tbgc - sum"] and "| +21.2 |" in rows["tbgc - sum"]
    assert "| not significant |" in rows["task_clip - single-task"]
    remove(records, Spec(*ADAMW, "tbgc", lr, 4, "test"))
    assert "**1 are missing**" in table.report(records, [ADAMW])
    assert "preliminary" in table.report(records, [ADAMW])

    page = tmp_path / "page.md"
    page.write_text(f"above\n{table.BEGIN}\nreplaced\n{table.END}\nbelow\n")
    for _ in range(2):
        table.write_page(page, text)
    content = page.read_text()
    assert content.startswith("above") and content.endswith("below\n") and "replaced" not in content
    assert content.count("96 of 96") == 1
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="page.md"):
        table.write_page(page, text)
    earlier = records.earlier()
    assert earlier.settings("composed") != records.settings("composed") and "to the head of today" not in text
    fill(earlier, [ADAMW])
    assert "| sum | .500 to .500 | .500 to .500 | .500 to .500 | +0.0 to +0.0 |" in table.report(records, [ADAMW])
    joint = Records(tmp_path / "joint", BASES, "cpu")
    fill(joint, [("joint", "adamw")])
    assert "to the head of today" not in table.report(joint, [("joint", "adamw")]), "no earlier head was trained there"
    drawn = {path.name for path in plots.write_plots(records, tmp_path) if path.stat().st_size > 0}
    names = {f"evidence-{kind}composed-adamw.png" for kind in ("", "rates-", "norms-")}
    assert drawn == names | {plots.AGAINST_SUM}


@pytest.mark.parametrize(("best", "says"), [(0, "the lowest tried"), (3, "inside"), (-1, "the highest tried")])
def test_the_report_names_a_best_rate_at_an_end_of_those_tried(records: Records, best: int, says: str) -> None:
    specs = records.choice("composed", "sgd", "tbgc")
    for spec in specs:
        record(records, spec, 0.6 if spec is specs[best] else 0.5)
    lines = table.report(records, [("composed", "sgd")]).splitlines()
    assert next(line for line in lines if line.startswith("| tbgc |") and "0.03: " in line).endswith(f"| {says} |")


# ---- data ----


def test_crops_contain_trees_that_are_at_least_half_inside_in_their_own_pixels() -> None:
    boxes = np.float32([[10, 10, 30, 30], [44, 0, 54, 10], [90, 90, 100, 100]])
    found = {(x, y): kept.tolist() for x, y, kept in ladder_data.crops(boxes, (0, 0, 100, 60), 50, 25)}
    # 25 % of the first tree lie at x >= 25; 60 % of the second lie at x < 50, and 40 % at x >= 50
    assert found == {(0, 0): [[10, 10, 30, 30], [44, 0, 50, 10]], (25, 0): [[19, 0, 29, 10]]}


def test_splits_share_no_product_and_no_photo(small: dict[str, Any]) -> None:
    made = ladder_data.pools(("trouser", "bag"))
    tiles = {split: {tile.tobytes() for tile in pool.tiles} for split, pool in made.items()}
    photos = {split: set(pool.photo_names) for split, pool in made.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert tiles[one].isdisjoint(tiles[other]) and photos[one].isdisjoint(photos[other])
        assert photos[one] and photos[other]


# ---- real runs ----


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Few images, and noise instead of Debian's Fashion-MNIST."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 12), ("t10k", 10)):
        images = rng.integers(13, 256, (10 * count, 28, 28), dtype=np.uint8)
        images[:, :4], images[:, -4:], images[:, :, :4], images[:, :, -4:] = 0, 0, 0, 0
        for what, values in (("images-idx3", images), ("labels-idx1", np.arange(10 * count, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">i4").tobytes()
            (tmp_path / f"{stem}-{what}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    counts = {"train": (12, 12, 24), "validation": (6, 6, 6), "test": (6, 6, 12)}
    monkeypatch.setattr(ladder_data, "FASHION", tmp_path)
    monkeypatch.setattr(ladder_data, "PER_CLASS", 12)
    monkeypatch.setattr(ladder_data, "HELD_OUT", 4)
    monkeypatch.setitem(ladder_data.SIZES, "cpu", {**ladder_data.SIZES["cpu"], **counts})
    return counts


def test_runs_append_records_and_are_not_trained_twice(small: dict[str, Any], tmp_path: Path) -> None:
    records = Records(tmp_path / "records", changed(max_steps=2, logging_steps=1), "cpu")
    fill(records, [ADAMW])
    lr = records.rates("adamw", "static")[1]
    todo = [Spec(*ADAMW, "single_detection", lr, CHOICE_SEED, "validation"), Spec(*ADAMW, "static", lr, 0, "test")]
    weights = records.static_weights(*ADAMW)
    remove(records, *todo)
    runner = runs.Runner(records, tmp_path / "work", None, gpu=False)
    kept = records.file.read_text()
    runner.run([ADAMW], jobs=2)
    content = records.file.read_text()
    assert content.startswith(kept)
    added = content.removeprefix(kept)
    trained = [spec_of(line) for line in content.splitlines()]
    assert len(trained) == len(set(trained)) and set(todo) <= {spec_of(line) for line in added.splitlines()}
    alone, static = (records.read(spec) for spec in todo)
    assert alone is not None and static is not None
    assert set(alone["metrics"]) == {"detection"} and set(static["metrics"]) == set(TASKS)
    assert static["balancer"] == {"name": "static", "weights": weights} and static["split"] == "test"
    for task in TASKS:
        raw, scaled = static["norms"][task]["curve"], static["scaled"][task]
        assert len(raw) == 2 and scaled == pytest.approx([weights[task] * norm for norm in raw], rel=2e-3)
    assert sum(static["update"]["along"].values()) == pytest.approx(1, abs=1e-3)
    assert static["update"]["difference"]["sum"] < 1e-3, "the parts add up to the step that AdamW took"
    assert sum(static["shares"].values()) == pytest.approx(1, abs=1e-3) and alone["shares"] == {"detection": 1.0}
    assert static["cpu_seconds"] > 0 and static["wall_seconds"] > 0
    assert str(tmp_path) not in added
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["data"]

    scenes = [{p.name: p.read_bytes() for p in (tmp_path / "work/data/composed" / split / "detection/train").iterdir()}
              for split in ("validation", "test")]  # fmt: skip
    assert scenes[0] == scenes[1] and len(scenes[0]) == 12, "both splits train on the same scenes"
    assert runner.next([ADAMW]) is None
    remove(records, todo[1])
    with records.file.open("a") as file:
        file.write('{"metrics": {"detection": 0.')
    assert runner.next([ADAMW]) == todo[1]


def test_a_run_that_fails_does_not_end_the_others(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "records", BASES, "cpu")
    fill(records, [ADAMW])
    specs = [spec for spec in records.planned(*ADAMW) if spec.split == "test"][:2]
    remove(records, *specs)
    monkeypatch.setattr(runs, "command", lambda *_: (["sh", "-c", "echo no space left on device; exit 3"], {}))
    monkeypatch.setattr(runs, "make_data", lambda *_: None)
    runner = runs.Runner(records, tmp_path / "work", None, gpu=False)
    with pytest.raises(SystemExit, match="2 runs failed") as failure:
        runner.run([ADAMW], jobs=1)
    assert all(spec.name in str(failure.value) for spec in specs)
    assert "no space left" in runner.failed[specs[1]].read_text()


def test_a_run_that_diverged_is_told_from_one_that_failed() -> None:
    said = (
        "error: loss, gradient or factor of task 'classification' was not finite in 50 steps in a row, the last of them"
    )
    assert runs.diverged(said) and not runs.diverged("error: no space left on device")
