"""DeepSpeed's Muon and AdamW by hand on whole matrices in float64: the reference for balanced steps with Muon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from allinone_ds.testing.toy import ToyModel

MOMENTUM, BETAS, EPS = 0.9, (0.9, 0.95), 1e-8
MUON_RATE, ADAM_RATE, DECAY = 0.02, 2e-3, 0.1


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix after the Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon/).

    Args:
        matrix: (rows, columns), float64.
        steps: of the iteration.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    return scale * (x.T if tall else x)


def is_of_muon(name: str, shape: torch.Size) -> bool:
    """Return whether Muon trains a parameter of the toy model: the matrices of its backbone."""
    return name.startswith("backbone.") and len(shape) == 2


@dataclass
class MuonByHand:
    """The optimizer of `muon_groups` on whole parameters.

    Attributes:
        momentum, first, second: state by the name of the parameter.
        steps: of AdamW, by the name of the parameter.
    """

    momentum: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def step(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights after a step on the sum of the balanced gradients; those without a gradient get zeros."""
        return {
            name: (self._muon if is_of_muon(name, value.shape) else self._adam)(
                name, value, gradients.get(name, torch.zeros_like(value))
            )
            for name, value in weights.items()
        }

    def _muon(self, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        momentum = self.momentum.get(name, torch.zeros_like(value)).lerp(gradient, 1 - MOMENTUM)
        self.momentum[name] = momentum
        return value * (1 - MUON_RATE * DECAY) - MUON_RATE * orthogonalised(gradient.lerp(momentum, MOMENTUM))

    def _adam(self, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        first = self.first.get(name, torch.zeros_like(value)).lerp(gradient, 1 - BETAS[0])
        second = self.second.get(name, torch.zeros_like(value)).lerp(gradient.square(), 1 - BETAS[1])
        count = self.steps.get(name, 0) + 1
        self.first[name], self.second[name], self.steps[name] = first, second, count
        direction = first / (1 - BETAS[0] ** count) / ((second / (1 - BETAS[1] ** count)).sqrt() + EPS)
        return value * (1 - ADAM_RATE * DECAY) - ADAM_RATE * direction


def muon_groups(model: ToyModel) -> list[dict[str, Any]]:
    """Return optimizer groups of the toy model: Muon for the backbone's matrices, AdamW for all others.

    Args:
        model: the model.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    of_muon = [param for name, param in named if is_of_muon(name, param.shape)]
    others = [param for name, param in named if name.startswith("backbone.") and not is_of_muon(name, param.shape)]
    modules = [*model.heads.values(), model.late]
    rest = [others, *(list(module.parameters()) for module in modules)]
    adam = {"use_muon": False, "lr": ADAM_RATE, "weight_decay": DECAY, "betas": BETAS, "eps": EPS}
    return [
        {"params": of_muon, "use_muon": True, "lr": MUON_RATE, "weight_decay": DECAY, "momentum": MOMENTUM},
        *({"params": params, **adam} for params in rest),
    ]


def muon(model: ToyModel, ns_method: str = "gram") -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon on the toy model, with the settings of `MuonByHand`.

    Args:
        model: the model.
        ns_method: "gram" or "standard".
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = muon_groups(model)
    groups[0]["ns_method"] = ns_method
    return MuonWithAuxAdam(groups)


@contextlib.contextmanager
def newton_schulz_in_float32() -> Iterator[None]:
    """Run DeepSpeed's Newton-Schulz iteration in float32 inside this block, so that it can be compared with float64."""
    from deepspeed.runtime.zero.muon import original_muon

    own = original_muon.ns_compute_dtype
    original_muon.ns_compute_dtype = lambda *_: torch.float32
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        original_muon.ns_compute_dtype = own
