"""Sketches: k numbers whose norm and inner products estimate those of gradients of P elements.

A sketch is linear, so the sum of all ranks' sketches is the sketch of the summed gradient, and its norm is known after
an all-reduce of k numbers instead of P. This is a count sketch (Charikar, Chen and Farach-Colton 2002) whose hashes are
cyclic shifts of blocks, so that it runs at the speed of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 16
"""Default length of a sketch of up to 512 times as many elements; the sketch of a longer gradient has a 512th."""


def default_size(elements: int) -> int:
    """Return the default length of a sketch: 65,536, or the next power of two above a 512th of the gradient.

    Args:
        elements: of the gradient, P.
    """
    return max(SMALLEST, 1 << max(0, math.ceil(math.log2(max(elements, 1) / 512))))


def norm_error(size: int) -> float:
    """Return a bound of the relative standard error of a sketched norm, for any gradient: sqrt(6 / k) / 2.

    Blocks b, c of the gradient overlap in the sketch with independent signs and a random shift, so their products have
    mean 0 and E (S_b . S_c)^2 <= 3 |b|^2 |c|^2 / k (shift 0, shift k / 2, all others: each at most 1 / k). Summed over
    pairs, var |S|^2 <= 6 |g|^4 / k; a norm has half the relative error of its square. The error of dense gradients is
    about sqrt(2 / k) / 2.

    Args:
        size: length k of the sketch.
    """
    return math.sqrt(6 / size) / 2


def held_bytes(size: int) -> int:
    """Return the bytes of one task's sketches while they are made: of backbone and heads, in two turns.

    Args:
        size: length k of a sketch.
    """
    return 2 * 2 * 4 * size


class Sketcher:
    """Sketches gradients that come as one tensor per parameter.

    Element j of a block of k elements is added to position (j + shift) mod k with sign (sign of j) * (sign of the
    block). `renew` draws new shifts and signs, equal on all ranks. Over draws the squared norm is unbiased; sketches of
    one draw can be added and multiplied with each other.

    Args:
        sizes: elements of each parameter.
        size: length k of a sketch.
        device: of the gradients.

    Example:
        >>> sketcher = Sketcher([3], size=64, device=torch.device("cpu"))
        >>> turns = sketcher.empty()
        >>> sketcher.add(turns, 0, torch.tensor([2.0, 3.0, 6.0]))
        >>> float(sketcher.sketch(turns).norm())
        7.0
    """

    def __init__(self, sizes: Sequence[int], size: int, device: torch.device):
        self.size = size
        self.device = device
        self._first = [0]  # of each parameter's blocks
        for elements in sizes:
            self._first.append(self._first[-1] + -(-elements // size))
        self.renew(0)

    def renew(self, seed: int) -> None:
        """Draw new shifts and signs; ranks with the same seed, and devices of one kind, draw the same."""
        generator = torch.Generator().manual_seed(seed)
        blocks = self._first[-1]
        self._shifts = torch.randint(self.size, (blocks,), generator=generator).tolist()
        self._block_signs = (torch.randint(2, (blocks,), generator=generator) * 2 - 1).tolist()
        on_device = torch.Generator(self.device).manual_seed(seed)  # k numbers take long to draw and send from the CPU
        signs = torch.randint(2, (self.size,), generator=on_device, dtype=torch.int8, device=self.device)
        self._signs = signs.float().mul_(2).sub_(1)  # (k,)

    def empty(self, *rows: int) -> Tensor:
        """Return (*rows, 2 k) zeros to `add` to: a block that wraps around goes on in the second turn, in one piece."""
        return torch.zeros(*rows, 2 * self.size, device=self.device)

    def add(self, turns: Tensor, index: int, gradient: Tensor) -> None:
        """Add the sketch of one parameter's gradient to `turns`, in place.

        Args:
            turns: (2 k,), of `empty`.
            index: of the parameter, in `sizes`.
            gradient: of any shape and floating type.
        """
        flat = gradient.detach().reshape(-1)
        for number, block in enumerate(flat.split(self.size), self._first[index]):
            place = turns.narrow(0, self._shifts[number], len(block))
            place.addcmul_(block.float(), self._signs[: len(block)], value=self._block_signs[number])

    def sketch(self, turns: Tensor) -> Tensor:
        """Return the sketches, (..., k), of everything that was added to `turns`, (..., 2 k)."""
        return turns[..., : self.size] + turns[..., self.size :]
