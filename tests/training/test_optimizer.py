"""Parameter groups: weight decay, learning rates that fall with depth, schedules."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.training.optimizer import groups_for_muon, optimizer_of_run, parameter_groups
from tests.tiny import tiny_model


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"])
def test_rates_fall_with_depth_and_groups_stay_one_component(model_type: str) -> None:
    model = tiny_model(model_type=model_type)
    groups = parameter_groups(model, 1.0, 0.5, backbone_lr_factor=0.1, layer_lr_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {p for p in model.parameters() if p.requires_grad}
    layers = set()
    for group in groups:
        members = [names[p] for p in group["params"]]
        if group["name"].startswith("head"):
            assert group["lr"] == 1.0 and len({".".join(n.split(".")[:2]) for n in members}) == 1
            continue
        numbers = model.backbone.layer_numbers()
        found = {numbers[n.removeprefix("backbone.")] for n in members}
        assert len(found) == 1 and all(n.startswith("backbone.") for n in members)
        layer = found.pop()
        layers.add(layer)
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** (3 - layer))
        for n in members:  # 0: pixels to tokens; 1, 2: the transformer's layers
            assert (layer == 0) == ("embeddings" in n), n
            assert (layer in (1, 2)) == (f"layer.{layer - 1}." in n), n
    assert {0, 1, 2} <= layers
    assert groups[0]["lr"] == 1.0  # Trainer logs the first group's


def test_warm_up_and_cosine_through_the_arguments(tmp_path: Path) -> None:
    arguments = AllInOneArguments(
        str(tmp_path),
        max_steps=100,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        layer_lr_decay=0.5,
        deepspeed="configs/deepspeed/zero2.json",
    )
    groups = parameter_groups(tiny_model(), 1.0, 0.0, arguments.backbone_lr_factor, arguments.layer_lr_decay)
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(100), 100, arguments.lr_scheduler_kwargs
    )
    start = [group["lr"] for group in groups]
    for step in range(100):
        factor = step / 10 if step < 10 else (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        for group, initial in zip(optimizer.param_groups, [g["initial_lr"] for g in groups], strict=True):
            assert group["lr"] == pytest.approx(initial * factor, abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert start[0] == 0.0 and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_groups_hold_every_trainable_parameter_once_and_one_component_each() -> None:
    model = tiny_model()
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.5, backbone_lr_factor=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    for group in groups:
        roots = {".".join(names[p].split(".")[: 1 if names[p].startswith("backbone") else 2]) for p in group["params"]}
        assert len(roots) == 1, group["name"]
        assert group["lr"] == pytest.approx(0.1 if roots == {"backbone"} else 1.0)
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.5)
    assert groups[0]["lr"] == 1.0  # Trainer logs the first group's


def test_norms_biases_embeddings_and_vectors_do_not_decay() -> None:
    model = tiny_model()
    groups = parameter_groups(model, 1.0, 0.5, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = [names[p] for group in groups if group["weight_decay"] for p in group["params"]]
    exempt = [names[p] for group in groups if not group["weight_decay"] for p in group["params"]]
    assert any("cls_token" in name for name in exempt) and any("position_embeddings" in name for name in exempt)
    assert all(not name.endswith("bias") and "norm" not in name and "lambda" not in name for name in decayed)
    assert any("query.weight" in name or "q_proj.weight" in name for name in decayed)


def test_a_parameter_outside_backbone_and_tasks_is_refused() -> None:
    model = tiny_model()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight"):
        parameter_groups(model, 1.0, 0.0, 0.1)


def test_a_task_has_its_own_rate_and_decay_and_the_order_stays() -> None:
    model = tiny_model()
    plain = parameter_groups(model, 1.0, 0.5, backbone_lr_factor=0.1)
    groups = parameter_groups(
        model, 1.0, 0.5, 0.1, head_lr_factor={"det": 3.0, "cls": 0.5}, head_weight_decay={"seg": 0.0, "cls": 0.2}
    )
    assert [group["name"] for group in groups] == [group["name"] for group in plain]
    rates = {group["name"].split("/")[1]: group["lr"] for group in groups if group["name"].startswith("head")}
    assert rates == {"det": 3.0, "seg": 1.0, "cls": 0.5}
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays["head/seg/decay"] == 0 and decays["head/cls/decay"] == 0.2 and decays["head/det/decay"] == 0.5
    assert all(decay == 0 for name, decay in decays.items() if name.endswith("no_decay"))
    assert {g["lr"] for g in groups if g["name"].startswith("backbone")} == {0.1}
    with pytest.raises(ConfigError, match="'dett'.*did you mean 'det'"):
        parameter_groups(model, 1.0, 0.5, 0.1, head_lr_factor={"dett": 2.0})


def test_muon_trains_the_matrices_of_the_layers_and_adamw_all_else(tmp_path: Path) -> None:
    model = tiny_model()
    given = parameter_groups(model, 1e-3, 0.1, backbone_lr_factor=0.1, layer_lr_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    zero3 = {"zero_optimization": {"stage": 3}}
    settings = {"optim": "muon", "optim_args": "muon_lr=0.02,momentum=0.9", "adam_beta2": 0.95}
    rates = {"learning_rate": 1e-3, "weight_decay": 0.1, "backbone_lr_factor": 0.1, "layer_lr_decay": 0.5}
    args = AllInOneArguments(str(tmp_path), max_steps=10, deepspeed=zero3, **settings, **rates)
    assert args.optim_name == "muon" and args.deepspeed["zero_optimization"]["reduce_scatter"] is False
    optimizer = optimizer_of_run(model, args)
    assert type(optimizer).__name__ == "MuonWithAuxAdam"
    before = {group["name"]: group for group in given}
    seen = set()
    for group in optimizer.param_groups:
        members = {names[p] for p in group["params"]}
        assert not members & seen
        seen |= members
        if not group["use_muon"]:
            assert group["betas"] == (0.9, 0.95) and group["lr"] == before[group["name"]]["lr"], group["name"]
            continue
        layer = group["name"].removesuffix("/muon")
        assert group["lr"] == pytest.approx(20 * before[f"{layer}/decay"]["lr"]) and group["momentum"] == 0.9
        assert group["weight_decay"] == 0.1
        assert all(".layer." in name and name.endswith("weight") for name in members), members
    assert seen == {name for name, p in model.named_parameters() if p.requires_grad}
    of_muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert len(of_muon) == 12 and all(p.dim() == 2 for p in of_muon)  # 2 layers: q, k, v, output and two of the MLP
    with pytest.raises(ConfigError, match="Muon would train nothing"):
        groups_for_muon(model, [group for group in given if group["name"].startswith("head")])


def test_tied_parameters_have_one_group_and_heads_with_different_settings_share_none() -> None:
    model = tiny_model()
    shared = model.tasks["cls"].norm.weight
    model.tasks["seg"].more = nn.LayerNorm(32)
    model.tasks["seg"].more.weight = shared
    model.tasks["det"].more = nn.LayerNorm(32)
    model.tasks["det"].more.weight = model.backbone.net.layernorm.weight
    found = {group["name"]: group["params"] for group in parameter_groups(model, 1.0, 0.5, 0.1)}
    assert [p is shared for p in found["head/seg+cls/no_decay"]] == [True]
    assert any(p is model.backbone.net.layernorm.weight for p in found["backbone/no_decay"])
    members = [id(p) for params in found.values() for p in params]
    assert sorted(members) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    for key, given in (("lr_factor", {"head_lr_factor": {"seg": 2.0}}), ("schedule", {"head_schedule": {"cls": {}}})):
        with pytest.raises(ConfigError, match=f"heads of 'seg' and 'cls', which differ in {key}"):
            parameter_groups(model, 1.0, 0.5, 0.1, **given)
