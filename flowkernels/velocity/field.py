"""Adapts a network's own convention to the library's: `velocity(x, t)`, t = 0 noise, t = 1 data, v = dx/dt."""

import copy
import functools
import itertools
import operator
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_callable,
    expect_dtype,
    expect_int,
    expect_list,
    expect_mapping,
    expect_positive_int,
    expect_real,
    expect_shown,
    expect_tensor,
    expect_text,
)
from flowkernels._guidance import Guidance, guided, guided_by, told
from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import BACKWARD_HOOKS, COMPILED_CALL, FORWARD_HOOKS, tree_flatten, tree_map
from flowkernels.runtime.watch import CLASS, DICT
from flowkernels.velocity.check import check
from flowkernels.velocity.hashes import unwrapped, wraps
from flowkernels.velocity.protocol import VelocityBase, expect_rows, fits_rows, is_per_sample, on_tensors, resolve
from flowkernels.velocity.provenance import Identity, hash_of, network_identity
from flowkernels.velocity.time_embedding import (
    Embedding,
    expand_embedding,
    exposes_time_embedding,
    takes_embedding,
    times_of,
)


class VelocityField(nn.Module, VelocityBase):
    """A network seen as a velocity field `v(x, t)`; call it with x `[n, *shape]` and t `[n]`.

    What the network is called with is `time_scale * t + time_offset`, or `time_scale * (1 - t) + time_offset` with
    `reverse_time`. One that takes (t (1 - eps) + eps) 999 has `time_scale=999 * (1 - eps), time_offset=999 * eps`.
    Diffusers' SD3 transformer, which takes sigma = 1 - t in thousandths and predicts noise - data:
    `VelocityField(net, reverse_time=True, time_scale=1000, x_name="hidden_states", time_name="timestep", ...)`;
    its Flux transformer takes sigma itself: the same without `time_scale`.

    Args:
        net: any callable `net(x, t, **conditioning)`; an `nn.Module` becomes a submodule. Returns a tensor, a tuple
            whose first entry is one, or an object with `.sample`.
        reverse_time: the network's time runs from data to noise.
        time_scale: factor on the time, such as 1000.
        time_offset: what is added to the time last, after factor and reversal.
        sign: +1 if the network predicts dx/dt, -1 if it predicts -dx/dt. None: -1 with `reverse_time`, else +1.
        x_name: keyword name of x; None passes it by position.
        time_name: keyword name of the time; None passes it by position.
        conditioning: further keyword arguments. A tensor, by itself or in lists, tuples and dicts, has one row for each
            sample, and follows them when samples are chunked or shuffled (`rows`), or one row for all, which is
            expanded; another number of rows is an error. Tensors without dimensions and what is no tensor are passed
            on as they are.
        shared: names of the conditioning that is not per sample, such as `("img_ids", "txt_ids")`: passed on as it is,
            whatever its shape.
        guidance: classifier-free guidance weight w, `v = v_uncond + w (v_cond - v_uncond)`; 1 means no guidance. Or a
            function `(cond, uncond, t) -> v` of the two velocities `[n, *shape]` in the state's dtype, and of the
            times t `[n]`, for weights that depend on the time, rescaling and the like; `fuse` and `fuse_head` take a
            weight alone.
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

    Subclasses may override `call_network`, the network's call; `pair`, the two velocities of guidance; `forward`, the
    velocity as a whole; and `time_embedding`, `rows`. The stages call what is overridden, with t as any callable gets
    it.

    Examples:
        >>> net = lambda x, t: x - t[:, None]  # takes sigma = 1 - t in thousandths, and predicts noise - data
        >>> velocity = fk.VelocityField(net, reverse_time=True, time_scale=1000)
        >>> velocity(torch.zeros(1, 2), torch.tensor([0.75]))
        tensor([[250., 250.]])
    """

    shares_solvers = True  # sampling/loop.py

    def __init__(
        self,
        net: Any,
        *,
        reverse_time: bool = False,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        sign: int | None = None,
        x_name: str | None = None,
        time_name: str | None = None,
        conditioning: Mapping[str, Any] | None = None,
        shared: Sequence[str] = (),
        guidance: Guidance = 1.0,
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
        time_offset = expect_real(time_offset, "time_offset", "a finite number")
        if callable(guidance):
            usable = not isinstance(guidance, (type, nn.Module))
            expect_shown(
                usable, "guidance", "a finite weight or a function (cond, uncond, t) -> v", guidance, TypeError
            )
        else:
            guidance = expect_real(guidance, "guidance", "a finite weight or a function (cond, uncond, t) -> v")
        for name, given in (("x_name", x_name), ("time_name", time_name)):
            if given is not None:
                expect_text(given, name, "the name of an argument, or None")
        for name, given in (("conditioning", conditioning), ("unconditional", unconditional)):
            if given is not None:
                expect_mapping(given, name, "a dict of keyword arguments")
        expect(x_name is None or time_name is not None, "time_name", "a name as well, with x_name", time_name)
        expect(time_name is None or x_name != time_name, "time_name", "another name than x_name", time_name)
        alone = not callable(guidance) and guidance == 1.0
        expect(alone or unconditional is not None, "unconditional", "a mapping with guidance", unconditional)
        unknown = set(unconditional or {}) - set(conditioning or {})
        expect(not unknown, "unconditional", f"keys of conditioning {sorted(conditioning or {})}", f"{sorted(unknown)}")
        names = "a tuple of names of conditioning"
        expect_shown(not isinstance(shared, str), "shared", names, shared, TypeError)
        shared = tuple(expect_text(key, "shared", names) for key in expect_list(shared, "shared", names, ordered=False))
        unknown = set(shared) - set(conditioning or {})
        expect(not unknown, "shared", f"keys of conditioning {sorted(conditioning or {})}", f"{sorted(unknown)}")
        taken = {x_name, time_name} & set(conditioning or {})
        expect(not taken, "conditioning", "other names than those of x and the time", f"{sorted(taken)}")
        if dtype is not None:
            expect_dtype(dtype, "dtype", FLOATS)
        reverse_time, packed = expect_bool(reverse_time, "reverse_time"), expect_bool(packed, "packed")
        time_column = expect_bool(time_column, "time_column")
        self.net = net
        self.reverse_time, self.time_scale, self.time_offset = reverse_time, time_scale, time_offset
        self.sign = sign if sign is not None else (-1 if reverse_time else 1)
        self.x_name, self.time_name = x_name, time_name
        self.conditioning, self.unconditional = dict(conditioning or {}), dict(unconditional or {})
        self.shared, self.guidance, self.packed, self.dtype = shared, guidance, packed, dtype
        expect(not time_column or time_name is None, "time_name", "None with time_column", time_name)
        self.time_column = time_column

    def _apply(self, fn, recurse: bool = True) -> "VelocityField":
        """`.to(device)` and the like move the conditioning along with the network."""
        for kwargs in (self.conditioning, self.unconditional):
            kwargs.update({k: on_tensors(v, fn) for k, v in kwargs.items()})
        return super()._apply(fn, recurse)

    @property
    def is_guided(self) -> bool:
        return callable(self.guidance) or self.guidance != 1.0

    @classmethod
    def of(cls, velocity: Any) -> "VelocityField":
        """A field as it is; of any other network one in the library's convention."""
        return velocity if isinstance(velocity, VelocityField) else cls(velocity)

    def convention(self) -> dict:
        """What identifies this adapter beside the network's weights, for a calibration's provenance."""
        said = dict(
            reverse_time=self.reverse_time,
            time_scale=self.time_scale,
            sign=self.sign,
            guidance=told(self.guidance),
            dtype=None if self.dtype is None else str(self.dtype),
        )
        # hashes of before are without it
        return said | dict(time_offset=self.time_offset) if self.time_offset else said

    def settings(self) -> dict:
        """The keyword arguments that make it again."""
        return dict(
            reverse_time=self.reverse_time,
            time_scale=self.time_scale,
            time_offset=self.time_offset,
            sign=self.sign,
            x_name=self.x_name,
            time_name=self.time_name,
            packed=self.packed,
            dtype=self.dtype,
            time_column=self.time_column,
            conditioning=self.conditioning,
            shared=self.shared,
            unconditional=self.unconditional,
            guidance=self.guidance,
        )

    def replaced(self, **changes: Any) -> "VelocityField":
        """The same field but for some settings: of the same class, with all it holds, its network shared."""
        field = copy.copy(self)
        field.__dict__.pop(COMPILED_CALL, None)  # which calls this one
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

        changes: dict[str, Any] = {}
        whole = isinstance(index, slice) and index.indices(n) == (0, n, 1)
        for name in ("conditioning", "unconditional"):
            kwargs = changes[name] = dict(getattr(self, name))
            for k, v in kwargs.items():
                if k not in self.shared:
                    expect_rows(v, f"{name}[{k!r}]", n)
                    kwargs[k] = v if whole else on_tensors(v, lambda t: t[index] if is_per_sample(t, n) else t)
        if isinstance(self.net, VelocityBase):
            changes["net"] = self.net.rows(index, n)
        return self.replaced(**changes)

    def without_guidance(self) -> "VelocityField":
        """The conditional field alone: what a student is that has guidance distilled into it."""
        return self.replaced(guidance=1.0, unconditional={})

    def without_conditioning(self, names: Collection[str]) -> "VelocityField":
        """The same field without the conditioning of these names, for what brings its own: whose rows need not be as
        many."""
        kept = {k: v for k, v in self.conditioning.items() if k not in names}
        return self if len(kept) == len(self.conditioning) else self.replaced(conditioning=kept)

    def with_conditioning(self, conditioning: Mapping[str, Any], guidance: Tensor | None = None) -> "VelocityField":
        """The same field with other conditioning: these entries beside those of other names.

        Args:
            conditioning: further keyword arguments of the network, as a field has them.
            guidance: weights of guidance, one for each sample `[n]`, in the place of its own.
        """
        given = {**self.conditioning, **expect_mapping(conditioning, "conditioning", "a dict of keyword arguments")}
        if guidance is None:
            return self.replaced(conditioning=given)
        expect(len(self.unconditional) > 0, "guidance", "None, of a field without `unconditional`", guidance)
        weight = expect_tensor(guidance, "guidance", FLOATS)
        expect(weight.dim() == 1, "guidance", "[n], a weight for each sample", weight)
        return self.replaced(conditioning=given, guidance=functools.partial(_weighted, weight))

    @torch.no_grad()
    def check(self, reference: Any, x: Tensor | None = None, *, times: Sequence[float] = (0.3, 0.8)) -> float:
        """Compare with a reference, and name what is wrong in the convention.

        Args:
            reference: a callable velocity(x, t) in the library's convention, such as `pipeline_velocity(pipe, ...)`; or
                a diffusers pipeline, whose transformer is called by its stock convention with this field's conditioning
                and guidance.
            x: the states `[n, *shape]` to compare on; None takes the reference's `noise(n)`.
            times: between 0 and 1, two or more: scale and offset of the time are told apart by two.

        Returns:
            The relative error, where they agree: to 1e-4, or 8 roundings of a narrower network. Both are evaluated
            once at each time. Where they do not, about 40 conventions are tried (sign, direction, scales of 1, 999 and
            1000, offsets), and if none agrees, Newton's steps look for another scale and offset.

        Raises:
            ValueError: naming what agrees, "velocity agrees with the reference if time_scale=1000 and sign is
                reversed", or that no convention does.

        Examples:
            >>> net = lambda x, t: x * t[:, None] / 1000  # takes t in thousandths
            >>> x = torch.ones(2, 3)
            >>> fk.VelocityField(net, time_scale=1000).check(lambda x, t: x * t[:, None], x) < 1e-6
            True
        """
        return check(self, reference, x, times)

    def network_time(self, t: Tensor) -> Tensor:
        """Times as the network takes them, of the library's t `[n]`; float64."""
        t = exact_time(t).to(float64_device(t.device), torch.float64)
        # before the difference: of k / 1000 and a scale of 1000, k; never t itself, which is the caller's
        t = t.clone() if self.time_scale == 1 else self.time_scale * t
        t = self.time_scale - t if self.reverse_time else t
        return t + self.time_offset if self.time_offset else t

    def time_embedding(self, t: Tensor) -> Embedding:
        """The network's, at times of the library's convention; for networks that have one (`has_time_embedding`)."""
        return resolve(self.net).embed_time(self.network_time(t), t)

    def embed_time(self, t: Tensor, like: Tensor) -> Embedding:
        if "time_embedding" not in self.__dict__ and type(self).time_embedding is EMBED:
            return resolve(self.net).embed_time(self.network_time(t), like)
        return self.time_embedding(self.time_for(t, like))

    def has_time_embedding(self) -> bool:
        """Whether the network says so; conditioning of the name, if any, is the network's own."""
        net = self.net
        known = net.has_time_embedding() if isinstance(net, VelocityBase) else exposes_time_embedding(net)
        return (
            known
            and "embedding" not in self.conditioning
            and all(takes_embedding(method) for method in overridden(self).values())
        )

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        """Times as they are: the network's are formed of them. A subclass that overrides the evaluation gets them
        rounded, and what it hands on is still exact (but in compiled loops, which know no more of a tensor than its
        values: there it gets them in float64)."""
        if not overridden(self) or torch.compiler.is_compiling():
            return t
        return _rounded(t, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        return times if x.is_cpu and times.is_cpu else times.to(float64_device(x.device), non_blocking=True)

    def identify(self, weights: bool = True) -> Identity:
        """With its convention and conditioning; a class that is not the library's counts with what it adds."""
        further = []
        if not type(self).__module__.startswith("flowkernels."):
            further.append(("field.", self, vars(VelocityField(unwrapped(self.net)))))
        given = dict(conditioning=self.conditioning, unconditional=self.unconditional, shared=self.shared)
        said, unknown = self.convention(), {}
        if callable(self.guidance):
            said["guidance_sha256"] = hash_of(self.guidance, "guidance", unknown)
        return network_identity(unwrapped(self.net), said, further=further, **given, weights=weights, unknown=unknown)

    def call_network(
        self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], embedding: Embedding | None = None
    ) -> Tensor:
        """The network's velocities of x `[n, *shape]` at times t `[n]` of the library's convention, kwargs being the
        conditioning; as the field gives them, but for guidance."""
        time, net = self.network_time(t), self.net
        # one that wraps nothing takes them as any callable does
        plain = not torch.compiler.is_compiling() and _takes_rounded(net)
        t = VelocityBase.time_for(self, time, x) if plain else resolve(net).time_for(time, x)
        column = time[:, None].to(x.device, self.dtype or x.dtype) if self.time_column else None
        return self._called(net, x, t, column, kwargs, embedding)

    def _called(
        self,
        net: Any,
        x: Tensor,
        t: Tensor | None,
        column: Tensor | None,
        kwargs: Mapping[str, Any],
        embedding: Embedding | None,
    ) -> Tensor:
        """`call_network`, with the time as the network takes it. column: the same `[n, 1]`, with `time_column`."""
        own = self.__dict__  # attributes of a module take longer
        x = x if own["dtype"] is None else x.to(own["dtype"])
        x = x if column is None else torch.cat([x, column], 1)
        x_name, time_name, n = own["x_name"], own["time_name"], x.shape[0]
        args = (x,) if column is not None else (x, t)
        if kwargs or embedding is not None or x_name or time_name:
            expanded = {k: v if k in self.shared else self._expanded(k, v, n) for k, v in kwargs.items()}
            if embedding is not None:
                expanded["embedding"] = expand_embedding(embedding, n)
            if time_name:
                expanded[time_name], args = t, args[:1]
            if x_name:
                expanded[x_name], args = x, args[1:]
            v = net(*args, **expanded)
        else:
            v = net(*args)
        return self._of_result(v)

    def _of_result(self, v: Any) -> Tensor:
        """The velocity that a network has returned."""
        if not isinstance(v, Tensor):
            v = getattr(v, "sample", v)
            v = v[0] if isinstance(v, tuple) else v
            expect(isinstance(v, Tensor), "net", "a tensor, a tuple of tensors or an object with .sample", v, TypeError)
        return v if self.sign == 1 else -v

    def _expanded(self, key: str, value: Any, n: int, of: str | None = None) -> Any:
        """Conditioning that is not shared, with a row for each of n samples."""
        if value is None or (isinstance(value, Tensor) and value.dim() and len(value) == n):  # most, at each evaluation
            return value
        if not fits_rows(value, n):
            of = of or ("unconditional" if value is self.unconditional.get(key) else "conditioning")
            expect_rows(value, f"{of}[{key!r}]", n)
        return on_tensors(value, lambda t: t.expand(n, *t.shape[1:]) if t.dim() and len(t) != n else t)

    def _both(self, key: str, cond: Any, uncond: Any, n: int) -> Any:
        """Conditioning of a packed call: that of both halves."""
        if key in self.shared:
            expected = "the same for both, being shared, in a packed call (or packed=False)"
            expect_shown(_same(cond, uncond), f"unconditional[{key!r}]", expected, uncond)
            return cond
        cond, uncond = self._expanded(key, cond, n, "conditioning"), self._expanded(key, uncond, n, "unconditional")
        if isinstance(cond, Tensor) and isinstance(uncond, Tensor) and cond.dim() and uncond.dim():
            return torch.cat([cond, uncond])
        if cond is uncond and (cond is None or isinstance(cond, (str, int, float))):
            return cond
        (of_cond, form), (of_uncond, other) = tree_flatten(cond), tree_flatten(uncond)
        rows = [isinstance(t, Tensor) and t.dim() > 0 for t in of_cond]
        alike = form == other and rows == [isinstance(t, Tensor) and t.dim() > 0 for t in of_uncond]
        alike = alike and all(r or _same_leaf(a, b) for r, a, b in zip(rows, of_cond, of_uncond, strict=True))
        if not alike:
            odd = "unconditional" if isinstance(cond, Tensor) and cond.dim() else "conditioning"
            expected = f"rows for 1 or {n} samples, or the same for both, in a packed call (or packed=False)"
            expect(False, f"{odd}[{key!r}]", expected, uncond if odd == "unconditional" else cond)
        if not any(rows):
            return cond
        parts = iter([torch.cat([a, b]) if r else a for r, a, b in zip(rows, of_cond, of_uncond, strict=True)])
        return next(parts) if isinstance(cond, Tensor) else tree_map(lambda _: next(parts), cond)

    def pair(self, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> tuple[Tensor, Tensor | None]:
        """(conditional velocity, unconditional velocity), the second None without guidance.

        embedding: of the time, with one row for all samples or a row for each; None leaves it to the network.
        """
        embedding = () if embedding is None else (embedding,)  # which an override may not take
        if not self.is_guided:
            return self.call_network(x, t, self.conditioning, *embedding), None
        other = {**self.conditioning, **self.unconditional}  # not |, which the compiler of torch 2.6 does not know
        if not self.packed:
            return self.call_network(x, t, self.conditioning, *embedding), self.call_network(x, t, other, *embedding)
        n, both = len(x), {}
        for k, cond in self.conditioning.items():
            both[k] = self._both(k, cond, other[k], n)
        exact = exact_time(t)
        t = torch.cat([t, t]) if exact is t else _rounded(torch.cat([exact, exact]), t.device, t.dtype)
        v = self.call_network(torch.cat([x, x]), t, both, *embedding)
        return v[:n], v[n:]

    def velocities(
        self, x: Tensor, t: Tensor, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        if is_called_whole(self):
            return super().velocities(x, t, embedding)
        v, v_uncond = self.pair(x, t, *(() if embedding is None else (embedding,)))
        if not callable(self.guidance):
            return v, v_uncond, self.guidance
        return v if v_uncond is None else self._guided(v, v_uncond, t, x), None, 1.0

    def moments(self, t: Tensor, x: Tensor) -> Iterator[Any]:
        """With the times as the network takes them, of all steps at once, where an evaluation is its call alone."""
        look = None if torch.compiler.is_compiling() else getattr(backends.extension(), "watch_changed", None)
        if look is None or not self._is_call_of_network():
            return super().moments(t, x)
        own, column = self.__dict__, self.time_column
        as_they_are = self.time_scale == 1 and not (self.reverse_time or self.time_offset)  # and are copied below
        time = t if as_they_are and VelocityField.network_time is NETWORK_TIME else self.network_time(t)
        if column:
            rows = times_of(time.to(x.device, self.dtype or x.dtype), x.shape[0], column=True)
        else:
            rows = times_of(VelocityBase.time_for(self, time, x), x.shape[0])
        held = own, self._modules, self.conditioning, *_hooks_of(own)
        entries = *((DICT, d, tuple(d), tuple(d.values())) for d in held), AS_IMPORTED
        bare = not (self.conditioning or self.x_name or self.time_name or self.dtype)
        known = look, entries, self.net, type(self.net), column, bare
        return zip(rows, itertools.repeat(known), itertools.repeat(t), itertools.count())

    def _is_call_of_network(self) -> bool:
        """Whether an evaluation is one call of a network, at times that are the same whatever is in x."""
        own = type(self) is VelocityField and not overridden(self) and not any(_hooks_of(self.__dict__))
        return own and not self.is_guided and _takes_rounded(self.net)

    def velocities_at(
        self, x: Tensor, moment: Any, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        if type(moment) is not tuple:
            return super().velocities_at(x, moment, embedding)
        time, (look, entries, net, kind, column, bare), t, i = moment
        if look(entries) >= 0 or type(net) is not kind or VelocityField.__call__ is not CALL:  # not what it was
            return super().velocities_at(x, t[i].expand(len(x)).clone(), embedding)
        if not bare or embedding is not None:
            times = (None, time) if column else (time, None)
            return self._called(net, x, *times, self.conditioning, embedding), None, 1.0
        v = net(torch.cat([x, time], 1)) if column else net(x, time)
        return self._of_result(v), None, 1.0  # whose sign is what it is after the call

    def _guided(self, v: Tensor, v_uncond: Tensor, t: Tensor, x: Tensor) -> Tensor:
        if callable(self.guidance):
            return guided_by(self.guidance, v, v_uncond, VelocityBase.time_for(self, t, x), x)
        return guided(v, v_uncond, self.guidance, x.dtype)

    def forward(self, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> Tensor:
        expect_tensor(x, "x", FLOATS), expect_tensor(t, "t", FLOATS)
        v, v_uncond = self.pair(x, t, *(() if embedding is None else (embedding,)))
        return v if v_uncond is None else self._guided(v, v_uncond, t, x)


def _weighted(weight: Tensor, cond: Tensor, uncond: Tensor, t: Tensor) -> Tensor:
    """Guidance with a weight for each sample."""
    return uncond + weight.to(cond).view(-1, *[1] * (cond.dim() - 1)) * (cond - uncond)


REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
OWN = {name: getattr(VelocityField, name) for name in ("forward", "pair", "call_network", "__call__", "velocities")}
EMBED, NETWORK_TIME = VelocityField.time_embedding, VelocityField.network_time
HOOKS = (*FORWARD_HOOKS, *BACKWARD_HOOKS)


def overridden(field: VelocityField) -> dict[str, Any]:
    """The methods of a field's evaluation that are not a VelocityField's own: of a subclass, or of this object."""
    found = {name: getattr(type(field), name) for name, own in OWN.items() if getattr(type(field), name) is not own}
    own = field.__dict__  # not vars(field), which the compiler of torch 2.6 does not know
    return found | {name: getattr(field, name) for name in OWN if name in own}


_hooks_of, CALL = operator.itemgetter(*HOOKS), OWN["__call__"]
AS_IMPORTED = CLASS, VelocityField, tuple(vars(VelocityField)), tuple(vars(VelocityField).values())


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


# ---- times ----


def _takes_rounded(net: Any) -> bool:
    """Whether a network takes times as any callable does: it is no velocity, and wraps none."""
    return not (isinstance(net, VelocityBase) or wraps(type(net)))


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64."""
    return torch.device("cpu") if device.type == "mps" else device


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
