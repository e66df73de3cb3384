"""Constants are copied to a device once."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds.data.augmentation.transforms import MEAN, STD, normalize
from allinone_ds.device_constants import constant


class _Copies(TorchDispatchMode):
    """What is made from numbers of the CPU, which ends in a wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_batch_is_normalised_without_a_new_tensor_of_constants() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalize(images)
    with _Copies() as made:
        found = normalize(images)
    assert not [name for name in made.names if "lift" in name or "detach" in name], made.names
    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(found, (images.float() - mean) / std)


def test_constants_serve_training_after_inference_mode_and_nested_numbers() -> None:
    with torch.inference_mode():
        constant([[1.5, 2.5]], torch.zeros(1))
    weight = torch.ones(2, requires_grad=True)
    (weight * constant([[1.5, 2.5]], weight)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.5, 2.5]


def test_a_tracer_gets_constants_of_its_own() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        constant([7.0, 8.0], torch.empty(1))
    assert constant([7.0, 8.0], torch.empty(1)).tolist() == [7.0, 8.0]
