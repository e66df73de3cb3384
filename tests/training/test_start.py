"""What would end a run at its start is an error that names its key, and `check` finds all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.training.start.arguments import require_launcher
from allinone_ds.training.start.run_check import check_run
from tests.launcher import run_ranks
from tests.training.wrong_runs import WRONG


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("starts")
    said = run_ranks(
        Path(__file__).with_name("ranks_start.py"), 1, folder, str(home / "tiny.yaml"), str(folder / "run")
    )
    assert not (folder / "run").exists()  # no failed start leaves a folder
    return said


@pytest.mark.parametrize("what", WRONG)
def test_check_says_what_training_says(what: str, trained: dict[str, str], home: Path) -> None:
    _, problems, _ = check_run(home / "tiny.yaml", [f"output_dir={home / 'none'}", *WRONG[what]], ranks=1)
    assert what in trained[what]
    number = list(WRONG).index(what)
    lines = [line.replace(f"{Path('run') / str(number)}", "none") for line in trained[what].splitlines()]
    shown = [line.rpartition("/none")[2] if "/none" in line else line for line in lines]
    assert all(any(line in problem for problem in problems) for line in shown), (lines, problems)


def test_a_right_run_has_no_problem_and_writes_nothing(home: Path) -> None:
    for overrides in (
        [],
        ["model.freeze=backbone", "tasks.det.lr_factor=2", "tasks.seg.weight_decay=0.3"],
        ["model.freeze=1", "balancer.name=db_mtl"],
        ["epochs={seg: 2}", "trainer.max_steps=null", "early_stopping={patience: 1}"],
        ["tasks.seg=null", "callbacks=[transformers.ProgressCallback]"],
        ["deepspeed=configs/deepspeed/zero3.json", "trainer.lr_scheduler_type=polynomial"],
    ):
        config, problems, _ = check_run(home / "tiny.yaml", [f"output_dir={home / 'none'}", *overrides], ranks=2)
        assert problems == [] and config is not None
    assert not (home / "none").exists()


def test_a_folder_with_checkpoints_is_a_warning(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    assert cli.main(["check", str(home / "tiny.yaml"), f"output_dir={tmp_path}"]) == 0
    assert f"warning: {tmp_path} already holds checkpoint-2" in capsys.readouterr().out


def test_all_problems_are_in_one_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["tasks.seg.head=foo", "tasks.det.options.bar=1", "tasks.cls.image_size=30", "balancer.max_norn=1"]
    wrong += ["trainer.foo=1", "trainer.logging_steps=0", "trainer.optim_args=x", "trainer.report_to=foo"]
    wrong += ["deepspeed.zero_optimization.foo=1", "tasks.cls.train.images=nowhere", "callbacks=[no.such]"]
    assert cli.main(["check", str(home / "tiny.yaml"), *wrong]) == 2
    said = capsys.readouterr().out
    for what in ("'foo'; allowed: light", "'bar'", "[30, 30]", "max_norn", "trainer.foo", "logging_steps", "optim_args",
                 "report_to", "zero_optimization.foo", "'images' must be a folder", "callbacks.no.such"):  # fmt: skip
        assert what in said, what


def test_a_loss_that_fails_on_the_data_is_found(home: Path) -> None:
    task = "tasks.cls.type=tests.training.failing_task:Failing"
    _, problems, _ = check_run(home / "tiny.yaml", [task], ranks=1)
    assert len(problems) == 1 and "tasks.cls, loss" in problems[0] and "IndexError: no such target" in problems[0]
    _, problems, _ = check_run(home / "tiny.yaml", ["tasks.cls.augment=[{RandomCrop: {size: -1}}]"], ranks=1)
    assert len(problems) == 1 and "tasks.cls.augment" in problems[0]


def test_a_script_without_a_launcher_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node N SCRIPT.py"):
        require_launcher()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    require_launcher()
