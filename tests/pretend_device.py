"""A device that is not there: tensors that are computed on the CPU, but say that they are elsewhere.

What a GPU would do with a program can then be seen without one: where the host would wait for it, how many operations
it would be sent, and which of them would be refused because one of their tensors is on the host. Numbers are those of
the CPU, bit for bit. It takes the place of torch's device "meta", of which autograd and modules know already.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
SHAPED_BY_DATA = {  # the host must know how many numbers come out
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
ANSWERS = {aten._local_scalar_dense.default, aten.equal.default}  # to a question of the host
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MADE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Away(torch.Tensor):
    """A tensor of the device. held: the numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of a Pretended device")


@dataclass
class Record:
    """What the host asked of the device. waits: by name of the operation. sent: operations, views not counted."""

    waits: Counter = field(default_factory=Counter)
    sent: int = 0

    @property
    def waited(self) -> int:
        return sum(self.waits.values())


class _Maker(TorchFunctionMode):
    """`torch.tensor` and its like on the device: made on the host, and copied."""

    def __init__(self, record: Record, allow: Callable):
        super().__init__()
        self.record, self.allow = record, allow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].cpu().tolist()
        away = func is torch.Tensor.new_tensor and isinstance(args[0], Away)
        if func in MADE and (away or torch.device(kwargs.get("device") or "cpu") == DEVICE):
            if isinstance(args[0], Away) and not away:
                return args[0]
            if away:
                args, kwargs["dtype"] = args[1:], kwargs.get("dtype") or args[0].dtype
            made = torch.tensor(*args, **{**kwargs, "device": "cpu"})
            self.allow(made, func)
            self.record.waits["copy to the device"] += 1
            self.record.sent += 1
            return Away(made)
        return func(*args, **kwargs)


class Pretended(TorchDispatchMode):
    """In this context there is the device; `record` says what it was asked.

    Args:
        float64: whether it knows this type, which Apple's GPUs do not.
    """

    def __init__(self, float64: bool = True):
        super().__init__()
        self.record, self.float64 = Record(), float64
        self.maker = _Maker(self.record, self._allow)

    def __enter__(self):
        self.maker.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.maker.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = [x for x in inputs if isinstance(x, Away)]
        to = kwargs.get("device")
        there = bool(away) if to is None else torch.device(to) == DEVICE
        if not away and not there:
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            there = isinstance(args[0], Away)
        self._count(func, args, kwargs, inputs, away, there)
        if to is not None:
            kwargs["device"] = "cpu"
        held, kept = tree_map(lambda x: x.held if isinstance(x, Away) else x, (args, kwargs))
        out = func(*held, **kept)
        known = {id(x.held): x for x in away}

        def wrapped(x):
            if not isinstance(x, torch.Tensor) or not there:
                return x
            self._allow(x, func)
            return known[id(x)] if id(x) in known else Away(x)

        return tree_map(wrapped, out)

    def _allow(self, x: torch.Tensor, func) -> None:
        if x.dtype == torch.float64 and not self.float64:
            raise TypeError(f"{func} makes float64, which the device does not have")

    def _count(self, func, args, kwargs, inputs, away, there) -> None:
        name = func.overloadpacket.__name__
        crossing = func in (aten._to_copy.default, aten.copy_.default)
        strangers = [x for x in inputs if not isinstance(x, Away) and x.ndim]
        if func in INDEXED:
            indices = [x for x in args[1] if x is not None]
            masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
            filled = func is not aten.index.Tensor and args[2].numel() == 1
            if (masks and not filled) or strangers:
                self.record.waits[f"{name} by a mask" if masks else f"{name} by an index of the host"] += 1
        elif crossing and (strangers or not there):
            nonblocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not nonblocking or not there:
                self.record.waits["copy to the device" if there else "copy to the host"] += 1
        elif strangers:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but got one of the host")
        elif func in SHAPED_BY_DATA or func in ANSWERS:
            self.record.waits[name.strip("_")] += 1
        returns = func._schema.returns
        self.record.sent += not any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = _moved(parameter)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Away(buffer)
    return module


def _moved(parameter: nn.Parameter) -> nn.Parameter:
    if not hasattr(parameter, "away"):  # one that is tied must stay one
        parameter.away = nn.Parameter(Away(parameter.detach()), parameter.requires_grad)
    return parameter.away
