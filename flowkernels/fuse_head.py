"""Fuse the last layer of a velocity network with the sampler's step."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW, expect, expect_positive_int, expect_shown
from flowkernels.ops import linear_euler
from flowkernels.ops.euler_step.reference import guided
from flowkernels.ops.linear_euler import ONE_OF_ORDERS, ORDERS
from flowkernels.velocity_field import VelocityField, expect_velocity, float64_device, overridden


@dataclass
class FinalLayer:
    """Where the trunk of a network ends, and what comes after.

    stop: path of the module at whose call the trunk ends. linear: of the nn.Linear that gives the velocity. None: the
        one that the network calls last, which is to be seen at its first call.
    arguments: `(net, layer, args, kwargs, also)`, with the arguments of that call and the output of the module `also`,
        to what `linear_euler` takes beside the Linear: z, and LayerNorm and modulation if any.
    patch, order: how the velocity lies in the outputs, as for `linear_euler`.
    verified: it has given the network's own velocity.
    """

    stop: str | None
    linear: str | None
    arguments: Callable[..., dict[str, Any]]
    also: str | None = None
    patch: int | None = None
    order: str = "pqc"
    verified: bool = False


def fuse_head(velocity, head: str | None = None, *, patch: int | None = None, order: str = "pqc") -> "FusedHead":
    """`velocity` with its last layer fused with the step, for `sample`, `rollout` and `calibrate`.

    A step then runs the network up to its final layer and one `linear_euler`, which does LayerNorm, modulation, Linear,
    unpatchify, guidance and the step: the velocity is written only where it is kept. Diffusers' SD3, Flux and DiT
    transformers are known, the latter with learned sigma as well, whose first half of channels is the velocity. Of
    any other network the velocity has to be the output of one nn.Linear, reshaped or in patches.

    Args:
        velocity: a network `net(x, t)`, or a `VelocityField` of one; not compiled as a whole (its blocks may be).
        head: path in the network of the nn.Linear, or of one of the transformers above. None: such a transformer if
            there is one in the network, else the nn.Linear that it calls last.
        patch, order: with a Linear head, how its outputs make a state `[n, C, H, W]`, as for `linear_euler`.

    Returns:
        FusedHead, itself a VelocityField of the same convention and parameter hash; called as `velocity(x, t)` it is
        the network's own, unfused. Weights are read at every step, so they may change.

    On its first step the fused velocity is compared with the network's own, which costs one more evaluation. What the
    network computes in bfloat16 or float16 up to the velocity is here in the state's dtype from the final layer on.

    It pays where the final layer is a part of the work. A step costs some tens of microseconds more in Python, so that
    small networks on small batches are not faster.

    Raises:
        TypeError, ValueError: naming what is in the way; at the first step, the head that does not give the velocity.
    """
    expect_velocity(velocity)
    patch = None if patch is None else expect_positive_int(patch, "patch")
    expect(isinstance(order, str) and order in ORDERS, "order", ONE_OF_ORDERS, order)
    expect_shown(head is None or isinstance(head, str), "head", "the path of a module, or None", head, TypeError)
    field = velocity if isinstance(velocity, VelocityField) else VelocityField(velocity)
    net, other = field.net, sorted(overridden(field))
    expected = "a VelocityField's own evaluation, of which the head is the last part"
    expect(not other, "velocity", expected, f"{other} overridden")
    expect(isinstance(net, nn.Module), "velocity", "an nn.Module or a VelocityField of one", net, TypeError)
    return FusedHead(field, _final_layer(net, head, patch, order))


def _final_layer(net: nn.Module, head: str | None, patch: int | None, order: str) -> FinalLayer:
    from flowkernels.integrations import diffusers

    if head is None:
        if patch is None and (known := diffusers.final_layer(net)) is not None:
            return known
        linears = any(isinstance(m, nn.Linear) for m in net.modules())
        expect(linears, "velocity", "a network with an nn.Linear that gives the velocity", f"a {type(net).__name__}")
        return FinalLayer(None, None, _after_trunk, patch=patch, order=order)
    try:
        module = net.get_submodule(head)
    except AttributeError as e:
        expect(False, "head", f"the path of a module in {type(net).__name__}", f"{head!r} ({e})")
    if isinstance(module, nn.Linear):
        return FinalLayer(head, head, _after_trunk, patch=patch, order=order)
    layer = diffusers.final_layer(module, head)
    expected = "the path of an nn.Linear, or of an SD3, Flux or DiT transformer of diffusers"
    expect(layer is not None, "head", expected, f"{head!r}, a {type(module).__name__}")
    return layer


def _after_trunk(net: nn.Module, layer: FinalLayer, args: tuple, kwargs: dict, also) -> dict:
    return dict(z=args[0] if args else kwargs["input"])


def _find_last_linear(layer: FinalLayer, net: nn.Module, call: Callable[[], Any]) -> None:
    """Make `layer` the nn.Linear that the network calls last in `call`."""
    called = []
    linears = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, m in linears]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    expected = "a network that calls an nn.Linear"
    expect(len(called) > 0, "velocity", expected, f"{type(net).__name__}, which calls none")
    layer.stop = layer.linear = called[-1]


def _expect_not_compiled(net: nn.Module, path: str) -> None:
    """No hook is called in what is compiled, the module at `path` or one that it is in."""
    names = path.split(".") if path else []
    for i in range(len(names) + 1):
        module = net.get_submodule(".".join(names[:i]))
        compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        which = repr(".".join(names[:i])) if i else type(net).__name__
        expect(not compiled, "velocity", "a network of which at most blocks are compiled", f"{which}, compiled")


class _TrunkEnds(BaseException):
    """Ends a forward pass at the final layer; no `except Exception` of a network stops it."""

    def __init__(self, args: tuple, kwargs: dict):
        self.inputs = args, kwargs


class FusedHead(VelocityField):
    """A velocity whose last layer `linear_euler` runs together with the step; made by `fuse_head`."""

    def __init__(self, field: VelocityField, layer: FinalLayer):
        super().__init__(field.net, **field.settings())
        self.training = field.training
        self.layer = layer

    def euler_steps(
        self, x: Tensor, times: Sequence[float], out: Tensor | None = None, keep: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None, None, float]]:
        """What `rollout.euler` yields, for it to hand on; v has guidance applied, and is None without `keep`."""
        h = [end - begin for begin, end in itertools.pairwise(times)]
        updates = [(False, (i,), (size,), False, (i,)) for i, size in enumerate(h)]
        yield from self.steps(x, times[:-1], updates, out, keep)

    def steps(
        self, x: Tensor, times: Sequence[float], updates: Sequence[tuple], out: Tensor | None = None, keep: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None, None, float]]:
        """An evaluation at each of the times, and its update, a `rollout.Update`; yields what `euler_steps` does."""
        start = x.contiguous()
        x = start.clone() if out is None else out[0].copy_(x)
        low = torch.empty_like(x, dtype=self.dtype) if self.dtype in LOW else None
        seen = x  # what the network reads: from the second step on the copy that the step has left
        past = {}  # velocities that later updates read, as the network gives them
        for i, (now, (first, which, factors, kept, done)) in enumerate(zip(times, updates, strict=True)):
            t = torch.full((len(x),), now, dtype=torch.float64, device=float64_device(x.device))
            if self.layer.linear is None:
                _expect_not_compiled(self.net, "")
                _find_last_linear(self.layer, self.net, lambda seen=seen, t=t: self.pair(seen, t))
            if not self.layer.verified:
                _expect_not_compiled(self.net, self.layer.stop)
            head = self._head(x, seen, t)
            if not self.layer.verified:
                self._verify(head, x, seen, t)
            new = x if out is None else out[i + 1]
            if any(_share_memory(head["z"], written) for written in (new, low)):  # a network without a trunk
                head["z"] = head["z"].clone()
            v = torch.empty_like(x) if keep or kept else None
            terms = {j: self.sign * b for j, b in zip(which, factors, strict=True)}
            h = terms.pop(i, 0.0)
            history = dict(history=[past[j] for j in terms], b=list(terms.values()))
            linear_euler(start if first else x, **head, h=h, **history, out=new, low=low, velocity_out=v)
            past[i] = v
            for j in done:
                del past[j]
            x, seen = new, new if low is None else low
            if keep and self.sign == -1:
                v = -v if kept else v.neg_()
            yield x, v, None, 1.0

    def _head(self, x: Tensor, seen: Tensor, t: Tensor) -> dict[str, Any]:
        """The trunk's evaluation, as `linear_euler` takes what comes after it."""
        if self.is_guided and not self.packed:
            halves = [
                self._until_head(lambda kwargs=kwargs: self._call(seen, t, kwargs))
                for kwargs in (self.conditioning, self.conditioning | self.unconditional)
            ]
            head = halves[0] | {k: torch.cat([h[k] for h in halves]) for k in ("z", "scale", "shift") if k in halves[0]}
        else:
            head = self._until_head(lambda: self.pair(seen, t))
        linear = self.net.get_submodule(self.layer.linear)
        head |= dict(weight=linear.weight, bias=linear.bias)
        z = head["z"]
        samples = (2 if self.is_guided else 1) * len(x)
        if z.shape[0] != samples and z.numel() > 0 and z.shape[:-1].numel() % samples == 0:
            z = z.reshape(samples, -1, z.shape[-1])  # tokens of all samples in a row
        if torch.float64 in (x.dtype, z.dtype):  # a float64 state, or a wider network than the state
            z = z.to(x.dtype)
        for key, p in head.items():
            if isinstance(p, Tensor):  # detached: a Parameter is not plain, and would take the way of the dispatcher
                head[key] = p.detach() if p.dtype in (z.dtype, x.dtype) else p.detach().to(x.dtype)
        guidance = self.guidance if self.is_guided else None
        return head | dict(z=z, guidance=guidance, patch=self.layer.patch, order=self.layer.order)

    def _until_head(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Run `call` until the final layer begins, and give what it is called with. No hook is left behind."""
        layer, also = self.layer, []

        def stop(module, args, kwargs):
            raise _TrunkEnds(args, kwargs)

        hooks = [self.net.get_submodule(layer.stop).register_forward_pre_hook(stop, with_kwargs=True)]
        if layer.also is not None:
            catch = self.net.get_submodule(layer.also)
            hooks.append(catch.register_forward_hook(lambda module, args, output: also.append(output)))
        try:
            call()
        except _TrunkEnds as end:
            return layer.arguments(self.net, layer, *end.inputs, also[-1] if also else None)
        finally:
            for hook in hooks:
                hook.remove()
        expected = f"a network that calls its module {layer.stop!r}"
        expect(False, "velocity", expected, f"{type(self.net).__name__}, which does not")

    def _verify(self, head: dict[str, Any], x: Tensor, seen: Tensor, t: Tensor) -> None:
        """Raise unless the fused velocity is the network's own, up to rounding in the dtype of the trunk."""
        velocity = torch.empty_like(x)
        which = f"head {self.layer.linear!r} of {type(self.net).__name__}"
        way_out = "head= names another nn.Linear, patch= and order= its patches"
        try:
            linear_euler(x, **head, h=0.0, velocity_out=velocity)
        except ValueError as e:
            raise ValueError(f"{which}: expected outputs that make the velocity, but {e}; {way_out}") from None
        parts = [None if v is None else v[:, : x.shape[1]].to(x.dtype) for v in self.pair(seen, t)]
        if parts[0].shape != x.shape:
            expect(False, "velocity", f"x's shape {list(x.shape)}", parts[0])
        own = guided(*parts, self.guidance, x.dtype)
        size = own if parts[1] is None else parts[1].abs() + abs(self.guidance) * (parts[0] - parts[1]).abs()
        if not own.isfinite().all():
            return  # which the stage reports
        allowed = max(1e-4, 8 * self._own_eps(head, x.device.type))  # a few operations of the network
        error = (self.sign * velocity - own).norm() / size.norm().clamp(min=torch.finfo(x.dtype).tiny)
        if not error <= allowed:
            expected = f"the network's own velocity, to a relative error of {allowed:.2g}"
            expect(False, which, expected, f"one that is {error:.2g} away; {way_out}")
        self.layer.verified = bool(own.any())  # of zeros nothing can be told

    def _own_eps(self, head: dict[str, Any], device: str) -> float:
        """Of the least precise dtype in which the network itself may compute its final layer."""
        dtypes = [self.net.get_submodule(self.layer.linear).weight.dtype, head["z"].dtype]
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        if torch.get_float32_matmul_precision() != "highest":
            dtypes.append(torch.bfloat16)
        return max(torch.finfo(dtype).eps for dtype in dtypes)


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
