"""Pretrained weights: what fits is loaded whatever the prefix, and what does not is counted, named or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone, BackboneConfig, build_backbone
from allinone_ds.models.pretrained import checkpoint_config
from tests.tiny import tiny_backbone

TYPES = ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"]
PREFIXES = ["teacher.backbone.", "module.", "backbone.", "encoder.", "student.", "vit.", "_orig_mod.", "a.b."]


def saved(folder: Path, model_type: str = "dinov2", **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Save a backbone; return the tensors of its file, and its last feature map of `pixels`."""
    torch.manual_seed(1)
    source = tiny_backbone(model_type, "patch")
    source.net.save_pretrained(folder, **settings)
    return {k: v.clone() for k, v in source.net.state_dict().items()}, last_map(source)


def last_map(backbone: Backbone, side: int = 32) -> Tensor:
    pixels = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    return backbone.eval()(pixels).feature_maps[-1].detach()


def rewrite(folder: Path, prefix: str, **more: Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**{prefix + k: v for k, v in load_file(file).items()}, **more}, file, metadata={"format": "pt"})


def load(folder: Path, model_type: str = "dinov2", min_loaded: float = 0.9, **config: Any) -> Backbone:
    return build_backbone(
        BackboneConfig(model_type=model_type, checkpoint=str(folder), config=config, min_loaded=min_loaded)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("model_type,prefix", [*((t, "model.") for t in TYPES), *(("dinov2", p) for p in PREFIXES)])
def test_a_prefix_of_all_names_is_removed(tmp_path: Path, model_type: str, prefix: str) -> None:
    state, expected = saved(tmp_path, model_type)
    rewrite(tmp_path, prefix)
    backbone = load(tmp_path, model_type)
    assert torch.equal(last_map(backbone), expected)
    assert backbone.loaded is not None and backbone.loaded.complete
    assert (backbone.loaded.loaded, backbone.loaded.missing, backbone.loaded.unexpected) == (len(state), (), ())


def test_a_teacher_is_preferred_to_its_student(tmp_path: Path) -> None:
    state, expected = saved(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    student = {f"student.{name}": torch.zeros_like(value) for name, value in names.items()}
    rewrite(tmp_path, "teacher.", **student)
    backbone = load(tmp_path)
    assert torch.equal(last_map(backbone), expected)
    assert backbone.loaded is not None and backbone.loaded.prefix == "teacher."
    assert len(backbone.loaded.unexpected) == len(state) and backbone.loaded.unexpected[0].startswith("student.")


def test_nested_and_sharded_files_are_read(tmp_path: Path) -> None:
    nested, sharded = tmp_path / "nested", tmp_path / "sharded"
    state, expected = saved(nested)
    (nested / "model.safetensors").unlink()
    optimizer = {"state": {0: {"m": torch.zeros(2)}}}
    content = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": optimizer}
    torch.save(content, nested / "pytorch_model.bin")
    backbone = load(nested)
    assert torch.equal(last_map(backbone), expected)
    assert backbone.loaded is not None
    assert backbone.loaded.prefix == "state_dict.module." and backbone.loaded.unexpected == ("optimizer.state.0.m",)
    saved(sharded, max_shard_size="20KB")
    assert torch.equal(last_map(load(sharded)), expected)
    files = sorted(sharded.glob("*-of-*"))
    files[0].unlink()
    with pytest.raises(ConfigError, match=f"1 of the {len(files)} files .* do not exist, among them {files[0].name}"):
        load(sharded)
    (nested / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="pytorch_model.bin cannot be read"):
        load(nested)
    (nested / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="has none of model.safetensors"):
        load(nested)


def test_names_of_a_different_architecture_are_refused(tmp_path: Path) -> None:
    state, _ = saved(tmp_path)
    names = {f"blocks.{i}.weight": value.clone() for i, value in enumerate(state.values())}
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"0 of {len(state)} tensors loaded; .*blocks.*At least 90% .*min_loaded"):
        load(tmp_path)
    backbone = load(tmp_path, min_loaded=0)
    assert backbone.loaded is not None and backbone.loaded.loaded == 0 and not backbone.loaded.complete


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_that_a_checkpoint_lacks_are_refused_or_counted(tmp_path: Path, model_type: str) -> None:
    state, _ = saved(tmp_path, model_type)
    with pytest.raises(ConfigError, match=rf"{len(state)} of \d+ tensors loaded; \d+ missing .*layer\.2\."):
        load(tmp_path, model_type, num_hidden_layers=3)
    more = load(tmp_path, model_type, min_loaded=0.5, num_hidden_layers=3).loaded
    assert more is not None and more.loaded == len(state) and not more.complete
    assert all("layer.2." in name for name in more.missing) and len(more.missing) > 10
    less = load(tmp_path, model_type, num_hidden_layers=1).loaded  # chosen by the user, but said
    assert less is not None and less.missing == () and all("layer.1." in name for name in less.unexpected)
    assert less.changed == ("config.num_hidden_layers = 1 (2 there)",) and not less.complete


@pytest.mark.parametrize("model_type", TYPES)
def test_other_sizes_are_named_with_both_shapes(tmp_path: Path, model_type: str) -> None:
    saved(tmp_path, model_type)
    shapes = r"is \(.*32.*\) there and \(.*64.*\) in this run; .*config.hidden_size = 64 \(32 there\)"
    with pytest.raises(ConfigError, match=shapes):
        load(tmp_path, model_type, hidden_size=64)
    shapes = r"is \(32, 3, 4, 4\) there and \(32, 3, 8, 8\) in this run; .*config.patch_size = 8"
    with pytest.raises(ConfigError, match=shapes):
        load(tmp_path, model_type, patch_size=8)
    heads = load(tmp_path, model_type, num_attention_heads=4).loaded  # no shape shows it
    assert heads is not None and heads.changed == ("config.num_attention_heads = 4 (2 there)",)


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_position_embeddings_are_interpolated_to_another_image_size(tmp_path: Path, model_type: str) -> None:
    state, _ = saved(tmp_path, model_type)
    rewrite(tmp_path, "module.")
    backbone = load(tmp_path, model_type, image_size=48)
    theirs = state["embeddings.position_embeddings"]
    grid = theirs[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    antialias = model_type == "dinov2_with_registers"
    grid = F.interpolate(grid, size=(12, 12), mode="bicubic", align_corners=False, antialias=antialias)
    expected = torch.cat([theirs[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 144, 32)], dim=1)
    assert torch.equal(backbone.net.state_dict()["embeddings.position_embeddings"], expected)
    assert backbone.loaded is not None and backbone.loaded.complete
    assert backbone.loaded.resized == ("embeddings.position_embeddings",)
    # the model interpolates its own embeddings at any image size, so that nothing changes at 48 pixels
    torch.testing.assert_close(last_map(backbone, 48), last_map(load(tmp_path, model_type), 48))


def test_lower_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    state, _ = saved(tmp_path)
    halves = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path).net.state_dict()
    assert all(torch.equal(loaded[name], value.bfloat16().float()) for name, value in state.items())


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match="is the folder of a run; set model.start_from"):
        load(tmp_path)


HIERARCHICAL: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
    },
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
}


@pytest.mark.parametrize("model_type", HIERARCHICAL)
def test_other_architectures_lose_their_prefix_and_warn_of_nothing(tmp_path: Path, model_type: str) -> None:
    config = HIERARCHICAL[model_type] | {"image_size": 32}
    torch.manual_seed(1)
    source = build_backbone(BackboneConfig(model_type=model_type, config=config))  # type: ignore[arg-type]
    source.net.save_pretrained(tmp_path)
    rewrite(tmp_path, "teacher.backbone.")
    loaded = load(tmp_path, model_type)
    assert torch.equal(last_map(loaded), last_map(source))
    assert loaded.loaded is not None and loaded.loaded.complete, str(loaded.loaded)
    assert "left random" not in str(loaded.loaded)  # a pooler, which the backbone does not have, is no loss


def test_a_folder_of_timm_says_what_was_loaded(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    source = build_backbone(BackboneConfig(name="timm/convnext_atto"))  # type: ignore[call-arg]
    source.net.save_pretrained(tmp_path)
    rewrite(tmp_path, "module.", **{"head.weight": torch.zeros(2)})
    loaded = build_backbone(BackboneConfig(model_type="timm_backbone", checkpoint=str(tmp_path)))  # type: ignore[call-arg]
    assert loaded.loaded is not None and loaded.loaded.prefix == "module."
    assert loaded.loaded.unexpected == ("head.weight",) and loaded.loaded.loaded == len(source.net.state_dict())


def test_a_checkpoint_that_is_not_here_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="checkpoint: ./nowhere is no folder; correct the path, or give OWNER/NAME"):
        checkpoint_config("./nowhere")

    def unreachable(name: str) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr("allinone_ds.models.pretrained.AutoConfig.from_pretrained", unreachable)
    for build in (checkpoint_config, lambda name: build_backbone(BackboneConfig(checkpoint=name, model_type="deit"))):
        with pytest.raises(ConfigError, match="'facebook/deit-x' is no folder, .*: We couldn't.* `hf download facebo"):
            build("facebook/deit-x")
