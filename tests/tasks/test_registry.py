"""Tasks by name: unknown names and invalid options are refused."""

import pytest

from allinone_ds.errors import ConfigError
from allinone_ds.tasks import build_task
from tests.tiny import CLASSES, SIZE, tiny_backbone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("detction",), "did you mean 'detection'"),
        (("nowhere:Thing",), "No module named 'nowhere'"),
        (("allinone_ds.tasks:Nothing",), "Nothing"),
        (("torch.nn:Linear",), "no subclass"),
        (("detection", "fcoss"), "did you mean 'fcos'"),
        (("detection", "fcos", {"num_conv": 1}), "did you mean 'num_convs'"),
        (("detection", "rf_detr", {"num_queries": 65}), "64 cells"),
        (("detection", "rf_detr", {"width": 30, "num_queries": 5}), "multiple"),
        (("segmentation", "upernet", {"scales": [3.0]}), "scales"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    type_name, head, options = (*arguments, None, None)[:3]
    with pytest.raises(ConfigError, match=message):
        build_task(type_name, "x", CLASSES, tiny_backbone(), SIZE, head, options)


def test_an_image_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        build_task("classification", "x", CLASSES, tiny_backbone(), (30, 32))


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("light", {"class_weights": [1.0]}, "tasks.seg.options: class_weights has 1 entries"),
        ("mask2former", {"width": 32, "attention_heads": 3}, "tasks.seg.options: mask2former: width 32 is no multiple"),
        ("light", {"widht": 8}, "tasks.seg.options"),
    ],
)
def test_an_error_of_a_head_names_the_key_of_the_run(head: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_task("segmentation", "seg", CLASSES, tiny_backbone(), SIZE, head, options)
    assert str(error.value).count("tasks.seg") == 1
