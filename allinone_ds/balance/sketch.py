"""Sketches: a gradient of P elements in k numbers whose norm and inner products estimate the gradient's own.

A sketch is linear, so the sum of all ranks' sketches is the sketch of the summed gradient: its norm is known after an
all-reduce of k numbers instead of P. (A count sketch in the sense of Charikar, Chen and Farach-Colton 2002, whose
hashes are cyclic shifts of blocks, so that it runs at the speed of memory.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 16
"""Default length of a sketch of up to 512 times as many elements; longer gradients get a 512th."""


def default_size(elements: int) -> int:
    """Length of a sketch when none is asked for: 65,536, or the power of two next above a 512th of the gradient."""
    return max(SMALLEST, 1 << max(0, math.ceil(math.log2(max(elements, 1) / 512))))


def norm_error(size: int) -> float:
    """Bound of a sketched norm's relative standard error, for any gradient: sqrt(6 / k) / 2.

    Blocks b, c of the gradient meet in the sketch with independent signs and a random shift, so their products have
    mean 0 and E (S_b . S_c)^2 <= 3 |b|^2 |c|^2 / k (shift 0, half a turn, all others: each at most 1 / k). Summed over
    pairs, var |S|^2 <= 6 |g|^4 / k; a norm has half the relative error of its square. Dense gradients come to
    sqrt(2 / k) / 2.

    Args:
        size: length k of the sketch.
    """
    return math.sqrt(6 / size) / 2


class Sketcher:
    """Sketches gradients that come as one tensor a parameter.

    Element j of a block of k elements goes to place (j + shift) mod k with sign (sign of j) * (sign of the block);
    shifts and signs are drawn anew by `renew`, equal on all ranks. So over draws the squared norm is unbiased, and
    within one draw all sketches can be added and multiplied with each other.

    Args:
        sizes: elements of each parameter.
        size: length k of a sketch.
        device: of the gradients.
    """

    def __init__(self, sizes: Sequence[int], size: int, device: torch.device):
        self.size = size
        self.device = device
        self._first = [0]  # of each parameter's blocks
        for elements in sizes:
            self._first.append(self._first[-1] + -(-elements // size))
        self.renew(0)

    def renew(self, seed: int) -> None:
        """Draw shifts and signs. Ranks that pass the same seed draw the same."""
        generator = torch.Generator().manual_seed(seed)
        blocks = self._first[-1]
        self._shifts = torch.randint(self.size, (blocks,), generator=generator).tolist()
        self._block_signs = (torch.randint(2, (blocks,), generator=generator) * 2 - 1).tolist()
        signs = torch.randint(2, (self.size,), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs = signs.to(self.device, torch.float32, non_blocking=True)  # (k,)

    def add(self, sketch: Tensor, index: int, gradient: Tensor) -> None:
        """sketch += sketch of one parameter's gradient.

        Args:
            sketch: (k,) float32, changed in place.
            index: of the parameter in `sizes`.
            gradient: of any shape and floating type.
        """
        flat = gradient.detach().reshape(-1)
        for number, block in enumerate(flat.split(self.size), self._first[index]):
            shift, sign = self._shifts[number], self._block_signs[number]
            block = block.float()
            head = min(len(block), self.size - shift)
            sketch[shift : shift + head].addcmul_(block[:head], self._signs[:head], value=sign)
            if head < len(block):  # round the end
                tail = len(block) - head
                sketch[:tail].addcmul_(block[head:], self._signs[head : head + tail], value=sign)
