"""Adapts a network's own convention to the library's: `velocity(x, t)`, t = 0 noise, t = 1 data, v = dx/dt."""

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_callable,
    expect_dtype,
    expect_int,
    expect_mapping,
    expect_positive_int,
    expect_real,
    expect_shown,
    expect_takes,
    expect_tensor,
    expect_text,
)
from flowkernels._identity import Unknown, attributes_hash, modules_of, tensors_hash, unwrapped, weights_hash
from flowkernels._warnings import warn
from flowkernels.ops.euler_step.reference import guided

Embedding = Any  # a tensor, or a tuple, list or dict of embeddings


class HasTimeEmbedding:
    """A network whose work on the time alone can be done ahead: once a schedule, instead of at every step.

    A network says so by this base class, `class Net(nn.Module, HasTimeEmbedding)`, a method `time_embedding` and a
    forward (of what is no module, a `__call__`) with a parameter `embedding` whose default is None. Of any other
    network a method or an argument of these names means what it likes, and is left alone.

    `net(x, t, embedding=net.time_embedding(t))` is `net(x, t)`. The stages call `time_embedding` with the times of all
    N steps in the network's own convention (behind `time_scale` and `reverse_time` of a `VelocityField`), and pass
    row i of everything that it returns at step i, expanded to the samples of the batch, both halves of a packed call
    included. Expanded rows are views of one: the network must not write to them. Networks whose embedding depends on
    more than the time, such as a label, embed the time here and add the rest in their forward.

    `time_embedding(t)` takes t `[N]` and returns tensors of N rows: one, or a tuple, list or dict of them, nested as it
    likes.
    """


class VelocityField(nn.Module):
    """A network seen as a velocity field `v(x, t)`; call it with x `[n, *shape]` and t `[n]`.

    What the network is called with is `time_scale * t`, or `time_scale * (1 - t)` with `reverse_time`.
    Diffusers' SD3 transformer, which takes sigma = 1 - t in thousandths and predicts noise - data:
    `VelocityField(net, reverse_time=True, time_scale=1000, x_name="hidden_states", time_name="timestep", ...)`;
    its Flux transformer takes sigma itself: the same without `time_scale`.

    Args:
        net: any callable `net(x, t, **conditioning)`; an `nn.Module` becomes a submodule. Returns a tensor, a tuple
            whose first entry is one, or an object with `.sample`.
        reverse_time: the network's time runs from data to noise.
        time_scale: factor on the time, such as 1000.
        sign: +1 if the network predicts dx/dt, -1 if it predicts -dx/dt. None: -1 with `reverse_time`, else +1.
        x_name, time_name: keyword names of the two inputs; None passes them by position.
        conditioning: further keyword arguments. A tensor whose first dimension is the number of samples is one row a
            sample, and follows them when samples are chunked or shuffled (`rows`); one of first dimension 1 is shared
            by all samples and expanded; anything else is passed on as it is. A container of tensors with one row a
            sample is refused where the rows of some samples are taken.
        guidance: classifier-free guidance weight w, `v = v_uncond + w (v_cond - v_uncond)`; 1 means no guidance.
        unconditional: the keyword arguments of the unconditional call that replace those of `conditioning`; needed
            with guidance.
        packed: the two velocities of guidance come from one call on a doubled batch (conditional half first), else from
            two calls.
        dtype: what x is cast to before the call (bfloat16 for a bfloat16 network); None passes the state as it is.
        time_column: the network has one input, x `[n, D]` with the time as a further column, such as torchcfm's
            `MLP(time_varying=True)`.

    The network's time is formed in float64 and rounded once, to float32, or float64 for a float64 state; the stages do
    so from the knots themselves.

    A network that exposes its time embedding (`HasTimeEmbedding`) does so through the field as well.

    Subclasses may override `_call`, the network's call; `pair`, the two velocities of guidance; `forward`, the velocity
    as a whole; and `time_embedding`, `rows`. The stages call what is overridden, with t as any callable gets it.
    """

    def __init__(
        self,
        net: Any,
        *,
        reverse_time: bool = False,
        time_scale: float = 1.0,
        sign: int | None = None,
        x_name: str | None = None,
        time_name: str | None = None,
        conditioning: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        unconditional: Mapping[str, Any] | None = None,
        packed: bool = True,
        dtype: torch.dtype | None = None,
        time_column: bool = False,
    ):
        super().__init__()
        expect_callable(net, "net", "a callable net(x, t)")
        sign = None if sign is None else expect_int(sign, "sign", "1, -1 or None", -1, 1)
        expect(sign != 0, "sign", "1, -1 or None", 0)
        time_scale = expect_real(time_scale, "time_scale", "a positive number", lambda a: a > 0)
        guidance = expect_real(guidance, "guidance", "a finite weight")
        for name, given in (("x_name", x_name), ("time_name", time_name)):
            if given is not None:
                expect_text(given, name, "the name of an argument, or None")
        for name, given in (("conditioning", conditioning), ("unconditional", unconditional)):
            if given is not None:
                expect_mapping(given, name, "a dict of keyword arguments")
        expect(x_name is None or time_name is not None, "time_name", "a name as well, with x_name", time_name)
        expect(time_name is None or x_name != time_name, "time_name", "another name than x_name", time_name)
        expect(guidance == 1.0 or unconditional is not None, "unconditional", "a mapping with guidance", unconditional)
        unknown = set(unconditional or {}) - set(conditioning or {})
        expect(not unknown, "unconditional", f"keys of conditioning {sorted(conditioning or {})}", f"{sorted(unknown)}")
        taken = {x_name, time_name} & set(conditioning or {})
        expect(not taken, "conditioning", "other names than those of x and the time", f"{sorted(taken)}")
        if dtype is not None:
            expect_dtype(dtype, "dtype", FLOATS)
        reverse_time, packed = expect_bool(reverse_time, "reverse_time"), expect_bool(packed, "packed")
        time_column = expect_bool(time_column, "time_column")
        self.net = net
        self.reverse_time, self.time_scale = reverse_time, time_scale
        self.sign = sign if sign is not None else (-1 if reverse_time else 1)
        self.x_name, self.time_name = x_name, time_name
        self.conditioning, self.unconditional = dict(conditioning or {}), dict(unconditional or {})
        self.guidance, self.packed, self.dtype = guidance, packed, dtype
        expect(not time_column or time_name is None, "time_name", "None with time_column", time_name)
        self.time_column = time_column

    def _apply(self, fn, recurse: bool = True) -> "VelocityField":
        """`.to(device)` and the like move the conditioning along with the network."""
        for kwargs in (self.conditioning, self.unconditional):
            kwargs.update({k: fn(v) for k, v in kwargs.items() if isinstance(v, Tensor)})
        return super()._apply(fn, recurse)

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1.0

    def convention(self) -> dict:
        """What identifies this adapter beside the network's weights, for a calibration's provenance."""
        return dict(
            reverse_time=self.reverse_time,
            time_scale=self.time_scale,
            sign=self.sign,
            guidance=self.guidance,
            dtype=None if self.dtype is None else str(self.dtype),
        )

    def settings(self) -> dict:
        """The keyword arguments that make it again."""
        return dict(
            **dict(reverse_time=self.reverse_time, time_scale=self.time_scale, sign=self.sign),
            **dict(x_name=self.x_name, time_name=self.time_name, packed=self.packed, dtype=self.dtype),
            time_column=self.time_column,
            **dict(conditioning=self.conditioning, unconditional=self.unconditional, guidance=self.guidance),
        )

    def _replace(self, **changes) -> "VelocityField":
        """The same field but for some settings: of the same class, with all it holds, its network shared."""
        field = copy.copy(self)
        field.__dict__.pop("_compiled_call_impl", None)  # which calls this one
        for name, value in vars(field).items():
            if name in REGISTRIES:
                field.__dict__[name] = copy.copy(value)
            elif isinstance(value, types.MethodType) and value.__self__ is self:
                field.__dict__[name] = types.MethodType(value.__func__, field)
            elif isinstance(value, functools.partial) and any(arg is self for arg in value.args):
                args = (field if arg is self else arg for arg in value.args)
                field.__dict__[name] = functools.partial(value.func, *args, **value.keywords)
        for name in ("conditioning", "unconditional"):
            setattr(field, name, dict(changes.pop(name, getattr(self, name))))
        for name, value in changes.items():
            setattr(field, name, value)
        return field

    def rows(self, index: Tensor | slice, n: int) -> "VelocityField":
        """The same field for the samples `index` of n: conditioning that has one row a sample is indexed."""

        expect_positive_int(n, "n")
        expect_shown(isinstance(index, (Tensor, slice)), "index", "a tensor of places or a slice", index, TypeError)
        if isinstance(index, Tensor):
            expect_tensor(index, "index", (torch.int64, torch.int32, torch.bool))

        whole = isinstance(index, slice) and index.indices(n) == (0, n, 1)

        def pick(kwargs, name):
            for k, v in kwargs.items() if not whole else ():
                nested = not isinstance(v, Tensor) and any(_per_sample(leaf, n) for leaf in tree_flatten(v)[0])
                expected = "a tensor of one row a sample by itself, so that the rows of some samples can be taken"
                expect_shown(not nested, f"{name}[{k!r}]", expected, v)
            return {k: v[index] if _per_sample(v, n) else v for k, v in kwargs.items()}

        changes = {name: pick(getattr(self, name), name) for name in ("conditioning", "unconditional")}
        inside = self.net
        if isinstance(inside, VelocityField) and inside.conditioning:
            changes["net"] = inside.rows(index, n)
        return self._replace(**changes)

    def without_guidance(self) -> "VelocityField":
        """The conditional field alone: what a student is that has guidance distilled into it."""
        return self._replace(guidance=1.0, unconditional={})

    def _network_time(self, t: Tensor) -> Tensor:
        """In float64."""
        t = exact_time(t).to(float64_device(t.device), torch.float64, copy=True)
        t = self.time_scale * t  # before the difference: of k / 1000 and a scale of 1000, k
        return self.time_scale - t if self.reverse_time else t

    def time_embedding(self, t: Tensor) -> Embedding:
        """The network's, at times of the library's convention; for networks that have one (`has_time_embedding`)."""
        return embed_time(self.net, self._network_time(t), t)

    def _call(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], embedding: Embedding | None = None) -> Tensor:
        n = len(x)
        time = self._network_time(t)
        t = time_for(self.net, time, x)
        x = x if self.dtype is None else x.to(self.dtype)
        expanded = {
            k: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() and len(v) == 1 else v
            for k, v in kwargs.items()
        }
        if embedding is not None:
            expanded["embedding"] = expand_embedding(embedding, n)
        if self.time_column:
            x = torch.cat([x, time[:, None].to(x)], 1)
        args = () if self.time_name or self.time_column else (t,)
        if self.time_name:
            expanded[self.time_name] = t
        if self.x_name:
            expanded[self.x_name] = x
        else:
            args = (x, *args)
        v = self.net(*args, **expanded)
        if not isinstance(v, Tensor):
            v = getattr(v, "sample", v)
            v = v[0] if isinstance(v, tuple) else v
            expect(isinstance(v, Tensor), "net", "a tensor, a tuple of tensors or an object with .sample", v, TypeError)
        return v if self.sign == 1 else -v

    def pair(self, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> tuple[Tensor, Tensor | None]:
        """(conditional velocity, unconditional velocity), the second None without guidance.

        embedding: of the time, with one row for all samples or a row for each; None leaves it to the network.
        """
        embedding = () if embedding is None else (embedding,)  # which an override may not take
        if not self.is_guided:
            return self._call(x, t, self.conditioning, *embedding), None
        other = {**self.conditioning, **self.unconditional}  # not |, which the compiler of torch 2.6 does not know
        if not self.packed:
            return self._call(x, t, self.conditioning, *embedding), self._call(x, t, other, *embedding)
        n, both = len(x), {}
        for k, cond in self.conditioning.items():
            uncond = other[k]
            if all(isinstance(c, Tensor) and c.dim() and len(c) in (1, n) for c in (cond, uncond)):
                both[k] = torch.cat([c.expand(n, *c.shape[1:]) for c in (cond, uncond)])
            else:
                expected = f"rows for 1 or {n} samples, or the same for both, in a packed call (or packed=False)"
                expect(_same(cond, uncond), f"unconditional[{k!r}]", expected, uncond)
                both[k] = cond
        exact = exact_time(t)
        t = torch.cat([t, t]) if exact is t else _rounded(torch.cat([exact, exact]), t.device, t.dtype)
        v = self._call(torch.cat([x, x]), t, both, *embedding)
        return v[:n], v[n:]

    def forward(self, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> Tensor:
        expect_tensor(x, "x", FLOATS), expect_tensor(t, "t", FLOATS)
        v, v_uncond = self.pair(x, t, *(() if embedding is None else (embedding,)))
        return v if v_uncond is None else guided(v, v_uncond, self.guidance, x.dtype)


REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
OWN = {name: getattr(VelocityField, name) for name in ("forward", "pair", "_call", "__call__")}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def overridden(field: VelocityField) -> dict[str, Any]:
    """The methods of a field's evaluation that are not a VelocityField's own: of a subclass, or of this object."""
    found = {name: getattr(type(field), name) for name, own in OWN.items() if getattr(type(field), name) is not own}
    return found | {name: getattr(field, name) for name in OWN if name in vars(field)}


def is_called_whole(field: VelocityField) -> bool:
    """Whether its velocity is what a call of it gives: `pair` would miss an override, or a hook."""
    changed = overridden(field)
    return "forward" in changed or "__call__" in changed or any(getattr(field, name) for name in HOOKS)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors in containers included; those that cannot be compared are not."""
    if a is b:
        return True
    (of_a, form), (of_b, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(map(_same_leaf, of_a, of_b))


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    try:
        return bool(a == b)
    except Exception:  # whatever an object makes of `==`, an array's many answers among it
        return False


def _per_sample(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == n and n > 1


def velocity_rows(velocity, index: Tensor | slice, n: int):
    """`velocity` for the samples `index` of n; a callable without per-sample conditioning is itself."""
    if isinstance(velocity, VelocityField):
        return velocity.rows(index, n)
    inside = unwrapped(velocity)
    if isinstance(inside, VelocityField) and len(range(n)[index] if isinstance(index, slice) else index) < n:
        rows = sorted(k for k, v in inside.conditioning.items() if _per_sample(v, n))
        expected = "a VelocityField around the wrapped network, where conditioning has a row for each sample"
        expect(not rows, "velocity", expected, f"a {type(velocity).__name__} around a VelocityField with {rows}")
    return velocity


# ---- times ----


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64."""
    return torch.device("cpu") if device.type == "mps" else device


def time_for(velocity, t: Tensor, x: Tensor) -> Tensor:
    """The times t in float64, where float64 is, as a velocity takes them beside x: a VelocityField as they are, since
    it forms its network's time of them; any other callable rounded to float32, or float64 for a float64 state. A
    subclass that overrides the field's evaluation gets them rounded as well, and what it hands on is still exact (but
    in compiled loops, which know no more of a tensor than its values: there it gets them in float64)."""
    compiled = torch.compiler.is_compiling()
    field = velocity if compiled or isinstance(velocity, VelocityField) else unwrapped(velocity)
    form = x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(field, VelocityField):
        return t.to(*form)
    return _rounded(t, *form) if overridden(field) and not compiled else t


def _rounded(exact: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rounded times that remember what they were."""
    with torch.inference_mode(False):  # whose tensors count no writes
        t = exact.to(device, dtype, copy=True)
        t._exact_time = exact, t._version
    return t


def exact_time(t: Tensor) -> Tensor:
    """What times were before they were rounded, unless they were written to since."""
    known = None if torch.compiler.is_compiling() else getattr(t, "_exact_time", None)
    return t if known is None or known[1] != t._version else known[0]


def embed_time(velocity, t: Tensor, like: Tensor) -> Embedding:
    """The time embedding at times t `[N]`; like: the state, whose dtype says what they are rounded to."""
    own = isinstance(velocity, VelocityField) and "time_embedding" not in vars(velocity)
    if own and type(velocity).time_embedding is EMBED:
        return embed_time(velocity.net, velocity._network_time(t), like)
    return velocity.time_embedding(time_for(velocity, t, like))


EMBED = VelocityField.time_embedding

_takes = weakref.WeakKeyDictionary()  # function -> whether it takes an embedding


def _takes_embedding(function) -> bool:
    """Whether it has a parameter `embedding=None`."""
    if torch.compiler.is_compiling():  # which would compile anew when the answer is there already
        return _looks_for_embedding(function)
    try:
        if function not in _takes:
            _takes[function] = _looks_for_embedding(function)
        return _takes[function]
    except TypeError:  # one that cannot be weakly referenced
        return _looks_for_embedding(function)


def _looks_for_embedding(function) -> bool:
    try:
        call = inspect.signature(function)
        return "embedding" in call.parameters and call.parameters["embedding"].default is None
    except (TypeError, ValueError):  # a callable without a signature
        return False


def expect_velocity(velocity, name: str = "velocity") -> None:
    """Something to call; whether it takes x and t is looked at where it does not (`evaluate`)."""
    expect_callable(velocity, name, "a callable velocity(x, t)")


def has_time_embedding(velocity) -> bool:
    """Whether the network says that it exposes its time embedding: `HasTimeEmbedding`."""
    if isinstance(velocity, VelocityField):  # conditioning of the name, if any, is the network's own
        known = "embedding" not in velocity.conditioning and has_time_embedding(velocity.net)
        return known and all(_takes_embedding(method) for method in overridden(velocity).values())
    method = getattr(velocity, "time_embedding", None) if isinstance(velocity, HasTimeEmbedding) else None
    if not callable(method) or isinstance(method, nn.Module):
        return False
    kind, own = type(velocity), getattr(velocity, "__dict__", ())
    if not isinstance(velocity, nn.Module):
        return _takes_embedding(kind.__call__)
    if "forward" in own or "__call__" in own:  # put over the class's
        return False
    passes = kind.__call__ is OWN["__call__"] or _takes_embedding(kind.__call__)
    return passes and _takes_embedding(kind.forward)


def time_embeddings(velocity, t: Tensor, x: Tensor) -> list[Embedding]:
    """The embedding at each of the times `[N]`, of one row each, from one call; x: the state."""
    return _rows(embed_time(velocity, t.clone(), x), len(t))


def _rows(embedding: Embedding, N: int) -> list[Embedding]:
    if isinstance(embedding, Tensor):
        ok = embedding.dim() > 0 and len(embedding) == N
        expect(ok, "time_embedding", f"tensors of {N} rows, one for each time", embedding)
        return embedding.split(1)
    if isinstance(embedding, dict):
        parts = {k: _rows(v, N) for k, v in embedding.items()}
        return [{k: rows[i] for k, rows in parts.items()} for i in range(N)]
    expect(isinstance(embedding, (tuple, list)), "time_embedding", "tensors in tuples or dicts", embedding, TypeError)
    parts = [_rows(v, N) for v in embedding]
    return [tuple(rows[i] for rows in parts) for i in range(N)]


def expand_embedding(embedding: Embedding, n: int) -> Embedding:
    """One row as the rows of n samples, without memory of their own; n rows as they are."""
    if isinstance(embedding, Tensor):
        return embedding if len(embedding) == n else embedding.expand(n, *embedding.shape[1:])
    if isinstance(embedding, dict):
        return {k: expand_embedding(v, n) for k, v in embedding.items()}
    return tuple(expand_embedding(v, n) for v in embedding)


def model_times(velocity, times: Tensor, x: Tensor) -> Tensor:
    """The times of all evaluations `[M]`, float64 on the CPU, as a velocity takes them, for loops; without a sync."""
    if isinstance(velocity if torch.compiler.is_compiling() else unwrapped(velocity), VelocityField):
        return times.to(float64_device(x.device), non_blocking=True)
    return times.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32, non_blocking=True)


ROWS = 1 << 20  # times that are expanded to the samples at once


def times_of(t: Tensor, n: int) -> Iterator[Tensor]:
    """The times t `[N]` of a schedule's steps one by one, each `[n]` for n samples and the network's to write to."""
    for part in (t,) if len(t) * n <= ROWS else t.split(max(1, ROWS // n)):
        yield from part.unsqueeze(1).expand(-1, n).clone(memory_format=torch.contiguous_format).unbind()


def evaluate(velocity, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> tuple[Tensor, Tensor | None, float]:
    """`(v, v_uncond or None, guidance)` at one time t, `[n]`, for all samples, checked for shape.

    t: in float64, or as the velocity takes it. embedding: of that time, of one row; None leaves it to the network.
    """
    t, given = time_for(velocity, t, x), () if embedding is None else (embedding,)
    if isinstance(velocity, VelocityField) and not is_called_whole(velocity):
        v, v_uncond = velocity.pair(x, t, *given)
        weight = velocity.guidance
    elif given:
        v, v_uncond, weight = velocity(x, t, embedding=expand_embedding(embedding, len(x))), None, 1.0
    else:
        v, v_uncond, weight = _called(velocity, x, t), None, 1.0
    if not isinstance(v, Tensor):
        expect(False, "velocity", f"a tensor of shape {list(x.shape)}", type(v).__name__, TypeError)
    for part in (v, v_uncond):
        if part is not None and (part.shape != x.shape or part.device != x.device):
            expect(False, "velocity", f"x's shape {list(x.shape)} on {x.device}, at t = {t[0]:.6g}", part)
        if part is not None and (part.dtype not in FLOATS or part.dtype != v.dtype):
            expected = " or ".join(str(d) for d in FLOATS) if part is v else f"the conditional one's {v.dtype}"
            expect(False, "velocity", expected, part, TypeError)
    if x.dtype == torch.float64 and v.dtype != torch.float64:  # a float64 state with a narrower network
        v, v_uncond = v.double(), None if v_uncond is None else v_uncond.double()
    elif x.dtype == torch.float32 and v.dtype == torch.float64:
        v, v_uncond = v.float(), None if v_uncond is None else v_uncond.float()
    return v, v_uncond, weight


def _called(velocity, x: Tensor, t: Tensor):
    try:
        return velocity(x, t)
    except TypeError:  # its own, unless it takes other arguments
        expect_takes(velocity, "velocity", "a callable velocity(x, t)", x, t)
        raise


TRAINING = "velocity: expected a network in eval mode"


def warn_if_training(velocity, stacklevel: int = 4) -> None:
    """Dropout or batch statistics make a velocity random: warn if a network is left in training mode.

    The warning points at the caller of the stage that asks, below the frame of its `torch.no_grad` decorator.
    """
    if not isinstance(velocity, nn.Module):
        return
    for name, module in velocity.named_modules():
        if not module.training:
            continue
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            text = f"{TRAINING}, got {type(module).__name__} {name!r} in training mode; call .eval() first"
            return warn(text, stacklevel)


@dataclass(frozen=True)
class Identity:
    """What a velocity is, as far as it can be read, in hashes: what is made of it carries them as its provenance.

    parameters: of the weights and the convention. of_state: that of what is in the state dict alone, which files of
    before have. attributes: of the classes of all modules and what they hold beside weights. conditioning,
    unconditional: of each of their values. None is unknown; `unknown` says why. unread: names of attributes and hooks
    that have no hash.
    """

    parameters: str | None
    of_state: str | None
    attributes: str | None
    conditioning: dict[str, str | None]
    unconditional: dict[str, str | None]
    unknown: dict[str, str]
    unread: tuple[str, ...] = ()

    def provenance(self) -> dict:
        """The entries of a file."""
        found = {"parameters_sha256": self.parameters, "attributes_sha256": self.attributes}
        found |= {"conditioning": self.conditioning, "unconditional": self.unconditional}
        return found | ({"unknown": self.unknown} if self.unknown else {})

    def is_proven(self, recorded: Mapping[str, Any]) -> bool:
        """Whether a recorded provenance is for certain of this velocity: nothing differs, and nothing is unknown."""
        hashes = (self.parameters, self.attributes)
        same = (recorded.get("parameters_sha256"), recorded.get("attributes_sha256")) == hashes and None not in hashes
        return same and not self.unknown and not self.unread and not self.differences(recorded)

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from a recorded provenance, or cannot be compared, in words; older ones know less."""
        if "parameters_sha256" not in recorded:
            return []
        found, there = [], recorded["parameters_sha256"]
        before = "attributes_sha256" not in recorded and there == self.of_state
        said = recorded.get("unknown")
        reasons = [k.get("parameters", NO_MODULE) if isinstance(k, Mapping) else "" for k in (said or {}, self.unknown)]
        if there != self.parameters and not before:
            told = [
                d[:12] if d else f"unknown: {why}" for d, why in zip((there, self.parameters), reasons, strict=True)
            ]
            found.append(f"parameters {told[0]}, now {told[1]}")
        elif self.parameters is None and reasons != [NO_MODULE] * 2:
            found.append(f"parameters unknown: {reasons[1]}")
        attributes = recorded.get("attributes_sha256")
        if attributes and self.attributes and attributes != self.attributes:
            found.append("attributes of its modules")
        for name in ("conditioning", "unconditional"):
            then, now = recorded.get(name), getattr(self, name)
            if isinstance(then, Mapping):
                keys = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k) or then[k] is None)
                found += [f"{name} {k!r}{'' if then.get(k) and now.get(k) else ' (unknown)'}" for k in keys]
        return found


NO_MODULE = "not a module"


def _field_and_network(velocity) -> tuple["VelocityField | None", Any]:
    """Wrappers around either aside, a sampler being one."""
    from flowkernels.fuse import FusedSampler  # which imports this module

    velocity = unwrapped(velocity.velocity if isinstance(velocity, FusedSampler) else velocity)
    field = velocity if isinstance(velocity, VelocityField) else None
    return field, unwrapped(velocity if field is None else field.net)


def attributes_of(velocity) -> tuple[str | None, list[str]]:
    """(the hash of the modules' classes and attributes, names of what has none); of no module (None, [])."""
    field, net = _field_and_network(velocity)
    if not isinstance(net, nn.Module):
        return None, []
    modules = modules_of(net)
    if field is not None and not type(field).__module__.startswith("flowkernels."):  # with what it adds
        modules.append(("field.", field, vars(VelocityField(net))))
    return attributes_hash(modules)


def hash_of(value: Any, name: str, unknown: dict[str, str]) -> str | None:
    """Of any value; None if it has none, and then why, in `unknown`."""
    try:
        return tensors_hash({"": value})
    except Unknown as e:
        unknown[name] = str(e)


def identity(velocity) -> Identity:
    """Of any velocity; about as long as its weights take to be read, and never an error."""
    field, net = _field_and_network(velocity)
    digests, unknown = (None, None), {}
    if isinstance(net, nn.Module):
        convention = (VelocityField(net) if field is None else field).convention()
        try:
            digests = weights_hash(net, repr(sorted(convention.items())))
        except Unknown as e:
            unknown["parameters"] = str(e)
    else:
        unknown["parameters"] = NO_MODULE
    attributes, unread = attributes_of(velocity)
    kwargs = [
        {key: hash_of(value, f"{name}.{key}", unknown) for key, value in getattr(field, name, {}).items()}
        for name in ("conditioning", "unconditional")
    ]
    return Identity(*digests[::-1], attributes, *kwargs, unknown, tuple(unread))


def warn_if_another(velocity, recorded: Mapping[str, Any], stacklevel: int) -> bool:
    """Warn if a velocity is not the one of a calibration's provenance; whether it is for certain."""
    now = identity(velocity)
    if differs := now.differences(recorded):
        text = f"velocity: expected the model that the calibration was made with, got another ({', '.join(differs)})"
        warn(text, stacklevel=stacklevel)
    return now.is_proven(recorded)


def parameter_hash(velocity) -> str | None:
    """The hash of a module's weights and its convention; None where they cannot be read, or for what is no module."""
    return identity(velocity).parameters
