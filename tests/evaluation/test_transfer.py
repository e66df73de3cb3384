"""The gain of multi-task runs over single-task models."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from allinone_ds import commands
from allinone_ds.cli import main
from allinone_ds.evaluation.transfer import MetricGain, Transfer, read_transfer
from allinone_ds.run_config.yaml_files import read_yaml
from tests.launcher import run_ranks

RANKS_TRAIN = Path(__file__).parents[1] / "training" / "ranks_train.py"
TINY = ["tasks.det=null", "trainer.max_steps=2", "trainer.save_strategy=no", "trainer.eval_strategy=no"]


def test_gains_ranks_and_their_means() -> None:
    rows = [
        MetricGain("seg", "miou", True, 0.5, [0.6, 0.45, 0.5]),
        MetricGain("depth", "rmse", False, 2.0, [1.0, 3.0, 1.0]),
        MetricGain("depth", "delta1", True, 0.8, [0.8, 0.4, math.nan]),
        MetricGain("edges", "f", True, 0.0, [0.1, 0.2, 0.0]),
        MetricGain("count", "nll", False, -2.0, [-3.0, -1.0, -2.0]),
    ]
    transfer = Transfer(["a", "b", "c"], rows)
    assert rows[0].gains == pytest.approx([20, -10, 0]) and rows[1].gains == pytest.approx([50, -50, 50])
    assert rows[2].gains[:2] == pytest.approx([0, -50]) and rows[2].gains[2] is None
    assert rows[3].gains == [None, None, None]  # no gain relative to 0
    assert rows[4].gains == pytest.approx([50, -50, 0])  # smaller is better, also below 0
    assert transfer.task_gain("depth", 0) == pytest.approx(25) and transfer.task_gain("edges", 0) is None
    assert transfer.mean_gains == pytest.approx([(20 + 25 + 50) / 3, (-10 - 50 - 50) / 3, (0 + 50 + 0) / 3])
    # ranks per row: 1 3 2, 1.5 3 1.5, 1 2 3, 2 1 3, 1 3 2
    assert transfer.mean_ranks == pytest.approx([6.5 / 5, 12 / 5, 11.5 / 5])
    assert transfer.worse(0) == [] and transfer.worse(1) == ["seg", "depth", "count"]


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = home / "joint"
    run_ranks(
        RANKS_TRAIN, 1, tmp_path_factory.mktemp("ranks"), str(home / "tiny.yaml"), f"output_dir={folder}",
        *TINY, "trainer.seed=3", "balancer.max_norm=0.02", "tasks.cls.lr_factor=2",
    )  # fmt: skip
    return folder


def test_baselines_are_trained_once_compared_and_reported(
    trained: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(config: str, flags: Sequence[str], content: dict[str, Any], ranks: int) -> float:
        started.append(Path(config).stem)
        assert ranks == 1 and not flags
        (tmp_path / started[-1]).mkdir()
        run_ranks(RANKS_TRAIN, ranks, tmp_path / started[-1], config)
        return 0.0

    monkeypatch.setattr(commands, "run_and_follow", run)
    assert main(["transfer", str(trained)]) == 0
    assert started == ["cls", "seg"]
    printed = capsys.readouterr().out
    assert "1/2  cls alone: trains" in printed and "worse than alone" in printed and "Delta m" in printed
    assert "Gain over single-task models" in (trained / "report.html").read_text()

    alone = json.loads((trained / "baselines" / "cls" / "metrics.json").read_text())
    together = json.loads((trained / "metrics.json").read_text())
    found = read_transfer(trained)
    assert found is not None and found.tasks == ["cls", "seg"]
    of_cls = {row.metric: row for row in found.rows if row.task == "cls"}
    assert of_cls["top1"].baseline == alone["eval_cls_top1"]
    assert of_cls["top1"].values == [together["eval_cls_top1"]]
    run_of, own = (read_yaml(folder / "config.yaml") for folder in (trained, trained / "baselines" / "cls"))
    assert own["tasks"] == {"cls": run_of["tasks"]["cls"]} and own["balancer"]["name"] == "sum"
    for key in ("seed", "learning_rate", "max_steps"):
        assert own["trainer"][key] == run_of["trainer"][key]

    assert main(["transfer", str(home / "tiny.yaml"), f"output_dir={trained}", "--with", str(trained)]) == 0
    assert started == ["cls", "seg"], "baselines that are there are not trained again"
    assert "mean rank" in capsys.readouterr().out


def test_baselines_of_other_settings_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = trained / "baselines" / "cls"
    own.mkdir(parents=True, exist_ok=True)
    before = (
        (own / "config.yaml").read_text() if (own / "config.yaml").exists() else (trained / "config.yaml").read_text()
    )
    (own / "config.yaml").write_text(before.replace("seed: 3", "seed: 4"))
    assert main(["transfer", str(trained)]) == 2
    assert "trainer.seed = 4, the run has 3" in capsys.readouterr().err
    (own / "config.yaml").write_text(before)


@pytest.mark.parametrize(("content", "says"), [({}, "the run has not ended"), ({"steps": 2}, "no task was evaluated")])
def test_a_run_that_cannot_be_compared(
    trained: Path, tmp_path: Path, content: dict[str, int], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "model.json"):
        (tmp_path / name).write_text((trained / name).read_text())
    if content:
        (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert main(["transfer", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
