"""The parameters of the backbone, by name, by module and from a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from allinone_ds.balance.heads import shared_parameters
from allinone_ds.testing import toy


def test_the_backbone_is_found_by_name_by_module_and_by_its_parameters() -> None:
    model = toy.make_model()
    wanted = {id(p) for p in model.backbone.parameters() if p.requires_grad}
    for shared in ("backbone", model.backbone, model.backbone.parameters()):
        assert shared_parameters(model, shared) == wanted


def test_the_name_is_that_of_the_model_before_it_was_compiled() -> None:
    model = toy.make_model()
    compiled = torch.compile(model)
    assert shared_parameters(compiled, "backbone") == shared_parameters(model, "backbone")
    with pytest.raises(ValueError, match="did you mean 'backbone'"):
        shared_parameters(compiled, "backbon")


def test_a_backbone_that_is_not_of_the_model_or_has_no_parameter_is_refused() -> None:
    model = toy.make_model()
    with pytest.raises(ValueError, match="do not belong to the engine's module"):
        shared_parameters(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no parameter"):
        shared_parameters(model, [])
    assert shared_parameters(model, model.backbone.frozen) == set()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        shared_parameters(model, "backbone")
