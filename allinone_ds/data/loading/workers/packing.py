"""Send nested tensors between processes as one tensor: each tensor that a worker sends takes a file descriptor."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

_ALIGNMENT = 16  # bytes: a view of any dtype must start at a multiple of its item size


class Packed(NamedTuple):
    """A value whose tensors lie in one.

    Example:
        >>> packed = pack({"labels": [torch.tensor([1, 2]), torch.tensor([3.0])]})
        >>> packed.bytes.shape, unpack(packed)
        (torch.Size([32]), {'labels': [tensor([1, 2]), tensor([3.])]})
    """

    value: Any
    """The value, with a `_Place` instead of each tensor."""
    bytes: Tensor
    """uint8 (n,), the content of all tensors."""


@dataclasses.dataclass
class _Place:
    start: int  # in bytes
    shape: torch.Size
    dtype: torch.dtype
    empty: Tensor | None  # of the tv_tensors class of the tensor, without elements; None for a plain tensor


def pack(value: Any) -> Packed:
    """Move the CPU tensors in dicts, lists, tuples and dataclasses into one tensor.

    The default way of torch to send a tensor keeps a file descriptor open for as long as the tensor is in use. The
    tensors of two detection batches of 100 images would exceed the usual limit of 1,024 descriptors.
    """
    tensors: list[tuple[int, Tensor]] = []
    size = 0

    def place(tensor: Tensor) -> _Place:
        nonlocal size
        plain = tensor.as_subclass(Tensor).detach()
        tensors.append((size, plain))
        placed = _Place(size, plain.shape, plain.dtype, None)
        if isinstance(tensor, tv_tensors.TVTensor):
            placed.empty = tv_tensors.wrap(plain.new_empty((0, *plain.shape[1:])), like=tensor)
        size += -(-plain.nbytes // _ALIGNMENT) * _ALIGNMENT
        return placed

    def is_movable(tensor: Any) -> bool:
        known = type(tensor) is Tensor or isinstance(tensor, tv_tensors.TVTensor)
        return known and tensor.device.type == "cpu" and tensor.layout is torch.strided

    packed = _replace(value, is_movable, place)
    content = torch.empty(size, dtype=torch.uint8)
    for start, tensor in tensors:
        if tensor.numel():
            content[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Packed(packed, content)


def unpack(packed: Packed, copy: bool = False) -> Any:
    """Return the value that was packed.

    Args:
        packed: what `pack` returned.
        copy: copy the tensors, for a value of which parts are kept: a view would keep the memory of all of it, and its
            file descriptor.
    """

    def tensor_at(place: _Place) -> Tensor:
        count = place.shape.numel() * place.dtype.itemsize
        tensor = packed.bytes[place.start : place.start + count].view(place.dtype).view(place.shape)
        tensor = tensor.clone() if copy else tensor
        return tensor if place.empty is None else tv_tensors.wrap(tensor, like=place.empty)

    return _replace(packed.value, lambda part: isinstance(part, _Place), tensor_at)


def _replace(value: Any, chosen: Any, new: Any) -> Any:
    """Return a copy of a nested value in which `new(part)` replaces every part that is `chosen`."""
    if chosen(value):
        return new(value)
    if type(value) is dict:
        return {key: _replace(part, chosen, new) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(part, chosen, new) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(part, chosen, new) for part in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, _Place):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{key: _replace(part, chosen, new) for key, part in parts.items()})
    return value
