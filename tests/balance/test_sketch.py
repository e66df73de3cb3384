"""Sketched norms and inner products: unbiased over draws, within the stated bound for any gradient, linear."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds.balance.combiners.sketch import SMALLEST, Sketcher, default_size, norm_error
from allinone_ds.balance.combiners.sketched import LocalCombiner

K, DRAWS = 256, 400
GENERATOR = torch.Generator().manual_seed(0)


def column(step: int) -> torch.Tensor:
    """One element in `step` is set: every block of K has its weight in the same places."""
    gradient = torch.zeros(K * 40)
    gradient[3::step] = 1.0
    return gradient


GRADIENTS = {
    "dense, odd sizes": [torch.randn(n, generator=GENERATOR) for n in (6401, 300, 7, 1)],
    "rank 1, rows as long as a block": [torch.outer(torch.ones(64), torch.randn(K, generator=GENERATOR))],
    "constant": [torch.ones(K * 40)],
    "one place of every block": [column(K)],
    "two places half a turn apart": [column(K // 2)],
}


def sketches(gradients: list[torch.Tensor], sketcher: Sketcher) -> torch.Tensor:
    turns = sketcher.empty()
    for index, gradient in enumerate(gradients):
        sketcher.add(turns, index, gradient)
    return sketcher.sketch(turns)


@pytest.mark.parametrize("name", GRADIENTS)
def test_squared_norm_is_unbiased_and_within_its_bound(name: str) -> None:
    gradients = GRADIENTS[name]
    sketcher = Sketcher([g.numel() for g in gradients], K, torch.device("cpu"))
    wanted = sum(float(g.double().square().sum()) for g in gradients)
    found = []
    for seed in range(DRAWS):
        sketcher.renew(seed)
        found.append(float(sketches(gradients, sketcher).double().square().sum()) / wanted)
    squares = torch.tensor(found, dtype=torch.float64)
    assert float(squares.std()) / 2 <= norm_error(K), "a norm has half the relative error of its square"
    assert abs(float(squares.mean()) - 1) <= 4 * float(squares.std()) / DRAWS**0.5


def test_sketches_add_up_whatever_the_cut() -> None:
    """The sum of ranks' sketches is that of their summed gradient; a matrix and its flat copy are one gradient."""
    sketcher = Sketcher([1000, 30], K, torch.device("cpu"))
    a, b = (
        [torch.randn(40, 25, generator=GENERATOR, dtype=torch.float32), torch.randn(30, generator=GENERATOR)]
        for _ in range(2)
    )
    whole = sketches([a[0] + b[0], (a[1] + b[1])], sketcher)
    torch.testing.assert_close(sketches(a, sketcher) + sketches(b, sketcher), whole, rtol=1e-5, atol=1e-5)
    half = sketches([a[0].bfloat16().reshape(-1), a[1].bfloat16()], sketcher)
    torch.testing.assert_close(half, sketches([g.bfloat16().float() for g in a], sketcher))


def test_inner_products_come_out() -> None:
    a = torch.randn(20_000, generator=GENERATOR)
    b = 0.5 * a + torch.randn(20_000, generator=GENERATOR)
    sketcher = Sketcher([20_000], 4096, torch.device("cpu"))
    found = []
    for seed in range(50):
        sketcher.renew(seed)
        found.append(float(sketches([a], sketcher) @ sketches([b], sketcher)))
    wanted = float(a @ b)
    assert abs(sum(found) / 50 / wanted - 1) < 0.02


def test_default_size_grows_with_the_model() -> None:
    assert default_size(20_000_000) == SMALLEST
    assert default_size(1_000_000_000) == 1 << 21
    assert norm_error(SMALLEST) < 0.005


class _Converted(TorchDispatchMode):
    """The most elements that float32 copies of 16-bit tensors have at a time."""

    def __init__(self):
        super().__init__()
        self.most = 0
        self._alive = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype.itemsize == 2:
            self._alive.append(weakref.ref(result))
            self.most = max(self.most, sum(kept().numel() for kept in self._alive if kept() is not None))
        return result


def test_16_bit_gradients_are_added_without_a_float32_copy_of_all_of_them() -> None:
    combiner = SimpleNamespace(local=SimpleNamespace(dtype=torch.float32), _scales=lambda index: index % 2 == 0)
    gradients = {index: torch.full((1000,), index, dtype=torch.bfloat16) for index in range(8)}
    sums = {index: torch.ones(1000) for index in gradients}
    with _Converted() as converted:
        LocalCombiner._add_scaled(combiner, sums, gradients, torch.tensor(0.5), torch.tensor(True), part=2.0)
    assert 0 < converted.most <= 2000
    for index, total in sums.items():
        assert (total == 1 + index * (1.0 if index % 2 == 0 else 2.0)).all()


def test_small_parameters_are_sketched_together() -> None:
    """As one block, which loses nothing; a parameter without a gradient counts as zeros."""
    sizes, large = [300, 7, 20, 1 << 15], 3
    combiner = SimpleNamespace(
        local=SimpleNamespace(sizes=sizes),
        shared=[True, True, False, True],
        _small={True: [0, 1], False: [2]},
        sketcher=Sketcher([*sizes, 307, 20], 1 << 16, torch.device("cpu")),
    )
    gradients = {index: torch.randn(size, generator=GENERATOR) for index, size in enumerate(sizes)}
    small = {index: gradients[index].bfloat16() for index in range(large)}
    backbone, heads = LocalCombiner._sketch(combiner, small)
    torch.testing.assert_close(backbone.norm(), torch.cat([small[0], small[1]]).float().norm())
    torch.testing.assert_close(heads.norm(), small[2].float().norm())
    apart = [LocalCombiner._sketch(combiner, {index: gradient}) for index, gradient in gradients.items()]
    torch.testing.assert_close(LocalCombiner._sketch(combiner, gradients), sum(apart))
