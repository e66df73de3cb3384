"""Resumes with tasks that have adapters of their own, added, removed, renamed and with other classes; on one rank.

Started by test_changed_tasks.py. What a resume loads is compared with the files of its checkpoint, under the names that
this script gives by hand, and its first step with torch's AdamW.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from allinone_ds import load
from allinone_ds.errors import ConfigError
from allinone_ds.export.folders import export_run
from allinone_ds.models.lora import is_adapter, name_without_lora, task_of
from allinone_ds.reporting.progress import ProgressBar
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.training import run
from tests.export.test_adapters import features
from tests.export.untrained import untrained_run
from tests.launcher import run_checks
from tests.training import ranks_changed_tasks as tasks

HOME = Path(sys.argv[2])
TARGETS = "target_modules: [q_proj, v_proj]"
SHARED = ["model.backbone.stem=patch", f"model.start_from={HOME / 'earlier'}", f"model.lora={{rank: 4, {TARGETS}}}"]
FROZEN = ["model.backbone.stem=patch", "model.freeze=backbone", "trainer.save_frozen=false"]
MORE = ["trainer.max_steps=6"]
KEYS = ("weight", *tasks.MOMENTS)


def started(name: str, *overrides: str, after: Path | None = None) -> Path:
    """Train a run whose steps move adapters and heads far; see `tasks.trained`."""
    return tasks.trained(name, *overrides, "trainer.learning_rate=0.01", after=after)


@cache
def shared(stage: int) -> Path:
    """The checkpoint of a run with shared adapters; det and cls have adapters of their own, seg has none."""
    if not (HOME / "earlier").exists():
        unset_hf_deepspeed_config()  # else ZeRO-3 would partition the model
        untrained_run(HOME / "earlier", home=HOME)
    own = [f"tasks.det.lora={{rank: 2, {TARGETS}}}", "tasks.cls.lora={rank: 3}", "trainer.ema_decay=0.9"]
    return started(f"shared{stage}", tasks.stage_of(stage), *SHARED, *own) / "checkpoint-2"


def other_classes() -> tuple[list[str], list[str], list[str]]:
    """Return the classes of the task cls, others, and the overrides that give it these."""
    folder = HOME / "data" / "classification"
    names = (folder / "classes.txt").read_text().splitlines()
    other = [names[1], "new", names[0], *names[3:]]
    (HOME / "other_classes.txt").write_text("\n".join(other) + "\n")
    lines = [line.rpartition(" ") for line in (folder / "train.txt").read_text().splitlines()]
    moved = {old: other.index(name) if name in other else 1 for old, name in enumerate(names)}
    (HOME / "other.txt").write_text("\n".join(f"{path} {moved[int(label)]}" for path, _, label in lines) + "\n")
    files = {"classes": HOME / "other_classes.txt", "list": HOME / "other.txt"}
    return names, other, [*(f"tasks.cls.train.{key}={file}" for key, file in files.items()), "tasks.cls.test=null"]


def check_tasks_with_adapters(stage: int) -> None:
    """Renamed, with other classes, dropped, and new with and without adapters: all that goes on does bit for bit."""
    names, other, classes = other_classes()
    boxes, fine = tasks.CHANGED[2:]
    given = [
        *tasks.CHANGED[:2],
        boxes.replace("continues: det", f"continues: det, lora: {{rank: 2, {TARGETS}}}"),
        fine.replace("continues: false", f"continues: false, lora: {{rank: 2, {TARGETS}}}"),
        fine.replace("tasks.fine", "tasks.plain"),
        *classes,
        "tasks.cls.lora={rank: 3}",
        "trainer.ema_decay=0.9",
        "trainer.disable_tqdm=false",
        "callbacks=[tests.training.ranks_changed_tasks.Inspect]",
    ]
    folder = started(f"others{stage}", tasks.stage_of(stage), *SHARED, *given, after=shared(stage))
    found, files = tasks.Inspect.found, tasks.saved_values(shared(stage))
    adapters = {"boxes": 0, "cls": 0, None: 0}
    for name, values in found["before"].items():
        task = task_of(name)
        if task in ("fine", "plain"):
            assert values["step"] == 0 and not values["exp_avg"].any() and not values["exp_avg_sq"].any(), name
            continue
        saved = files[name.replace("tasks.boxes.", "tasks.det.").replace(".boxes.", ".det.")]
        assert float(values["step"]) == float(saved["step"]) == 2, name
        if name.startswith("tasks.cls.classifier"):
            mine, theirs = values["weight"].view(len(other), -1), saved["weight"].view(len(names), -1)
            assert all(torch.equal(mine[other.index(one)], theirs[names.index(one)]) for one in other if one != "new")
            continue
        assert all(torch.equal(values[key], saved[key]) for key in KEYS), name
        adapters[task] = adapters.get(task, 0) + is_adapter(name)
    assert adapters == {"boxes": 8, "cls": 24, None: 8}, adapters  # A and B of 2 or 6 layers in each of 2 blocks
    assert bool(files["backbone.net.encoder.layer.0.attention.v_proj.lora_B.cls.weight"]["exp_avg"].any())
    said = tasks.events(folder)
    for words in ("task 'boxes' goes on as 'det'", "task 'fine' is new: its head, adapters, optimizer state and data",
                  "task 'plain' is new: its head, optimizer state", "task 'seg' of the checkpoint is dropped, with its "
                  "head and", f"task 'cls' goes on with {len(other)} classes"):  # fmt: skip
        assert words in said, said
    tasks.compare_step(found)
    handler = tasks.TRAINERS[0].callback_handler
    assert [type(one) for one in handler.callbacks if isinstance(one, ProgressCallback)] == [ProgressBar]


def base_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what all tasks share, under the names that it has without adapters."""
    return {name_without_lora(name): value for name, value in weights.items() if task_of(name) is None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def check_adapters_of_the_only_task(first: int, second: int) -> None:
    """The first adapters of a run come with a task, and go with it: the base keeps its weights under other names."""
    plain, fine = tasks.stage_of(first), tasks.CHANGED[3].replace("continues: false", "lora: {rank: 2}")
    begun = started(f"bare{first}", plain, *FROZEN) / "checkpoint-2"
    before = read_weights(begun)[0]
    grown = started(f"grown{first}", plain, *FROZEN, fine, after=begun)
    with_adapters = read_weights(grown / "checkpoint-4")[0]
    assert same(base_of(with_adapters), base_of(before)) and any(".base_layer." in name for name in with_adapters)
    assert same(read_weights(grown / "checkpoint-2")[0], before)  # its frozen weights are still there
    assert same(read_weights(grown / "checkpoint-4", prefer_shards=True)[0], with_adapters)
    kept = load_file(grown / "checkpoint-4" / "model.safetensors")
    assert {task_of(name) for name in kept if is_adapter(name)} == {"fine"} and not any("base_layer" in n for n in kept)
    # what the run exports, `peft` loads onto the backbone of before
    unset_hf_deepspeed_config()  # else ZeRO-3 would partition the models that are loaded here
    export_run(grown / "checkpoint-4", grown / "export")
    net = load(begun).model
    with torch.no_grad():
        plain_features = features(net, "cls")
        net.backbone.net = PeftModel.from_pretrained(net.backbone.net, grown / "export" / "adapter" / "fine").eval()
        net.backbone.net = net.backbone.net.base_model.model
        adapted = features(net, "cls")
        assert not torch.allclose(adapted, plain_features, atol=1e-3)
        torch.testing.assert_close(adapted, features(load(grown / "checkpoint-4").model, "fine"))
        torch.testing.assert_close(features(load(grown / "export" / "tasks" / "fine").model, "fine"), adapted)
    other = "callbacks=[tests.training.ranks_changed_tasks.Inspect]"
    last = grown / "checkpoint-4"
    shrunk = started(f"shrunk{first}", tasks.stage_of(second), *FROZEN, *MORE, other, after=last)
    found, files = tasks.Inspect.found["before"], tasks.saved_values(last)
    for name, values in found.items():
        assert all(torch.equal(values[key], files[name][key]) for key in KEYS) and values["step"] == 4, name
    without = read_weights(shrunk / "checkpoint-6")[0]
    assert same(base_of(without), base_of(before)) and not any(is_adapter(name) for name in without)
    assert "task 'fine' of the checkpoint is dropped, with its head, adapters and" in tasks.events(shrunk)


def check_refusals() -> None:
    own = ["tasks.det.lora={rank: 2, target_modules: [q_proj, v_proj]}", "tasks.cls.lora={rank: 3}"]
    for given, words in (
        ([own[0]], "task 'cls' has other adapters than 'cls'.*lora_A.*absent in this run; use the same lora"),
        ([own[0], "tasks.cls.lora={rank: 4}"], "task 'cls' has other adapters.* use the same lora, or set tasks.cls"),
        ([*own, "tasks.seg.lora={}"], "task 'seg' has other adapters.* absent in the checkpoint"),
        (["model.lora=null", "model.freeze=backbone", *own], "different model: the backbone differs"),
    ):
        with pytest.raises(ConfigError, match=words):
            started("no" + str(abs(hash(words))), tasks.stage_of(2), *SHARED, *given, after=shared(2))


if __name__ == "__main__":
    run.finish_run = lambda trainer, metrics: None  # no evaluation, plots and pages
    run.AllInOneTrainer = tasks.Recorded
    checks = {f"check_tasks_with_adapters {stage}": partial(check_tasks_with_adapters, stage) for stage in (0, 2, 3)}
    only = check_adapters_of_the_only_task
    checks |= {f"{only.__name__} {first}": partial(only, first, second) for first, second in ((2, 3), (3, 1))}
    run_checks(checks | {"check_refusals": check_refusals}, sys.argv[1])
