"""`mlp_sample` in Triton: all steps in one launch.

A program takes a tile of samples through every layer and every step. It reads the network from a list of lines in
memory, one line a layer, so that one compiled kernel runs any network. Unrolling the list at compile time instead would
save reading a line of 21 numbers a layer, and the branches on what it says, but compile for seconds at every new
network; and values would go through memory all the same, since Triton cannot take columns of a tensor in registers.

The values of a tile lie in rows of scratch memory which no other program reads; they stay in the caches. Whatever a
layer reads there was written before a barrier of the program: it orders accesses to all memory among the threads of one
program, which share a first level cache, on NVIDIA's GPUs as on AMD's.
"""

import functools
import sys
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from flowkernels.ops import triton_common
from flowkernels.ops.library import Made, is_captured
from flowkernels.ops.mlp_sample import (
    ACTIVATIONS,
    COMBINES,
    MAPS,
    PLACE,
    Layer,
    Updates,
    _kernel,
    _places,
    _round_up,
)
from flowkernels.ops.triton_common import scalar
from flowkernels.solver import Update

# BLOCK: columns of a tile of outputs, DEEP: inputs that are multiplied at a time, a divisor of DEPTH
CONFIGS = {"mlp_sample": {"ROWS": 16, "BLOCK": 128, "DEEP": 32, "num_warps": 8, "num_stages": 4}}
SEARCH = {
    "mlp_sample": {
        "ROWS": (16, 32, 64),
        "BLOCK": (64, 128, 256),
        "DEEP": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
}
DEPTH = tl.constexpr(64)  # what the inputs of products are padded to a multiple of
RESIDENT = 2  # programs for each multiprocessor: more samples are taken tile after tile, so that rows stay in caches

# What a line says. A place is that of a column in the row. Products read their inputs at INPUTS, where they are to be
# COPIED if they have to be rounded, aligned or padded. Tables: where they begin, and from step to step and from sample
# to sample; the first is -1 for none.
MAP, SOURCE, SOURCE_WIDTH, COPIED, INPUTS, OUT, WIDTH, WEIGHT, OUTPUTS = map(tl.constexpr, range(9))
ACTIVATION, COMBINE, OTHER = map(tl.constexpr, range(9, 12))
SCALE, SHIFT, SHIFT_EACH, LINE = map(tl.constexpr, (12, 15, 18, 21))
EPS, ALPHA, GAIN = map(tl.constexpr, range(3))
FROM_START, TERMS, KEPT, UPDATE = map(tl.constexpr, range(4))  # as `Updates` lists them
LINEAR, LAYER_NORM = (tl.constexpr(MAPS.index(name)) for name in ("linear", "layer_norm"))
ADD, MULTIPLY, MAXIMUM = map(tl.constexpr, range(1, len(COMBINES) - 1))
RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, ELU, TANH, SIGMOID, MISH, *MORE = map(tl.constexpr, range(1, len(ACTIVATIONS)))
SOFTPLUS, AT_LEAST, AT_MOST = MORE


# ---- what a layer does ----
# Rows and tables are read 4 bytes a thread, neighbours side by side: columns begin anywhere, and with one layout for
# all that follows a product nothing is exchanged between threads. Products read 16 bytes a thread.


@triton.jit
def _copy_inputs(row, place, width, inputs, at, BLOCK: tl.constexpr):
    """The inputs of a product where it can read them, with zeros after the last one."""
    padded = (width + DEPTH - 1) // DEPTH * DEPTH
    for first in range(0, padded, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        found = tl.load(row + place + column, mask=column < width, other=0.0)
        tl.store(inputs + at + column, found.to(inputs.dtype.element_ty), mask=column < padded)


@triton.jit
def _product(
    inputs,  # [ROWS, 1] pointers to rows
    at,  # their first column, a multiple of 8
    depth,
    weight,  # [depth, outputs], both padded
    outputs,  # a multiple of 16
    first,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs first..first + BLOCK of the tile's samples. The order of a sum is the same whatever the tile."""
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = column < outputs
    k = tl.arange(0, DEEP)
    x = inputs + at + k[None, :]
    w = weight + k[:, None] * outputs + column
    sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(0, depth, DEEP):
        sum = tl.dot(tl.load(x), tl.load(w, mask=mask), sum, input_precision=PRECISION)
        x += DEEP
        w += DEEP * outputs
    return sum


@triton.jit
def _moments(row, width, eps, centred, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean and 1 / deviation of each sample; not centred: 0 and 1 / root of the mean square."""
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        sums += tl.load(row + column, mask=column < width, other=0.0)
    mean = tl.where(centred, tl.sum(sums, 1, keep_dims=True) / width, 0.0)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        off = tl.where(column < width, tl.load(row + column, mask=column < width, other=0.0) - mean, 0.0)
        squares += off * off
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, 1, keep_dims=True) / width + eps)


@triton.jit
def _table(tables, line, step, sample, column, mask):
    """A table's entries; line points to where it begins in `tables` and to its strides."""
    begin = tl.load(line) + step * tl.load(line + 1)
    return tl.load(tables + begin + sample * tl.load(line + 2) + column, mask=mask)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: its series near 0, where the difference would lose digits."""
    series = x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    return tl.where(x > -0.4, x + x * series, tl.exp(x) - 1.0)


@triton.jit
def _activate(x, activation, alpha):
    if activation == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif activation == LEAKY_RELU:
        x = tl.where(x < 0.0, alpha * x, x)
    elif activation == SILU:
        x = x * tl.sigmoid(x)
    elif activation == GELU:
        x = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif activation == GELU_TANH:
        x = x * tl.sigmoid(x * (0.07135481283 * x * x + 1.5957691216))
    elif activation == ELU:
        x = tl.where(x > 0.0, x, alpha * _expm1(x))
    elif activation == TANH:
        e = _expm1(-2.0 * tl.abs(x))
        x = tl.where(x < 0.0, e, -e) / (e + 2.0)
    elif activation == SIGMOID:
        x = tl.sigmoid(x)
    elif activation == MISH:  # x tanh(log(1 + e)) = x w / (w + 2), w = e (e + 2)
        e = tl.exp(tl.minimum(x, 40.0))
        w = e * (e + 2.0)
        x = x * (w / (w + 2.0))
    elif activation == SOFTPLUS:  # log(1 + e) = 2 artanh(e / (e + 2)), whose argument is 1 / 3 at most
        e = tl.exp(-tl.abs(x))
        s = e / (e + 2.0)
        z = s * s
        series = 2 / 7 + z * (2 / 9 + z * (2 / 11 + z * (2 / 13 + z * (2 / 15))))
        x = tl.where(x < 0.0, 0.0, x) + s * (2.0 + z * (2 / 3 + z * (2 / 5 + z * series)))
    elif activation == AT_LEAST:
        x = tl.where(x < alpha, alpha, x)
    elif activation == AT_MOST:
        x = tl.where(x > alpha, alpha, x)
    return x


@triton.jit
def _layer(
    line,  # [LINE]
    numbers,  # [3]
    step,
    sample,  # [ROWS, 1]
    weights,
    tables,
    row,  # [ROWS, 1] pointers
    inputs,  # [ROWS, 1] pointers
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = other (+, *, max or min) gain * activation(scale * map(source) + shift + shift_each)"""
    map = tl.load(line + MAP)
    source, depth = tl.load(line + SOURCE), tl.load(line + SOURCE_WIDTH).to(tl.int32)
    at, outputs = tl.load(line + INPUTS) // 8 * 8, tl.load(line + OUTPUTS) // 16 * 16
    weight = weights + tl.load(line + WEIGHT) // 16 * 16
    out, width = row + tl.load(line + OUT), tl.load(line + WIDTH).to(tl.int32)
    activation, combine = tl.load(line + ACTIVATION), tl.load(line + COMBINE)
    alpha, gain = tl.load(numbers + ALPHA), tl.load(numbers + GAIN)
    mean, factor = tl.zeros([ROWS, 1], tl.float32), tl.full([ROWS, 1], 1.0, tl.float32)
    if map >= LAYER_NORM:
        mean, factor = _moments(row + source, depth, tl.load(numbers + EPS), map == LAYER_NORM, ROWS, BLOCK)
    if tl.load(line + COPIED) != 0:
        _copy_inputs(row, source, depth, inputs, at, BLOCK)
        tl.debug_barrier()
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = column < width
        if map == LINEAR:
            y = _product(inputs, at, depth, weight, outputs, first, ROWS, BLOCK, DEEP, PRECISION)
        else:
            y = (tl.load(row + source + column, mask=mask) - mean) * factor
        if tl.load(line + SCALE) >= 0:
            y *= _table(tables, line + SCALE, step, sample, column, mask)
        if tl.load(line + SHIFT) >= 0:
            y += _table(tables, line + SHIFT, step, sample, column, mask)
        if tl.load(line + SHIFT_EACH) >= 0:
            y += _table(tables, line + SHIFT_EACH, step, sample, column, mask)
        y = gain * _activate(y, activation, alpha)
        if combine != 0:
            other = tl.load(row + tl.load(line + OTHER) + column, mask=mask)
            if combine == ADD:
                y = other + y
            elif combine == MULTIPLY:
                y = other * y
            else:
                beyond = tl.where(combine == MAXIMUM, other > y, other < y)
                y = tl.where(beyond | (other != other), other, y)  # y, if that is NaN
        tl.store(out + column, y, mask=mask)


# ---- all layers, all steps ----


@triton.jit
def _updated(
    row,  # [ROWS, 1] pointers to states
    x,  # [ROWS, 1] pointers to x_0
    past,  # [ROWS, 1] pointers to velocities that are kept, [place, room]
    room,
    v,  # [ROWS, BLOCK]
    column,
    mask,
    scale,
    update,  # [UPDATE]
    places,  # of this update's terms
    factors,
):
    """x_0 or the state, scaled, and the terms, one after another; v is kept where a later update wants it."""
    state = scale * tl.load(tl.where(tl.load(update + FROM_START) != 0, x, row) + column, mask=mask)
    for i in range(tl.load(update + TERMS).to(tl.int32)):
        place = tl.load(places + i)
        term = tl.load(past + place * room + column, mask=mask & (place >= 0))
        state += tl.load(factors + i) * tl.where(place >= 0, term, v)
    kept = tl.load(update + KEPT)
    if kept >= 0:
        tl.store(past + kept * room + column, v, mask=mask)
    return state


@triton.jit(do_not_specialize=["n", "D", "steps", "count", "velocity", "uncond", "kept"])
def mlp_sample_kernel(
    x,  # [n, D]
    out,  # [n, D]
    states,  # [steps + 1, n, D], if 1 is in `kept`
    velocities,  # [steps, n, D], if 2 is in `kept`
    h,  # [steps], or the scales of all updates and then their factors
    updates,  # [steps, UPDATE], or None for Euler steps
    places,  # [terms]
    lines,  # [count, LINE]
    numbers,  # [count, 3]: eps, alpha, gain
    weights,
    tables,
    rows,  # [programs * ROWS, pitch]: the state at 0, the velocity, the unconditional one or -1, others, kept ones
    inputs,  # [programs * ROWS, input_pitch]: rows again, or in bfloat16 the inputs of a product
    guidance,
    n,
    D,
    steps,
    count,
    velocity,
    uncond,
    kept,
    past,  # place in the row of velocities that are kept, with room for so many columns each
    room,
    pitch,
    input_pitch,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r = tl.arange(0, ROWS)[:, None].to(tl.int64)
    n = tl.full((), n, tl.int64)
    place = tl.program_id(0) * ROWS + r
    row, inputs = rows + place * pitch, inputs + place * input_pitch
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        sample = tile * ROWS + r
        here = sample < n
        sample = tl.minimum(sample, n - 1)  # rows past the last sample are it again
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = column < D
            state = tl.load(x + sample * D + column, mask=mask)
            tl.store(row + column, state, mask=mask)
            if kept % 2 == 1:
                tl.store(states + sample * D + column, state, mask=mask & here)
        tl.debug_barrier()
        term = 0
        for step in range(steps):
            for i in range(count):
                _layer(lines + i * LINE, numbers + i * 3, step, sample, weights, tables, row, inputs,
                       ROWS, BLOCK, DEEP, PRECISION)  # fmt: skip
                tl.debug_barrier()
            for first in range(0, D, BLOCK):
                column = first + tl.arange(0, BLOCK)[None, :]
                mask = column < D
                v = tl.load(row + velocity + column, mask=mask)
                if uncond >= 0:
                    u = tl.load(row + uncond + column, mask=mask)
                    v = u + scalar(guidance, tl.float32) * (v - u)
                if updates is None:
                    state = tl.load(row + column, mask=mask) + tl.load(h + step) * v
                else:
                    state = _updated(row, x + sample * D, row + past, room, v, column, mask,
                                     tl.load(h + step), updates + step * UPDATE, places + term,
                                     h + steps + term)  # fmt: skip
                tl.store(row + column, state, mask=mask)
                at = (step * n + sample) * D + column
                if kept >= 2:
                    tl.store(velocities + at, v, mask=mask & here)
                if kept % 2 == 1:
                    tl.store(states + at + n * D, state, mask=mask & here)
            if updates is not None:
                term += tl.load(updates + step * UPDATE + TERMS).to(tl.int32)
            tl.debug_barrier()
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            state = tl.load(row + column, mask=column < D)
            tl.store(out + sample * D + column, state, mask=(column < D) & here)
        tl.debug_barrier()


# ---- the host ----


class Plan:
    """A network as the kernel reads it: packed weights, and lines that lack their tables."""

    def __init__(self, dim: int, layers: Sequence[Layer], weights: torch.dtype | None):
        self.dim, self.low = dim, weights
        places, self.row = _places(dim, layers)
        self.lines, self.numbers, self.input_width = [], [], 0
        packed, begin, value = [], 0, 0
        for a in layers:
            value += not a.first
            source = places[a.source.value] + a.source.first
            other = 0 if a.other is None else places[a.other.value] + a.other.first
            copied = False
            if a.map == "linear":
                copied = weights is not None or source % 8 != 0 or a.source.width % DEPTH.value != 0
                room = (0, -a.width % PLACE, 0, -a.source.width % DEPTH.value)
                packed.append(pad(a.weight.t(), room).to(weights or torch.float32).reshape(-1))
            if copied:
                self.input_width = max(self.input_width, a.source.width + -a.source.width % DEPTH.value)
            self.lines.append([
                *(MAPS.index(a.map), source, a.source.width, copied, source),
                *(places[value] + a.first, a.width, begin, _round_up(a.width)),
                *(ACTIVATIONS.index(a.activation), COMBINES.index(a.combine), other),
            ])  # fmt: skip
            self.numbers += [a.eps, a.alpha, a.gain]
            begin = sum(w.numel() for w in packed)
        self.velocity = places[value]
        self.weights = torch.cat(packed) if packed else None
        self.made = Made([self.weights])
        self.sent: dict[str, tuple[list, Tensor, Made]] = {}

    def prepare(self, steps: Tensor | Sequence[Update], layers, unconditional, guidance: float) -> "Prepared":
        """With the tables of these layers, which are the plan's. steps: float64 step sizes, or updates."""
        return Prepared(self, steps, layers, unconditional, guidance)

    def on_device(self, what: str, values: list, x: Tensor) -> Tensor:
        """These numbers beside x."""
        if what in self.sent and self.sent[what][0] == values:
            _, found, made = self.sent[what]
            made.use()
            return found
        found = triton_common.on_device(values, torch.float32 if what in ("h", "numbers") else torch.int64, x.device)
        if not is_captured(x):
            self.sent[what] = values, found, Made([found])
        return found


class Prepared:
    """A plan with the tables of one schedule: all that the kernel is given but the samples."""

    def __init__(self, plan: Plan, steps: Tensor | Sequence[Update], layers, unconditional, guidance: float):
        self.plan, self.guidance, self.steps = plan, guidance, len(steps)
        self.pitch, self.uncond, inputs = plan.row, -1, 0
        if isinstance(steps, Tensor):
            self.h, self.updates, self.places, count = steps.tolist(), None, None, 0
        else:
            given = Updates(steps)
            self.updates = [number for update in given.listed for number in update]
            self.h, self.places, count = given.scales + given.factors, given.places, given.count
        if unconditional is not None:
            self.uncond, self.pitch = self.pitch, self.pitch + _round_up(plan.dim)
        if plan.low is None:  # copies of inputs are in the row as well
            inputs, self.pitch = self.pitch, self.pitch + plan.input_width
        self.past, self.pitch = self.pitch, self.pitch + count * _round_up(plan.dim)
        self.lines, self.numbers, packed = [], [], []

        def table(t: Tensor | None) -> list[int]:
            if t is None:
                return [-1, 0, 0]
            for d in (0, 1):
                if t.stride(d) == 0 and t.shape[d] > 1:  # it is repeated
                    t = t.narrow(d, 0, 1)
            begin = packed[-1][0] + packed[-1][1].numel() if packed else 0
            packed.append((begin, t.reshape(-1)))
            steps, samples, width = t.shape
            return [begin, samples * width if steps > 1 else 0, width if samples > 1 else 0]

        def add(lines: list[list[int]], numbers: list[float], tables) -> None:
            for line, given in zip(lines, tables, strict=True):
                where = inputs if line[COPIED.value] else line[INPUTS.value]
                self.lines += [*line[: INPUTS.value], where, *line[INPUTS.value + 1 :]]
                self.lines += [number for t in given for number in table(t)]
            self.numbers += numbers

        if unconditional is not None:  # first, and what they have found is kept
            add(plan.lines, plan.numbers, [a.tables for a in unconditional])
            copy = [MAPS.index("identity"), plan.velocity, plan.dim, 0, 0, self.uncond, plan.dim, 0, 0, 0, 0, 0]
            add([copy], [0.0, 0.0, 1.0], [(None, None, None)])
        add(plan.lines, plan.numbers, [a.tables for a in layers])
        self.tables = torch.cat([t for _, t in packed]) if packed else None
        self.sent: list[Tensor] | None = None
        plan.made.use()
        self.made = Made([plan.weights, self.tables])

    def run(self, x: Tensor, out: Tensor, states: Tensor | None = None, velocities: Tensor | None = None) -> int:
        """-1, as a GPU is not waited for: what is not finite shows in the result."""
        plan, (n, D) = self.plan, (len(x), self.plan.dim)
        if n == 0:
            return -1
        self.made.use()
        if (sent := self.sent) is None:
            names = "h", "updates", "places", "lines", "numbers"
            given = ((what, getattr(self, what)) for what in names)
            sent = [None if values is None else plan.on_device(what, values, x) for what, values in given]
            if not is_captured(x):
                self.sent, self.made = sent, Made([*sent, *self.made.tensors])
        config = triton_common.config_of(CONFIGS, "mlp_sample")
        programs = min(triton.cdiv(n, config["ROWS"]), RESIDENT * _multiprocessors(x.device))
        inputs = rows = x.new_empty(programs * config["ROWS"], self.pitch)
        if plan.low is not None:
            inputs = x.new_empty(len(rows), plan.input_width, dtype=plan.low)
        none, kept = x.new_empty(0), (states is not None) + 2 * (velocities is not None)
        triton_common.launch(
            *(mlp_sample_kernel, (programs,), x, out, *(out if t is None else t for t in (states, velocities))),
            *(*sent, *(none if t is None else t for t in (plan.weights, self.tables)), rows, inputs),
            *(triton_common.parts(self.guidance, x.dtype), n, D, self.steps, len(self.lines) // LINE.value),
            *(plan.velocity, self.uncond, kept, self.past, _round_up(D), self.pitch, inputs.shape[1]),
            on=x,
            config=config,
            PRECISION=_precision(plan.low),
        )
        return -1


def _precision(weights: torch.dtype | None) -> str:
    """Of float32 on NVIDIA's tensor cores: three products of parts of 11 bits, each less exact than one in float32 by
    about half a bit. Their sums are cut off instead of rounded, but only within DEEP inputs; those are then added up as
    float32. Emulated so, errors are within what `samples.error_and_bound` allows. AMD's cores take float32.
    """
    return "tf32x3" if weights is None and triton_common.target() == "cuda" else "ieee"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def mlp_sample(*args) -> tuple[Tensor, Tensor, Tensor]:
    return _kernel(sys.modules[__name__], *args)
