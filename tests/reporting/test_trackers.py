"""What trackers record of a run on two ranks that is interrupted and resumed, read back from their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allinone_ds.reporting.trackers import WandbTracker, _of_one_size
from tests.launcher import run_ranks
from tests.tiny_run import TEST_SAMPLES

# 0.31 has the reader of offline runs, `wandb leet inspect`
pytest.importorskip("wandb", minversion="0.31", reason="needs the extra `tracking`")


pytest.importorskip("tensorboard", reason="needs the extra `tracking`")


SECRET = "s3cr3t-4711"
MAIN = {"det": "map50", "seg": "miou", "cls": "top1"}


@pytest.fixture(scope="module")
def tracked(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The run's folder, and W&B's files of the first start and of the resumed one."""
    place = tmp_path_factory.mktemp("tracked")
    folder = place / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(place / "netrc"))  # no key anywhere
        patch.setenv("WANDB_CONFIG_DIR", str(place))
        patch.setenv("WANDB_DIR", str(place))
        patch.setenv("WANDB_LOG_MODEL", "checkpoint")  # and the final weights
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        script = Path(__file__).parent / "ranks_trackers.py"
        results = run_ranks(script, 2, place, str(home), str(folder))
    assert set(results.values()) == {""}, results
    files = sorted((place / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return folder, files


def test_an_offline_run_holds_everything_under_one_step_metric(tracked: tuple[Path, list[Path]]) -> None:
    from .wandb_file import records, rows

    _, files = tracked
    logged = rows(files[0])
    training = [row for row in logged if "train/loss" in row]
    assert [row["train/global_step"] for row in training] == [1, 2, 3, 4]
    assert all("train/global_step" in row for row in logged if any(not key.startswith("_") for key in row))
    for row in training:
        for task in TEST_SAMPLES:
            norm, scale = row[f"train/grad_norm/{task}/raw"], row[f"train/grad_norm/{task}/scale"]
            assert row[f"train/grad_norm/{task}/scaled"] == pytest.approx(norm * scale, rel=1e-5)
            assert row[f"train/images_per_second/{task}"] > 0
            assert row[f"train/skipped/{task}"] == 0
        moved = {task: row[f"train/grad_norm/{task}/scaled"] ** 2 for task in TEST_SAMPLES}
        for task, square in moved.items():
            assert row[f"train/grad_norm/{task}/share"] == pytest.approx(square / sum(moved.values()), rel=1e-4)
        # 2 images x 2 micro-steps of det, 2 of seg, 4 of cls
        pace = [row[f"train/images_per_second/{task}"] for task in ("det", "seg", "cls")]
        assert pace == pytest.approx([pace[1] * 2, pace[1], pace[1] * 2])
        assert 0 <= row["train/seconds/data_wait"] <= row["train/seconds/step"]
        assert row["train/memory/peak_gib"] > 0.05 and row["train/broken_images"] == 0
    evaluations = [row for row in logged if "eval/score" in row]
    assert [row["train/global_step"] for row in evaluations] == [2, 4]
    galleries = [row for row in logged if any(key.startswith("predictions/") for key in row)]
    assert [row["train/global_step"] for row in galleries] == [2, 4]
    for row in galleries:
        for task in TEST_SAMPLES:
            assert row[f"predictions/{task}._type"] == "images/separated"
            names = row[f"predictions/{task}.filenames"]
            assert len(names) == 4 and all((files[0].parent / "files" / name).is_file() for name in names)

    metrics = {}
    config: dict[str, Any] = {}
    artifacts = {}
    saved = []
    for kind, content in records(files[0]):
        match kind:
            case "metric":
                metrics[content.get("name") or content["glob_name"]] = content
            case "config":
                config.update(content["update"])
            case "artifact":
                artifacts[content["type"]] = [entry["path"] for entry in content["manifest"]["contents"]]
                saved += [alias for alias in content["aliases"] if "manifest.json" in artifacts[content["type"]]]
    assert metrics["*"]["step_metric"] == "train/global_step"
    for name in ("score", *(f"{task}_{key}" for task, key in MAIN.items())):
        assert metrics[f"eval/{name}"]["summary"] == {"max": True}
        assert metrics[f"eval/{name}"]["step_metric"] == "train/global_step"
    assert config["learning_rate"] == 1e-3 and config["run"]["tasks"]["det"]["micro_steps"] == 2
    assert sorted(artifacts["config"]) == ["config.yaml", "model.json"]
    assert sorted(artifacts["model"]) == ["config.yaml", "model.json", "model.safetensors"]
    # checkpoints are written in the background here: each is whole when it is logged
    assert {"checkpoint_global_step_2", "checkpoint_global_step_4"} <= set(saved)
    assert {row["train/global_step"] for row in training if "train/cosine/det/seg" in row} == {1, 3}
    assert all(-1.01 <= row.get("train/cosine/det/seg", 0) <= 1.01 for row in training)


def test_no_tracker_writes_a_secret_down(tracked: tuple[Path, list[Path]]) -> None:
    files = [file for file in tracked[0].parent.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and any("tfevents" in file.name for file in files)
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_the_averaged_weights_have_figures_of_their_own(tracked: tuple[Path, list[Path]]) -> None:
    folder, _ = tracked
    metrics, own = (json.loads((place / "metrics.json").read_text()) for place in (folder, folder / "ema"))
    assert {"eval_ema_score", "eval_ema_det_map50"} <= set(metrics) and own["steps"] == 4
    for key, value in own.items():
        if key.startswith("eval_"):
            assert metrics[key.replace("eval_", "eval_ema_")] == value


def test_a_resumed_run_keeps_its_id_and_its_rows_go_on(tracked: tuple[Path, list[Path]]) -> None:
    from .wandb_file import rows

    folder, files = tracked
    assert len(files) == 2 and files[0].name == files[1].name  # run-ID.wandb
    assert json.loads((folder / "wandb.json").read_text())["id"] == files[0].stem.removeprefix("run-")
    first, second = rows(files[0]), rows(files[1])
    assert [row["train/global_step"] for row in second if "train/loss" in row] == [3, 4]
    counts = [row["_step"] for row in first] + [row["_step"] for row in second]
    assert counts == sorted(set(counts)), "a row whose counter goes back would be dropped"


def test_tensorboard_gets_the_same(tracked: tuple[Path, list[Path]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    from .wandb_file import rows

    folder, files = tracked
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    known = set(tags["scalars"])
    row = next(row for row in rows(files[0]) if "train/loss" in row)
    assert {key for key in row if key.startswith("train/")} - {"train/global_step"} <= known
    assert {f"eval/{task}_{key}" for task, key in MAIN.items()} | {"eval/score"} <= known
    assert [event.step for event in events.Scalars("train/loss/det")] == [1, 2, 3, 4]  # once each, over the resume
    assert {f"predictions/{task}/0" for task in TEST_SAMPLES} <= set(tags["images"])
    assert {f"predictions/{task}/lowest_scores/0" for task in TEST_SAMPLES} <= set(tags["images"])
    assert "config/text_summary" in tags["tensors"]
    # one chart per quantity, with the lines of all tasks
    event = events.Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    lines = {
        chart.title: [tag for tag in known if any(re.match(key, tag) for key in chart.multiline.tag)]
        for category in layout.category
        for chart in category.chart
    }
    assert {title: len(found) for title, found in lines.items() if len(found) != 3} == {"metrics": 6, "cosines": 3}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "abc"}', '{"id": "abc", "rows": null}'])
def test_a_spoilt_note_of_the_id_ends_no_run(tmp_path: Path, content: str) -> None:
    messages: list[str] = []
    tracker = object.__new__(WandbTracker)
    tracker.trainer = SimpleNamespace(  # type: ignore[assignment]
        state=SimpleNamespace(global_step=3), warn=lambda step, message: messages.append(message)
    )
    file = tmp_path / "wandb.json"
    assert tracker._read_id(file) == {} and not messages
    file.write_text('{"id": "abc", "rows": 7}')
    assert tracker._read_id(file) == {"id": "abc", "rows": 7} and not messages
    file.write_text(content)
    assert tracker._read_id(file) == {} and "WANDB_RUN_ID" in messages[0]


def test_pictures_of_a_gallery_have_one_size() -> None:
    tall, wide = torch.zeros(3, 5, 2, dtype=torch.uint8), torch.ones(3, 3, 4, dtype=torch.uint8)
    first, second = _of_one_size([tall, wide])
    assert first.shape == second.shape == (3, 5, 4)
    assert torch.equal(first[:, :, :2], tall) and torch.equal(second[:, :3], wide)
    assert (first[:, :, 2:] == 255).all() and (second[:, 3:] == 255).all()
