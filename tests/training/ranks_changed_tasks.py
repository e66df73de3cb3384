"""Samples tasks, and resumes with tasks added, removed, renamed and with other classes, on one rank.

The reference of the first step after a resume is torch's AdamW on a copy of the model, whose weights and moments are
those that the files of the checkpoint hold under the names that this script gives by hand.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from allinone_ds.errors import ConfigError
from allinone_ds.models.lora import task_of
from allinone_ds.run_config.build import build_model
from allinone_ds.run_config.schema import load_config
from allinone_ds.training import run
from allinone_ds.training.optimizer import without_decay
from allinone_ds.training.trainer import AllInOneTrainer
from allinone_ds.zero.checkpoint.layout import SavedShards, read_file
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.fragments import Fragment
from tests.launcher import run_checks

HOME = Path(sys.argv[2])
FOLDER = Path(tempfile.mkdtemp())
PLAIN = ["trainer.eval_strategy=no", "trainer.lr_scheduler_type=constant", "trainer.weight_decay=0.1"]
SAMPLED = ["trainer.max_steps=8", "trainer.save_steps=4", "trainer.logging_steps=3"]
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS: dict[int, Any] = {}
TRAINERS: list[AllInOneTrainer] = []


class Recorded(AllInOneTrainer):
    """Keeps the batches of its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        TRAINERS[:] = [self]

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:  # type: ignore[override]
        STEPS[inputs.step] = inputs
        return super().training_step(model, inputs, *args)


def trained(name: str, *overrides: str, after: Path | None = None) -> Path:
    """Train the tiny run, from a checkpoint if one is given; return its folder."""
    folder = FOLDER / name
    given = [f"output_dir={folder}", *PLAIN, *overrides]
    if after is not None:
        folder.mkdir()
        shutil.copytree(after, folder / after.name)
        for file in after.parent.glob("frozen*"):
            shutil.copy(file, folder)
        given.append("trainer.resume_from_checkpoint=true")
    run.train_run(load_config(HOME / "tiny.yaml", given))
    return folder


def stage_of(stage: int) -> str:
    if stage:
        return f"deepspeed=configs/deepspeed/zero{stage}.json"
    auto = "train_batch_size: auto, train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto"
    return f"deepspeed={{zero_optimization: {{stage: 0}}, {auto}}}"


@cache
def begun(stage: int, *overrides: str) -> Path:
    return trained(f"begun{stage}{len(overrides)}", stage_of(stage), *overrides) / "checkpoint-2"


def events(folder: Path) -> str:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return "\n".join(event["message"] for event in lines if event["event"] in ("warning", "note", "info"))


def logs(folder: Path, step: int) -> list[dict[str, Any]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


# ---- sampling ----


def check_sampling(stage: int) -> None:
    """A resumed run equals an uninterrupted one; heads stand still, samples do not, and logs have gaps."""
    options = [stage_of(stage), *SAMPLED, "balancer={name: db_mtl, beta: 0.5}",
               "sampling={tasks_per_step: 1, weights: {det: 1, seg: 2, cls: 1}}"]  # fmt: skip
    STEPS.clear()
    first = trained(f"sampled{stage}", *options)
    schedule = TRAINERS[0].schedule
    ran = [list(STEPS[step].batches) for step in range(8)]
    assert ran == [list(schedule.tasks_of(step)) for step in range(8)] and all(len(names) == 1 for names in ran)
    assert {name for names in ran for name in names} == {"det", "seg", "cls"}
    again = trained(f"again{stage}", *options, after=first / "checkpoint-4")
    expected = load_file(first / "checkpoint-8" / "model.safetensors")
    found = load_file(again / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    compared = [entry for entry in logs(first, 8) if entry["step"] > 3]
    for one, other in zip(compared, [entry for entry in logs(again, 8) if entry["step"] > 3], strict=True):
        timed = ("runtime", "images_per_second", "seconds/", "memory/")
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
            k: v for k, v in other.items() if not k.startswith(timed)
        }
    for entry in logs(first, 8):
        window = {name for step in range(max(entry["step"] - 3, 0), entry["step"]) for name in ran[step]}
        assert {key.split("/")[1] for key in entry if key.startswith("grad_norm/")} == window
        assert all(value == value for value in entry.values()), entry
        for name in ("det", "seg", "cls"):
            images = {"det": 4, "seg": 2, "cls": 4}[name] * sum(name in names for names in ran[: entry["step"]])
            assert entry[f"epoch/{name}"] == images / 24
    before, after = load_file(first / "checkpoint-4" / "model.safetensors"), expected
    for name in ("det", "seg", "cls"):
        moved = any(not torch.equal(before[key], after[key]) for key in after if key.startswith(f"tasks.{name}."))
        assert moved == any(name in names for names in ran[4:]), name
    assert "sampling: of 8 steps, tasks run in: cls" in events(first)


def check_positions() -> None:
    """A resume with other sampling and micro-steps goes on with the next sample of each task."""
    first = trained("drawn", *SAMPLED, "sampling={every: {seg: 2}, start: {cls: 2}}", stage_of(2))
    here = TRAINERS[0].schedule
    assert {task: here.position(task, 4) for task in here.tasks} == {"det": 4 * 4, "seg": 2 * 2, "cls": 2 * 4}
    other = ["sampling={every: {det: 3}}", "tasks.seg.micro_steps=3"]
    folder = trained("drawn_again", *SAMPLED, *other, stage_of(2), after=first / "checkpoint-4")
    now = TRAINERS[0].schedule
    draws = [draw.position for step in (4, 5) for k in range(3) for draw in now.draw("seg", step, k, 0)]
    assert draws == list(range(4, 16))
    assert [draw.position for draw in now.draw("det", 6, 0, 0)] == [16, 17] and now.tasks_of(5) == ("cls", "seg")
    assert "the sampling of tasks changes at step 4" in events(folder)
    assert "order of the data" not in events(folder)


def check_refusals_of_sampling() -> None:
    for given, words in (
        (
            "sampling={tasks_per_step: 1, weights: {det: 1, seg: 0, cls: 1}}",
            "none of the 4 steps runs 'seg' \\(the others run in ",
        ),
        ("sampling={start: {det: 1, seg: 1, cls: 2}}", "no task runs in step 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            trained(f"unsampled{len(words)}", given)


# ---- other tasks ----

NEW_CLASSES = "[square, triangle, star, circle]"
CHANGED = [
    "tasks.det=null",
    "tasks.seg=null",
    "tasks.boxes={type: detection, image_size: 32, options: {width: 32, num_convs: 1}, batch_size: 2, micro_steps: 2, "
    "train: {format: coco, images: detection/train, annotations: detection/train.json}, continues: det}",
    "tasks.fine={type: classification, image_size: 32, batch_size: 4, train: {format: image_list, images: "
    "classification/train, list: classification/train.txt, classes: classification/classes.txt}, continues: false}",
]


class Inspect(TrainerCallback):
    """Compares what a resume has loaded with the files of the checkpoint, and its first step with the reference."""

    found: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = TRAINERS[0].deepspeed
        self.found.clear()
        self.found["before"] = held(engine)
        self.found["initial"] = copy.deepcopy(TRAINERS[0].ema.shards) if TRAINERS[0].ema else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.found["after"] = held(TRAINERS[0].deepspeed)
            self.found["rates"] = {g["name"]: g["lr"] for g in TRAINERS[0].deepspeed.optimizer.param_groups}


def held(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return {parameter: its weights, moments and step count}, flat, on one rank."""
    adapter = open_engine(engine)
    values: dict[str, dict[str, torch.Tensor]] = {}
    if adapter.stage == 0:
        for name, param in [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]:
            own = adapter.optimizer.state.get(param, {})
            values[name] = {key: own.get(key, torch.zeros_like(param)).view(-1).clone() for key in MOMENTS}
            values[name] |= {"weight": param.detach().view(-1).clone(), "step": torch.tensor(float(own.get("step", 0)))}
        return values
    masters, state = adapter.masters(), adapter.optimizer.optimizer.state
    for f in adapter.fragments():
        own = state.get(masters[f.group], {})
        part = slice(f.start, f.start + f.length)
        values[f.name] = {"weight": masters[f.group].detach().view(-1)[part].clone()}
        for key in MOMENTS:
            values[f.name][key] = own[key].view(-1)[part].clone() if key in own else torch.zeros(f.length)
        values[f.name]["step"] = torch.tensor(float(own.get("step", 0)))
    return values


def saved_values(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    values: dict[str, dict[str, Any]] = {}
    folder = checkpoint / (checkpoint / "latest").read_text()
    if not list(folder.glob("*optim_states.pt")):
        content = read_file(folder / "mp_rank_00_model_states.pt")
        names, states = read_file(checkpoint / "loop_state_0.pt")["parameters"], content["optimizer"]["state"]
        for n, name in enumerate(names):
            own = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1), "step": 0, **states.get(n, {})}
            weight = content["module"][name].view(-1)
            values[name] = {key: own[key].view(-1).expand_as(weight) for key in MOMENTS}
            values[name] |= {"step": own["step"], "weight": weight}
        return values
    saved = SavedShards(folder)
    for name, shape in saved.shapes.items():
        [(rank, group, *_)] = saved.where(name, 0, shape.numel())
        values[name] = {"weight": saved.whole(name).view(-1), "step": saved.states[rank][group]["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            values[name][key] = torch.empty(shape.numel())
            sources = [[part[key] for part in parts] for parts in saved.states]
            saved.fill([values[name][key]], [Fragment(name, 0, 0, 0, shape.numel())], sources)
    return values


def check_other_tasks(stage: int) -> None:
    """One task renamed, one dropped, one with other classes, one new: weights, moments, counts and step are exact."""
    checkpoint = begun(stage, "trainer.ema_decay=0.9")
    classes = HOME / "other_classes.txt"
    names = (HOME / "data/classification/classes.txt").read_text().splitlines()
    other = [names[1], "new", names[0], *names[3:]]  # one dropped, one new, two in a different order
    classes.write_text("\n".join(other) + "\n")
    lists = {
        part: [line.rpartition(" ") for line in (HOME / f"data/classification/{part}.txt").read_text().splitlines()]
        for part in ("train",)
    }
    own = HOME / "other.txt"
    moved = {old: other.index(name) if name in other else 1 for old, name in enumerate(names)}
    own.write_text("\n".join(f"{path} {moved[int(label)]}" for path, _, label in lists["train"]) + "\n")
    changed = [*CHANGED, f"tasks.cls.train.classes={classes}", f"tasks.cls.train.list={own}", "tasks.cls.test=null"]
    folder = trained(f"other{stage}", stage_of(stage), *changed, "trainer.ema_decay=0.9",
                     "callbacks=[tests.training.ranks_changed_tasks.Inspect]", after=checkpoint)  # fmt: skip
    from tests.training.ranks_changed_tasks import Inspect as Imported

    found, files = Imported.found, saved_values(checkpoint)
    before = found["before"]
    kept = 0
    for name, values in before.items():
        source = name.replace("tasks.boxes.", "tasks.det.")
        if name.startswith("tasks.fine."):
            assert values["step"] == 0 and not values["exp_avg"].any() and not values["exp_avg_sq"].any()
            continue
        assert float(values["step"]) == float(files[source]["step"]) == 2, name
        rows = None
        if name.startswith("tasks.cls.classifier"):
            assert len(values["weight"]) % len(other) == 0
            rows = [names.index(label) if label in names else None for label in other]
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            mine, theirs = values[key], files[source][key]
            if rows is not None:
                mine, theirs = mine.view(len(other), -1), theirs.view(len(names), -1)
                for row, there in enumerate(rows):
                    if there is None:
                        assert key == "weight" or not mine[row].any()
                    else:
                        assert torch.equal(mine[row], theirs[there])
            else:
                assert torch.equal(mine, theirs), (name, key)
            kept += 1
    assert kept > 60
    said = events(folder)
    for words in (
        "task 'boxes' goes on as 'det' of the checkpoint",
        "task 'fine' is new",
        "task 'seg' of the checkpoint is dropped",
        f"task 'cls' goes on with {len(other)} classes (before: {len(names)})",
        f"those of new start fresh, those of {names[2]} are dropped",
    ):
        assert words in said, said
    compare_step(found)


def compare_step(found: dict[str, Any]) -> None:
    """The step after the resume equals AdamW of torch on the loaded weights, moments and counts."""
    trainer = TRAINERS[0]
    inputs = STEPS[2]
    unset_hf_deepspeed_config()  # else ZeRO-3 would partition the reference
    model = build_model(trainer.run_files.config, trainer.run_files.facts)
    frozen = load_file(Path(trainer.args.output_dir) / "checkpoint-4" / "model.safetensors")
    for name, parameter in model.named_parameters():
        value = found["before"][name]["weight"] if name in found["before"] else frozen[name]
        parameter.data = value.clone().view(parameter.shape)
    model.train()
    weights = trainer._label_weights.of_step(inputs.batches)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for task, batches in inputs.batches.items():
        model.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            (model(task=task, **batch).loss * weights[task][number] / len(batches)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        shared = [g.reshape(-1) for n, g in grads.items() if task_of(n) is None]
        norm = torch.cat(shared).norm()
        factor = min(1.0, 0.1 / (float(norm) + 1e-6))
        for name, gradient in grads.items():
            total[name] += gradient * factor
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    exempt = without_decay(model)
    for name, gradient in total.items():
        state = found["before"][name]
        component = "backbone" if task_of(name) is None else f"head/{task_of(name)}"
        rate = found["rates"][f"{component}/{'no_decay' if name in exempt else 'decay'}"]
        step = float(state["step"]) + 1
        flat = gradient.reshape(-1)
        first = beta1 * state["exp_avg"] + (1 - beta1) * flat
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * flat.square()
        decayed = state["weight"] * (1 - rate * (0.0 if name in exempt else 0.1))
        moved = decayed - rate * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        after = found["after"][name]
        torch.testing.assert_close(after["exp_avg"], first, rtol=1e-3, atol=1e-7, msg=name)
        torch.testing.assert_close(after["weight"], moved, rtol=1e-4, atol=2e-6, msg=name)
        assert float(after["step"]) == step


def check_next_resume() -> None:
    """`continues` stays in the file: the next resume goes on with the new names, as an uninterrupted run does."""
    checkpoint = begun(2, "trainer.ema_decay=0.9")
    options = [stage_of(2), *CHANGED, "trainer.max_steps=6"]
    first = trained("renamed", *options, after=checkpoint)
    again = trained("renamed_again", *options, after=first / "checkpoint-4")
    expected = load_file(first / "checkpoint-6" / "model.safetensors")
    found = load_file(again / "checkpoint-6" / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    assert "goes on as" not in events(again) and "is new" not in events(again)
    positions = read_file(first / "checkpoint-4" / "loop_state_0.pt")["positions"]
    assert positions == {"cls": (16, "cls"), "boxes": (16, "det"), "fine": (8, "fine")}


def check_refusals() -> None:
    checkpoint = begun(2, "trainer.ema_decay=0.9")
    unnamed = [CHANGED[0], CHANGED[1], CHANGED[2].replace(", continues: det", "")]
    for given, words in (
        (unnamed, "is it a new name\\? Set tasks.boxes.continues to det, or to false"),
        ([CHANGED[2]], "the tasks det and boxes both go on with 'det'.*set tasks.det.continues"),
        (
            [CHANGED[0], CHANGED[2].replace("continues: det", "continues: dett")],
            "has no task 'dett'; did you mean 'det'",
        ),
        (["tasks.det.options.width=16"], "task 'det' has a different head than 'det'.*tasks.det.continues to false"),
        (["model.backbone.config.hidden_size=48", "tasks.cls=null"], "different model: the backbone differs"),
    ):
        with pytest.raises(ConfigError, match=words):
            trained("refused" + str(abs(hash(words))), stage_of(2), *given, after=checkpoint)


if __name__ == "__main__":
    run.finish_run = lambda trainer, metrics: None  # no evaluation, plots and pages
    import tests.training.ranks_changed_tasks as imported

    imported.TRAINERS, imported.STEPS = TRAINERS, STEPS
    run.AllInOneTrainer = Recorded
    checks = {f"check_sampling {stage}": partial(check_sampling, stage) for stage in (2, 3)}
    checks |= {f"check_other_tasks {stage}": partial(check_other_tasks, stage) for stage in (0, 1, 2, 3)}
    further = (check_positions, check_refusals_of_sampling, check_next_resume, check_refusals)
    run_checks(checks | {check.__name__: check for check in further}, sys.argv[1])
