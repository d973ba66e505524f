"""Fuse the last layer of a velocity network with the sampler's step.

What is fused is told by a `FinalLayer` (final_layer.py): an nn.Linear, or the final layer of a transformer known by its
class (transformers.py, where a new family is added). That it gives the velocity is proven by the operations of a call
(moves.py), and watched from then on (watch.py).
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS, LOW, expect, expect_positive_int, expect_shown
from flowkernels._guidance import expect_weight
from flowkernels.fusion import transformers
from flowkernels.fusion.final_layer import FinalLayer, after_trunk
from flowkernels.fusion.moves import Moves, Refused
from flowkernels.ops.linear_euler import ONE_OF_ORDERS, ORDERS, linear_euler
from flowkernels.ops.linear_euler.reference import unpatchify
from flowkernels.runtime.torch_private import (
    CALL_MODULE,
    COMPILED_MODULE,
    FORWARD_HOOKS,
    float32_products,
    of_all_modules,
    tree_flatten,
)
from flowkernels.runtime.watch import Unwatchable, Watch, executed
from flowkernels.solver import Solver, last_uses
from flowkernels.velocity.field import VelocityField, float64_device, is_called_whole
from flowkernels.velocity.protocol import Velocity, resolve

WAY_OUT = "the velocity itself takes a function, unfused"
KEPT = 16  # kinds of calls that are remembered as proven


def fuse_head(
    velocity: Velocity, head: str | None = None, *, patch: int | None = None, order: str = "pqc"
) -> "FusedHead":
    """`velocity` with its last layer fused with the step, for `sample`, `rollout` and `calibrate`.

    A step then runs the network up to its final layer and one `linear_euler`, which does LayerNorm, modulation, Linear,
    unpatchify, guidance and the step: the velocity is written only where it is kept. Diffusers' SD3, Flux and DiT
    transformers are known, the latter with learned sigma as well, whose first half of channels is the velocity. Of
    any other network the velocity has to be the output of one nn.Linear, reshaped or in patches.

    Args:
        velocity: a network `net(x, t)`, or a `VelocityField` of one; not compiled as a whole (its blocks may be).
        head: path in the network of the nn.Linear, or of one of the transformers above. None: such a transformer if
            there is one in the network, else the nn.Linear that it calls last.
        patch: with a Linear head, the side of the patches that its outputs make of a state `[n, C, H, W]`, as for
            `linear_euler`.
        order: how a patch lies in the outputs, as for `linear_euler`.

    Returns:
        FusedHead, itself a VelocityField of the same convention and parameter hash; called as `velocity(x, t)` it is
        the network's own, unfused. Weights are read at every step, so they may change. It may be used by several
        threads, and by some while others call the network. Copies and pickles of it hold a network of their own.

    Before the first step it is proven that the fused velocity is the network's own, whatever weights, times and states
    will be: the network is evaluated at three times of the schedule (the first, the middle, the last) on the state
    times 1, 0.1 and 30, and each operation is looked at. Between the output of the Linear and the velocity there may
    be none but such as move it to where `linear_euler` writes it; the modules that `linear_euler` computes must have
    no hooks and no forward but their class's own; and no value may be read on the host (`.item()`, `if t > 0.5`,
    masks as an index), since another value could send the network another way. The velocities are compared as well.
    What the proof does not hold for is refused. It costs three evaluations (one more if the Linear is to be found),
    and is made again for each new shape, dtype or device of state and conditioning and when a module, attribute or hook
    of the network has changed; while the velocity is all zeros, at every run. What it can't see: Python code that
    depends on what is outside the network and its arguments (global variables, clocks, random numbers that are not
    torch's), and values read through C extensions.

    What the network computes in bfloat16 or float16 up to the velocity is here in the state's dtype from the final
    layer on. It pays where the final layer is a part of the work. A step costs some tens of microseconds more in
    Python, so that small networks on small batches are not faster.

    Raises:
        TypeError, ValueError: naming what is in the way; at the first step, what cannot be proven.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> velocity, noise = fk.VelocityField(net, time_column=True), torch.randn(4, 2)
        >>> fused = fk.fuse_head(velocity)  # goes wherever the velocity does
        >>> torch.allclose(fk.sample(fused, noise, 8), fk.sample(velocity, noise, 8), atol=1e-5)
        True
    """
    resolve(velocity)
    patch = None if patch is None else expect_positive_int(patch, "patch")
    expect(isinstance(order, str) and order in ORDERS, "order", ONE_OF_ORDERS, order)
    expect_shown(head is None or isinstance(head, str), "head", "the path of a module, or None", head, TypeError)
    field = VelocityField.of(velocity)
    _expect_own_evaluation(field)
    net = field.net
    expect(isinstance(net, nn.Module), "velocity", "an nn.Module or a VelocityField of one", net, TypeError)
    layer = _final_layer(net, head, patch, order)
    if layer.linear is not None:
        _expect_as_known(net, layer)
    return FusedHead(field, Proven((head, patch, order), layer))


def _expect_own_evaluation(field: VelocityField) -> None:
    """That neither a subclass nor the object has other methods, or hooks: nothing of them would be in a fused step."""
    kinds = itertools.takewhile(lambda kind: kind not in (VelocityField, FusedHead), type(field).__mro__)
    names = set().union(vars(field), *map(vars, kinds)) & vars(VelocityField).keys() - {"__init__"}
    other = sorted(name for name in names if not name.startswith("__") or name == "__call__")
    expected = "a VelocityField's own evaluation, of which the head is the last part"
    expect(not other, "velocity", expected, f"{other} overridden")
    expect(not is_called_whole(field), "velocity", expected, "hooks on it")
    expect_weight(field.guidance, "a fused head, whose kernel joins guidance with the step", WAY_OUT)


def _final_layer(net: nn.Module, head: str | None, patch: int | None, order: str) -> FinalLayer:
    if head is None:
        if patch is None and (known := transformers.final_layer(net)) is not None:
            return known
        linears = any(isinstance(m, nn.Linear) for m in net.modules())
        expect(linears, "velocity", "a network with an nn.Linear that gives the velocity", f"a {type(net).__name__}")
        return FinalLayer(None, None, after_trunk, patch=patch, order=order)
    try:
        module = net.get_submodule(head)
    except AttributeError as e:
        expect(False, "head", f"the path of a module in {type(net).__name__}", f"{head!r} ({e})")
    if isinstance(module, nn.Linear):
        return FinalLayer(head, head, after_trunk, patch=patch, order=order)
    layer = transformers.final_layer(module, head)
    expected = f"the path of an nn.Linear, or of one of diffusers' {', '.join(transformers.FAMILIES)}"
    expect(layer is not None, "head", expected, f"{head!r}, {kind_of(module)}")
    return layer


def kind_of(module: nn.Module) -> str:
    kind = type(module)
    return f"a {kind.__name__ if kind.__module__.startswith('torch.') else f'{kind.__module__}.{kind.__qualname__}'}"


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


class _TrunkEnds(BaseException):
    """Ends a forward pass at the final layer; no `except Exception` of a network stops it."""

    def __init__(self, given: dict[str, Any]):
        self.given = given


def _expect_not_compiled(net: nn.Module, path: str) -> None:
    """No hook is called in what is compiled, the module at `path` or one that it is in."""
    names = path.split(".") if path else []
    for i in range(len(names) + 1):
        module = net.get_submodule(".".join(names[:i]))
        compiled = module._compiled_call_impl is not None or hasattr(module, COMPILED_MODULE)
        which = repr(".".join(names[:i])) if i else type(net).__name__
        expect(not compiled, "velocity", "a network of which at most blocks are compiled", f"{which}, compiled")


def _expect_computed(net: nn.Module, path: str, kind: type[nn.Module], met: bool) -> None:
    """That the module is what `linear_euler` computes in its place: `kind`, and nothing beside.

    met: hooks before its call are called in a fused step as well.
    """
    module = net.get_submodule(path)
    own, odd = type(module), None
    before, after = _hooks_of_all()
    hooks = (module._forward_hooks, after) if met else (module._forward_hooks, after, module._forward_pre_hooks, before)
    if not isinstance(module, kind):
        odd = kind_of(module)
    elif own.forward is not kind.forward or "forward" in vars(module):
        odd = f"{kind_of(module)} with another forward"
    elif own.__call__ is not nn.Module.__call__ or own._call_impl is not CALL_MODULE:
        odd = f"{kind_of(module)} with another __call__"
    elif _foreign(*hooks):
        odd = "one with hooks, on it or on all modules"
    else:
        for name in ("weight", "bias"):
            t = getattr(module, name, None)
            if t is not None and (type(t) not in (Tensor, nn.Parameter) or t.dtype not in FLOATS):
                odd = f"one whose {name} is a {type(t).__name__} of {t.dtype}"
    name = f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
    expect(odd is None, "velocity", f"a {name} as {path!r}; head= names another one", odd)


def _hooks_of_all() -> tuple[dict, dict]:
    """Those before and after every module's forward."""
    return of_all_modules._global_forward_pre_hooks, of_all_modules._global_forward_hooks


def _hooked_at(net: nn.Module, layer: FinalLayer) -> list[dict]:
    """Where hooks of the library's come and go, those of other threads among them."""
    after, before = FORWARD_HOOKS
    places = (layer.stop, before), (layer.linear, after), (layer.also, after)
    try:
        return [getattr(net.get_submodule(path), hooks) for path, hooks in places if path is not None]
    except AttributeError:  # gone
        return []


def _foreign(*hooks: dict) -> list[Callable]:
    """Without those of the library, which change nothing."""
    found = [hook for held in hooks for hook in list(held.values())]
    return [hook for hook in found if not (getattr(hook, "__module__", None) or "").startswith("flowkernels.")]


def _expect_as_known(net: nn.Module, layer: FinalLayer) -> None:
    _expect_not_compiled(net, layer.stop)
    for path, kind in (*layer.computed, (layer.linear, nn.Linear)):
        _expect_computed(net, path, kind, met=path == layer.stop)


@dataclass
class Proven:
    """The final layer that was found, and for which kinds of calls it is proven; shared by copies of other rows.

    asked: the head, patch and order that `fuse_head` was asked for.
    calls: of each kind, the network as it was, and objects in the conditioning, which keep their identity so.
    """

    asked: tuple
    layer: FinalLayer
    calls: dict[tuple, tuple[Watch, list]] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        return vars(self) | dict(calls={})  # a copy is of another network

    def __deepcopy__(self, memo) -> "Proven":
        return Proven(self.asked, self.layer)


class FusedHead(VelocityField):
    """A velocity whose last layer `linear_euler` runs together with the step; made by `fuse_head`."""

    is_fused = True

    def __init__(self, field: VelocityField, proven: Proven):
        super().__init__(field.net, **field.settings())
        self.training = field.training
        self.proven = proven

    @property
    def layer(self) -> FinalLayer:
        return self.proven.layer

    def fused_steps(
        self, x: Tensor, solver: Solver, out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `loop.steps` yields."""
        times, updates = solver.model_times.tolist(), solver.updates()
        last = last_uses(updates)
        start = x.contiguous()
        x = start.clone() if out is None else out[0].copy_(x)
        low = torch.empty_like(x, dtype=self.dtype) if self.dtype in LOW else None
        seen = x  # what the network reads: from the second step on the copy that the step has left
        past = {}  # velocities that later updates read, as the network gives them
        layer, since = self._proven_layer(x, times)
        for i, (now, update) in enumerate(zip(times, updates, strict=True)):
            head = self._head(layer, x, seen, _times(now, x))
            if since is not None:
                self._expect_unchanged(since, "a call that ends at the head")
                since = None
            new = x if out is None else out[i + 1]
            if any(_share_memory(head["z"], written) for written in (new, low)):  # a network without a trunk
                head["z"] = head["z"].clone()
            kept = last[i] > i
            v = torch.empty_like(x) if keep or kept else None
            terms = {k: self.sign * b for k, b in zip(update.which, update.factors, strict=True)}
            h = terms.pop(i, 0.0)
            history = dict(history=[past[k] for k in terms], b=list(terms.values()))
            begin = start if update.from_start else x
            linear_euler(begin, **head, h=h, **history, out=new, low=low, velocity_out=v)
            past[i] = v
            past = {k: p for k, p in past.items() if last[k] > i}
            x, seen = new, new if low is None else low
            if keep and self.sign == -1:
                v = -v if kept else v.neg_()
            yield x, v if keep else None

    # ---- one evaluation ----

    def _evaluations(self, seen: Tensor, t: Tensor) -> list[Callable[[], Any]]:
        """The calls of the network that make up one evaluation, each with all of its samples."""
        if self.is_guided and not self.packed:
            both = (self.conditioning, self.conditioning | self.unconditional)
            return [lambda kwargs=kwargs: self.call_network(seen, t, kwargs) for kwargs in both]
        return [lambda: self.pair(seen, t)]

    def _head(self, layer: FinalLayer, x: Tensor, seen: Tensor, t: Tensor) -> dict[str, Any]:
        """The trunk's evaluation, as `linear_euler` takes what comes after it."""
        parts = [self._until_head(layer, call) for call in self._evaluations(seen, t)]
        given = parts[0]
        if len(parts) > 1:
            given = given | {k: torch.cat([p[k] for p in parts]) for k in ("z", "scale", "shift") if k in given}
        samples = (2 if self.is_guided else 1) * len(x)
        return self._operands(layer, given, samples, x.dtype) | dict(guidance=self.guidance if self.is_guided else None)

    def _operands(self, layer: FinalLayer, given: dict[str, Any], samples: int, dtype: torch.dtype) -> dict[str, Any]:
        """What `linear_euler` takes for that many samples, of what the final layer is given."""
        linear = self.net.get_submodule(layer.linear)
        z = given["z"]
        if z.shape[0] != samples and z.numel() > 0 and z.shape[:-1].numel() % samples == 0:
            z = z.reshape(samples, -1, z.shape[-1])  # tokens of all samples in a row
        if torch.float64 in (dtype, z.dtype):  # a float64 state, or a wider network than the state
            z = z.to(dtype)
        head = given | dict(z=z, weight=linear.weight, bias=linear.bias)
        for key, p in head.items():
            if isinstance(p, Tensor):  # detached: a Parameter is not plain, and would take the way of the dispatcher
                head[key] = p.detach() if p.dtype in (z.dtype, dtype) else p.detach().to(dtype)
        return head | dict(patch=layer.patch, order=layer.order)

    def _hooks(self, layer: FinalLayer, stop: Callable[[dict], None]) -> list[tuple[Callable, Callable, dict]]:
        """Hooks that call `stop` with what the final layer is given, where it begins."""
        also: list = []

        def begins(module, args, kwargs):
            stop(layer.arguments(self.net, layer, args, kwargs, also[-1] if also else None))

        hooks = [(self.net.get_submodule(layer.stop).register_forward_pre_hook, begins, dict(with_kwargs=True))]
        if layer.also is not None:
            catch = self.net.get_submodule(layer.also).register_forward_hook
            hooks.append((catch, lambda module, args, output: also.append(output), {}))
        return hooks

    def _until_head(self, layer: FinalLayer, call: Callable[[], Any]) -> dict[str, Any]:
        """Run `call` until the final layer begins, and give what it is called with. No hook is left behind."""

        def stop(given):
            raise _TrunkEnds(given)

        try:
            with _hooked(*self._hooks(layer, stop)):
                call()
        except _TrunkEnds as end:
            return end.given
        self._expect_called(layer, False)

    def _expect_called(self, layer: FinalLayer, called: bool) -> None:
        expected = f"a network that calls its module {layer.stop!r}, in the thread in which it is called"
        expect(called, "velocity", expected, f"{type(self.net).__name__}, which does not")

    # ---- the proof ----

    def _proven_layer(self, x: Tensor, times: Sequence[float]) -> tuple[FinalLayer, Watch | None]:
        """The final layer, proven for calls of this kind; and the network as it was, if that is news."""
        _expect_own_evaluation(self)
        kind, objects = self._kind_of_call(self.layer, x)
        watch, _ = self.proven.calls.get(kind, (None, None))
        if watch is not None and watch.changed() is None:
            return self.layer, None
        _expect_not_compiled(self.net, "")
        layer = _final_layer(self.net, *self.proven.asked)
        if layer.linear is None:
            layer = self._find_last_linear(layer, x, times[0])
        _expect_as_known(self.net, layer)
        with executed() as codes:
            told = self._compare(layer, x.clone(), times[0])
        kind, objects = self._kind_of_call(layer, x)
        watch = self._watch(layer, objects, codes)  # behind a first call, which may fill caches
        for now, scale in ((times[len(times) // 2], 0.1), (times[-1], 30.0)):
            told &= self._compare(layer, x * scale, now)
        self._expect_unchanged(watch, "each call")
        self.proven.layer = layer
        self.proven.calls.pop(kind, None)
        if told:
            for old in list(self.proven.calls)[: 1 - KEPT]:
                self.proven.calls.pop(old, None)
            self.proven.calls[kind] = watch, objects
        return layer, watch

    def _watch(self, layer: FinalLayer, objects: list, codes: set | None) -> Watch:
        """The network as it is, but for its weights and for the hooks, of which `_kind_of_call` takes care."""
        hooks = *_hooks_of_all(), *_hooked_at(self.net, layer)
        but = *self.net.parameters(), *self.net.buffers(), *hooks
        try:
            return Watch(self.net, *objects, codes=codes, but=but)
        except Unwatchable as e:
            raise ValueError(f"velocity: expected a network whose changes can be noticed, but {e}") from None

    def _expect_unchanged(self, watch: Watch, who: str) -> None:
        expected = "a network that a call leaves as it was: what it does could change from step to step"
        changed = watch.changed()
        expect(changed is None, "velocity", expected, f"{type(self.net).__name__}, of which {who} changes {changed}")

    def _kind_of_call(self, layer: FinalLayer, x: Tensor) -> tuple[tuple, list]:
        """What may decide, beside what is watched, which operations the network runs; and the objects in it that are
        known by their identity."""
        leaves, form = tree_flatten(self.settings())
        plain = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
        objects = [a for a in leaves if not isinstance(a, (Tensor, *plain))]
        values = tuple(_kind_of(a) if isinstance(a, (Tensor, *plain)) else id(a) for a in leaves)
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        modes = (autocast, torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        weights = tuple((t.shape, t.dtype, t.device) for t in (*self.net.parameters(), *self.net.buffers()))
        hooks = _foreign(*_hooks_of_all(), *_hooked_at(self.net, layer))
        return (_kind_of(x), str(form), values, modes, weights, tuple(map(id, hooks))), objects + hooks

    def _find_last_linear(self, layer: FinalLayer, x: Tensor, now: float) -> FinalLayer:
        """The layer with the nn.Linear that the network calls last."""
        moves = Moves()
        try:
            moves.run(lambda: self.pair(x.clone(), _times(now, x)))
        except Refused as e:
            expect(False, "velocity", "a network that runs alike for all values", f"one that {e}")
        expected = "a network that calls an nn.Linear"
        expect(bool(moves.linear), "velocity", expected, f"{type(self.net).__name__}, which calls none")
        linears = [(name, m) for name, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        last = [n for n, m in linears if any(p is t for p in m._parameters.values() for t in moves.linear)]
        expected = "the path of the nn.Linear that gives the velocity"
        expect(bool(last), "head", expected, "None, and the weights that are used last are of none")
        return replace(layer, stop=last[-1], linear=last[-1])

    def _compare(self, layer: FinalLayer, x: Tensor, now: float) -> bool:
        """Raise unless the fused velocity is the network's own; whether values have told as much."""
        samples = torch.cat([x, x]) if self.is_guided and self.packed else x
        return all([self._compare_call(layer, call, samples) for call in self._evaluations(x, _times(now, x))])

    def _compare_call(self, layer: FinalLayer, call: Callable[[], Any], x: Tensor) -> bool:
        """The same of one call of the network, x as many samples as it has."""
        which = f"head {layer.linear!r} of {type(self.net).__name__}"
        way_out = "head= names another nn.Linear, patch= and order= its patches"
        moves, given, outputs = Moves(), [], []

        def follow(module, args, output):
            outputs.append(output)
            moves.follow(output)

        result, refused = None, None
        try:
            ends = (self.net.get_submodule(layer.linear).register_forward_hook, follow, {})
            with _hooked(*self._hooks(layer, given.append), ends):
                result = moves.run(call)
        except Refused as e:
            refused = e
        self._expect_called(layer, bool(given) or refused is not None)
        if outputs:
            velocity = torch.empty_like(x)
            operands = self._operands(layer, given[0], len(x), x.dtype)
            try:
                linear_euler(x, **operands, h=0.0, velocity_out=velocity)
            except ValueError as e:
                raise ValueError(f"{which}: expected outputs that make the velocity, but {e}; {way_out}") from None
        if refused is not None:
            expected = "the network's own velocity, to be moved and copied alone, alike for all values"
            expect(False, which, expected, f"a network that {refused}; {way_out}")
        once = len(given) == len(outputs) == 1
        expect(
            once, which, "the network's own velocity, to be made in one call of it", f"{len(outputs)} calls; {way_out}"
        )
        parts = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
        for part in parts:
            fits = part.dim() == x.dim() and part[:, : x.shape[1]].shape[1:] == x.shape[1:]
            expect(fits, "velocity", f"x's shape {[len(part), *x.shape[1:]]}", part)
        own = torch.cat([part[:, : x.shape[1]] for part in parts]).to(x.dtype)
        tokens = torch.arange(1, outputs[0].numel() + 1, device="cpu").view(len(x), -1, outputs[0].shape[-1])
        at = tokens.reshape(x.shape) if layer.patch is None else unpatchify(tokens, x, layer.patch, layer.order)
        places = [moves.places(part) for part in parts]
        moved = all(p is not None for p in places)
        moved = moved and torch.equal(torch.cat([p[:, : x.shape[1]] for p in places]), self.sign * at)
        expected = "the network's own velocity, to be the Linear's output as patch= and order= have it"
        expect(moved, which, expected, f"a network that returns something else; {way_out}")
        if not own.isfinite().all():
            return False  # which the stage reports
        precision = self._precision(operands, outputs[0], parts[0])
        error = (self.sign * velocity - own).norm() / own.norm().clamp(min=torch.finfo(x.dtype).tiny)
        if not error <= precision:
            expected = f"the network's own velocity, to a relative error of {precision:.2g}"
            expect(False, which, expected, f"one that is {error:.2g} away; {way_out}")
        # of a factor or a term of zeros nothing can be told
        return all(bool(t.any()) for t in (own, *(operands[k] for k in ("scale", "shift") if k in operands)))

    def _precision(self, operands: dict[str, Any], *results: Tensor) -> float:
        """A few roundings in the least precise dtype in which the network may compute its final layer."""
        dtypes = [operands["weight"].dtype, operands["z"].dtype, *(t.dtype for t in results)]
        if not {"highest", "ieee"}.issuperset(float32_products()):
            dtypes.append(torch.bfloat16)
        return max(1e-4, 8 * max(torch.finfo(dtype).eps for dtype in dtypes))


def _times(now: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), now, dtype=torch.float64, device=float64_device(x.device))


def _kind_of(a: Any) -> tuple:
    return (a.shape, a.dtype, a.device) if isinstance(a, Tensor) else (type(a), a)


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
