"""The traffic runs: their data in exactly the folders that they expect, the model at full size, and two steps of a
reduced one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allinone_ds import cli
from allinone_ds.data.sources import open_source
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.training.start import run_check
from tests.tiny_run import launch

RUN = "configs/runs/traffic_8gpu.yaml"
LARGE = "configs/runs/traffic_64gpu.yaml"
SAMPLES = 5
SIGNS = [f"sign {i}" for i in range(45)]


def photo(rng: np.random.Generator, file: Path, height: int = 48, width: int = 64) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data_root of the run, five samples a split."""
    root = tmp_path_factory.mktemp("traffic")
    rng = np.random.default_rng(0)
    for split, street_split in (("train", "train"), ("test", "val")):
        images, annotations = [], []
        for i in range(SAMPLES):
            photo(rng, root / "tt100k" / split / f"{10000 + i}.jpg")
            images.append({"id": 10000 + i, "file_name": f"{10000 + i}.jpg", "height": 48, "width": 64})
            box = {"bbox": [4 + i, 6, 20, 30], "area": 600, "iscrowd": 0}
            annotations.append({"id": i, "image_id": 10000 + i, "category_id": 1 + 9 * i, **box})
            stem = f"0a0a0b1a-{i:08}"
            photo(rng, root / "bdd100k/seg/images" / street_split / f"{stem}.jpg")
            stored = rng.choice([*range(19), 255], (48, 64)).astype(np.uint8)
            (root / "bdd100k/seg/labels" / street_split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored).save(root / "bdd100k/seg/labels" / street_split / f"{stem}_train_id.png")
            photo(rng, root / "cars" / split / f"{i:06}.jpg")
        categories = [{"id": 1 + i, "name": name} for i, name in enumerate(SIGNS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "tt100k" / f"{split}.json").write_text(json.dumps(content))
        ids = (1, 196, 14, 3, 195)
        lines = [f"{i:06}.jpg {identity}\n" for i, identity in zip(range(SAMPLES), ids, strict=True)]
        (root / "cars" / f"{split}.txt").write_text("".join(lines))
    return root


def small(root: Path) -> list[str]:
    """Overrides: the made data, and as many samples as it has."""
    tasks = ("signs", "streets", "cars")
    counts = [f"tasks.{task}.{split}.expect.samples={SAMPLES}" for task in tasks for split in ("train", "test")]
    return [f"data_root={root}", *counts]


def reduced() -> list[str]:
    """Overrides: layers of a size at which two steps take seconds."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    signs = {"num_queries": 10, "groups": 2, "width": 32, "ffn_dim": 32, "self_attention_heads": 2}
    signs |= {"cross_attention_heads": 2, "decoder_layers": 1}
    streets = {"width": 32, "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 2}
    streets |= {"encoder_ffn_dim": 32, "ffn_dim": 32, "points": 64}
    return [
        *(f"model.backbone.config.{key}={value}" for key, value in sizes.items()),
        *(f"tasks.signs.options.{key}={value}" for key, value in signs.items()),
        *(f"tasks.streets.options.{key}={value}" for key, value in streets.items()),
        "tasks.cars.options.width=32",
        *(f"tasks.{task}.image_size=64" for task in ("signs", "streets", "cars")),
    ]


def test_check_names_what_is_missing(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_check, "_loss", lambda *_: None)  # takes half a minute
        assert cli.main(["check", RUN, f"data_root={data}"]) == 1
    said = capsys.readouterr().out
    for count in (6103, 3067, 7000, 1000, 8144, 8041):
        assert f"holds 5 samples, expect.samples is {count}: {count - 5} missing" in said
    assert "6 errors" in said
    assert cli.main(["check", RUN, *small(data), *reduced()]) == 0


def test_samples_are_what_the_folders_hold(data: Path) -> None:
    config = load_config(RUN, small(data))
    signs, streets, cars = (open_source(config.tasks[task].train, data) for task in config.tasks)
    assert [signs[i]["labels"].tolist() for i in range(SAMPLES)] == [[0], [9], [18], [27], [36]]
    assert signs.classes == SIGNS and signs[2]["boxes"].tolist() == [[6, 6, 26, 36]]
    assert [cars[i]["label"] for i in range(SAMPLES)] == [0, 195, 13, 2, 194]
    assert cars.classes[0] == "1" and cars.classes[195] == "196"
    for i in range(SAMPLES):
        file = data / "bdd100k/seg/labels/train" / f"{Path(streets.path(i)).stem}_train_id.png"
        assert np.array_equal(streets[i]["mask"].numpy(), np.array(Image.open(file)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("0 195", "class id 0 must be 1 or more (ids count from first_id, which is 1)"),
        ("1 197", "holds 197 classes, expect.classes is 196: 1 too many"),
        ("1 195", "holds 195 classes, expect.classes is 196: 1 missing"),
    ],
)
def test_ids_with_a_different_start_are_reported(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ids: str,
    message: str,
) -> None:
    monkeypatch.setattr(run_check, "_loss", lambda *_: None)  # takes half a minute, and is tested above
    first, last = ids.split()
    (tmp_path / "list.txt").write_text(f"000000.jpg {first}\n000001.jpg {last}\n")
    overrides = [*small(data), f"tasks.cars.train.list={tmp_path / 'list.txt'}"]
    assert cli.main(["check", RUN, *overrides]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_map_without_its_image_is_reported_with_the_suffix(data: Path, tmp_path: Path) -> None:
    config = load_config(RUN, small(data))
    source = config.tasks["streets"].train.model_copy(update={"expect": None, "label_maps": str(tmp_path)})
    for i in range(SAMPLES - 1):
        name = f"0a0a0b1a-{i:08}_train_id.png"
        (tmp_path / name).write_bytes((data / "bdd100k/seg/labels/train" / name).read_bytes())
    (tmp_path / "0a0a0b1a-00000000_train_color.png").write_bytes((tmp_path / name).read_bytes())
    dataset = open_source(source, data, strict=False)
    assert len(dataset) == SAMPLES - 1
    messages = {problem.level: str(problem) for problem in dataset.structural}
    assert "00000004_train_id.png; add the label map or remove the image" in messages["error"]
    assert "do not end with '_train_id'" in messages["warning"] and "train_color" in messages["warning"]


def test_a_different_source_line_reads_the_data_from_datasets(data: Path, tmp_path: Path) -> None:
    """The same samples, written by `save_to_disk`; in the run's file only the source's own line changes."""
    kept = load_config(RUN, small(data))
    here = {task: open_source(kept.tasks[task].train, data) for task in kept.tasks}
    paths = {task: [dataset.path(i) for i in range(SAMPLES)] for task, dataset in here.items()}
    names = [str(1 + i) for i in range(196)]
    boxes = [{"bbox": [[4.0 + i, 6.0, 20.0, 30.0]], "category": [9 * i]} for i in range(SAMPLES)]
    maps = [str(data / "bdd100k/seg/labels/train" / f"{Path(p).stem}_train_id.png") for p in paths["streets"]]
    box = {
        "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        "category": datasets.Sequence(datasets.ClassLabel(names=SIGNS)),
    }
    tables = {
        "signs": ({"image": paths["signs"], "objects": boxes}, {"objects": box}),
        "streets": ({"image": paths["streets"], "label": maps}, {"label": datasets.Image()}),
        "cars": (
            {"image": paths["cars"], "label": [here["cars"][i]["label"] for i in range(SAMPLES)]},
            {"label": datasets.ClassLabel(names=names)},
        ),
    }
    content: dict[str, Any] = {"base": RUN, "tasks": {}}
    kinds = {"signs": "detection", "streets": "segmentation", "cars": "classification"}
    for task, (columns, features) in tables.items():
        table = datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), **features}))
        datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / task))
        line = {"format": "datasets", "path": task, "split": "train", "kind": kinds[task]}
        content["tasks"][task] = {"train": line}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    counts = [f"tasks.{task}.train.expect.samples={SAMPLES}" for task in here]
    config = load_config(tmp_path / "run.yaml", counts)
    said = [f"tasks.{t}.train.{k}={v}" for t, task in content["tasks"].items() for k, v in task["train"].items()]
    assert load_config(RUN, [*said, *counts]) == config
    for task, before in here.items():
        assert config.tasks[task].train.expect.classes == len(before.classes)
        found = open_source(config.tasks[task].train, tmp_path)
        assert found.classes == before.classes
        for i in range(SAMPLES):
            one, two = found[i], before[i]
            assert torch.equal(one["image"], two["image"])
            for key in ("boxes", "labels", "mask"):
                assert (key in one) == (key in two) and (key not in one or torch.equal(one[key], two[key]))
            assert one.get("label") == two.get("label")


def full_size(config: RunConfig) -> torch.nn.Module:
    classes = {
        "signs": SIGNS,
        "streets": list(config.tasks["streets"].train.classes),
        "cars": [str(i) for i in range(196)],
    }
    with torch.device("meta"):
        return build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))


@pytest.mark.parametrize(("run", "millions", "channels"), [(RUN, 303, 1024), (LARGE, 6716, 4096)])
def test_the_model_is_built_at_full_size_without_memory(run: str, millions: float, channels: int) -> None:
    model = full_size(load_config(run))
    made = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert made == ["tasks.streets.segmenter.net.pixel_decoder.level_embed"]  # transformers' torch.Tensor(3, width)
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert set(model.tasks) == {"signs", "streets", "cars"}
    with torch.device("meta"):
        features = model.backbone(torch.empty(1, 3, 512, 512)).feature_maps
    assert [tuple(f.shape) for f in features] == [(1, channels, 32, 32)] * 4


def test_the_larger_run_differs_only_in_the_keys_of_its_file() -> None:
    paper, larger = load_config(RUN), load_config(LARGE)
    assert larger.tasks == paper.tasks and larger.balancer == paper.balancer
    assert larger.deepspeed["zero_optimization"]["stage"] == 3
    assert larger.trainer == paper.trainer | {
        "max_steps": 5500, "warmup_steps": 275, "gradient_checkpointing": True, "layer_lr_decay": 0.95,
        "backbone_lr_factor": 1.0, "save_steps": 275, "eval_steps": 275,
    }  # fmt: skip


@pytest.mark.parametrize("run", [RUN, LARGE])
def test_two_steps_of_it_at_reduced_size(data: Path, tmp_path: Path, run: str) -> None:
    overrides = [
        *small(data),
        f"output_dir={tmp_path / 'run'}",
        *reduced(),
        "trainer.max_steps=2", "trainer.warmup_steps=1", "trainer.logging_steps=1", "trainer.dataloader_num_workers=0",
        "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.load_best_model_at_end=false",
    ]  # fmt: skip
    launch(tmp_path, "torchrun", *overrides, config=run)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    for task, name in (("signs", "map50"), ("streets", "miou"), ("cars", "top1")):
        assert metrics[f"eval_{task}_samples"] == SAMPLES and 0 <= metrics[f"eval_{task}_{name}"] <= 1
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [event[f"loss/{task}"] for event in events if "loss" in event for task in ("signs", "streets", "cars")]
    assert len(losses) == 6 and np.isfinite(losses).all()
