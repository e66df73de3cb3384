"""The generated pages of docs/reference are up to date, and describe every key, head, source and exit code."""

from __future__ import annotations

import re

from allinone_ds import errors
from allinone_ds.balance.options import WEIGHTINGS
from allinone_ds.data.sources import SOURCE_CLASSES
from allinone_ds.run_config.arguments import SET_ELSEWHERE, AllInOneArguments
from allinone_ds.run_config.schema import RunConfig, TaskConfig
from allinone_ds.tasks import TASKS
from tools.make_reference import COMMAND, PAGES, nested, pages


def test_the_pages_are_what_the_package_says() -> None:
    stale = [file.name for file, text in pages().items() if not file.exists() or file.read_text() != text]
    assert stale == [], f"run {COMMAND}"


def test_every_key_is_described() -> None:
    page = (PAGES / "run-file.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    empty = [name for name, rest in rows if not rest.rpartition(" | ")[2].strip()]
    assert empty == []
    keys = {name for name, _ in rows}
    models = [*nested(RunConfig), *SOURCE_CLASSES, *(o for task in TASKS.values() for o in task.HEADS.values())]
    assert TaskConfig in models and len(models) > 15
    named = {name for model in models for name in model.model_fields} - {"format"}
    arguments = {name for name, field in AllInOneArguments.__dataclass_fields__.items() if field.init}
    assert named | (arguments - SET_ELSEWHERE.keys()) <= keys
    assert all(f"balancer.name: {name}" in page for name in WEIGHTINGS if name != "sum")


def test_every_exit_code_is_described() -> None:
    kinds = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.AllInOneError)]
    assert {cls.exit_code for cls in kinds} | {0, errors.REQUEUE, errors.INTERRUPTED} == errors.EXIT_CODES.keys()
