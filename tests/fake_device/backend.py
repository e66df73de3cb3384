"""The device "fake" of torch: tensors whose bytes lie in host memory, and every operator run by the CPU's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.fake_device.record import record

NAME = "fake"
DEVICE = "fake:0"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_WAITS = tuple(f"aten::{name}" for name in (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "multinomial", "repeat_interleave.Tensor", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq",
    "_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_cholesky_ex",
))  # fmt: skip
"""Operators that make the host wait on CUDA, by the beginning of their names."""
_memory: dict[int, tuple[StorageWeakRef, Any]] = {}
"""Storage on the device -> whether it is still there, and the storage on the host that has its bytes."""
_pinned: dict[int, StorageWeakRef] = {}
_library = torch.library.Library("_", "IMPL")
_aten = torch.library.Library("aten", "IMPL")


class _Module(_DummyBackendModule):
    """`torch.fake`; random numbers come from the CPU's generator."""

    Stream: Any = None
    Event: Any = None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


def register() -> None:
    """Add the device to torch, once per process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    _library.fallback(_run, "PrivateUse1")
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast leaves types as they are
    _aten.impl("_to_copy", _to_copy, "PrivateUse1")
    _aten.impl("native_group_norm", _group_norm, "PrivateUse1")
    _aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    _aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: _is_pinned(self)
    torch.Tensor.record_stream = _record_stream
    torch.Generator = _Generator
    torch.Tensor.data = property(_get_data, _set_data)
    torch._has_compatible_shallow_copy_type = lambda *tensors: True


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that shares the bytes of a device tensor."""
    _, storage = _memory[tensor.untyped_storage()._cdata]
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(tensor: Tensor) -> Tensor:
    """Return a device tensor that takes over the bytes of a CPU tensor."""
    sweep()
    result = torch._C._acc.create_empty_tensor((0,), tensor.dtype)
    _set(result, tensor)
    return result


def is_device(value: Any) -> bool:
    """Return whether a value is a tensor on the fake device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def _set(target: Tensor, tensor: Tensor) -> None:
    """Let a device tensor have the bytes, size and strides of a CPU tensor."""
    bytes_ = tensor.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(bytes_.data_ptr(), torch.device(DEVICE), bytes_.nbytes())
    _memory[storage._cdata] = StorageWeakRef(storage), bytes_
    record.allocated(storage._cdata)
    place = storage, tensor.storage_offset(), tensor.size(), tensor.stride()
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_CPU, target, *place)


def sweep() -> None:
    """Forget the memory of tensors that are gone."""
    for storage in [key for key, (alive, _) in _memory.items() if alive.expired()]:
        del _memory[storage]
        record.freed(storage)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator of the device."""
    name = op._schema.name
    if name.startswith("aten::empty"):  # its result is not an access
        return on_device(op(*args, **{**kwargs, "device": "cpu", "pin_memory": None}))
    if name == "aten::set_":
        return op.redispatch(_CPU, *args, **kwargs)
    if _is_view(op):
        return op.redispatch(_CPU, *args, **kwargs)
    if name == "aten::_copy_from":
        return _copy(*args, **kwargs)
    return _kernel(op, args, kwargs)


def _is_view(op: Any) -> bool:
    """Return whether the results share memory with an argument, and nothing is written."""
    aliases = [r.alias_info for r in op._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


MIXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::set_")
"""Operators of a GPU that also accept tensors on the host: indices."""


def _refuse_host(name: str, values: list[Any]) -> None:
    """Raise for a tensor on the host beside those of the device, as a GPU does; a number (0-dim) may be there."""
    for value in values:
        if isinstance(value, Tensor) and not is_device(value) and value.dim():
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found one on the host")


def _kernel(op: Any, args: Any, kwargs: Any) -> Any:
    """Run the CPU's kernel of an operator on the bytes of device tensors."""
    schema = op._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    written, read = [], []
    for argument in schema.arguments:
        alias = argument.alias_info
        tensors = [t for t in tree_flatten(given.get(argument.name))[0] if is_device(t)]
        (written if alias is not None and alias.is_write else read).extend(tensors)
    hosts = {id(tensor): on_host(tensor) for tensor in (*written, *read)}
    devices = {id(hosts[id(tensor)]): tensor for tensor in (*written, *read)}
    args = tuple(_tensor(a, value) for a, value in zip(schema.arguments, args, strict=False))
    if schema.name not in MIXES:
        _refuse_host(schema.name, tree_flatten((args, kwargs))[0])
    cpu_args, cpu_kwargs = tree_map_only(Tensor, lambda t: hosts.get(id(t), t), (args, kwargs))
    if "device" in cpu_kwargs:
        cpu_kwargs["device"] = "cpu"
    result = op(*cpu_args, **cpu_kwargs)
    for tensor in written:
        _follow(tensor, hosts[id(tensor)])
    fresh = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor) and id(t) not in devices]
    devices |= {id(tensor): on_device(tensor) for tensor in fresh}
    record.launch(schema.name, read, [*written, *(devices[id(tensor)] for tensor in fresh)])
    if schema.name.startswith(_WAITS):
        record.wait(schema.name.removeprefix("aten::"))
    return tree_map_only(Tensor, lambda t: devices[id(t)], result)


def _tensor(argument: Any, value: Any) -> Any:
    """Return a number as the tensor that it was, where an operator takes only tensors."""
    if isinstance(argument.type, torch.TensorType) and isinstance(value, int | float):
        return torch.tensor(value)
    return value


def _follow(tensor: Tensor, host: Tensor) -> None:
    """Give a device tensor the size that an operator gave to its CPU tensor, as it does to `out`."""
    if host.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        _set(tensor, host)
    elif host.shape != tensor.shape:
        tensor.as_strided_(host.size(), host.stride(), host.storage_offset())


def _to_copy(tensor: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    """Convert a device tensor; a copy to the host that does not block gets page-locked memory, as on CUDA."""
    if non_blocking and device is not None and torch.device(device).type == "cpu":
        host = _pin_memory(torch.empty(tensor.shape, dtype=options.get("dtype") or tensor.dtype))
        return host.copy_(tensor, non_blocking=True)
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.aten._to_copy.default._op_dk(key, tensor, device=device, non_blocking=non_blocking, **options)


def _group_norm(image: Tensor, *args: Any) -> Any:
    return _kernel(torch.ops.aten.native_group_norm.default, (image.contiguous(), *args), {})


def _convolution(*args: Any) -> Any:
    return _kernel(torch.ops.aten.convolution.default, args, {})


def _convolution_backward(output: Tensor, image: Tensor, weight: Tensor, *args: Any) -> Any:
    *options, mask = args
    sizes = [weight.shape[1] * options[5] if options[3] else weight.shape[0]] if mask[2] else None
    return _kernel(torch.ops.aten.convolution_backward.default, (output, image, weight, sizes, *options, mask), {})


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy from, to or on the device, as `cudaMemcpyAsync` does."""
    outward, inward = not is_device(target), not is_device(source)
    host = target if outward else source
    cpu_source, cpu_target = (on_host(t) if is_device(t) else t for t in (source, target))
    cpu_target.copy_(cpu_source)
    record.launch("copy", [] if inward else [source], [] if outward else [target])
    if outward or inward:
        what = "copy to the host" if outward else "copy to the device"
        if not non_blocking:
            record.wait(what)
        elif _is_pinned(host):
            record.copies(host, writes=outward)
        else:
            if outward:  # CUDA waits
                record.clocks.all_streams_wait_for_stream(record.stream)
            record.note("copy", what)
    return target


class _Generator(torch.Generator):
    """A generator of the CPU, which draws for the device as well."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


class WatchedHost(TorchDispatchMode):
    """Reports, inside this block, uses of page-locked memory whose copy to or from the device may still run.

    `torch.tensor(..., device=...)` fails inside of it (torch 2.14), as in all modes.
    """

    @classmethod
    def around(cls, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs in such a block."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with cls():
                return function(*args, **kwargs)

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_view(func) and not any(map(is_device, tree_flatten((args, kwargs))[0])):
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                alias = argument.alias_info
                for tensor in tree_flatten(given.get(argument.name))[0]:
                    if isinstance(tensor, Tensor):
                        record.host_uses(tensor, alias is not None and alias.is_write, func._schema.name)
        return func(*args, **kwargs)


def _pin_memory(self: Tensor, device: Any = None) -> Tensor:
    result = self.clone()
    _pinned[result.untyped_storage()._cdata] = StorageWeakRef(result.untyped_storage())
    return result


def _is_pinned(tensor: Tensor) -> bool:
    kept = _pinned.get(tensor.untyped_storage()._cdata)
    return kept is not None and not kept.expired()


def _record_stream(self: Tensor, stream: Any) -> None:
    record.used_by(self.untyped_storage()._cdata, stream.number)


def _get_data(self: Tensor) -> Tensor:
    return torch._C.TensorBase.data.__get__(self)


def _set_data(self: Tensor, value: Tensor) -> None:
    """Assign `tensor.data`; torch lets CPU and CUDA tensors take each other's place, but not those of a new device."""
    if is_device(self) == is_device(value):
        torch._C.TensorBase.data.__set__(self, value)
        return
    other = torch.nn.Parameter(value.detach(), self.requires_grad)
    torch._C._swap_tensor_impl(self, other)
