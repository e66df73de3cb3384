"""Sums and products of gradient shards against float64, in the way of an accelerator too."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds.balance import arithmetic
from allinone_ds.balance.joint.measure import squares

N = 3 * arithmetic.CHUNK + 5
FACTOR = torch.tensor(1 / 3)
"""In bfloat16 it is 0.2 % larger."""


def halves(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_millions_of_elements_is_close_to_float64(dtype):
    gradients = [halves(dtype), halves(dtype)[:7]]
    wanted = sum(gradient.double().square().sum() for gradient in gradients)
    for found in (
        arithmetic.square_norm(gradients, torch.device("cpu")),
        squares([gradients], torch.device("cpu"))[0],
    ):
        assert abs(float((found / wanted).sqrt()) - 1) < (1e-6 if dtype == torch.float32 else 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [arithmetic.scale_or_zero, arithmetic._scale_on_device])
def test_a_scaled_tensor_is_the_rounded_product(dtype, scale):
    gradient = halves(dtype)
    wanted = (gradient.double() * FACTOR.double()).to(dtype)
    found = scale(gradient.clone(), FACTOR, torch.tensor(True))
    assert found.dtype == dtype and torch.allclose(found, wanted, rtol=1e-7, atol=0)
    gradient[0] = torch.inf
    assert (scale(gradient, FACTOR, torch.tensor(False)) == 0).all()


@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [arithmetic.add_scaled, arithmetic._add_on_device])
def test_a_scaled_sum_has_one_rounding(total, add):
    gradient, before = halves(torch.bfloat16), halves(total).flip(0)
    sums = before.clone()
    add([sums], [gradient.clone()], FACTOR, torch.tensor(True))
    wanted = before.double() + gradient.double() * FACTOR.double()
    assert torch.allclose(sums.double(), wanted, rtol=2**-8 if total == torch.bfloat16 else 1e-6, atol=1e-6)
    moved = (sums.double() - before.double()).dot(gradient.double()) / gradient.double().square().sum()
    assert abs(moved / FACTOR.double() - 1) < 2e-5, "no common factor for all elements"
    gradient[0] = torch.nan
    add([sums], [gradient], FACTOR, torch.tensor(False))
    assert torch.allclose(sums.double(), wanted, rtol=2**-8 if total == torch.bfloat16 else 1e-6, atol=1e-6)


def test_an_accelerator_without_the_fused_kernel_adds_as_well(monkeypatch):
    def missing(*arguments, **options):
        raise NotImplementedError("Could not run 'aten::_fused_sgd_' with arguments from this backend")

    gradient, before = halves(torch.float32), halves(torch.float32).flip(0)
    sums = [before.clone(), before.clone()]
    arithmetic._add_on_device(sums[:1], [gradient], FACTOR, torch.tensor(True))
    monkeypatch.setattr(torch, "_fused_sgd_", missing)
    arithmetic._add_on_device(sums[1:], [gradient.clone()], FACTOR, torch.tensor(True))
    torch.testing.assert_close(*sums)
    gradient[0] = torch.inf
    arithmetic._add_on_device(sums[1:], [gradient], FACTOR, torch.tensor(False))
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("add", [arithmetic.add_scaled, arithmetic._add_on_device])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_model_in_channels_last_are_added(add, dtype):
    gradient = halves(torch.bfloat16)[:24].to(dtype).view(2, 3, 2, 2)
    sums = [torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)]
    add(sums, [gradient.clone()], FACTOR, torch.tensor(True))
    torch.testing.assert_close(sums[0], 1 + gradient.float() * FACTOR)


def test_a_factor_below_the_range_of_fp16_still_scales():
    """fp16 gradients carry the loss scale, so they are large where factors are small."""
    gradient = torch.full((4,), 60_000.0, dtype=torch.float16)
    found = arithmetic._scale_on_device(gradient, torch.tensor(2e-8), torch.tensor(True))
    assert torch.allclose(found.float(), torch.tensor(60_000.0 * 2e-8), rtol=1e-3)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_inner_products_take_few_operations_and_no_tf32():
    generator = torch.Generator().manual_seed(0)
    sizes = (9 * arithmetic.CHUNK + 3, 7, 5000)
    shards = [[torch.randn(n, generator=generator) + 0.1 * t for n in sizes] for t in range(4)]
    whole = torch.stack([torch.cat(shard).double() for shard in shards])
    torch.set_float32_matmul_precision("medium")
    try:
        with _Count() as operations:
            gram = arithmetic.inner_products(shards, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    wanted = whole @ whole.T
    scale = wanted.diagonal().sqrt()
    assert ((gram - wanted).abs() / (scale[:, None] * scale)).max() < 1e-7
    assert torch.equal(gram, gram.T)
    assert operations.count < 120, "some 10 per 4 chunks of all tasks"


class _Alive(TorchDispatchMode):
    """The most elements that tensors made like others have at a time."""

    def __init__(self):
        super().__init__()
        self.most = 0
        self._made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty_like.default:
            self._made.append(weakref.ref(result))
            self.most = max(self.most, sum(made().numel() for made in self._made if made() is not None))
        return result


def test_16_bit_gradients_are_converted_some_at_a_time(monkeypatch):
    monkeypatch.setattr(arithmetic, "BATCH", 2000)
    gradients = [torch.full((1000,), float(index), dtype=torch.bfloat16) for index in range(8)]
    sums = [torch.ones(1000) for _ in gradients]
    with _Alive() as alive:
        arithmetic._add_on_device(sums, gradients, torch.tensor(0.5), torch.tensor(True))
    assert 0 < alive.most <= 2000
    assert all((total == 1 + index * 0.5).all() for index, total in enumerate(sums))
