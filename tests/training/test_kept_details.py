"""The trainer keeps what an evaluation found for each class, and warns once of misleading metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.training.trainer import AllInOneTrainer


def test_details_of_the_last_and_the_best_step_are_kept_and_warnings_are_said_once() -> None:
    said: list[tuple[int, str]] = []
    trainer: Any = object.__new__(AllInOneTrainer)
    trainer.state = SimpleNamespace(global_step=2, best_model_checkpoint=None)
    trainer.details, trainer._evaluation_warnings = {}, set()
    trainer.warn = lambda step, message: said.append((step, message))
    for step, best, note in ((2, None, "few"), (4, "run/checkpoint-2", "few"), (6, "run/checkpoint-2", "more")):
        trainer.state.global_step, trainer.state.best_model_checkpoint = step, best
        for prefix in ("eval", "eval_ema"):
            trainer._keep_details(prefix, Evaluation({}, None, {"det": {"notes": [note]}, "own": {}}))
    assert said == [(2, "det: few"), (6, "det: more")]
    assert sorted(trainer.details) == [("eval", 2), ("eval", 6), ("eval_ema", 2), ("eval_ema", 6)]
