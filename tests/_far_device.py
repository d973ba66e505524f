"""A device whose memory the host does not see, on the host: it counts where a GPU would have to be waited for.

Its tensors say that they are on "meta", for which torch has all that a device needs, and hold their values in others on
the CPU, on which everything is computed.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FAR, HERE = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select)
READS += (aten.bincount, aten._unique2, aten.unique_dim)


class FarTensor(Tensor):
    @staticmethod
    def __new__(cls, there: Tensor):
        size, strides = there.shape, there.stride()
        made = Tensor._make_wrapper_subclass(
            cls, size, strides, there.storage_offset(), dtype=there.dtype, device=FAR, requires_grad=False
        )
        made.there = there
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {}, None)


class FarGenerator(torch.Generator):
    """Also there, it draws on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def far(t: Tensor) -> Tensor:
    return FarTensor(t.detach().clone())


def far_module(module: nn.Module) -> nn.Module:
    """The module, with its weights and buffers there."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(far(p), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = far(b)
    return module


def near(t: Tensor) -> Tensor:
    """A copy of the values, which counts as no wait."""
    return t.detach().there.clone()


def compute(func, args, kwargs, waits: list | None):
    given = {}  # of each tensor there that is given, by its values
    plain_args, plain_kwargs = here(args, given), {key: here(a, given) for key, a in kwargs.items()}
    is_far = bool(given)
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    packet = func.overloadpacket
    to_far, to_here = device == FAR, device is not None and device != FAR
    if packet is aten.copy_:
        to_far = isinstance(args[0], FarTensor)
        to_here = not to_far
        crosses = isinstance(args[0], FarTensor) != isinstance(args[1], FarTensor) and args[1].dim() > 0
    else:
        crosses = packet is aten._to_copy and device is not None and is_far != (device == FAR)
    if waits is not None:
        masks = packet is aten.index and any(t is not None and t.dtype == torch.bool for t in args[1])
        if is_far and (packet in READS or masks):
            waits.append(str(func))
        elif crosses and not (to_far and kwargs.get("non_blocking")):
            waits.append(f"{func} to {'it' if to_far else 'the host'}")
    if to_far and device is not None:
        plain_kwargs["device"] = HERE
    out = func(*plain_args, **plain_kwargs)
    if packet is aten._local_scalar_dense or not (to_far or (is_far and not to_here)):
        return out
    return there(out, given)


def here(value, given: dict):
    """The value, or one of its tensors, on the CPU."""
    if isinstance(value, FarTensor):
        given[id(value.there)] = value
        return value.there
    return type(value)(here(v, given) for v in value) if type(value) in (tuple, list) else value


def there(value, given: dict):
    """The result there: what was written is the tensor that was given."""
    if isinstance(value, Tensor):
        return given[id(value)] if id(value) in given else FarTensor(value)
    return type(value)(there(v, given) for v in value) if type(value) in (tuple, list) else value


class Waits(TorchDispatchMode):
    """What the host would wait for, and in which of `during`'s calls, in `found`."""

    def __init__(self):
        super().__init__()
        self.found, self.call = [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = []
        out = compute(func, args, kwargs or {}, waits)
        self.found += [(self.call, wait) for wait in waits]
        return out

    def during(self, call):
        @functools.wraps(call)
        def named(*args, **kwargs):
            self.call = call.__name__
            try:
                return call(*args, **kwargs)
            finally:
                self.call = None

        return named
