"""Every architecture: maps of one resolution, layers in order, sizes, folders, and clear refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import allinone_ds
from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.export.folders import export_run
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import NAMED, Backbone, BackboneConfig, build_backbone
from allinone_ds.tasks import build_task
from allinone_ds.training.optimizer import parameter_groups
from tests.export.untrained import untrained_run
from tests.models.nets import HIERARCHICAL, NETS, every_net, needs_timm, settings
from tests.tasks.heads import HEADS
from tests.tiny import CLASSES, TYPES

SIZE = (64, 64)


def net(name: str, **more: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(**{**settings(name), **more}))  # type: ignore[arg-type]


def pixels(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or SIZE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", every_net)
def test_maps_have_one_resolution_and_every_parameter_a_gradient(name: str) -> None:
    backbone = net(name)
    for size in [SIZE] if backbone.fixed_size else [SIZE, (96, 64)]:
        maps = backbone(pixels(*size)).feature_maps
        expected = (2, backbone.channels, size[0] // backbone.stride, size[1] // backbone.stride)
        assert [tuple(level.shape) for level in maps] == [expected] * backbone.num_levels
    sum(level.square().mean() for level in maps).backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    half = backbone.bfloat16()(pixels()).feature_maps
    assert all(level.dtype == torch.bfloat16 and level.isfinite().all() for level in half)


@pytest.mark.parametrize("name", HIERARCHICAL)
@pytest.mark.parametrize("stride", [4, 16, 32])
def test_one_map_holds_all_stages_at_the_chosen_stride(name: str, stride: int) -> None:
    backbone = net(name, stride=stride).eval()
    found = backbone(pixels()).feature_maps[0]
    start = 0
    for level in backbone.net(pixels()).feature_maps:
        part = found[:, start : start + level.shape[1]]
        start += level.shape[1]
        side = 64 // stride
        if level.shape[-1] >= side:
            torch.testing.assert_close(part, F.adaptive_avg_pool2d(level, side))
        else:
            torch.testing.assert_close(part, F.interpolate(level, size=(side, side), mode="bilinear"))
        torch.testing.assert_close(part.mean((2, 3)), level.mean((2, 3)), atol=0.5, rtol=0.5)  # what a class head pools
    assert start == found.shape[1] == backbone.channels


@pytest.mark.parametrize("name", ["vit", "deit", "vit_mae"])
def test_a_model_without_a_backbone_class_is_that_of_transformers(name: str) -> None:
    backbone = net(name, out_indices=[2]).eval()
    if name == "vit_mae":
        theirs = transformers.ViTMAEModel(backbone.config).eval()
    else:
        cls = transformers.ViTModel if name == "vit" else transformers.DeiTModel
        theirs = cls(backbone.config, add_pooling_layer=False).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    for size in (SIZE, (32, 96)):
        h, w = size[0] // 8, size[1] // 8
        more = {"noise": torch.arange(h * w).expand(2, -1)} if name == "vit_mae" else {}
        tokens = theirs(pixels(*size), interpolate_pos_encoding=True, **more).last_hidden_state[:, -h * w :]
        expected = tokens.transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        torch.testing.assert_close(backbone(pixels(*size)).feature_maps[0], expected)


def test_folders_of_pretraining_and_of_classifiers_give_their_encoder(tmp_path: Path) -> None:
    for name, cls in (
        ("vit_mae", transformers.ViTMAEForPreTraining),
        ("deit", transformers.DeiTForImageClassificationWithTeacher),
        ("beit", transformers.BeitForMaskedImageModeling),
    ):
        config = type(net(name).config)(**NETS[name])
        torch.manual_seed(1)
        model = cls(config)
        model.save_pretrained(tmp_path / name)
        backbone = build_backbone(BackboneConfig(name=str(tmp_path / name)))
        assert backbone.loaded is not None and backbone.loaded.complete, name
        state = model.state_dict()
        for key, value in backbone.net.state_dict().items():
            theirs = next(state[known] for known in (key, f"vit.{key}", f"deit.{key}") if known in state)
            assert torch.equal(value, theirs), (name, key)


@pytest.mark.parametrize("name", every_net)
def test_layers_are_numbered_from_the_pixels_to_the_maps(name: str) -> None:
    backbone = net(name)
    numbers = backbone.layer_numbers()
    assert list(numbers) == [n for n, _ in backbone.named_parameters()]
    assert sorted(set(numbers.values()) | {backbone.depth + 1}) == list(range(backbone.depth + 2))
    if name in NETS:
        depths = NETS[name].get("depths", [NETS[name].get("num_hidden_layers")])
        assert backbone.depth == sum(depths)
    # an early layer reads nothing that a later one computes: without the later ones its gradient is the same
    order = list(numbers.values())
    norms = [
        i for i, n in enumerate(numbers) if "hidden_states_norms" in n or "layernorm" in n.rpartition("net.")[2][:10]
    ]
    inner = [number for i, number in enumerate(order) if i not in norms and number <= backbone.depth]
    assert inner == sorted(inner)
    model = AllInOneModel(
        backbone, {"cls": build_task("classification", "cls", CLASSES, backbone, backbone.fixed_size or SIZE)}
    )
    groups = parameter_groups(model, 1.0, 0.1, backbone_lr_factor=1.0, layer_lr_decay=0.5)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for n, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(0.5 ** (backbone.depth + 1 - numbers[n])), n


@pytest.mark.parametrize("name", every_net)
def test_a_saved_folder_gives_the_same_net(name: str, tmp_path: Path) -> None:
    backbone = net(name).eval()
    backbone.net.save_pretrained(tmp_path)
    for given in ({"name": str(tmp_path)}, {"checkpoint": str(tmp_path)}):
        loaded = build_backbone(BackboneConfig(**given)).eval()  # type: ignore[arg-type]
        size = backbone.fixed_size or SIZE
        for ours, theirs in zip(loaded(pixels(*size)).feature_maps, backbone(pixels(*size)).feature_maps, strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="give one of them"):
        BackboneConfig(name=str(tmp_path), checkpoint=str(tmp_path))


def test_a_classifier_of_transformers_gives_its_vit(tmp_path: Path) -> None:
    backbone = net("vit").eval()
    config = transformers.ViTConfig(**NETS["vit"])
    classifier = transformers.ViTForImageClassification(config)
    classifier.vit.load_state_dict(backbone.net.state_dict())
    classifier.save_pretrained(tmp_path)
    loaded = build_backbone(BackboneConfig(name=str(tmp_path))).eval()
    assert torch.equal(loaded(pixels()).feature_maps[-1], backbone(pixels()).feature_maps[-1])


@pytest.mark.parametrize("name", every_net)
def test_an_exported_model_gives_what_the_run_gives(name: str, tmp_path: Path) -> None:
    heads = {task: {"image_size": 64} for task in ("det", "seg", "cls")}
    model = untrained_run(tmp_path, "patch", heads, **settings(name))
    done = export_run(tmp_path)
    assert tmp_path / "export" / "backbone" in done.folders
    loaded = allinone_ds.load(tmp_path / "export" / "model")
    for task in ("seg", "cls"):
        assert torch.equal(loaded.model(task, pixels()).logits, model(task, pixels()).logits)
    again = build_backbone(BackboneConfig(name=str(tmp_path / "export" / "backbone"))).eval()
    assert torch.equal(again(pixels()).feature_maps[0], model.backbone(pixels()).feature_maps[0])
    card = (tmp_path / "export" / "backbone" / "README.md").read_text()
    if name in ("deit", "vit_mae"):
        assert f"{type(again.net).__name__}.from_pretrained" in card
    if name == "vit":
        assert "ViTModel.from_pretrained" in card
        transformers.ViTModel.from_pretrained(tmp_path / "export" / "backbone", add_pooling_layer=False)
    assert (name in card) or name in NETS


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "hiera"])
def test_every_head_learns_on_it(name: str) -> None:
    from tests.tiny import samples

    backbone = net(name)
    made: list[Sample] = [{**s, "image": F.interpolate(s["image"][None], scale_factor=2)[0]} for s in samples(4)]
    for sample in made:
        sample["mask"] = sample["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1)
        sample["boxes"] = sample["boxes"] * 2
    for head in HEADS:
        kind, chosen, options = HEADS[head]
        if options.get("num_queries", 0) > 16 and head.startswith("rf"):
            options = {**options, "num_queries": 8}
        task = build_task(TYPES.get(kind, kind), kind, CLASSES, backbone, SIZE, chosen, options)
        model = AllInOneModel(backbone, {kind: task}).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            loss = model(kind, **task.collate(made)).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert min(losses[1:]) < losses[0], (head, losses)


@pytest.mark.parametrize("name", ["swin", "hiera", "vit"])
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    backbone = net(name)
    message = {
        "swin": r"multiples of 32, the backbone's coarsest stage",
        "hiera": r"only takes 64 x 64 pixels",
        "vit": "multiples of 8, the backbone's patch size",
    }[name]
    with pytest.raises(ConfigError, match=rf"tasks.x.image_size = \[60, 80\]: .*{message}"):
        build_task("classification", "x", CLASSES, backbone, (60, 80))
    with pytest.raises(ValueError, match=message):
        backbone(pixels(60, 80))


@pytest.mark.parametrize(
    ("name", "test_time", "message"),
    [
        ("hiera", {"scales": [1.0, 1.5]}, "views of 96 x 96 pixels: .* only takes 64 x 64"),
        ("hiera", {"scales": [1.5], "windows": True, "flip": True}, None),
        ("swin", {"scales": [0.7, 1.6]}, None),
    ],
)
def test_views_have_sizes_that_the_net_takes(name: str, test_time: dict, message: str | None, tmp_path: Path) -> None:
    heads = {task: {"image_size": 64} for task in ("det", "seg", "cls")}
    heads["seg"]["test_time"] = test_time  # type: ignore[assignment]
    if message is None:
        untrained_run(tmp_path, "patch", heads, **settings(name))
        model = allinone_ds.load(tmp_path)
        image = torch.zeros(3, 50, 70, dtype=torch.uint8)
        assert model.predict(image, "seg", model.test_time["seg"])[0]["mask"].shape == (50, 70)
    else:
        with pytest.raises(ConfigError, match=rf"tasks.seg.test_time: {message}"):
            untrained_run(tmp_path, "patch", heads, **settings(name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "facebook/dinov2-base"}, "A folder with a config.json of transformers and timm/NAME are allowed too"),
        ({"name": "convnext_tt"}, "did you mean 'convnext_t'"),
        ({"name": "swin_t", "model_type": "vit"}, "model_type is 'vit'"),
        ({"model_type": "swn"}, "'swin'"),
        ({"model_type": "swin", "stem": "conv"}, "stem: 'conv' is for plain ViTs"),
        ({"model_type": "swin", "config": {"hidden_size": 4}}, "unknown key 'hidden_size' for swin"),
        ({"model_type": "swin", "config": NETS["swin"], "out_indices": [1, 5]}, "stage numbers from 1 to 4"),
        ({"model_type": "vit", "config": NETS["vit"], "out_indices": [0, 1]}, "layer numbers from 1 to 2"),
        ({"model_type": "swin", "config": NETS["swin"], "stride": 12}, "4, 8, 16, 32 pixels per cell"),
        ({"model_type": "vit", "config": NETS["vit"], "stride": 16}, "have 8 pixels per cell"),
        ({"model_type": "vit", "config": NETS["vit"] | {"image_size": [64, 32]}}, "give one number for each"),
        ({"model_type": "hiera", "config": NETS["hiera"] | {"image_size": 64}}, "image_size"),
        ({"model_type": "hiera", "config": NETS["hiera"] | {"num_query_pool": 4}}, "num_query_pool"),
        ({"model_type": "convnext", "config": NETS["convnext"] | {"drop_path_rate": 1.0}}, "below 1"),
    ],
)
def test_bad_settings_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**given))


def test_a_net_without_checkpointing_says_so() -> None:
    backbone = net("convnext")
    model = AllInOneModel(backbone, {"cls": build_task("classification", "cls", CLASSES, backbone, SIZE)})
    with pytest.raises(ConfigError, match="convnext does not support it"):
        model.activation_checkpointing_enable()


# parameters as the papers give them for the classifier, without its last layer of 1000 classes, in millions
@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_b", 85.8), ("swin_t", 27.5), ("swin_b", 86.7), ("convnext_t", 27.8), ("convnext_b", 87.6),
     ("hiera_t", 27.1), ("hiera_b", 50.8)],
)  # fmt: skip
def test_named_backbones_have_their_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))  # type: ignore[call-arg]
    assert name in NAMED
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@needs_timm
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "timm/convnext_atoo"}, "timm has no model 'convnext_atoo'; did you mean 'convnext_atto'"),
        ({"name": "timm/resnet10t"}, "freeze_batch_norm_2d: true"),
        ({"model_type": "timm_backbone"}, "give the name of a timm model"),
        ({"name": "timm/convnext_atto", "config": {"features_only": False}}, "features_only: must be true"),
        ({"name": "timm/convnext_atto", "out_indices": [5]}, "stage numbers from 1 to 4"),
    ],
)
def test_bad_settings_of_timm_are_named(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(**given))


@needs_timm
def test_a_timm_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    net("convnext_atto").net.save_pretrained(tmp_path)
    assert build_backbone(BackboneConfig(name=str(tmp_path), out_indices=[2, 3])).channels == 80 + 160
    net("convnext_atto", out_indices=[1, 2]).net.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="it lacks .* tensors .*_backbone.stages_2"):
        build_backbone(BackboneConfig(name=str(tmp_path), out_indices=[2, 3]))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="TimmBackbone.save_pretrained"):
        build_backbone(BackboneConfig(name=str(tmp_path)))


@needs_timm
def test_a_timm_net_of_one_size_refuses_others() -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name="timm/vit_tiny_patch16_224"))  # type: ignore[call-arg]
    assert backbone.num_levels == 4 and backbone.fixed_size == (224, 224) and backbone.depth == 12
    with pytest.raises(ConfigError, match="only takes 224 x 224 pixels"):
        build_task("classification", "x", CLASSES, backbone, (256, 256))


@needs_timm
def test_maps_with_channels_last_are_turned() -> None:
    backbone = net("convnext_atto")
    expected = backbone(pixels()).feature_maps[0]
    forward = backbone.net.forward

    def channels_last(x: torch.Tensor) -> transformers.modeling_outputs.BackboneOutput:
        maps = tuple(level.permute(0, 2, 3, 1) for level in forward(x).feature_maps)
        return transformers.modeling_outputs.BackboneOutput(feature_maps=maps)

    backbone.net.forward = channels_last
    backbone.net._backbone.output_fmt = "NHWC"
    assert torch.equal(backbone(pixels()).feature_maps[0], expected)


def test_timm_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"pip install 'allinone_ds\[timm\]'"):
        build_backbone(BackboneConfig(name="timm/resnet18"))  # type: ignore[call-arg]
