"""Velocity evaluation and all steps of a sampler in one call, for networks that are stacks of linear layers."""

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_bool, expect_int, expect_list, expect_number, expect_tensor
from flowkernels.ops.library import (
    DTYPE_CODES,
    Made,
    direct,
    dispatch,
    fresh,
    is_captured,
    is_transformed,
    no_autocast,
    register,
    stream_of,
    uploaded,
)
from flowkernels.ops.mlp_sample import reference
from flowkernels.solver import Update, euler_sizes, last_uses

MAPS = ("identity", "linear", "layer_norm", "rms_norm")  # as csrc/mlp_sample/mlp_sample.h, norms last
COMBINES = ("none", "add", "multiply", "maximum", "minimum")
ACTIVATIONS = tuple(reference.ACTIVATIONS)
PLACE = 16  # floats: where values begin in a row of scratch memory, and what the rows of tables are padded to


class Source(NamedTuple):
    """Columns [first, first + width) of a value: 0 is the state x, others come from the layers."""

    value: int
    first: int
    width: int


@dataclass(frozen=True)
class Layer:
    """`other (+, *, max or min) gain * activation(scale * map(source) + shift + shift_each)`, one row a sample.

    map: "linear" (weight `[width, source.width]`), "layer_norm" or "rms_norm" (eps, no affine part) or
        "identity".
    scale, shift, shift_each: tables `[N or 1, n or 1, width]`, float32, one row for a step and a sample. They hold what
        depends on time or conditioning alone, biases too. Two shifts, since a sum of one row a step and one row a
        sample takes less room than a row for both.
    activation: none, relu, leaky_relu (slope alpha), silu, gelu, gelu_tanh, elu (alpha), tanh, sigmoid, mish, softplus,
        at_least (alpha) or at_most (alpha).
    first: the output's first column in its value; above 0 it is appended to the value of the layer before.
    """

    map: str
    source: Source
    width: int
    weight: Tensor | None = None
    eps: float = 1e-5
    scale: Tensor | None = None
    shift: Tensor | None = None
    shift_each: Tensor | None = None
    activation: str = "none"
    alpha: float = 0.0
    gain: float = 1.0
    combine: str = "none"
    other: Source | None = None
    first: int = 0

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.shift, self.shift_each


def mlp_sample(
    x: Tensor,
    step_sizes: Sequence[float] | Sequence[Update],
    layers: Sequence[Layer],
    *,
    unconditional: Sequence[Layer] | None = None,
    guidance: float = 1.0,
    weights: torch.dtype | None = None,
    trajectory: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """All Euler steps `x <- x + h_s v(x, t_s)` of a velocity network in one call, or all updates of a `Solver`.

    The state and all activations of a few samples stay in the caches (of the CUDA kernels in shared memory) through
    every layer and step; memory sees x, the result and the weights. `fk.fuse` makes the layers of a network, and packs
    its weights once instead of at every call as this function does. NaN and Inf are not looked for: they show in the
    result. Inside torch.func's transforms and forward-mode differentiation it runs as plain torch.

    Args:
        x: noise `[n, D]`, float32.
        step_sizes: h_s for s = 0..N-1, or what `Solver.updates()` returns: an `Update`, or a tuple like it, for each
            of N evaluations (whether the state after it starts from x instead of the state before it; which velocities
            are added; their factors; what the state that it starts from is multiplied by, 1 where that is left out).
        layers: the network; the value of the last layer is the velocity, of width D.
        unconditional: the same layers with the tables of the unconditional velocity, for guidance.
        guidance: w in `v_uncond + w (v - v_uncond)`; 1 means no guidance.
        weights: torch.bfloat16 to round the weights and the inputs of linear layers to it, summing in float32: a
            relative error of 2^-9 a product, and faster where the processor multiplies bfloat16. None: float32.
        trajectory: return every state and velocity as well.

    Returns:
        The state after N steps `[n, D]`; with `trajectory` the triple (state, states `[N+1, n, D]`, velocities
        `[N, n, D]`). There is no gradient: asking for one raises.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> from flowkernels.ops.mlp_sample import Layer, Source
        >>> layer = Layer("linear", Source(0, 0, 2), 2, weight=-torch.eye(2))
        >>> fk.mlp_sample(torch.ones(1, 2), [0.5, 0.5], [layer])  # two Euler steps of dx/dt = -x
        tensor([[0.2500, 0.2500]])
    """
    expect_tensor(x, "x", (torch.float32,))
    expect(x.dim() == 2 and x.shape[1] > 0, "x", "shape [n, D] with D > 0", x)
    expect(weights is None or weights is torch.bfloat16, "weights", "torch.bfloat16 or None", weights, TypeError)
    guidance, trajectory = expect_number(guidance, "guidance"), expect_bool(trajectory, "trajectory")
    expect(guidance == 1.0 or unconditional is not None, "guidance", "1 without unconditional", guidance)
    h = expect_steps(expect_list(step_sizes, "step_sizes", "a sequence of numbers"))
    expect_layers(layers, "layers", x, len(h))
    if unconditional is not None:
        expect_layers(unconditional, "unconditional", x, len(h))
        same = _code(unconditional) == _code(layers) and _numbers(unconditional) == _numbers(layers)
        same = same and all(a.weight is b.weight for a, b in zip(layers, unconditional, strict=True))
        expect(same, "unconditional", "the layers with other tables", "other layers")
    if torch.is_grad_enabled():
        others = _named_tensors(unconditional or (), "unconditional")
        for name, t in [("x", x), *_named_tensors(layers, "layers"), *others]:
            expect(not t.requires_grad, name, "no gradient: mlp_sample has none", "requires_grad")
    args = (x, *_flat_steps(h), *_flat(layers, unconditional), float(guidance), weights, trajectory)
    if (way := direct("mlp_sample", x, *args[3])) is not None:
        state, states, velocities = _kernel(way[0], *args)
    elif is_transformed():
        with no_autocast(x):
            state, states, velocities = reference.mlp_sample(x, h, layers, unconditional, float(guidance), weights)
    else:
        state, states, velocities = dispatch("mlp_sample", *args)
    return (state, states, velocities) if trajectory else state


def expect_steps(steps: list) -> list[float] | list[Update]:
    if not any(isinstance(step, (tuple, list)) for step in steps):
        return [float(expect_number(size, f"step_sizes[{i}]")) for i, size in enumerate(steps)]
    for i, update in enumerate(steps):
        where, form = f"step_sizes[{i}]", "(whether from x, which velocities, their factors, a scale), as all others"
        expect(isinstance(update, (tuple, list)) and len(update) in (3, 4), where, form, update, TypeError)
        from_start, which, factors, scale = Update(*update)
        expect(isinstance(from_start, bool), where, "True or False first", from_start, TypeError)
        expected = f"increasing numbers of evaluations from 0 to {i}"
        which, factors = expect_list(which, where, expected), expect_list(factors, where, "a list of factors")
        rises = all(type(k) is int for k in which) and all(a < b for a, b in itertools.pairwise([-1, *which, i + 1]))
        expect(rises, where, expected, which)
        expect(len(factors) == len(which), where, f"{len(which)} factors", factors)
        for k, factor in zip(which, factors, strict=True):
            expect_number(factor, f"{where}, factor of {k}")
        expect_number(scale, f"{where}, scale")
    updates = []
    for i, (from_start, which, factors, scale) in enumerate(itertools.starmap(Update, steps)):
        updates.append(Update(from_start and i > 0, tuple(which), tuple(map(float, factors)), float(scale)))
    sizes = euler_sizes(updates)
    return updates if sizes is None else sizes


def expect_layers(layers: Sequence[Layer], name: str, x: Tensor, steps: int) -> None:
    expect(isinstance(layers, Sequence), name, "a sequence of layers", layers, TypeError)
    expect(len(layers) > 0, name, "at least one layer", "none")
    n, widths = len(x), [x.shape[1]]
    for i, layer in enumerate(layers):
        where = f"{name}[{i}]"
        expect(isinstance(layer, Layer), where, "a Layer", layer, TypeError)
        for what, names in (("map", MAPS), ("combine", COMBINES), ("activation", ACTIVATIONS)):
            given = getattr(layer, what)
            expect(isinstance(given, str) and given in names, f"{where}.{what}", f"one of {', '.join(names)}", given)
        for what in ("eps", "alpha", "gain"):
            expect_number(getattr(layer, what), f"{where}.{what}")
        expect_int(layer.width, f"{where}.width", "at least 1", 1)
        expect_int(layer.first, f"{where}.first", "a number of columns", 0)
        together = (layer.combine == "none") == (layer.other is None)
        expect(together, f"{where}.other", "a source with combine, and None without", layer.other)
        for what, source in (("source", layer.source), ("other", layer.other)):
            if source is None and what == "other":
                continue
            is_source = isinstance(source, tuple) and [type(n) for n in source] == [int] * 3
            expect(is_source, f"{where}.{what}", "a Source of three integers", source, TypeError)
            value, first, width = source
            last = len(widths) - (1 if layer.first else 0)
            fits = 0 <= value < last and first >= 0 and width > 0 and first + width <= widths[value]
            expect(fits, f"{where}.{what}", f"columns of an earlier value of {widths[:last]} columns", source)
        fits = layer.other is None or layer.other.width == layer.width
        expect(fits, f"{where}.other", f"width {layer.width}", layer.other)
        if layer.map == "linear":
            expect_tensor(layer.weight, f"{where}.weight", (torch.float32,))
            shape = [layer.width, layer.source.width]
            fits = list(layer.weight.shape) == shape and layer.weight.device == x.device
            expect(fits, f"{where}.weight", f"shape {shape} on {x.device}", layer.weight)
        else:
            expect(layer.weight is None, f"{where}.weight", f"None with {layer.map}", layer.weight)
            expect(layer.source.width == layer.width, f"{where}.width", f"{layer.source.width}", layer.width)
        for what, table in zip(("scale", "shift", "shift_each"), layer.tables, strict=True):
            if table is None:
                continue
            expect_tensor(table, f"{where}.{what}", (torch.float32,))
            fits = table.dim() == 3 and table.shape[2] == layer.width and table.device == x.device
            fits = fits and table.shape[0] in (1, steps) and table.shape[1] in (1, n)
            expect(fits, f"{where}.{what}", f"shape [{steps} or 1, {n} or 1, {layer.width}] on {x.device}", table)
        if layer.first:
            expect(i > 0 and layer.first == widths[-1], f"{where}.first", "the width of the value so far", layer.first)
            widths[-1] += layer.width
        else:
            widths.append(layer.width)
    expect(widths[-1] == x.shape[1], name, f"a last value of {x.shape[1]} columns, as x has", f"{widths[-1]}")


def _named_tensors(layers: Sequence[Layer], where: str):
    for i, layer in enumerate(layers):
        for name in ("weight", "scale", "shift", "shift_each"):
            if (t := getattr(layer, name)) is not None:
                yield f"{where}[{i}].{name}", t


# Steps as the registered op takes them: the sizes; or all factors, and of each update whether it starts from x, how
# many terms it has, and which. A scale that is not 1 is the first of the update's factors, and a 2 in its first number.


def _flat_steps(steps: list[float] | list[Update]) -> tuple[list[float], list[int]]:
    if not steps or not isinstance(steps[0], Update):
        return steps, []
    code, factors = [], []
    for u in steps:
        scaled = u.scale != 1
        code += [u.from_start + 2 * scaled, len(u.which), *u.which]
        factors += [u.scale, *u.factors] if scaled else u.factors
    return factors, code


def _steps(step_sizes: Sequence[float], updates: Sequence[int]) -> list[float] | list[Update]:
    if not updates:
        return list(step_sizes)
    found, factors, code = [], iter(step_sizes), iter(updates)
    for begin in code:
        which = tuple(next(code) for _ in range(next(code)))
        scale = next(factors) if begin & 2 else 1.0
        found.append(Update(bool(begin & 1), which, tuple(next(factors) for _ in which), scale))
    return found


# A layer as the registered op takes it: its tensors, its integers and its numbers


def _code(layers: Sequence[Layer]) -> list[int]:
    code = []
    for a in layers:
        other = a.other or Source(-1, 0, 0)
        code += [MAPS.index(a.map), *a.source, a.width, ACTIVATIONS.index(a.activation)]
        code += [COMBINES.index(a.combine), *other, a.first]
        code += [sum((t is not None) << i for i, t in enumerate((a.weight, *a.tables)))]
    return code


_CODES = 12


def _numbers(layers: Sequence[Layer]) -> list[float]:
    return [float(v) for a in layers for v in (a.eps, a.alpha, a.gain)]


def _flat(layers, unconditional):
    tensors = [t for a in layers for t in (a.weight, *a.tables) if t is not None]
    tensors += [t for a in unconditional or () for t in a.tables if t is not None]
    return tensors, _code(layers), _numbers(layers), unconditional is not None


def _layers(tensors, code, numbers, guided) -> tuple[list[Layer], list[Layer] | None]:
    rest, found = iter(tensors), []

    def tables(present):
        return {name: next(rest) for i, name in enumerate(("scale", "shift", "shift_each")) if present >> i & 1}

    for i in range(0, len(code), _CODES):
        map_, value, first, width, out, activation, combine, o_value, o_first, o_width, at, present = code[
            i : i + _CODES
        ]
        eps, alpha, gain = numbers[i // _CODES * 3 : i // _CODES * 3 + 3]
        found.append(
            Layer(
                MAPS[map_],
                Source(value, first, width),
                out,
                weight=next(rest) if present & 1 else None,
                **tables(present >> 1),
                eps=eps,
                alpha=alpha,
                gain=gain,
                first=at,
                activation=ACTIVATIONS[activation],
                combine=COMBINES[combine],
                other=None if o_value < 0 else Source(o_value, o_first, o_width),
            )
        )
    if not guided:
        return found, None
    others = []
    for a, present in zip(found, code[_CODES - 1 :: _CODES], strict=True):
        others.append(Layer(**{**vars(a), **tables(present >> 1)}))
    return found, others


# The kernels' side


def _round_up(n: int) -> int:
    return -(-n // PLACE) * PLACE


class Plan:
    """A network as a kernel reads it: packed weights, and every value's place in a row of scratch memory.

    C: the compiled module, or that of the CUDA kernels.
    """

    def __init__(self, C, dim: int, layers: Sequence[Layer], weights: torch.dtype | None):
        self.C, self.dim, self.low = C, dim, int(weights is not None)
        self.weight_type = DTYPE_CODES[weights or torch.float32]
        pack = self._pack_for_cuda if is_cuda(C) else self._pack
        places, self.row = _places(dim, layers)
        self.packed, structs, value, table = [], b"", 0, 0
        for a in layers:
            value += not a.first
            weight = 0
            if a.map == "linear":
                self.packed.append(pack(a.weight))
                weight = self.packed[-1].data_ptr()
            numbers = []
            for t in a.tables:
                numbers.append(-1 if t is None else table)
                table += t is not None
            other = 0 if a.other is None else places[a.other.value] + a.other.first
            structs += struct.pack(
                "=qqqqqqdqqqqddqq",
                *(MAPS.index(a.map), places[a.source.value] + a.source.first, a.source.width),
                *(places[value] + a.first, a.width, weight, a.eps),
                *numbers,
                *(ACTIVATIONS.index(a.activation), a.alpha, a.gain, COMBINES.index(a.combine), other),
            )
        self.count, self.velocity, self.made = len(layers), places[value], Made(self.packed)
        self.structs = torch.frombuffer(bytearray(structs), dtype=torch.uint8)

    def prepare(self, steps: Tensor | Sequence[Update], layers, unconditional, guidance: float) -> "Prepared":
        """With the tables of these layers, which are the plan's. steps: float64 step sizes, or updates."""
        others = None if unconditional is None else Tables(unconditional)
        return Prepared(self, steps, Tables(layers), others, guidance)

    def _pack(self, weight: Tensor) -> Tensor:
        weight = weight.contiguous()
        size = self.C.mlp_pack(weight.data_ptr(), *weight.shape, self.weight_type, 0)
        room = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
        packed = room[-room.data_ptr() % 64 :][:size]
        self.C.mlp_pack(weight.data_ptr(), *weight.shape, self.weight_type, packed.data_ptr())
        return packed

    def _pack_for_cuda(self, weight: Tensor) -> Tensor:
        """Panels of 256 outputs, one after another: [inputs][outputs], padded to multiples of 4. For tensor cores to
        multiples of 16: [tile of inputs][tile of outputs][lane][8], as a lane holds them for mma.m16n8k16."""
        unit = 16 if self.low else 4
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % unit, 0, -weight.shape[0] % unit))
        panels = weight.split(256)
        if self.low:  # outputs: tile, half, row; inputs: tile, half, pair, one of the pair
            tiles = [w.bfloat16().reshape(-1, 2, 8, w.shape[1] // 16, 2, 4, 2) for w in panels]
            panels = [t.permute(3, 0, 2, 5, 4, 1, 6) for t in tiles]
        else:
            panels = [w.t() for w in panels]
        return torch.cat([w.reshape(-1) for w in panels])


def plan_for(kernels, dim: int, layers: Sequence[Layer], weights: torch.dtype | None):
    """The plan for the compiled module, that of the CUDA kernels, or that of the Triton kernels, which has its own."""
    if hasattr(kernels, "Plan"):
        return kernels.Plan(dim, layers, weights)
    return Plan(kernels, dim, layers, weights)


def is_cuda(C) -> bool:
    """Whether it is the module of the CUDA kernels."""
    return hasattr(C, "mlp_program")


class Prepared:
    """A plan with the tables of one schedule: all that the kernel is given but the samples."""

    def __init__(
        self,
        plan: Plan,
        steps: Tensor | Sequence[Update],
        tables: "Tables",
        unconditional: "Tables | None",
        guidance: float,
    ):
        self.C, self.is_cuda = plan.C, is_cuda(plan.C)
        given = steps if isinstance(steps, Tensor) else Updates(steps)
        self.kept = (plan, given, tables, unconditional)  # their memory is read
        h, updates = (steps.data_ptr(), (0, 0, 0, 0)) if given is steps else (0, given.numbers)
        uncond = 0 if unconditional is None else unconditional.structs.data_ptr()
        numbers = struct.pack(
            "=qqqqqqqqqdqqqqq",
            *(plan.dim, len(steps), h, plan.structs.data_ptr(), plan.count, plan.row, plan.velocity),
            *(tables.structs.data_ptr(), uncond, guidance, plan.low, *updates),
        )
        self.struct = torch.frombuffer(bytearray(numbers), dtype=torch.uint8)
        self.address = self.struct.data_ptr()
        self.program: Tensor | None = None
        plan.made.use()
        self.made = Made([*plan.packed, *tables.padded, *(() if unconditional is None else unconditional.padded)])

    def run(self, x: Tensor, out: Tensor, states: Tensor | None = None, velocities: Tensor | None = None) -> int:
        """The first sample whose result is not finite, or -1; always -1 on a GPU, which is not waited for."""
        kept = (0 if t is None else t.data_ptr() for t in (states, velocities))
        if not self.is_cuda:
            pointers = x.data_ptr(), out.data_ptr()
            return self.C.mlp_sample(self.address, *pointers, len(x), *kept, torch.get_num_threads())
        where = stream_of(x)
        self.made.use()
        if (program := self.program) is None:
            host = torch.empty(self.C.mlp_program(self.address, 0), dtype=torch.uint8, device="cpu")
            self.C.mlp_program(self.address, host.data_ptr())
            program = uploaded(self.C, host, x, where)
            if not is_captured(x):
                self.program, self.made = program, Made([program, *self.made.tensors])
        scratch = x.new_empty(self.C.mlp_scratch(self.address, len(x), where[0]), dtype=torch.uint8)
        pointers = program.data_ptr(), x.data_ptr(), out.data_ptr()
        self.C.mlp_sample(self.address, *pointers, len(x), *kept, scratch.data_ptr(), *where)
        return -1


def _places(dim: int, layers: Sequence[Layer]) -> tuple[list[int], int]:
    """Each value's first float in the row, and the row's length. A value's room is free again after its last use.

    Whole vectors are read and written: a room also holds what lies past the columns that a layer asks for.
    """
    rooms, last_use = [_round_up(dim)], {}
    for i, a in enumerate(layers):
        room = _round_up(a.first + _round_up(a.width))  # whole vectors are written
        if a.first:
            rooms[-1] = max(rooms[-1], room)
        else:
            rooms.append(room)
        for source in (a.source, a.other):
            if source is not None:
                last_use[source.value] = i
                rooms[source.value] = max(rooms[source.value], _round_up(source.first + _round_up(source.width)))
    taken, places, value, end = [(0, rooms[0], 0)], [0], 0, rooms[0]
    for i, a in enumerate(layers):
        if a.first:
            continue
        value += 1
        taken = [t for t in taken if t[2] == 0 or last_use.get(t[2], i) >= i]  # the state stays
        room, at = rooms[value], 0
        for begin, stop, _ in sorted(taken):
            if at + room <= begin:
                break
            at = max(at, stop)
        taken.append((at, at + room, value))
        places.append(at)
        end = max(end, *(stop for _, stop, _ in taken))
    return places, end


class Tables:
    """The tables of some layers as the kernels read them: rows padded to whole vectors, their addresses."""

    def __init__(self, layers: Sequence[Layer]):
        self.padded, numbers = [], []
        for table in (t for a in layers for t in a.tables if t is not None):
            width = table.shape[2]
            if width % PLACE or table.stride(2) != 1 or (table.shape[1] > 1 and table.stride(1) % PLACE):
                table = torch.nn.functional.pad(table, (0, -width % PLACE)).contiguous()
            self.padded.append(table)
            steps, samples = (table.stride(d) if table.shape[d] > 1 else 0 for d in (0, 1))
            numbers += [table.data_ptr(), steps, samples]
        self.structs = torch.tensor(numbers, dtype=torch.int64, device="cpu")


class Updates:
    """Updates as the kernels read them. A velocity that a later update adds has a place until then.

    listed: for each update whether it starts from x, its number of terms, and the place where its velocity is kept, or
    -1. scales: one for each. places: of each term's velocity, -1 for that of the update's own evaluation. count: of
    places.
    """

    def __init__(self, updates: Sequence[Update]):
        last = last_uses(updates)
        self.listed, self.places, self.count = [], [], 0
        self.scales, self.factors = [u.scale for u in updates], [b for u in updates for b in u.factors]
        taken, free = {}, []
        for i, u in enumerate(updates):
            self.places += [taken.get(k, -1) for k in u.which]
            free += [taken.pop(k) for k in u.which if k < i and last[k] == i]
            if last[i] > i:
                self.count += not free
                taken[i] = free.pop() if free else self.count - 1
            self.listed.append((int(u.from_start), len(u.which), taken.get(i, -1)))
        structs = b"".join(struct.pack("=qqq", *numbers) for numbers in self.listed)
        terms = b"".join(struct.pack("=qd", *term) for term in zip(self.places, self.factors, strict=True))
        self.structs = bytearray(structs + terms + struct.pack(f"={len(self.scales)}d", *self.scales)) or bytearray(1)
        at = torch.frombuffer(self.structs, dtype=torch.uint8).data_ptr()
        scales = 0 if all(scale == 1 for scale in self.scales) else at + len(structs) + len(terms)
        self.numbers = at, at + len(structs), self.count, scales


def _empty(x: Tensor, steps: int, trajectory: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = steps if trajectory else -1
    states = x.new_empty(kept + 1, *x.shape) if trajectory else x.new_empty(0)
    return x.new_empty(x.shape), states, x.new_empty(kept, *x.shape) if trajectory else x.new_empty(0)


def _kernel(C, x, step_sizes, updates, tensors, code, numbers, guided, guidance, weights, trajectory, *where):
    layers, unconditional = _layers(tensors, code, numbers, guided)
    plan = plan_for(C, x.shape[1], layers, weights)
    steps = _steps(step_sizes, updates)
    out, states, velocities = map(fresh, _empty(x, len(steps), trajectory))
    given = steps if updates else torch.tensor(steps, dtype=torch.float64, device="cpu")
    kept = (states, velocities) if trajectory else (None, None)
    plan.prepare(given, layers, unconditional, guidance).run(x.contiguous(), out, *kept)
    return out, states, velocities


def _reference(x, step_sizes, updates, tensors, code, numbers, guided, guidance, weights, trajectory):
    layers, unconditional = _layers(tensors, code, numbers, guided)
    steps = _steps(step_sizes, updates)
    out, *kept = reference.mlp_sample(x, steps, layers, unconditional, guidance, weights)
    empty = _empty(x, len(steps), trajectory)
    return empty[0].copy_(out), *(kept if trajectory else empty[1:])


def _fake(x, step_sizes, updates, tensors, code, numbers, guided, guidance, weights, trajectory):
    return _empty(x, len(_steps(step_sizes, updates)), trajectory)


register(
    "mlp_sample(Tensor x, float[] step_sizes, int[] updates, Tensor[] tensors, int[] code, float[] numbers, "
    "bool guided, float guidance, ScalarType? weights, bool trajectory) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _reference,
    _fake,
)
