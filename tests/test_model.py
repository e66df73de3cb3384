"""The model of all tasks: routing, activation checkpointing, dtypes."""

import pytest
import torch

from allinone_ds.data.augmentation.transforms import stack_images
from allinone_ds.errors import ConfigError
from allinone_ds.model import AllInOneModel
from allinone_ds.tasks import build_task
from tests.tiny import CLASSES, SIZE, samples, tiny_backbone, tiny_model


def gradients(model, name):
    model.zero_grad()
    model(name, **model.tasks[name].collate(samples())).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def test_a_forward_touches_the_backbone_and_one_head():
    model = tiny_model()
    touched = {key.split(".")[1] for key in gradients(model, "seg") if key.startswith("tasks.")}
    assert touched == {"seg"}


def test_uint8_images_are_normalised_and_floats_are_not():
    model = tiny_model().eval()
    pixels = model.tasks["seg"].collate(samples())["pixel_values"]
    assert pixels.dtype == torch.uint8
    with torch.no_grad():
        raw, given = (model("seg", pixel_values=p).logits for p in (pixels, stack_images(samples())))
        other = model("seg", pixel_values=pixels.float()).logits
    assert torch.equal(raw, given) and not torch.allclose(raw, other, atol=1e-3)


def test_unknown_task_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'det'"):
        tiny_model()("dett", torch.zeros(1, 3, *SIZE))


@pytest.mark.parametrize("name", ["keys", "a.b", "a/b", ""])
def test_names_that_modules_cannot_have_are_refused(name):
    backbone = tiny_backbone()
    task = build_task("classification", name, CLASSES, backbone, SIZE)
    with pytest.raises(ConfigError, match="cannot name a task"):
        AllInOneModel(backbone, {name: task})


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"])
def test_checkpointing_changes_no_gradient(model_type):
    model = tiny_model(model_type=model_type, **({"pos_embed_rescale": None} if model_type == "dinov3_vit" else {}))
    plain = gradients(model, "cls")
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = gradients(model, "cls")
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert plain.keys() == again.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(grad, again[key])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_inputs_of_layers_stay_on_a_machine_without_a_gpu():
    with pytest.raises(ConfigError, match="offload moves activations from a GPU.*remove it"):
        tiny_model().activation_checkpointing_enable(offload=True)


def test_checkpointing_is_enabled_by_its_earlier_name():
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_config_has_the_hidden_size():
    assert tiny_model().config.hidden_size == 32
