"""Training at full strength: large backbones, drop path, layer-wise rates, schedules, averaged weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.loader import TaskData
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import evaluate_tasks
from allinone_ds.models.backbone import NAMED, BackboneConfig, build_backbone
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.training.optimizer import backbone_layer, parameter_groups
from tests.launcher import run_ranks
from tests.tiny import SIZE, samples, tiny_backbone, tiny_model

HERE = Path(__file__).parent
EMA_KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload",
             "zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16", "zero1 bf16 fp32-accumulation")  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(HERE / "ranks_ema.py", 2, tmp_path_factory.mktemp("strength"))


@pytest.mark.parametrize("kind", EMA_KINDS)
def test_averaged_weights_come_and_go_on_every_engine(ranks: dict[str, str], kind: str) -> None:
    assert ranks[f"check_average {kind}"] == ""


def test_under_zero_3_no_rank_ever_holds_the_whole_backbone(ranks: dict[str, str]) -> None:
    assert ranks["check_no_rank_holds_the_whole_backbone"] == ""


@pytest.mark.parametrize("case", ["zero2 fp32", "zero3 fp32"])
def test_a_compiled_forward_trains_to_the_same_weights(ranks: dict[str, str], case: str) -> None:
    assert ranks[f"check_compiled {case}"] == ""


# parameters as the papers give them, in millions
@pytest.mark.parametrize(
    ("name", "millions"), [("vit_l", 303), ("vit_g", 1011), ("dinov2_g", 1137), ("dinov3_7b", 6716)]
)
def test_named_backbones_have_their_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))  # type: ignore[call-arg]
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert backbone.num_levels == 4 and backbone.channels == NAMED[name][1]["hidden_size"]
    assert backbone.config._attn_implementation == "sdpa"


def test_a_named_backbone_is_spelled_out_and_its_fields_can_be_replaced() -> None:
    cfg = BackboneConfig(name="dinov2_g", config={"drop_path_rate": 0.3, "patch_size": 16})
    assert cfg.name is None and cfg.model_type == "dinov2"
    assert cfg.config["hidden_size"] == 1536 and cfg.config["patch_size"] == 16 and cfg.config["drop_path_rate"] == 0.3
    assert BackboneConfig.model_validate(cfg.model_dump()) == cfg
    with pytest.raises(ValueError, match="did you mean 'vit_l'"):
        BackboneConfig(name="vit_ll")
    with pytest.raises(ValueError, match="model_type is 'vitdet'"):
        BackboneConfig(name="vit_l", model_type="vitdet")


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"])
def test_drop_path_drops_in_training_only(model_type: str) -> None:
    torch.manual_seed(0)
    more = {"pos_embed_rescale": None} if model_type == "dinov3_vit" else {}
    backbone = tiny_backbone(model_type, drop_path_rate=0.5, **more)
    pixels = torch.randn(8, 3, 32, 32)
    backbone.train()
    one, two = (backbone(pixels).feature_maps[-1] for _ in range(2))
    assert not torch.equal(one, two)
    dropping = [module for name, module in backbone.named_modules() if name.endswith("drop_path")]
    dropping = [module for module in dropping if not isinstance(module, nn.Identity)]  # vitdet's rate starts at 0
    assert len(dropping) == (1 if model_type == "vitdet" else 2)
    for module in dropping:  # whole samples go, and the others make up for them
        out = module(torch.ones(4000, 2, 3))
        assert module.drop_prob == 0.5 and set(out.unique().tolist()) == {0.0, 2.0}
        assert (out == out[:, :1, :1]).all() and abs(float(out.mean()) - 1) < 0.1
    backbone.eval()
    assert torch.equal(backbone(pixels).feature_maps[-1], backbone(pixels).feature_maps[-1])


def test_an_evaluation_between_two_steps_drops_nothing() -> None:
    model = tiny_model(drop_path_rate=0.5)
    task = model.tasks["cls"]
    data = TaskData(samples(4), eval_transform(SIZE), task.collate, batch_size=4)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    task.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.logits))
    for _ in range(2):
        model.train()
        evaluate_tasks(model, {"cls": data}, torch.device("cpu"))
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


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
        found = {backbone_layer(n, 2) for n in members}
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


@pytest.mark.parametrize(("key", "value"), [("layer_lr_decay", 0), ("layer_lr_decay", 1.1), ("ema_decay", 1.0)])
def test_rates_outside_their_range_are_refused(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        AllInOneArguments(str(tmp_path), max_steps=1, deepspeed="configs/deepspeed/zero2.json", **{key: value})


def test_attention_and_checkpointing_serve_the_rotary_backbone_too() -> None:
    model = tiny_model(model_type="dinov3_vit", num_register_tokens=4, pos_embed_rescale=None)
    assert model.config._attn_implementation == "sdpa"
    model.activation_checkpointing_enable()
    model("cls", **model.tasks["cls"].collate(samples())).loss.backward()
    assert all(p.grad is not None for n, p in model.backbone.named_parameters() if p.requires_grad), "no gradient"
