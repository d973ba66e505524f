"""From a recorded velocity network to the layers of `mlp_sample`.

A further operation of torch becomes fusable here: one that leaves values where they are by its name in `SAME`, another
by a method `_lower_NAME` of `Lowering`, which appends a `Draft` or changes one. NAME is what aten records, without the
underscore of one in place, and not always what was called: `x.square()` is `pow`, `F.relu6` is `hardtanh`. The message
of `NotFusable` shows it. What is looked at are the values that depend on the state; all else is replayed by torch, once
a schedule. tests/test_fuse.py holds a network of each.

The activations are those of `mlp_sample`, by aten's names. One that has arguments has its branch in `_activate`. A new
one is first added to the op: ops/mlp_sample/reference.py (`ACTIVATIONS`), the docstring of `Layer` and triton_kernel.py
beside it; in csrc/mlp_sample/ the enumeration of mlp_sample.h, run.h, cuda.cu and test.cpp; its vectors in
csrc/common/activations.h; a shape more in `sample_inputs` of ops/mlp_sample/samples.py, and `zero_below` in
tests/ops/test_mlp_sample.py; the lists in docs/fused-samplers.md, "Which networks", and in the docstring of `fuse`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkernels.fusion.record import ROWS, STATE, TIME, Call, NotFusable, Record, Ref
from flowkernels.ops.mlp_sample import ACTIVATIONS, Layer, Source
from flowkernels.runtime.torch_private import tree_flatten


@dataclass
class Replayed:
    """What the tables of layers are made of: replayed values, for so many steps and samples."""

    record: Record
    values: dict[int, Tensor]
    steps: int
    n: int
    device: torch.device


@dataclass(frozen=True)
class Static:
    """A value that does not depend on the state, as a table `[N or 1, n or 1, width or 1]`."""

    kind: frozenset
    places: frozenset[int]
    table: Callable[[Replayed], Tensor]

    @staticmethod
    def number(value: float) -> "Static":
        return Static(
            frozenset(),
            frozenset(),
            lambda r: torch.full((1, 1, 1), float(value), dtype=torch.float64, device=r.device),
        )

    def combine(self, other: "Static", f: Callable[[Tensor, Tensor], Tensor]) -> "Static":
        return Static(self.kind | other.kind, self.places | other.places, lambda r: f(self.table(r), other.table(r)))

    def __mul__(self, other: "Static") -> "Static":
        return self.combine(other, torch.mul)

    def __add__(self, other: "Static") -> "Static":
        return self.combine(other, torch.add)


@dataclass
class Value:
    """A value that depends on the state: columns of a draft, in a tensor of shape `[n, *shape]`."""

    draft: int
    first: int
    width: int
    shape: tuple[int, ...]


@dataclass
class Parts:
    """A concatenation that nothing has needed as one value yet."""

    parts: list[Value | Static]
    widths: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.widths),)


@dataclass
class Draft:
    """A layer in the making. Drafts are values; a concatenated one has further drafts as its parts."""

    map: str
    source: Source
    width: int
    weight: tuple[Callable[[Replayed], Tensor], frozenset[int]] | None = None
    eps: float = 0.0
    scale: Static | None = None
    shifts: list[Static] = field(default_factory=list)
    activation: str = "none"
    alpha: float = 0.0
    gain: float = 1.0
    combine: str = "none"
    other: Source | None = None
    more: list["Draft"] = field(default_factory=list)

    @property
    def is_affine(self) -> bool:
        """Nothing has happened yet that a further scale and shift could not be merged with."""
        return self.activation == "none" and self.combine == "none" and not self.more

    def scale_by(self, factor: Static) -> None:
        self.scale = factor if self.scale is None else self.scale * factor
        self.shifts = [s * factor for s in self.shifts]


SAME = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "clone", "contiguous", "_to_copy")
SAME += ("lift_fresh", "expand", "flatten", "native_dropout", "dropout", "view_as", "to")
ACTIVATED = frozenset(ACTIVATIONS) - {"none", "gelu_tanh"}  # the latter is recorded as a gelu


class Lowering:
    """Turns a record into drafts of layers."""

    def __init__(self, record: Record, x: int, out: int, dim: int):
        self.record, self.drafts, self.dim = record, [None], dim  # value 0 is the state
        self.known: dict[int, Value | Parts] = {x: Value(0, 0, dim, tuple(record.tensors[x].shape[1:]))}
        self.readers = self._count_readers(out)
        for call in record.calls:
            if STATE in call.kind:
                self._lower(call)
        result = self.known.get(out)
        if result is None:
            raise NotFusable("the velocity does not depend on x")
        result = self._whole(result)
        if result.width != dim:
            raise NotFusable(f"the velocity has {result.width} columns for {dim} of x")
        last = len(self.drafts) - 1
        if (result.draft, result.first, result.width) != (last, 0, self._width(last)):
            self._append(Draft("identity", self._source(result), dim))

    def _count_readers(self, out: int) -> dict[int, int]:
        """How often a value is read, views of it counted as the value."""
        root: dict[int, int] = {}
        readers = {out: 1}
        for call in self.record.calls:
            refs = [a.index for a in tree_flatten((call.args, call.kwargs))[0] if isinstance(a, Ref)]
            if _name(call) in SAME and refs and STATE in self.record.kinds[refs[0]]:
                root |= dict.fromkeys(call.outputs, root.get(refs[0], refs[0]))
                continue
            for r in refs:
                readers[root.get(r, r)] = readers.get(root.get(r, r), 0) + 1
        if out in root:
            readers[root[out]] = readers.get(root[out], 0) + 1
        return readers

    def _fail(self, call: Call, why: str):
        raise NotFusable(f"{call.where}: {_name(call)} {why}")

    def _width(self, draft: int) -> int:
        d = self.drafts[draft]
        return self.dim if d is None else d.width + sum(m.width for m in d.more)

    def _source(self, v: Value) -> Source:
        return Source(v.draft, v.first, v.width)

    def _append(self, draft: Draft, shape: tuple[int, ...] | None = None) -> Value:
        self.drafts.append(draft)
        return Value(len(self.drafts) - 1, 0, draft.width, shape or (draft.width,))

    def _whole(self, v: Value | Parts) -> Value:
        """A concatenation as one value."""
        if isinstance(v, Value):
            return v
        drafts = []
        for part, width in zip(v.parts, v.widths, strict=True):
            if isinstance(part, Value):
                drafts.append(Draft("identity", self._source(part), width))
                continue
            for c in range(0, width, self.dim):  # a table: nothing times the state, plus the table
                w = min(self.dim, width - c)
                columns = Static(part.kind, part.places, lambda r, part=part, c=c, w=w: part.table(r)[..., c : c + w])
                drafts.append(Draft("identity", Source(0, 0, w), w, scale=Static.number(0), shifts=[columns]))
        drafts[0].more = drafts[1:]
        value = self._append(drafts[0])
        return Value(value.draft, 0, sum(v.widths), v.shape)

    def _open(self, v: Value, ready: Callable[[Draft], bool]) -> Draft | None:
        """The draft that makes v, if one operation alone reads it and `ready` says that it may go on there."""
        d = self.drafts[v.draft]
        if d is None or d.more or (v.first, v.width) != (0, d.width) or not ready(d):
            return None
        places = [p for p, k in self.known.items() if isinstance(k, Value) and k.draft == v.draft]
        if sum(self.readers.get(p, 0) for p in places) != 1:
            return None
        for p in places:  # they hold what the draft was before
            del self.known[p]
        return d

    def _static(self, call: Call, a: Any, shape: tuple[int, ...]) -> Static:
        """An argument without the state, to be broadcast to `[n, *shape]`."""
        if not isinstance(a, Ref):
            return Static.number(a)
        kind, leads, place = self.record.kinds[a.index], self.record.leads(a.index), a.index
        dims = self.record.tensors[place].dim()
        if dims > len(shape) + 1 or (dims == len(shape) + 1 and not leads and len(self.record.tensors[place]) != 1):
            self._fail(call, f"meets a tensor of shape {list(self.record.tensors[place].shape)}")
        leads = leads and dims == len(shape) + 1
        if kind and not leads:
            self._fail(call, "uses time or conditioning other than as one row a sample")

        def table(r: Replayed) -> Tensor:
            value = r.values[place].to(r.device)  # constants of no dimension may be on the CPU
            value = value.broadcast_to(len(value) if leads else 1, *shape).reshape(len(value) if leads else 1, -1)
            steps, n = r.steps if TIME in kind else 1, r.n if ROWS in kind else 1
            return value.double().view(steps, n, -1)

        return Static(kind, frozenset({place}), table)

    def _argument(self, a: Any) -> Value | Parts | None:
        """What an argument is that depends on the state; None for others."""
        if not isinstance(a, Ref) or STATE not in self.record.kinds[a.index]:
            return None
        if a.index not in self.known:
            raise NotFusable("a layer norm's mean or another side result is read")
        return self.known[a.index]

    # ---- one operation ----

    def _lower(self, call: Call) -> None:
        if not call.outputs:
            self._fail(call, "returns no tensor")
        name, args, out = _name(call), call.args, call.outputs[0]
        shape = tuple(self.record.tensors[out].shape)
        if not shape or shape[0] != self.record.rows:
            self._fail(call, "leaves no row for each sample")
        method = getattr(self, f"_lower_{name}", None)
        if name in SAME:
            v = self._argument(args[0])
            if v is None:
                self._fail(call, "on the state's shape is not known to mlp_sample")
            if isinstance(v, Parts) and shape[1:] != v.shape:
                v = self._whole(v)
            if torch.Size(shape[1:]).numel() != torch.Size(v.shape).numel():
                self._fail(call, "changes the number of columns")
            self.known[out] = Value(v.draft, v.first, v.width, shape[1:]) if isinstance(v, Value) else v
        elif name in ACTIVATED:
            self._activate(call, name)
        elif method is not None:
            method(call)
        else:
            self._fail(call, "on values that depend on x is nothing that mlp_sample computes")

    def _linear(self, call: Call, x: Any, weight: Any, transposed: bool, bias: Any = None) -> None:
        v = self._argument(x)
        bad = v is None or self._argument(weight) is not None or self._argument(bias) is not None
        if bad or self.record.kinds[weight.index] or len(v.shape) != 1:
            self._fail(call, "is not a row of features times a matrix of parameters")
        parts = v if isinstance(v, Parts) else Parts([v], [v.width])
        out = call.outputs[0]
        width = self.record.tensors[out].shape[1]
        first, dynamic, columns, shifts = 0, [], [], []
        place = weight.index

        def matrix(r: Replayed) -> Tensor:  # [in, out]
            return r.values[place].T if transposed else r.values[place]

        for part, w in zip(parts.parts, parts.widths, strict=True):
            if isinstance(part, Value):
                dynamic.append((part, w))
                columns.append((first, w))
            else:  # its columns of the weight meet a table: another table

                def table(r: Replayed, part=part, first=first, w=w) -> Tensor:
                    return part.table(r).expand(-1, -1, w) @ matrix(r)[first : first + w].double()

                shifts.append(Static(part.kind, part.places | {place}, table))
            first += w
        if bias is not None:
            shifts.append(self._static(call, bias, (width,)))
        if len(dynamic) > 1:
            source = self._whole(Parts([p for p, _ in dynamic], [w for _, w in dynamic]))
        else:
            source = dynamic[0][0]

        def rows(r: Replayed) -> Tensor:
            picked = torch.cat([matrix(r)[c : c + w] for c, w in columns])
            return picked.T.float().contiguous()

        draft = Draft("linear", self._source(source), width, weight=(rows, frozenset({place})), shifts=shifts)
        self.known[out] = self._append(draft)

    def _lower_addmm(self, call: Call) -> None:
        bias, x, weight = call.args
        if any(value != 1 for value in call.kwargs.values()):
            self._fail(call, "with alpha or beta is not a linear layer")
        self._linear(call, x, weight, False, bias)

    def _lower_mm(self, call: Call) -> None:
        self._linear(call, *call.args, False)

    def _lower_matmul(self, call: Call) -> None:
        self._linear(call, *call.args, False)

    def _lower_linear(self, call: Call) -> None:
        self._linear(call, call.args[0], call.args[1], True, *call.args[2:])

    def _lower_native_layer_norm(self, call: Call) -> None:
        x, normalized, weight, bias, eps = call.args
        v = self._whole(self._argument(x))
        if tuple(normalized) != v.shape or len(v.shape) != 1:
            self._fail(call, "is over other than all features of a sample")
        draft = Draft("layer_norm", self._source(v), v.width, eps=eps)
        if weight is not None:
            draft.scale_by(self._static(call, weight, v.shape))
        if bias is not None:
            draft.shifts.append(self._static(call, bias, v.shape))
        self.known[call.outputs[0]] = self._append(draft)

    def _identity(self, v: Value) -> tuple[Draft, Value]:
        """A new layer that reads v."""
        value = self._append(Draft("identity", self._source(v), v.width), v.shape)
        return self.drafts[value.draft], value

    def _activate(self, call: Call, name: str) -> None:
        v = self._whole(self._argument(call.args[0]))
        rest = call.args[1:]
        d = self._open(v, lambda d: d.is_affine)
        d, value = (d, v) if d is not None else self._identity(v)
        if name == "gelu" and call.kwargs.get("approximate") == "tanh":
            name = "gelu_tanh"
        if name == "leaky_relu":
            d.alpha = float(rest[0]) if rest else 0.01
        if name == "elu":
            alpha, scale, input_scale = (*rest, *(1.0, 1.0, 1.0)[len(rest) :])
            if input_scale != 1:
                self._fail(call, "with an input scale is not known to mlp_sample")
            d.alpha, d.gain = float(alpha), float(scale)
        if rest and name not in ("leaky_relu", "elu"):
            self._fail(call, "with arguments is not known to mlp_sample")
        d.activation = name
        self.known[call.outputs[0]] = Value(value.draft, 0, value.width, v.shape)

    def _affine(self, call: Call, a: Any, change: Callable[[Draft, Static], None], b: Any) -> None:
        """a depends on the state, b does not."""
        v = self._whole(self._argument(a))
        if tuple(self.record.tensors[call.outputs[0]].shape[1:]) != v.shape:
            self._fail(call, "broadcasts the state")
        static = self._static(call, b, v.shape)
        d = self._open(v, lambda d: d.is_affine)
        d, value = (d, v) if d is not None else self._identity(v)
        change(d, static)
        self.known[call.outputs[0]] = Value(value.draft, 0, value.width, v.shape)

    def _binary(self, call: Call, combine: str) -> None:
        """Both depend on the state: the later one takes the other in, if nothing else reads it."""
        p, q = (self._whole(self._argument(a)) for a in call.args[:2])
        if p.shape != q.shape:
            self._fail(call, "broadcasts the state")
        shape, (other, v) = p.shape, sorted((p, q), key=lambda v: v.draft)
        d = self._open(v, lambda d: d.combine == "none") if other.draft < v.draft else None
        d, v = (d, v) if d is not None else self._identity(v)
        d.combine, d.other = combine, self._source(other)
        self.known[call.outputs[0]] = Value(v.draft, 0, v.width, shape)

    def _lower_add(self, call: Call) -> None:
        a, b = self._terms(call)
        if self._argument(a) is not None and self._argument(b) is not None:
            return self._binary(call, "add")
        a, b = (a, b) if self._argument(a) is not None else (b, a)
        return self._affine(call, a, lambda d, s: d.shifts.append(s), b)

    def _lower_sub(self, call: Call) -> None:
        self._subtract(call, *self._terms(call))

    def _lower_rsub(self, call: Call) -> None:
        self._subtract(call, *self._terms(call)[::-1])

    def _terms(self, call: Call) -> tuple[Any, Any]:
        if call.kwargs.get("alpha", 1) != 1 or len(call.args) > 2:
            self._fail(call, "with alpha is not known to mlp_sample")
        return call.args

    def _subtract(self, call: Call, a: Any, b: Any) -> None:
        minus = Static.number(-1)
        if self._argument(b) is None:
            return self._affine(call, a, lambda d, s: d.shifts.append(s * minus), b)
        if self._argument(a) is None:
            return self._affine(call, b, lambda d, s: (d.scale_by(minus), d.shifts.append(s)), a)
        p, q = self._whole(self._argument(a)), self._whole(self._argument(b))
        if p.shape != q.shape:
            self._fail(call, "broadcasts the state")
        d, value = self._identity(q)
        d.scale_by(minus)
        d.combine, d.other = "add", self._source(p)
        self.known[call.outputs[0]] = value
        return None

    def _lower_neg(self, call: Call) -> None:
        self._affine(call, call.args[0], lambda d, s: d.scale_by(s), -1.0)

    def _lower_mul(self, call: Call) -> None:
        a, b = call.args[:2]
        if self._argument(a) is not None and self._argument(b) is not None:
            return self._binary(call, "multiply")
        a, b = (a, b) if self._argument(a) is not None else (b, a)
        return self._affine(call, a, lambda d, s: d.scale_by(s), b)

    def _lower_div(self, call: Call) -> None:
        a, b = call.args[:2]
        if self._argument(a) is None or self._argument(b) is not None or call.kwargs.get("rounding_mode"):
            self._fail(call, "divides by the state or rounds")
        one = Static.number(1)
        self._affine(call, a, lambda d, s: d.scale_by(one.combine(s, torch.div)), b)

    def _lower_addcmul(self, call: Call) -> None:
        """base + value * a * b, where base and one of a and b come without the state."""
        base, a, b = call.args
        a, b = (a, b) if self._argument(a) is not None else (b, a)
        if self._argument(base) is not None or self._argument(a) is None or self._argument(b) is not None:
            self._fail(call, "of several values that depend on the state")
        value = Static.number(call.kwargs.get("value", 1))
        v = self._whole(self._argument(a))
        shift = self._static(call, base, v.shape)
        self._affine(call, a, lambda d, s: (d.scale_by(s * value), d.shifts.append(shift)), b)

    def _lower_cat(self, call: Call) -> None:
        tensors, dim = call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        if len(self.record.tensors[call.outputs[0]].shape) != 2 or dim not in (1, -1):
            self._fail(call, "is not along the features")
        parts, widths = [], []
        for t in tensors:
            width = self.record.tensors[t.index].shape[1]
            v = self._argument(t)
            if isinstance(v, Parts):
                parts += v.parts
                widths += v.widths
                continue
            parts.append(v if v is not None else self._static(call, t, (width,)))
            widths.append(width)
        self.known[call.outputs[0]] = Parts(parts, widths)

    def _columns(self, call: Call, dim: int, ranges: list[tuple[int, int]]) -> None:
        """Outputs that are ranges of columns of a value `[n, width]`."""
        v = self._whole(self._argument(call.args[0]))
        if len(v.shape) != 1 or dim not in (1, -1):
            self._fail(call, "is not along the features")
        for out, (first, width) in zip(call.outputs, ranges, strict=True):
            self.known[out] = Value(v.draft, v.first + first, width, (width,))

    def _lower_slice(self, call: Call) -> None:
        args = (*call.args, *(0, None, None, 1)[len(call.args) - 1 :])
        _, dim, start, end, step = args
        shape = self.record.tensors[call.args[0].index].shape
        start, end, _ = slice(start, end).indices(shape[dim])
        if dim == 0 and (start, end, step) == (0, shape[0], 1):
            self.known[call.outputs[0]] = self._argument(call.args[0])
            return
        if step != 1:
            self._fail(call, "with a step is not known to mlp_sample")
        self._columns(call, dim, [(start, end - start)])

    def _lower_split(self, call: Call) -> None:
        dim = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
        widths = [self.record.tensors[o].shape[-1] for o in call.outputs]
        self._columns(call, dim, [(sum(widths[:i]), w) for i, w in enumerate(widths)])

    _lower_split_with_sizes = _lower_split

    def _lower_glu(self, call: Call) -> None:
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", -1)
        v = self._whole(self._argument(call.args[0]))
        if len(v.shape) != 1 or dim not in (1, -1):
            self._fail(call, "is not along the features")
        half = v.width // 2
        gate = Draft("identity", Source(v.draft, v.first + half, half), half, activation="sigmoid")
        gate.combine, gate.other = "multiply", Source(v.draft, v.first, half)
        self.known[call.outputs[0]] = self._append(gate)

    # ---- tables and layers ----

    def needed(self, of_rows: bool = False) -> set[int]:
        """Places of the values that weights and tables are made of; only tables of conditioning `of_rows`."""
        places = set()
        for d in self._all():
            places |= d.weight[1] if d.weight and not of_rows else set()
            for s in (d.scale, *d.shifts):
                if s is not None and (ROWS in s.kind or not of_rows):
                    places |= s.places
        return places

    @property
    def matrices(self) -> set[int]:
        """Places of the weights of linear layers."""
        return set().union(*(d.weight[1] for d in self._all() if d.weight))

    def width_of_both(self) -> int:
        """Floats in the terms of tables that have a row for every step of every sample."""
        tables = [(d, s) for d in self._all() for s in (d.scale, *d.shifts) if s is not None]
        return sum(d.width for d, s in tables if {TIME, ROWS} <= s.kind)

    def _all(self) -> Iterable[Draft]:
        for d in self.drafts[1:]:
            yield d
            yield from d.more

    def layers(self, r: Replayed, known: Sequence[Layer] | None = None) -> list[Layer]:
        """The layers. Weights and tables that do not depend on conditioning are taken over from `known` ones."""
        found, earlier = [], iter(known or ())
        for d in self.drafts[1:]:
            first = 0
            for part in (d, *d.more):
                found.append(self._layer(part, first, r, next(earlier, None)))
                first += part.width
        return found

    def _layer(self, d: Draft, first: int, r: Replayed, known: Layer | None) -> Layer:
        def table(name: str, terms: list[Static]) -> Tensor | None:
            if not terms:
                return None
            if known is not None and not any(ROWS in s.kind for s in terms):
                return getattr(known, name)
            return sum(s.table(r) for s in terms).float().expand(-1, -1, d.width).contiguous()

        weight = None
        if d.weight:
            weight = known.weight if known is not None else d.weight[0](r)
        return Layer(
            *(d.map, d.source, d.width, weight, d.eps),
            scale=table("scale", [d.scale] if d.scale is not None else []),
            shift=table("shift", [s for s in d.shifts if ROWS not in s.kind]),
            shift_each=table("shift_each", [s for s in d.shifts if ROWS in s.kind]),
            activation=d.activation,
            alpha=d.alpha,
            gain=d.gain,
            combine=d.combine,
            other=d.other,
            first=first,
        )


def _name(call: Call) -> str:
    """The operation's name, without the underscore of one that works in place."""
    name = call.function._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") else name
