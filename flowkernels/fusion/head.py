"""Fuse the last layer of a velocity network with the sampler's step.

Where it begins is found in a call of the network (final_layer.py); what is done in it and with its outputs is seen at
every step by a stand-in for what it reads (stand_in.py); where the outputs go is found once (places.py).
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW, expect, expect_shown
from flowkernels._guidance import expect_weight
from flowkernels.fusion.final_layer import FinalLayer
from flowkernels.fusion.final_layer import find as find_layer
from flowkernels.fusion.places import Places, Selected, select
from flowkernels.fusion.places import find as find_places
from flowkernels.fusion.record import NotFusable
from flowkernels.fusion.stand_in import Head, Outputs, Refused, StandIn, Tail, Ways
from flowkernels.ops.linear_euler import linear_euler
from flowkernels.runtime.torch_private import COMPILED_MODULE, float32_products, uncompiled
from flowkernels.runtime.watch import Unwatchable, Watch, executed
from flowkernels.solver import Solver, last_uses
from flowkernels.velocity.field import VelocityField, float64_device, is_called_whole
from flowkernels.velocity.protocol import Velocity, resolve

WAY_OUT = "the velocity itself takes a function, unfused"
COMPILE = "; torch.compile of network and step together, where it takes the network, does as well or better on a CPU"
log = logging.getLogger("flowkernels")


def fuse_head(velocity: Velocity, head: str | None = None) -> "FusedHead":
    """`velocity` with its last layer fused with the step, for `sample`, `rollout` and `calibrate`.

    A step then runs the network up to its final layer and one `linear_euler`, which does LayerNorm, modulation, Linear,
    unpatchify, guidance and the step: the velocity is written only where it is kept. The final layer is known by what
    it does, in any network: a linear layer of tokens, before it a LayerNorm, factors and terms of a sample (each may
    be missing), behind it nothing but moves of its outputs to their places, text tokens left out. So it is with
    diffusers' transformers (docs/diffusers.md has a table). Of a final layer that does more before its linear layer,
    such as an RMSNorm, the linear layer is fused alone.

    Args:
        velocity: a network `net(x, t)`, or a `VelocityField` of one; not compiled as a whole (its blocks may be).
        head: path in the network of the nn.Linear that gives the velocity, or of a module that it is in. None: the one
            that the network calls last.

    Returns:
        FusedHead, itself a VelocityField of the same convention and parameter hash; called as `velocity(x, t)` it is
        the network's own, unfused. Weights are read at every step, so they may change. It may be used by several
        threads, and by some while others call the network. Copies and pickles of it hold a network of their own.

    Nothing is assumed of the network from one step to the next. At every step its own Python runs to the end, from its
    final layer on with a stand-in that has the shape of the tokens and no values: what is done with it tells what
    `linear_euler` is to compute, and that the velocity is this and nothing more. Before the first step, and again when
    a step does something that no step before it did, it is found where the final layer begins, where each output goes,
    and the fused velocity is compared with the network's own, at two times of the schedule and on the state times 1
    and 30. This costs four evaluations, some more where the final layer is fused in part. A step costs up to a
    millisecond more in Python. What is refused: a final layer that does more with the velocity than to move it (hooks
    and adapters that do so included), reads its values or keeps it; weights that are no plain tensors; and networks
    that a call changes, which would not be the same after this look at them.

    What the network computes in bfloat16 or float16 up to the velocity is here in the state's dtype from the final
    layer on.

    `torch.compile` of the network and the step together fuses the same passes, all but the product with the step, and
    the rest of the network as well. On a CPU it took less time than a fused head at every depth of a transformer, where
    it takes the network (benchmarks/fused_head.py; on a GPU the two have not been compared), and the log `flowkernels`
    says so at level INFO beside what is fused. A fused head is for networks that are not compiled whole: that read
    values on the host, have hooks, offload or change their weights, or run at many sizes.

    Raises:
        TypeError, ValueError: naming what is in the way.
        NotFusable: a ValueError, at the first step: naming the module and what it does.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> velocity, noise = fk.VelocityField(net, time_column=True), torch.randn(4, 2)
        >>> fused = fk.fuse_head(velocity)  # goes wherever the velocity does
        >>> torch.allclose(fk.sample(fused, noise, 8), fk.sample(velocity, noise, 8), atol=1e-5)
        True
    """
    resolve(velocity)
    expect_shown(head is None or isinstance(head, str), "head", "the path of a module, or None", head, TypeError)
    field = VelocityField.of(velocity)
    _expect_own_evaluation(field)
    net = field.net
    expect(isinstance(net, nn.Module), "velocity", "an nn.Module or a VelocityField of one", net, TypeError)
    module = net
    if head is not None:
        try:
            module = net.get_submodule(head)
        except AttributeError as e:
            expect(False, "head", f"the path of a module in {type(net).__name__}", f"{head!r} ({e})")
    linears = any(isinstance(m, nn.Linear) for m in module.modules())
    expected = f"a {'network' if head is None else 'module'} with an nn.Linear that gives the velocity"
    expect(linears, "velocity" if head is None else "head", expected, f"a {type(module).__name__}")
    return FusedHead(field, Proven(head))


def _expect_own_evaluation(field: VelocityField) -> None:
    """That neither a subclass nor the object has other methods, or hooks: nothing of them would be in a fused step."""
    kinds = itertools.takewhile(lambda kind: kind not in (VelocityField, FusedHead), type(field).__mro__)
    names = set().union(vars(field), *map(vars, kinds)) & vars(VelocityField).keys() - {"__init__"}
    other = sorted(name for name in names if not name.startswith("__") or name == "__call__")
    expected = "a VelocityField's own evaluation, of which the head is the last part"
    expect(not other, "velocity", expected, f"{other} overridden")
    expect(not is_called_whole(field), "velocity", expected, "hooks on it")
    expect_weight(field.guidance, "a fused head, whose kernel joins guidance with the step", WAY_OUT)


# ---- hooks that other threads do not meet ----

_calls = threading.local()  # .mine: the calls of the network that this thread is in, as their hooks know them
_registering = threading.Lock()  # handles of hooks are numbered without one


@contextlib.contextmanager
def _hooked(*hooks: tuple[Callable, Callable, dict]):
    """Hooks `(register, hook, how)` that only this thread's calls meet, in the `with` and not in one nested in it."""
    call, mine = object(), _calls.__dict__.setdefault("mine", [])

    def own(hook):
        def filtered(*args):  # with or without keyword arguments, as threads see it that began before it was there
            calls = getattr(_calls, "mine", None)
            return hook(*args) if calls and calls[-1] is call else None

        return filtered

    with _registering:
        handles = [register(own(hook), **how) for register, hook, how in hooks]
    mine.append(call)
    try:
        yield
    finally:
        mine.pop()
        with _registering:
            for handle in handles:
                handle.remove()


def _compiled(net: nn.Module, path: str) -> str | None:
    """The module at `path`, or one that it is in, that is compiled, and calls no hook; None if there is none."""
    names = path.split(".") if path else []
    for i in range(len(names) + 1):
        module = net.get_submodule(".".join(names[:i]))
        if module._compiled_call_impl is not None or hasattr(module, COMPILED_MODULE):
            return repr(".".join(names[:i])) if i else type(net).__name__
    return None


def _expect_not_compiled(net: nn.Module, path: str) -> None:
    compiled = _compiled(net, path)
    expected = "a network of which at most blocks are compiled"
    _expect_fusable(compiled is None, "velocity", expected, f"{compiled}, compiled")


def _expect_fusable(ok: bool, name: str, expected: str, got: str) -> None:
    expect(ok, name, expected, got, NotFusable)


@dataclass
class Proven:
    """Where the final layer begins, and where its outputs go, by the way in which a call has moved them; shared by
    copies of other rows.

    asked: the head that `fuse_head` was asked for. parts: what `linear_euler` does of the final layer, in words.
    """

    asked: str | None
    layer: FinalLayer | None = None
    parts: str = ""
    ways: Ways = field(default_factory=Ways)
    places: dict[tuple, Places] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        return vars(Proven(self.asked))  # a copy is of another network

    def __deepcopy__(self, memo) -> "Proven":
        return Proven(self.asked)


@dataclass
class Evaluation:
    """One of the network, up to its final layer: the heads of its one or two calls, in which way their outputs became
    the velocity, and the places of the velocity of all samples in the outputs of each head."""

    heads: list[Head]
    way: tuple
    places: list[Tensor] | None


class FusedHead(VelocityField):
    """A velocity whose last layer `linear_euler` runs together with the step; made by `fuse_head`."""

    is_fused = True

    def __init__(self, field: VelocityField, proven: Proven):
        super().__init__(field.net, **field.settings())
        self.training = field.training
        self.proven = proven

    @property
    def layer(self) -> FinalLayer | None:
        """Where the final layer begins; None before the first step."""
        return self.proven.layer

    def fused_steps(
        self, x: Tensor, solver: Solver, out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `loop.steps` yields."""
        _expect_own_evaluation(self)
        times, updates = solver.model_times.tolist(), solver.updates()
        last = last_uses(updates)
        start = x.contiguous()
        x = start.clone() if out is None else out[0].copy_(x)
        low = torch.empty_like(x, dtype=self.dtype) if self.dtype in LOW else None
        seen = x  # what the network reads: from the second step on the copy that the step has left
        past = {}  # velocities that later updates read, as the network gives them, and their sign
        for i, (now, update) in enumerate(zip(times, updates, strict=True)):
            head, places = self._head(x, seen, now, times)
            new = x if out is None else out[i + 1]
            for key, t in head.items():  # what is the state itself, such as the tokens of a network without a trunk
                if isinstance(t, Tensor) and any(_share_memory(t, written) for written in (new, low)):
                    head[key] = t.clone()
            kept = last[i] > i
            v = torch.empty_like(x) if keep or kept else None
            past[i] = v, places.sign
            terms = {k: past[k][1] * b for k, b in zip(update.which, update.factors, strict=True)}
            h = terms.pop(i, 0.0)
            history = dict(history=[places.of(past[k][0]) for k in terms], b=list(terms.values()))
            begin = start if update.from_start else x
            to = dict(out=places.room_in(new), low=places.room_in(low), velocity_out=places.room_in(v))
            linear_euler(places.of(begin), **head, h=h, **history, x_scale=update.scale, **to)
            for written, t in zip(to.values(), (new, low, v), strict=True):
                places.put(written, t)
            past = {k: p for k, p in past.items() if last[k] > i}
            x, seen = new, new if low is None else low
            if keep and places.sign == -1:
                v = -v if kept else v.neg_()
            yield x, v if keep else None

    # ---- one evaluation ----

    def _head(self, x: Tensor, seen: Tensor, now: float, times: Sequence[float]) -> tuple[dict[str, Any], Places]:
        """The trunk's evaluation, as `linear_euler` takes what comes after it."""
        if (known := self._known_head(x, seen, now)) is None:
            self._prove(x, now, times)
            known = self._known_head(x, seen, now)
            got = "one that does something else with its velocity at every call"
            _expect_fusable(known is not None, "velocity", "a network that does the same at every call", got)
        return known

    def _known_head(self, x: Tensor, seen: Tensor, now: float) -> tuple[dict[str, Any], Places] | None:
        """None for a call that does what no proven one has done; the proof then says what."""
        if not self._may_enter(self.layer):
            return None
        with contextlib.suppress(Refused):
            evaluation = self._until_head(self.layer, seen, now)
            places = self.proven.places.get((x.shape, x.device, *evaluation.way))
            if places is not None:
                operands = _operands(evaluation, places, x, len(x) * (2 if self.is_guided else 1))
                return operands | dict(guidance=self.guidance if self.is_guided else None), places
        return None

    def _may_enter(self, layer: FinalLayer | None) -> bool:
        """Whether a call is met where it began in another one."""
        try:
            return layer is not None and not any(_compiled(self.net, path) for path in (layer.stop, layer.linear))
        except AttributeError:  # gone
            return False

    def _until_head(self, layer: FinalLayer, seen: Tensor, now: float, with_places: bool = False) -> Evaluation:
        """An evaluation with a stand-in for what the final layer reads. No hook is left behind."""
        tail = Tail(self.proven.ways, with_places, calls=2 if self.is_guided and not self.packed else 1)

        def begins(module, args, kwargs):
            given, args = (kwargs, args) if isinstance(layer.given, str) else (list(args), args)
            known = layer.given in given if given is kwargs else layer.given < len(given)
            tail.expect(known, f"calls {layer.stop!r} with other arguments")
            given[layer.given] = tail.begin(given[layer.given])
            return (args, given) if given is kwargs else (tuple(given), kwargs)

        register = self.net.get_submodule(layer.stop).register_forward_pre_hook
        try:
            with _hooked((register, begins, dict(with_kwargs=True))):
                parts = self.pair(seen, _times(now, seen))
        except Exception:
            if tail.refused is not None:  # also where the network has made another error of it
                raise tail.refused from None
            raise
        if tail.refused is None:
            tail.expect(tail.begun > 0, f"does not call {layer.stop!r} in the thread in which it is called itself")
            values = [part.value for part in parts if isinstance(part, StandIn) and isinstance(part.value, Outputs)]
            whole = len(values) == sum(part is not None for part in parts)
            tail.expect(whole, "returns something else than the outputs of its linear layer")
        del parts
        tail.end()
        heads = list({id(v.head): v.head for v in values}.values())
        places = [torch.cat([v.places for v in values if v.head is h]) for h in heads] if with_places else None
        return Evaluation(heads, (len(heads), *(v.way for v in values)), places)

    # ---- the proof ----

    def _prove(self, x: Tensor, now: float, times: Sequence[float]) -> None:
        """Find where the final layer begins, and where its outputs go, in calls like this one."""
        _expect_not_compiled(self.net, "")
        proven, net = self.proven, self.net
        with uncompiled(), executed() as codes:
            seen = x.clone()  # which the network may write to
            own, linear, layers = find_layer(net, proven.asked, lambda: self.pair(seen, _times(now, x)))
        kind = type(net).__name__
        what = "an nn.Linear" if proven.asked is None else f"its module {proven.asked!r}"
        _expect_fusable(linear is not None, "velocity", f"a network that calls {what}", f"a {kind}, which does not")
        watch = self._watch(layers, codes)  # behind a first call, which may fill caches
        which, refused = f"head {linear!r} of {kind}", Refused("calls it with no tokens")
        for layer in layers:
            if layer is layers[-1]:
                _expect_not_compiled(net, layer.linear)
            elif not self._may_enter(layer):
                continue
            try:
                parts = self._compare(which, layer, own, x, now)
                another = times[-1] if now != times[-1] else times[0]
                with uncompiled():
                    further = self.pair(30 * x, _times(another, x))
                self._compare(which, layer, further, 30 * x, another)
            except Refused as e:
                refused = e
            else:
                break
        else:
            expected = "the network's own velocity, to be made by a linear layer and moved and copied alone"
            _expect_fusable(False, which, expected, f"a network that {refused}; head= names another layer")
        expected = "a network that a call leaves as it was: what it does could change from step to step"
        changed = watch.changed()
        _expect_fusable(changed is None, "velocity", expected, f"{kind}, of which a call changes {changed}")
        proven.layer, proven.parts = layer, parts
        log.info(
            "fuse_head, of a %s from %r on: %s%s", kind, layer.stop, parts, COMPILE if x.device.type == "cpu" else ""
        )

    def _watch(self, layers: list[FinalLayer], codes: set | None) -> Watch:
        """The network as it is, but for its weights, buffers (OmniGen makes some of them anew at every call) and hooks
        that other threads may have there."""
        hooks = (self.net.get_submodule(layer.stop)._forward_pre_hooks for layer in layers)
        buffers = (module._buffers for module in self.net.modules())
        but = *self.net.parameters(), *self.net.buffers(), *buffers, *hooks
        try:
            return Watch(self.net, codes=codes, but=but)
        except Unwatchable as e:
            raise NotFusable(f"velocity: expected a network whose changes can be noticed, but {e}") from None

    def _compare(self, which: str, layer: FinalLayer, own: tuple[Tensor | None, ...], x: Tensor, now: float) -> str:
        """Learn the way of a call to the velocity, which is `own`, and raise unless the fused one is the same; what is
        fused, in words."""
        with uncompiled():
            evaluation = self._until_head(layer, x.clone(), now, with_places=True)
        parts = [part for part in own if part is not None]
        dtypes = [*(part.dtype for part in parts), *(head.weight.dtype for head in evaluation.heads)]
        own = torch.cat([part[:, : x.shape[1]].to(x.dtype) for part in parts])
        expect(own.shape[1:] == x.shape[1:], "velocity", f"x's shape {list(x.shape)}", own)
        samples, calls = len(own), []
        for head, at in zip(evaluation.heads, evaluation.places, strict=True):
            tokens = head.features.z.shape[:-1].numel()
            if tokens % len(at):
                raise Refused(f"has {tokens} tokens in {len(at)} samples")
            calls.append((at[:, : x.shape[1]], tokens // len(at)))
            factor = _of_samples(head.features.factor, head.features.z, x.dtype)
            if factor is not None and not torch.equal(1 + (factor.to(x.dtype) - 1), factor.to(x.dtype)):
                raise Refused("has a factor in its final layer that is no 1 + scale")
        places = find_places(calls, len(evaluation.heads[0].weight), x.device)
        operands = _operands(evaluation, places, x, samples)
        state = torch.zeros_like(own, memory_format=torch.contiguous_format)
        velocity = torch.empty_like(state)
        room = places.room_in(velocity)
        linear_euler(places.of(state), **operands, h=0.0, velocity_out=room)
        places.put(room, velocity)
        self.proven.places[(x.shape, x.device, *evaluation.way)] = places
        known = dict(LayerNorm="norm", scale="scale", shift="shift")
        words = ", ".join(word for word, key in known.items() if operands[key] is not None)
        words = f"{words or 'linear layer alone'}; outputs {places.text}"
        if not own.isfinite().all():
            return words  # what is not, the stage reports
        precision = _precision([operands["z"].dtype, *dtypes])
        error = (places.sign * velocity - own).norm() / own.norm().clamp(min=torch.finfo(x.dtype).tiny)
        expected = f"the network's own velocity, to a relative error of {precision:.2g}"
        _expect_fusable(bool(error <= precision), which, expected, f"one that is {error:.2g} away")
        return words


def _operands(evaluation: Evaluation, places: Places, x: Tensor, samples: int) -> dict[str, Any]:
    """What `linear_euler` takes of it, for so many samples."""
    dtype, calls = x.dtype, len(evaluation.heads)
    parts = [
        _head_operands(h, samples // calls, k, dtype) for h, k in zip(evaluation.heads, places.tokens, strict=True)
    ]
    head = parts[0]
    if calls > 1:
        for key in ("z", "scale", "shift"):
            if head[key] is not None:
                head[key] = torch.cat([p[key].expand(samples // calls, *p[key].shape[1:]) for p in parts])
    head |= dict(weight=places.rows_of(head["weight"]), bias=places.rows_of(head["bias"]))
    for key, p in head.items():
        if isinstance(p, Tensor) and p.dtype not in (head["z"].dtype, dtype):
            head[key] = p.to(dtype)
    return head | dict(patch=places.patch, order=places.order)


def _head_operands(head: Head, samples: int, tokens: Selected, dtype: torch.dtype) -> dict[str, Any]:
    features = head.features
    z = features.z
    factor, shift = (_of_samples(t, z, dtype) for t in (features.factor, features.term))
    if z.shape[0] != samples and z.numel() > 0:
        shared = all(t is None or len(t) == 1 for t in (factor, shift))
        if not shared or z.shape[:-1].numel() % samples:
            raise Refused("modulates tokens of all samples in a row")
        z = z.reshape(samples, -1, z.shape[-1])
    z = select(z if z.dim() < 4 else z.flatten(1, -2), tokens)
    if torch.float64 in (dtype, z.dtype):  # a float64 state, or a wider network than the state
        z = z.to(dtype)
    return dict(
        z=z,
        weight=head.weight,
        bias=head.bias,
        norm=features.norm,
        norm_weight=features.norm_weight,
        norm_bias=features.norm_bias,
        scale=None if factor is None else factor.to(dtype) - 1,
        shift=shift,
    )


def _of_samples(t: Any, z: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A factor or a term of tokens z `[m, *tokens, d]` as `[m, d]` or `[1, d]`."""
    if t is None:
        return None
    t = t if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=z.device)
    t = t.reshape((1,) * (z.dim() - t.dim()) + t.shape)
    if t.shape[1:-1].numel() != 1:
        raise Refused("modulates each token by itself")
    return t.reshape(len(t), -1).expand(-1, z.shape[-1])


def _precision(dtypes: list[torch.dtype]) -> float:
    """A few roundings in the least precise dtype in which the network may compute its final layer."""
    if not {"highest", "ieee"}.issuperset(float32_products()):
        dtypes = [*dtypes, torch.bfloat16]
    return max(1e-4, 8 * max(torch.finfo(dtype).eps for dtype in dtypes))


def _times(now: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), now, dtype=torch.float64, device=float64_device(x.device))


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
