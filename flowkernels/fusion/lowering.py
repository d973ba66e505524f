"""From a recorded velocity network to the layers of `mlp_sample`.

A further operation of torch becomes fusable here: one that leaves values where they are by its name in `SAME`; one that
puts them elsewhere by its name in `MOVES`, where it is done on numbers of columns in place of values; another by a
method `_lower_NAME` of `Lowering`, which makes it of `_plus`, `_times`, `_join`, `_activated`, `_bounded` and `_norm`
on what `_operands` returns, the arguments as torch broadcasts them. NAME is what aten records, without the underscore
of one in place, and not always what was called: `x.square()` is `pow`, `F.relu6` is `hardtanh`. The message of
`NotFusable` shows it. An operation that reads a value twice adds its draft to `held`, or the first reading would change
what the second one reads. What is looked at are the values that depend on the state; all else is replayed by torch,
once a schedule. Each has a row in `PLAIN` of tests/test_fuse_operations.py, in the forms that torch has of it, and a
draw in `ALONE`, `TOGETHER` or `MODULES` there; what is refused has one in `REFUSED`.

The activations are those of `mlp_sample`, by aten's names. One that has arguments has its branch in `_activate`. A new
one is first added to the op: ops/mlp_sample/reference.py (`ACTIVATIONS`), the docstring of `Layer` and triton_kernel.py
beside it; in csrc/mlp_sample/ the enumeration of mlp_sample.h, run.h, cuda.cu and test.cpp; its vectors in
csrc/common/activations.h; a shape more in `sample_inputs` of ops/mlp_sample/samples.py, and `zero_below` in
tests/ops/test_mlp_sample.py; the lists in docs/fused-samplers.md, "Which networks", and in the docstring of `fuse`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowkernels.fusion.record import ROWS, STATE, TIME, Call, NotFusable, Record, Ref, Refused
from flowkernels.ops.mlp_sample import ACTIVATIONS, Layer, Source
from flowkernels.runtime.torch_private import tree_flatten, tree_map


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

    def columns(self, first: int, width: int, of: int) -> "Static":
        """Some of its `of` columns."""
        if (first, width) == (0, of):
            return self
        return Static(self.kind, self.places, lambda r: self.table(r).expand(-1, -1, of)[..., first : first + width])

    def map(self, f: Callable[[Tensor], Tensor]) -> "Static":
        return Static(self.kind, self.places, lambda r: f(self.table(r)))

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
    """Columns from several places, which nothing has needed as one value yet."""

    parts: list[Value | Static]
    widths: list[int]
    shape: tuple[int, ...]


@dataclass
class Square:
    """The square of a value, which nothing has needed yet but its mean; of `mean` features, with eps added, and under a
    root (power 1/2) or the reciprocal of one (-1/2)."""

    of: Value
    shape: tuple[int, ...]
    mean: int = 0
    eps: float = 0.0
    power: float = 1.0


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
SAME += ("lift_fresh", "flatten", "native_dropout", "dropout", "view_as", "to")
# What puts values elsewhere, and which of its arguments they are in; its others say where, the same for all samples
MOVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unfold"), (0,)),
    **dict.fromkeys(("permute", "transpose", "t", "movedim", "flip", "roll", "diagonal", "rot90"), (0,)),
    **dict.fromkeys(("expand", "repeat", "tile", "index", "index_select", "gather", "take_along_dim"), (0,)),
    **dict.fromkeys(("cat", "stack"), (0,)),
    **dict.fromkeys(("slice_scatter", "select_scatter", "copy"), (0, 1)),
    "index_put": (0, 2),
}
ACTIVATED = frozenset(ACTIVATIONS) - {"none", "gelu_tanh", "at_least", "at_most"}  # these have other names in aten
MOST_PARTS = 4096  # that a value is put together of
ROW = 1 << 32  # between the numbers of a sample's columns and those of the next one's
MEAN = "is a mean over features, which nothing but an RMSNorm may read here: x * rsqrt(mean(x^2, -1, keepdim) + eps)"


class Lowering:
    """Turns a record into drafts of layers."""

    def __init__(self, record: Record, x: int, out: int, dim: int):
        self.record, self.drafts, self.dim = record, [None], dim  # value 0 is the state
        self.known: dict[int, Value | Parts | Square] = {x: Value(0, 0, dim, tuple(record.tensors[x].shape[1:]))}
        self.readers = self._count_readers(out)
        self.own: set[int] = set()  # drafts that only the operation at hand has seen yet
        self.held: set[int] = set()  # drafts that the operation at hand reads again
        refused, unknown = Refused(record.refused), set()
        for call in record.calls:
            if STATE not in call.kind:
                continue
            self.at, self.own, self.held = call, set(), set()
            read = {a.index for a in tree_flatten((call.args, call.kwargs))[0] if isinstance(a, Ref)}
            try:
                if unknown.isdisjoint(read):
                    self._lower(call)
                    continue
            except NotFusable as e:
                refused.append(str(e))
            unknown.update(call.outputs)  # the rest is looked at as if it were a value of this shape
            for place in call.outputs:
                if (rows := self._rows_at(place)) is not None:
                    shape = _without(self.record.tensors[place].shape, rows)
                    self.known[place] = self._append(
                        Draft("identity", Source(0, 0, 1), torch.Size(shape).numel()), shape
                    )
                    unknown.discard(place)
        refused.raise_any()
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
        self.own.add(len(self.drafts) - 1)
        return Value(len(self.drafts) - 1, 0, self._width(len(self.drafts) - 1), shape or (draft.width,))

    def _whole(self, v: Value | Parts | Square) -> Value:
        """What is put together, or was not needed until now, as one value."""
        if isinstance(v, Value):
            return v
        if isinstance(v, Square):
            if v.mean:
                raise NotFusable(f"the velocity {MEAN}")
            square = Draft("identity", self._source(v.of), v.of.width, combine="multiply", other=self._source(v.of))
            return self._append(square, v.shape)
        drafts = []
        for part, width in zip(v.parts, v.widths, strict=True):
            if isinstance(part, Value):
                drafts.append(Draft("identity", self._source(part), width))
                continue
            for c in range(0, width, self.dim):  # a table: nothing times the state, plus the table
                w = min(self.dim, width - c)
                columns = part.columns(c, w, width)
                drafts.append(Draft("identity", Source(0, 0, w), w, scale=Static.number(0), shifts=[columns]))
        drafts[0].more = drafts[1:]
        return self._append(drafts[0], v.shape)

    def _open(self, v: Value, ready: Callable[[Draft], bool]) -> Draft | None:
        """The draft that makes v, if one operation alone reads it and `ready` says that it may go on there."""
        d = self.drafts[v.draft]
        if d is None or d.more or (v.first, v.width) != (0, d.width) or v.draft in self.held or not ready(d):
            return None
        if v.draft in self.own:
            return d
        places = [p for p, k in self.known.items() if v.draft in (w.draft for w in _values(k))]
        if sum(self.readers.get(p, 0) for p in places) != 1:
            return None
        for p in places:  # they hold what the draft was before
            del self.known[p]
        self.own.add(v.draft)
        return d

    def _rows_at(self, place: int) -> int | None:
        """The dimension that counts the samples."""
        shape = tuple(self.record.tensors[place].shape)
        return shape.index(self.record.rows) if shape.count(self.record.rows) == 1 else None

    def _static(self, call: Call, a: Any, shape: tuple[int, ...], rows: int = 0) -> Static:
        """An argument without the state, to be broadcast to `shape` with the samples at `rows`."""
        if not isinstance(a, Ref):
            return Static.number(a)
        kind, place = self.record.kinds[a.index], a.index
        sizes, dims = tuple(self.record.tensors[place].shape), len(shape) + 1
        sizes = (1,) * (dims - len(sizes)) + sizes
        leads = len(sizes) == dims and sizes[rows] == self.record.rows
        expected = (*shape[:rows], self.record.rows if leads else 1, *shape[rows:])
        if len(sizes) != dims or any(s not in (1, e) for s, e in zip(sizes, expected, strict=True)):
            self._fail(call, f"meets a tensor of shape {list(self.record.tensors[place].shape)}")
        if kind and not leads:
            self._fail(call, "uses time or conditioning other than as one row a sample")

        def table(r: Replayed) -> Tensor:
            value = r.values[place].to(r.device)  # constants of no dimension may be on the CPU
            value = value.reshape((1,) * (dims - value.dim()) + value.shape).movedim(rows, 0)
            value = value.broadcast_to(len(value), *shape).reshape(len(value), -1)
            steps, n = r.steps if TIME in kind else 1, r.n if ROWS in kind else 1
            return value.double().view(steps, n, -1)

        return Static(kind, frozenset({place}), table)

    def _argument(self, a: Any) -> Value | Parts | Square | None:
        """What an argument is that depends on the state; None for others."""
        if not isinstance(a, Ref) or STATE not in self.record.kinds[a.index]:
            return None
        if a.index not in self.known:
            self._fail(self.at, "reads a norm's mean or another side result")
        return self.known[a.index]

    def _state(self, call: Call, a: Any) -> Value:
        """An argument that has to depend on the state."""
        v = self._argument(a)
        if v is None:
            self._fail(call, "on the state's shape is not known to mlp_sample")
        if isinstance(v, Square) and v.mean:
            self._fail(call, f"reads what {MEAN}")
        if not isinstance(v, Value):
            v = self.known[a.index] = self._whole(v)
            self.own.discard(v.draft)  # others may read it, too
        return v

    def _shape(self, call: Call) -> tuple[int, tuple[int, ...]]:
        """Where the samples are in what the operation returns, and the shape of one."""
        rows = self._rows_at(call.outputs[0])
        if rows is None:
            self._fail(
                call, "leaves no row for each sample: it mixes them, or folds them and features into one dimension"
            )
        return rows, _without(self.record.tensors[call.outputs[0]].shape, rows)

    def _operands(self, call: Call, *args: Any) -> list[Value | Static]:
        """Arguments as they are broadcast to what the operation returns."""
        rows, shape = self._shape(call)
        found = []
        for a in args:
            if self._argument(a) is None:
                found.append(self._static(call, a, shape, rows))
                continue
            full = self.record.tensors[call.outputs[0]].shape
            if self.record.tensors[a.index].shape == full:
                found.append(self._state(call, a))
            else:
                found.append(self._whole(*self._moved(call, [a], lambda t, full=full: [t.expand(full)])))
        twice = [v.draft for v in found if isinstance(v, Value)]
        self.held |= {d for d in twice if twice.count(d) > 1}
        return found

    # ---- one operation ----

    def _lower(self, call: Call) -> None:
        if not call.outputs:
            self._fail(call, "returns no tensor")
        name, args, out = _name(call), call.args, call.outputs[0]
        _, shape = self._shape(call)
        dtype = self.record.tensors[out].dtype
        method = getattr(self, f"_lower_{name}", None)
        if not dtype.is_floating_point:
            self._fail(call, f"makes {dtype} of values that depend on x")
        if name in SAME:
            v = self._argument(args[0])
            if v is None:
                self._fail(call, "on the state's shape is not known to mlp_sample")
            if torch.Size(shape).numel() != torch.Size(v.shape).numel():
                self._fail(call, "changes the number of columns")
            if self._rows_at(args[0].index) != 0 or self._rows_at(out) != 0:
                return self._move(call, (0,))  # columns may come to lie before the samples
            self.known[out] = replace(v, shape=shape)
        elif name in ACTIVATED:
            self._activate(call, name)
        elif method is not None:
            method(call)
        elif name in MOVES:
            self._move(call, MOVES[name])
        else:
            self._fail(call, "on values that depend on x is nothing that mlp_sample computes")
        return None

    # ---- what puts values elsewhere ----

    def _move(self, call: Call, data: tuple[int, ...]) -> None:
        """An operation that returns elements of its arguments, found out by doing it on their numbers."""
        given = [call.args[i] for i in data]
        flat = tree_flatten(given)[0]
        for a in tree_flatten(([v for i, v in enumerate(call.args) if i not in data], call.kwargs))[0]:
            if isinstance(a, Ref) and not self._is_constant(a.index):
                self._fail(call, "takes places that are not the same in every call")
        if _name(call) == "index_put" and True in (*call.args[3:], *call.kwargs.values()):
            self._fail(call, "adds up values at places")

        def again(*numbers: Tensor) -> list[Tensor]:
            rest = iter(numbers)
            args = list(call.args)
            for i in data:
                args[i] = tree_map(lambda a: next(rest).clone() if isinstance(a, Ref) else a, args[i])
            plain = tree_map(lambda a: self.record.tensors[a.index] if isinstance(a, Ref) else a, (args, call.kwargs))
            return [t for t in tree_flatten(call.function(*plain[0], **plain[1]))[0] if isinstance(t, Tensor)]

        for place, v in zip(call.outputs, self._moved(call, flat, again), strict=True):
            self.known[place] = v

    def _is_constant(self, place: int) -> bool:
        """Whether a value is the same in every call of the network as it is, and still what it was when it was read."""
        return not self.record.kinds[place] and place not in self.record.given and self.record.is_current(place)

    def _moved(
        self, call: Call, given: list, f: Callable[..., list[Tensor]], fill: float | None = None
    ) -> list[Value | Parts]:
        """What f makes of these arguments, which it does nothing to but put them elsewhere; fill: a number that it may
        put somewhere as well."""
        origins: list[tuple[Any, int, int]] = []  # what a column is of: a draft or a Static, its number, of how many
        numbers = []
        for a in given:
            t, rows = self.record.tensors[a.index], self._rows_at(a.index)
            v, base = self._argument(a), len(origins)
            shape = tuple(t.shape) if rows is None else _without(t.shape, rows)
            width = torch.Size(shape).numel()
            if v is None and rows is None and self.record.kinds[a.index]:
                self._fail(call, "uses time or conditioning other than as one row a sample")
            parts = v if isinstance(v, Parts) else Parts([v], [width], shape)
            if v is None:
                parts = Parts([self._static(call, a, shape, rows or 0)], [width], shape)
            elif isinstance(v, Square):
                parts = Parts([self._state(call, a)], [width], shape)
            for part, w in zip(parts.parts, parts.widths, strict=True):
                of = part.draft if isinstance(part, Value) else part
                origins += [(of, (part.first if isinstance(part, Value) else 0) + c, w) for c in range(w)]
            columns = torch.arange(base, base + width, device=t.device).view(shape)
            if rows is None:
                numbers.append(columns)
                continue
            row = torch.arange(1, 1 + self.record.rows, device=t.device) * ROW
            index = [None] * t.dim()
            index[rows] = slice(None)
            numbers.append(columns.unsqueeze(rows) + row[tuple(index)])
        if fill is not None:
            origins.append((Static.number(fill), 0, 1))
            numbers.append(len(origins) - 1)
        found = []
        try:
            moved = f(*numbers)
        except (RuntimeError, ValueError, IndexError, TypeError) as e:
            self._fail(call, f"does more than to put values elsewhere ({e})")
        for out in moved:
            dims = [d for d, size in enumerate(out.shape) if size == self.record.rows]
            if len(dims) != 1:
                self._fail(call, "leaves no row for each sample")
            rows = out.movedim(dims[0], 0)
            first, step = rows[0].flatten(), torch.arange(self.record.rows, device=out.device)
            moves = torch.where(first >= ROW, ROW, 0) * step[:, None]
            if not torch.equal(rows.reshape(len(rows), -1), first + moves):
                self._fail(call, "mixes samples")
            found.append(self._parts(call, [origins[i] for i in (first % ROW).tolist()], tuple(rows.shape[1:])))
        return found

    def _parts(self, call: Call, columns: list[tuple[Any, int, int]], shape: tuple[int, ...]) -> Value | Parts:
        """Columns, by what they are of and their numbers, in as few parts as possible."""
        runs: list[list] = []
        for of, number, width in columns:
            last = runs[-1] if runs and (runs[-1][0] is of or (isinstance(of, int) and runs[-1][0] == of)) else None
            same = isinstance(of, int) or (
                last and last[2] == width
            )  # numbers are tables of one column, or as if of more
            if last and same and (last[1] + last[3] == number or (isinstance(of, Static) and width == 1)):
                last[3] += 1
            else:
                runs.append([of, number, width, 1])
        if len(runs) > MOST_PARTS:
            self._fail(call, f"puts a value together of {len(runs)} parts")
        parts = [
            Value(of, first, w, (w,)) if isinstance(of, int) else of if width == 1 else of.columns(first, w, width)
            for of, first, width, w in runs
        ]
        if len(parts) == 1 and isinstance(parts[0], Value):
            return replace(parts[0], shape=shape)
        return Parts(parts, [run[3] for run in runs], shape)

    def _lower_constant_pad_nd(self, call: Call) -> None:
        x, pad, value = (*call.args, 0.0)[:3]
        self._state(call, x)
        (v,) = self._moved(call, [x], lambda t, fill: [torch.constant_pad_nd(t, pad, fill)], float(value))
        self.known[call.outputs[0]] = v

    def _lower_where(self, call: Call) -> None:
        """By a mask that does not depend on the state."""
        mask, a, b = call.args
        if self._argument(mask) is not None:
            self._fail(call, "chooses by values that depend on x")
        mask, a, b = self._operands(call, mask, a, b)
        self._choose(call, mask, a, b)

    def _lower_masked_fill(self, call: Call) -> None:
        x, mask, value = call.args
        if self._argument(mask) is not None:
            self._fail(call, "chooses by values that depend on x")
        x, mask, value = self._operands(call, x, mask, value)
        self._choose(call, mask, value, x)

    def _choose(self, call: Call, mask: Static, a: Value | Static, b: Value | Static) -> None:
        """a where the mask is set, b elsewhere."""

        def masked(v: Value | Static, mine: Static) -> Value | Static:
            if isinstance(v, Static):  # whatever it is elsewhere
                return _where(v, mine)
            d, value = self._draft(v, lambda d: d.is_affine)
            d.scale, d.shifts = _where(d.scale or Static.number(1), mine), [_where(s, mine) for s in d.shifts]
            return value

        a, b = masked(a, mask), masked(b, mask.map(lambda m: (m == 0).double()))
        self._result(call, self._plus(a, b))

    # ---- linear layers ----

    def _linear(self, call: Call, x: Any, weight: Any, transposed: bool, bias: Any = None, by=(1.0, 1.0)) -> None:
        """by: what the product and the bias are multiplied by."""
        v = self._argument(x)
        bad = v is None or self._argument(weight) is not None or self._argument(bias) is not None
        if bad or self.record.kinds[weight.index]:
            self._fail(call, "is not a row of features times a matrix of parameters")
        rows, shape = self._shape(call)
        width = torch.Size(shape).numel()
        t = self.record.tensors[weight.index]
        size = t.numel() // (1 if (repeated := self._rows_at(weight.index)) is None else self.record.rows)
        if repeated not in (None, 0) or size != torch.Size(v.shape).numel() * width:
            self._fail(call, "multiplies several rows of features of a sample")
        parts = v if isinstance(v, Parts) else Parts([self._state(call, x)], [torch.Size(v.shape).numel()], v.shape)
        out = call.outputs[0]
        first, dynamic, columns, shifts = 0, [], [], []
        place, (factor, of_bias) = weight.index, by

        def matrix(r: Replayed) -> Tensor:  # [in, out]
            value = r.values[place]
            value = value.reshape(value.shape[-2:]).T if transposed else value
            return value.reshape(-1, width) if factor == 1 else value.reshape(-1, width).double() * factor

        for part, w in zip(parts.parts, parts.widths, strict=True):
            if isinstance(part, Value):
                dynamic.append((part, w))
                columns.append((first, w))
            else:  # its columns of the weight meet a table: another table

                def table(r: Replayed, part=part, first=first, w=w) -> Tensor:
                    return part.table(r).expand(-1, -1, w) @ matrix(r)[first : first + w].double()

                shifts.append(Static(part.kind, part.places | {place}, table))
            first += w
        if bias is not None and of_bias != 0:
            shifts.append(self._static(call, bias, shape, rows) * Static.number(of_bias))
        if not dynamic:  # nothing of the state is left
            self.known[out] = Parts([sum(shifts[1:], start=shifts[0])], [width], shape)
            return
        if len(dynamic) > 1:
            widths = [w for _, w in dynamic]
            source = self._whole(Parts([p for p, _ in dynamic], widths, (sum(widths),)))
        else:
            source = dynamic[0][0]

        def picked(r: Replayed) -> Tensor:
            return torch.cat([matrix(r)[c : c + w] for c, w in columns]).T.float().contiguous()

        draft = Draft("linear", self._source(source), width, weight=(picked, frozenset({place})), shifts=shifts)
        self.known[out] = self._append(draft, shape)

    def _product(self, call: Call, a: Any, b: Any, bias: Any = None, by=(1.0, 1.0)) -> None:
        """A matrix product: of rows of features by a matrix, or of a matrix by columns of features."""
        if self._argument(a) is not None and self._argument(b) is not None:
            self._fail(call, "multiplies two matrices that depend on x")
        if self._argument(a) is not None:
            return self._linear(call, a, b, False, bias, by)
        return self._linear(call, b, a, True, bias, by)

    def _lower_addmm(self, call: Call) -> None:
        by = float(call.kwargs.get("alpha", 1)), float(call.kwargs.get("beta", 1))
        bias, a, b = call.args[:3]
        if self._argument(bias) is None:
            return self._product(call, a, b, bias, by)
        self._product(call, a, b, None, (by[0], 0.0))
        product, (base,) = self._whole(self.known[call.outputs[0]]), self._operands(call, bias)
        return self._result(call, self._plus(product, base, by[1]))

    _lower_baddbmm = _lower_addmv = _lower_addmm

    def _lower_mm(self, call: Call) -> None:
        self._product(call, *call.args[:2])

    _lower_matmul = _lower_bmm = _lower_mv = _lower_dot = _lower_mm

    def _lower_linear(self, call: Call) -> None:
        self._linear(call, call.args[0], call.args[1], True, *call.args[2:])

    # ---- norms ----

    def _norm(self, v: Value, map_: str, features: int, eps: float) -> Value:
        """Each run of so many features by itself."""
        sources = (Source(v.draft, v.first + c, features) for c in range(0, v.width, features))
        first, *rest = (Draft(map_, source, features, eps=eps) for source in sources)
        first.more = rest
        return self._append(first, v.shape)

    def _affine(self, call: Call, v: Value, weight: Any, bias: Any, shape: tuple[int, ...] = ()) -> Value:
        """Times a weight, plus a bias, each None or a tensor; shape: of one, beside dimensions of 1 after it."""
        for a, f in ((weight, self._times), (bias, self._plus)):
            if a is not None:
                v = f(v, self._parameter(call, a, v.shape, shape))
        return v

    def _parameter(self, call: Call, a: Ref, shape: tuple[int, ...], own: tuple[int, ...] = ()) -> Static:
        if self._argument(a) is not None:
            self._fail(call, "has parameters that depend on x")
        if not own:
            return self._static(call, a, shape)
        if self.record.kinds[a.index]:
            self._fail(call, "uses time or conditioning other than as one row a sample")
        place = a.index
        return Static(
            frozenset(),
            frozenset({place}),
            lambda r: r.values[place].to(r.device).double().view(own).expand(shape).reshape(1, 1, -1),
        )

    def _lower_native_layer_norm(self, call: Call) -> None:
        x, normalized, weight, bias, eps = call.args
        v, normalized = self._state(call, x), tuple(normalized)
        if self._rows_at(x.index) != 0 or v.shape[len(v.shape) - len(normalized) :] != normalized:
            self._fail(call, "is over other than features of a sample")
        out = self._norm(v, "layer_norm", torch.Size(normalized).numel(), eps)
        self._result(call, self._affine(call, out, weight, bias))

    def _lower__fused_rms_norm(self, call: Call) -> None:
        x, normalized, weight, eps = call.args
        v, normalized = self._state(call, x), tuple(normalized)
        if self._rows_at(x.index) != 0 or v.shape[len(v.shape) - len(normalized) :] != normalized:
            self._fail(call, "is over other than features of a sample")
        eps = torch.finfo(self.record.tensors[x.index].dtype).eps if eps is None else eps
        out = self._norm(v, "rms_norm", torch.Size(normalized).numel(), eps)
        self._result(call, self._affine(call, out, weight, None))

    def _lower_native_group_norm(self, call: Call) -> None:
        x, weight, bias, _, channels, _, groups, eps = call.args
        v = self._state(call, x)
        out = self._norm(v, "layer_norm", v.width // groups, eps)
        self._result(call, self._affine(call, out, weight, bias, (channels, *(1 for _ in v.shape[1:]))))

    def _lower_native_batch_norm(self, call: Call) -> None:
        x, weight, bias, mean, variance, training, _, eps = call.args
        if training or mean is None or variance is None:
            self._fail(call, "takes the mean and the variance of the batch: expected eval mode and running statistics")
        v = self._state(call, x)
        if self._rows_at(x.index) != 0:
            self._fail(call, "is over other than features of a sample")
        own = (v.shape[0], *(1 for _ in v.shape[1:]))
        mean, variance = (self._parameter(call, a, v.shape, own) for a in (mean, variance))
        scale = variance.map(lambda a: (a + eps).rsqrt())
        if weight is not None:
            scale = scale * self._parameter(call, weight, v.shape, own)
        out = self._plus(self._times(v, scale), mean * scale * Static.number(-1))
        self._result(call, self._affine(call, out, None, bias, own))

    _lower_cudnn_batch_norm = _lower_native_batch_norm

    def _lower_pow(self, call: Call) -> None:
        x, exponent = call.args
        v = self._argument(x)
        if v is None or isinstance(exponent, Ref):
            self._fail(call, "with an exponent that is a tensor is not known to mlp_sample")
        if isinstance(v, Square) and v.mean and v.power == 1 and exponent in (0.5, -0.5):
            self.known[call.outputs[0]] = replace(v, power=exponent)
            return
        v = self._state(call, x)
        if exponent == 2:
            self.known[call.outputs[0]] = Square(v, v.shape)
            return
        if exponent not in (1, 3, 4):
            self._fail(call, f"to the power of {exponent} is nothing that mlp_sample computes")
        self.held.add(v.draft)
        out = v
        for _ in range(int(exponent) - 1 if exponent < 4 else 2):
            out = self._join(out, v if exponent < 4 else out, "multiply")
            self.held.add(out.draft)
        self._result(call, out)

    def _lower_mean(self, call: Call) -> None:
        v, rest = self._argument(call.args[0]), call.args[1:]
        dims = rest[0] if rest else None
        if not isinstance(v, Square) or v.mean or not isinstance(dims, (list, tuple)) or len(dims) != 1:
            self._fail(call, MEAN)
        if dims[0] not in (-1, len(v.shape)) or self._rows_at(call.args[0].index) != 0:
            self._fail(call, MEAN)
        kept = (1,) if len(rest) > 1 and rest[1] else ()
        self.known[call.outputs[0]] = replace(v, shape=(*v.shape[:-1], *kept), mean=v.shape[-1])

    def _lower_rsqrt(self, call: Call) -> None:
        self._root(call, -0.5)

    def _lower_sqrt(self, call: Call) -> None:
        self._root(call, 0.5)

    def _root(self, call: Call, power: float) -> None:
        v = self._argument(call.args[0])
        if not isinstance(v, Square) or not v.mean or v.power != 1:
            self._fail(call, "on values that depend on x is nothing that mlp_sample computes")
        self.known[call.outputs[0]] = replace(v, power=power)

    def _lower_reciprocal(self, call: Call) -> None:
        v = self._argument(call.args[0])
        if not isinstance(v, Square) or v.power != 0.5:
            self._fail(call, "divides by values that depend on x")
        self.known[call.outputs[0]] = replace(v, power=-0.5)

    def _rms_norm(self, call: Call, x: Any, root: Any, power: float) -> bool:
        """Whether the operation takes x times `power` of the root of its own mean square, which is then lowered."""
        v, square = self._argument(x), self._argument(root)
        if not isinstance(square, Square) or square.power != power or v is None or isinstance(v, Square):
            return False
        if self._state(call, x) != square.of or square.shape != (*square.of.shape[:-1], 1):
            return False
        v = square.of
        self._result(call, self._norm(v, "rms_norm", square.mean, square.eps))
        return True

    # ---- element by element ----

    def _result(self, call: Call, v: Value | Static) -> None:
        _, shape = self._shape(call)
        if isinstance(v, Static):
            self.known[call.outputs[0]] = Parts([v], [torch.Size(shape).numel()], shape)
        else:
            self.known[call.outputs[0]] = replace(v, shape=shape)

    def _draft(self, v: Value, ready: Callable[[Draft], bool]) -> tuple[Draft, Value]:
        """The draft of v where it may go on, or a new layer that reads v."""
        if (d := self._open(v, ready)) is not None:
            return d, v
        value = self._append(Draft("identity", self._source(v), v.width), v.shape)
        return self.drafts[value.draft], value

    def _times(self, a: Value | Static, b: Value | Static) -> Value | Static:
        if isinstance(a, Static):
            a, b = b, a
        if isinstance(a, Static):
            return a * b
        if isinstance(b, Value):
            return self._join(a, b, "multiply")
        d, value = self._draft(a, lambda d: d.is_affine)
        d.scale_by(b)
        return value

    def _plus(self, a: Value | Static, b: Value | Static, alpha: float = 1.0) -> Value | Static:
        """a + alpha * b"""
        if isinstance(a, Value) and isinstance(b, Value):
            return self._join(a, b, "add", alpha)
        if isinstance(b, Value):
            b = b if alpha == 1 else self._times(b, Static.number(alpha))
            a, b, alpha = b, a, 1.0
        b = b if alpha == 1 else b * Static.number(alpha)
        if isinstance(a, Static):
            return a + b
        d, value = self._draft(a, lambda d: d.is_affine)
        d.shifts.append(b)
        return value

    def _join(self, p: Value, q: Value, combine: str, alpha: float = 1.0) -> Value:
        """Both depend on the state: the later one takes the other in, if nothing else reads it. alpha: of q."""
        other, v = (p, q) if alpha != 1 else sorted((p, q), key=lambda v: v.draft)
        d = self._open(v, lambda d: d.combine == "none") if other.draft < v.draft else None
        if d is None:
            v = self._append(Draft("identity", self._source(v), v.width), v.shape)
            d = self.drafts[v.draft]
        d.gain *= alpha
        d.combine, d.other = combine, self._source(other)
        return v

    def _activated(self, v: Value, activation: str, alpha: float = 0.0, gain: float = 1.0) -> Value:
        d, value = self._draft(v, lambda d: d.is_affine)
        d.activation, d.alpha, d.gain = activation, alpha, gain
        return value

    def _activate(self, call: Call, name: str) -> None:
        (v,) = self._operands(call, call.args[0])
        if isinstance(v, Static):
            self._fail(call, "on the state's shape is not known to mlp_sample")
        rest, alpha, gain = [float(a) for a in call.args[1:]], 0.0, 1.0
        if name == "gelu" and call.kwargs.get("approximate") == "tanh":
            name = "gelu_tanh"
        if name == "leaky_relu":
            alpha = rest[0] if rest else 0.01
        if name == "elu":  # scale * (x > 0 ? x : alpha (exp(c x) - 1)), which has c x in both once scale is scale / c
            alpha, scale, c = (*rest, *(1.0, 1.0, 1.0)[len(rest) :])
            self._expect_positive(call, c)
            v, alpha, gain = self._scaled(v, c), alpha * c, scale / c
        if name == "softplus":
            beta, threshold = (*rest, *(1.0, 20.0)[len(rest) :])
            self._expect_positive(call, beta)
            if threshold < 18:  # log(1 + e) differs from x by more than float32 rounds
                self._fail(call, f"with a threshold of {threshold:g} has a jump that mlp_sample does not compute")
            v, gain = self._scaled(v, beta), 1 / beta
        if rest and name not in ("leaky_relu", "elu", "softplus"):
            self._fail(call, "with arguments is not known to mlp_sample")
        self._result(call, self._activated(v, name, alpha, gain))

    def _expect_positive(self, call: Call, scale: float) -> None:
        if scale <= 0:
            self._fail(call, f"with a scale of {scale:g} is not known to mlp_sample")

    def _scaled(self, v: Value, factor: float) -> Value:
        return v if factor == 1 else self._times(v, Static.number(factor))

    def _lower_celu(self, call: Call) -> None:
        alpha = float(call.args[1]) if len(call.args) > 1 else 1.0
        self._expect_positive(call, alpha)
        v = self._scaled(self._state(call, call.args[0]), 1 / alpha)
        self._result(call, self._activated(v, "elu", 1.0, alpha))

    def _lower_log_sigmoid_forward(self, call: Call) -> None:
        v = self._scaled(self._state(call, call.args[0]), -1.0)
        self._result(call, self._activated(v, "softplus", gain=-1.0))

    def _lower__prelu_kernel(self, call: Call) -> None:
        """max(x, 0) - weight * max(-x, 0)"""
        v, weight = self._operands(call, *call.args)
        if isinstance(weight, Value) or isinstance(v, Static):
            self._fail(call, "has a slope that depends on x")
        self.held.add(v.draft)
        below = self._activated(self._scaled(v, -1.0), "relu")
        self._result(call, self._plus(self._activated(v, "relu"), self._times(below, weight), -1.0))

    def _bounded(self, v: Value | Static, bound: Any, which: str) -> Value | Static:
        """The greater of both ("maximum") or the lesser one."""
        if isinstance(v, Static):
            v, bound = bound, v
        if isinstance(v, Static):
            return v.combine(bound, getattr(torch, which))
        if isinstance(bound, Value):
            return self._join(v, bound, which)
        table = Draft("identity", self._source(v), v.width, scale=Static.number(0), shifts=[bound])
        table.combine, table.other = which, self._source(v)
        return self._append(table, v.shape)

    def _clamped(self, v: Value | Static, low: Any, high: Any) -> Value | Static:
        """Numbers, or None"""
        if low is not None:
            v = self._activated(v, "relu") if low == 0 else self._activated(v, "at_least", float(low))
        return v if high is None else self._activated(v, "at_most", float(high))

    def _lower_clamp(self, call: Call) -> None:
        low, high = (*call.args[1:], None, None)[:2]
        low, high = call.kwargs.get("min", low), call.kwargs.get("max", high)
        if isinstance(low, Ref) or isinstance(high, Ref):
            (v,) = self._operands(call, call.args[0])
            for bound, which in ((low, "maximum"), (high, "minimum")):
                if bound is not None:
                    v = self._bounded(v, *self._operands(call, bound), which)
            self._result(call, v)
        else:
            self._result(call, self._clamped(self._state(call, call.args[0]), low, high))

    def _lower_clamp_min(self, call: Call) -> None:
        v, bound = self._operands(call, *call.args)
        if isinstance(call.args[1], Ref):
            self._result(call, self._bounded(v, bound, "maximum"))
        else:
            self._result(call, self._clamped(v, call.args[1], None))

    def _lower_clamp_max(self, call: Call) -> None:
        v, bound = self._operands(call, *call.args)
        if isinstance(call.args[1], Ref):
            self._result(call, self._bounded(v, bound, "minimum"))
        else:
            self._result(call, self._clamped(v, None, call.args[1]))

    def _lower_hardtanh(self, call: Call) -> None:
        low, high = (*call.args[1:], *(-1.0, 1.0)[len(call.args) - 1 :])
        self._result(call, self._clamped(self._state(call, call.args[0]), low, high))

    def _lower_maximum(self, call: Call) -> None:
        self._result(call, self._bounded(*self._operands(call, *call.args), "maximum"))

    def _lower_minimum(self, call: Call) -> None:
        self._result(call, self._bounded(*self._operands(call, *call.args), "minimum"))

    def _lower_abs(self, call: Call) -> None:
        v = self._state(call, call.args[0])
        self.held.add(v.draft)
        self._result(call, self._join(v, self._scaled(v, -1.0), "maximum"))

    def _lower_threshold(self, call: Call) -> None:
        x, threshold, value = call.args
        if threshold != value:
            self._fail(call, "with another value than its threshold has a jump that mlp_sample does not compute")
        self._result(call, self._clamped(self._state(call, x), threshold, None))

    def _lower_softshrink(self, call: Call) -> None:
        """max(x - l, 0) + min(x + l, 0), and the latter is -max(-x - l, 0)"""
        v, bound = self._state(call, call.args[0]), float(call.args[1]) if len(call.args) > 1 else 0.5
        self.held.add(v.draft)
        above = self._activated(self._plus(v, Static.number(-bound)), "relu")
        below = self._activated(self._plus(self._scaled(v, -1.0), Static.number(-bound)), "relu")
        self._result(call, self._plus(above, below, -1.0))

    def _lower_hardsigmoid(self, call: Call) -> None:
        v = self._plus(self._state(call, call.args[0]), Static.number(3.0))
        self._result(call, self._times(self._clamped(v, 0.0, 6.0), Static.number(1 / 6)))

    def _lower_hardswish(self, call: Call) -> None:
        v = self._state(call, call.args[0])
        self.held.add(v.draft)
        gate = self._times(self._clamped(self._plus(v, Static.number(3.0)), 0.0, 6.0), Static.number(1 / 6))
        self._result(call, self._times(v, gate))

    def _lower_add(self, call: Call) -> None:
        self._add(call, *call.args[:2], self._alpha(call))

    def _lower_sub(self, call: Call) -> None:
        self._add(call, *call.args[:2], -self._alpha(call))

    def _lower_rsub(self, call: Call) -> None:
        self._add(call, *call.args[1::-1], -self._alpha(call))

    def _alpha(self, call: Call) -> float:
        return float(call.args[2] if len(call.args) > 2 else call.kwargs.get("alpha", 1))

    def _add(self, call: Call, a: Any, b: Any, alpha: float) -> None:
        v = self._argument(a)
        if isinstance(v, Square) and v.mean and v.power == 1 and not isinstance(b, Ref):
            self.known[call.outputs[0]] = replace(v, eps=v.eps + alpha * float(b))
            return
        self._result(call, self._plus(*self._operands(call, a, b), alpha))

    def _lower_neg(self, call: Call) -> None:
        self._result(call, self._scaled(self._state(call, call.args[0]), -1.0))

    def _lower_mul(self, call: Call) -> None:
        a, b = call.args[:2]
        if isinstance(a, Ref) and a == b:
            v = self._state(call, a)
            self.known[call.outputs[0]] = Square(v, v.shape)
        elif isinstance(v := self._argument(a), Square) and v.mean and not isinstance(b, Ref) and b == 1:
            self.known[call.outputs[0]] = v  # of 1 / root
        elif not self._rms_norm(call, a, b, -0.5) and not self._rms_norm(call, b, a, -0.5):
            self._result(call, self._times(*self._operands(call, a, b)))

    def _lower_div(self, call: Call) -> None:
        a, b = call.args[:2]
        if call.kwargs.get("rounding_mode"):
            self._fail(call, "rounds")
        if self._rms_norm(call, a, b, 0.5):
            return
        root = self._argument(b)
        if isinstance(root, Square) and root.power == 0.5 and not isinstance(a, Ref) and a == 1:
            self.known[call.outputs[0]] = replace(root, power=-0.5)
            return
        if root is not None:
            self._fail(call, "divides by values that depend on x")
        a, b = self._operands(call, a, b)
        self._result(call, self._times(a, Static.number(1).combine(b, torch.div)))

    def _lower_addcmul(self, call: Call) -> None:
        """base + value * a * b"""
        base, a, b = self._operands(call, *call.args)
        self._result(call, self._plus(base, self._times(a, b), float(call.kwargs.get("value", 1))))

    def _lower_addcdiv(self, call: Call) -> None:
        """base + value * a / b"""
        if self._argument(call.args[2]) is not None:
            self._fail(call, "divides by values that depend on x")
        base, a, b = self._operands(call, *call.args)
        quotient = self._times(a, Static.number(1).combine(b, torch.div))
        self._result(call, self._plus(base, quotient, float(call.kwargs.get("value", 1))))

    def _lower_lerp(self, call: Call) -> None:
        """a + w (b - a), which is (1 - w) a + w b"""
        a, b, w = self._operands(call, *call.args)
        if isinstance(w, Static):
            a = self._times(a, w.map(lambda w: 1 - w))
            return self._result(call, self._plus(a, self._times(b, w)))
        self.held |= {v.draft for v in (a, b, w) if isinstance(v, Value)}
        return self._result(call, self._plus(a, self._times(self._plus(b, a, -1.0), w)))

    def _lower_glu(self, call: Call) -> None:
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", -1)
        a, b = map(self._whole, self._moved(call, [call.args[0]], lambda t: list(t.chunk(2, dim))))
        gate = Draft("identity", self._source(b), b.width, activation="sigmoid")
        gate.combine, gate.other = "multiply", self._source(a)
        self._result(call, self._append(gate))

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


def _where(v: Static, mask: Static) -> Static:
    """0 where the mask is not set, also of what is not finite there."""
    return v.combine(mask, lambda v, m: torch.where(m != 0, v, 0.0))


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _values(v: Value | Parts | Square) -> list[Value]:
    """The values that it is made of."""
    if isinstance(v, Parts):
        return [part for part in v.parts if isinstance(part, Value)]
    return [v.of if isinstance(v, Square) else v]
