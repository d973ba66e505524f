"""Bad calls of everything public: for each argument of each place values that it may not have, one or two at once.

A place knows one good call, and of every argument whether a value means something there (`fine`). A call is then
"works"; "named", an error that names the argument, what was expected and what came, before the velocity is evaluated;
or a fault:

    unnamed   another exception, or one that does not say which argument
    nonsense  it was accepted though the value means nothing
    late      it was refused after the velocity had been evaluated
    hang      it took more than two seconds of the processor
    state     it was refused and left something behind: a file, a setting of the process
    crash     the interpreter is gone (told by `tests/test_bad_calls.py`, which runs this file)

    python tests/_bad_calls.py --calls 20000 --seed 1        # the counts, and the faults one by one
"""

import argparse
import contextlib
import fractions
import importlib
import inspect
import itertools
import json
import math
import numbers
import os
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.cli.main import main as command_line
from flowkernels.integrations import comfy, host_loops, k_diffusion
from flowkernels.integrations.export import RECEIVERS
from flowkernels.models import bundled, closed_form, networks
from flowkernels.ops.mlp_sample import Layer, Source
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends, observers

SECONDS = 2.0
FAULTS = ("unnamed", "nonsense", "late", "hang", "state", "crash")
F32, F64 = torch.float32, torch.float64
N, D, K = 4, 3, 6  # samples, features, fine steps


def rand(*shape, dtype=F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- the values ----


class Loud:
    def __repr__(self):
        raise RuntimeError("no repr")


class Huge:
    def __repr__(self):
        return "x" * 10**6


class Odd:
    """An object whose every special method is something else than expected."""

    def __len__(self):
        return -1

    def __iter__(self):
        raise KeyError("iter")

    def __float__(self):
        return "x"

    def __index__(self):
        raise KeyError("index")

    def __array__(self, *args, **kwargs):
        raise KeyError("array")


def recursive() -> list:
    found = []
    found.append(found)
    return found


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(rand(N, D), 0.1, 0, torch.qint8)


def sparse_rows() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rand(N, D).to_sparse_csr()


def with_value(value: float, *shape) -> Tensor:
    t = rand(*shape)
    t.view(-1)[-1] = value
    return t


VALUES: dict[str, Callable[[], Any]] = {
    **{repr(v): (lambda v=v: v) for v in (None, "", "text", "bf16", "float32", "1", b"bytes", True, False)},
    **{repr(v): (lambda v=v: v) for v in (0, 1, -1, 3, 7, 10**6, 2**31, 2**63, 2**70, -(2**70))},
    **{repr(v): (lambda v=v: v) for v in (0.0, 0.5, 1.0, 1.5, -0.5, 3.0, math.nan, math.inf, -math.inf, 1e308, 1e-320)},
    **{
        repr(v): (lambda v=v: v) for v in (1 + 2j, Decimal("0.5"), fractions.Fraction(1, 2), range(3), slice(0, 1), ...)
    },
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "'x' * 10**6": lambda: "x" * 10**6,
    **{f"np {v!r}": (lambda v=v: v) for v in (np.float32(0.5), np.float64(math.nan), np.int64(3), np.bool_(True))},
    "np array": lambda: np.array([0.5, 1.5]),
    "np times": lambda: np.array([0.0, 0.5, 1.0]),
    "np text": lambda: np.array("x"),
    "np objects": lambda: np.array([object()]),
    "np empty": lambda: np.zeros((2, 0)),
    **{repr(v): (lambda v=v: v) for v in ([], [0.0, 1.0], [0.5], [6.7], [3], [True], [False, True], ["a"], [None])},
    **{
        repr(v): (lambda v=v: v) for v in ([[0.0], [1.0]], [[0.0, 1.0], [1.0]], (3,), (3.0,), (-1,), ("3",), [1, 2**70])
    },
    **{repr(v): (lambda v=v: v) for v in ([0.0, math.nan, 1.0], [math.nan], [1 + 2j], [0, 1], [0.0, 0.7, 0.4, 1.0])},
    **{repr(v): (lambda v=v: v) for v in ({}, {"a": 1}, {1: 2}, set(), frozenset("a"), {"c": None}, {"c": [[1], []]})},
    "dict of lists of tensors": lambda: {"c": [rand(N, D), rand(N)]},
    "dict of nested tensors": lambda: {"c": {"d": (rand(N, D),)}},
    "dict of a sparse tensor": lambda: {"c": rand(N, D).to_sparse()},
    "dict of ragged rows": lambda: {"c": rand(N - 1, D)},
    "list of tensors": lambda: [rand(N, D)],
    "list of other tensors": lambda: [rand(2), rand(3)],
    "list of sparse tensors": lambda: [rand(N, D).to_sparse()],
    "list of itself": recursive,
    "deep list": lambda: json.loads("[" * 500 + "]" * 500),
    "long list": lambda: [0.5] * 10**5,
    "generator": lambda: (i for i in range(3)),
    "iterator": lambda: iter([1]),
    "object": object,
    "object that cannot be shown": Loud,
    "object of a long repr": Huge,
    "odd object": Odd,
    "int": lambda: int,
    "nn.Linear": lambda: nn.Linear,
    "Loud": lambda: Loud,
    "module": lambda: nn.Linear(D, D),
    "empty module": nn.Module,
    "module of another shape": lambda: nn.Sequential(nn.Linear(D + 4, D)),
    "function of none": lambda: lambda: 0,
    "function of one": lambda: lambda x: x,
    "function of three": lambda: lambda x, t, c: x,
    "function of two, to None": lambda: lambda x, t: None,
    "function of two, to a text": lambda: lambda x, t: "x",
    "function of two, to one row": lambda: lambda x, t: x[:1],
    "function of two, to NaN": lambda: lambda x, t: x * math.nan,
    "function of two, to integers": lambda: lambda x, t: x.long(),
    "function of two, to a list": lambda: lambda x, t: [x],
    "print": lambda: print,
    **{str(v): (lambda v=v: v) for v in (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn)},
    **{str(v): (lambda v=v: v) for v in (torch.complex64, torch.strided, torch.device("meta"))},
    "'cuda:7'": lambda: "cuda:7",
    "torch.Generator": torch.Generator,
    "path": lambda: Path("no-folder") / "x",
    "path of a folder": lambda: Path("folder"),
    "text of a folder": lambda: "folder",
    "path with zero": lambda: "a\0b",
    "exception": lambda: ValueError("a value"),
    "tensor 0.5": lambda: torch.tensor(0.5),
    "tensor 3": lambda: torch.tensor(3),
    "tensor True": lambda: torch.tensor(True),
    "tensor NaN": lambda: torch.tensor(math.nan),
    "tensor of one": lambda: torch.tensor([0.5]),
    "tensor of times": lambda: torch.tensor([0.0, 0.5, 1.0]),
    "tensor of bools": lambda: torch.tensor([False, True]),
    "tensor of complex times": lambda: torch.tensor([0j, 1 + 1j]),
    "tensor": lambda: rand(N, D),
    "float64 tensor": lambda: rand(N, D, dtype=F64),
    "float16 tensor": lambda: rand(N, D, dtype=torch.float16),
    "bfloat16 tensor": lambda: rand(N, D, dtype=torch.bfloat16),
    "float8 tensor": lambda: rand(N, D).to(torch.float8_e4m3fn),
    "tensor [n]": lambda: rand(N),
    "tensor [n, d, 2]": lambda: rand(N, D, 2),
    "tensor [n, 1]": lambda: rand(N, 1),
    "tensor [2n, d]": lambda: rand(2 * N, D),
    "tensor [0, d]": lambda: rand(0, D),
    "tensor [n, 0]": lambda: rand(N, 0),
    "tensor of no shape": lambda: torch.empty(()),
    "int64 tensor": lambda: torch.zeros(N, D, dtype=torch.int64),
    "int64 tensor [n]": lambda: torch.full((N,), 2**40),
    "negative int64 tensor [n]": lambda: torch.full((N,), -1),
    "int32 tensor [n]": lambda: torch.zeros(N, dtype=torch.int32),
    "bool tensor": lambda: rand(N, D) > 0,
    "complex tensor": lambda: rand(N, D) * 1j,
    "meta tensor": lambda: rand(N, D).to("meta"),
    "meta number": lambda: torch.tensor(0.5, device="meta"),
    "sparse tensor": lambda: rand(N, D).to_sparse(),
    "sparse rows": sparse_rows,
    "nested tensor": lambda: torch.nested.as_nested_tensor([rand(D), rand(D + 1)]),
    "sparse float64 [K+1, K+1]": lambda: torch.eye(K + 1, dtype=F64).to_sparse(),
    "sparse int64 [n]": lambda: torch.zeros(N, dtype=torch.int64).to_sparse(),
    "mkldnn tensor": lambda: rand(N, D).to_mkldnn(),
    "quantised tensor": quantised,
    "tensor with gradient": lambda: rand(N, D).requires_grad_(),
    "number with gradient": lambda: torch.tensor(0.5, requires_grad=True),
    "parameter": lambda: nn.Parameter(rand(N, D)),
    "expanded tensor": lambda: rand(1, D).expand(N, D),
    "transposed tensor": lambda: rand(D, N).T,
    "tensor with NaN": lambda: with_value(math.nan, N, D),
    "tensor with Inf": lambda: with_value(math.inf, N, D),
    "long tensor": lambda: torch.zeros(10**6),
    "schedule": lambda: fk.Schedule.uniform(2),
    "solver": lambda: fk.Solver.heun(2),
    "inverse solver": lambda: fk.Solver.heun(2, inverse=True),
    "step cost": lambda: fk.StepCost(2),
}


# ---- what an argument may be ----


def anything(v) -> bool:
    return True


def nothing_else(v) -> bool:
    return False


def is_int(least: int, most: int = 2**63 - 1) -> Callable:
    return lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and least <= v <= most


def is_number(v) -> bool:
    """Of an op: not finite is a number too."""
    if isinstance(v, Tensor):
        return v.dim() == 0 and not v.dtype.is_complex and v.dtype != torch.bool and not v.is_meta
    if not isinstance(v, numbers.Real) or isinstance(v, bool):
        return False
    try:
        return isinstance(float(v), float)
    except OverflowError:
        return False


def within(low: float, high: float = math.inf, ends: str = "()") -> Callable:
    """A finite number between the two, "[" or "]" where the end counts."""

    def fine(v):
        if not is_number(v):
            return False
        a = float(v)
        return (
            math.isfinite(a)
            and (low <= a if ends[0] == "[" else low < a)
            and (a <= high if ends[1] == "]" else a < high)
        )

    return fine


def is_flag(v) -> bool:
    return isinstance(v, (bool, np.bool_))


def is_one_of(*choices) -> Callable:
    return lambda v: any(v is c or (isinstance(c, str) and isinstance(v, str) and v == c) for c in choices)


def is_times(v) -> bool:
    if isinstance(v, numbers.Integral) and not isinstance(v, bool):
        return 1 <= v <= 10**6
    try:
        t = v if isinstance(v, Tensor) else torch.as_tensor(v)
    except Exception:
        return False
    rises = (
        t.layout is torch.strided
        and t.dim() == 1
        and len(t) >= 2
        and not t.is_meta
        and t.dtype not in (torch.bool, torch.complex64)
    )
    return rises and bool((t.diff() > 0).all()) and t[0] >= 0 and t[-1] == 1


def is_plan(v) -> bool:
    return isinstance(v, (fk.Schedule, fk.Solver)) or is_times(v)


def is_dense(*dtypes: torch.dtype, finite: bool = False, meta: bool = False) -> Callable:
    def fine(v):
        if not isinstance(v, Tensor) or v.layout is not torch.strided or v.dtype not in dtypes:
            return False
        if v.is_meta:
            return meta
        return not finite or bool(torch.isfinite(v).all())

    return fine


def are_dense(*dtypes) -> Callable:
    """A sequence of such tensors."""
    one = is_dense(*dtypes, meta=True)
    return lambda v: isinstance(v, (list, tuple)) and all(map(one, v))


def are_numbers(v) -> bool:
    if isinstance(v, (np.ndarray, Tensor)) or hasattr(v, "__next__"):  # an iterator has nothing left to look at
        return not isinstance(v, Tensor) or v.layout is torch.strided
    return isinstance(v, (list, tuple, range)) and all(map(is_number, v))


def or_none(fine: Callable) -> Callable:
    return lambda v: v is None or fine(v)


def is_function(v) -> bool:
    return callable(v) and not isinstance(v, type)


def is_guidance(v) -> bool:
    return within(-math.inf)(v) or (is_function(v) and not isinstance(v, nn.Module))


def are_names(v) -> bool:
    """Of conditioning with one entry, c; an iterator may be of anything."""
    return hasattr(v, "__next__") or (not isinstance(v, (str, bytes, Tensor)) and all(k == "c" for k in v))


def are_within_1(v) -> bool:
    try:
        t = torch.as_tensor(v).double()
    except Exception:
        return False
    return t.numel() > 0 and bool(((t >= 0) & (t <= 1)).all())


def are_finite(v) -> bool:
    try:
        return bool(torch.as_tensor(v).double().isfinite().all())
    except Exception:
        return False


def are_from(v, low: float, high: float) -> bool:
    return are_finite(v) and bool(((t := torch.as_tensor(v).double()) >= low - 1e-6).all() and (t <= high + 1e-6).all())


def are_callbacks(v) -> bool:
    return isinstance(v, (list, tuple)) and all(is_function(each) for each in v)


def is_path(v) -> bool:
    return isinstance(v, (str, os.PathLike)) and v != "" and "\0" not in str(v) and len(str(v)) < 1000


def is_dict(v) -> bool:
    return isinstance(v, Mapping) and all(isinstance(k, str) for k in v)


def is_steps(v) -> bool:
    """One number of steps, or several."""
    one = is_int(1, K)
    if isinstance(v, (list, tuple, range, set, dict)):
        return len(v) > 0 and all(map(one, v))
    return one(v) or (hasattr(v, "__next__"))  # an iterator, of which nothing is left to look at


FLOATS = (F32, F64, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)
is_noise = is_dense(*FLOATS, finite=True)
is_low = or_none(lambda v: v in LOW if isinstance(v, torch.dtype) else is_dense(*LOW)(v))


# ---- the places ----


@dataclass
class Arg:
    make: Callable[[], Any]
    fine: Callable[[Any], bool]
    said: tuple[str, ...] = ()  # what messages may call it as well


@dataclass
class Place:
    """One good call. errors: further types that it may raise. evaluated: how often its velocity was."""

    name: str
    call: Callable
    args: dict[str, Arg]
    errors: tuple[type, ...] = ()

    def good(self) -> dict[str, Any]:
        return {name: arg.make() for name, arg in self.args.items()}


class Count:
    evaluations = 0


def velocity(x, t):
    Count.evaluations += 1
    return -x * (1 + t.view(-1, *[1] * (x.dim() - 1)))


class Net(nn.Module):
    """A small network that counts its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x, t, **conditioning):
        Count.evaluations += 1
        return self.last(torch.tanh(self.first(x)) + t[:, None])


class TwoTimed(Net):
    """A network of two times."""

    def forward(self, x, t, s, **conditioning):
        return super().forward(x, t + s)


class Embedded(Net):
    """With an embedding of the time."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, D)

    def forward(self, x, t):
        return super().forward(x + self.time(t[:, None]), t)


PLACES: list[Place] = []


def place(where: str, call: Callable, errors: tuple[type, ...] = (), /, **args) -> None:
    """args: (value or function that makes it, what else is fine[, other names])."""
    made = {}
    for key, (value, fine, *said) in args.items():
        make = value if callable(value) and getattr(value, "__name__", "") == "<lambda>" else lambda value=value: value
        made[key] = Arg(make, fine, tuple(said))
    PLACES.append(Place(where, call, made, errors))


def _ops() -> None:
    x, number = (lambda: rand(N, D), is_dense(F32, F64, meta=True)), (0.5, is_number)
    v = (lambda: rand(N, D), is_dense(*FLOATS, meta=True))
    optional = (lambda: rand(N, D), or_none(is_dense(*FLOATS, meta=True)))
    out = (lambda: torch.empty(N, D), or_none(is_dense(F32, F64, meta=True)))
    low = (torch.bfloat16, is_low)
    place("euler_step", fk.euler_step, x=x, v=v, h=number, v_uncond=optional, guidance=number, low=low)
    place("euler_step out", fk.euler_step, x=x, v=v, h=number, out=out, low=low)
    terms, b = (lambda: [rand(N, D)] * 2, are_dense(*FLOATS)), (lambda: [0.5, 0.25], are_numbers)
    place("linear_update", fk.linear_update, x=x, v=terms, b=b, scale=number, low=low)
    place("linear_update out", fk.linear_update, x=x, v=terms, b=b, out=out, low=low)
    parameter = is_dense(*FLOATS)
    head = dict(
        **dict(x=(*x, "z"), z=(lambda: rand(N, 5), parameter), weight=(lambda: rand(D, 5), parameter, "z"), h=number),
        **dict(bias=(lambda: rand(D), or_none(parameter)), norm=(1e-5, or_none(is_number))),
        **{name: (lambda: rand(5), or_none(parameter)) for name in ("norm_weight", "norm_bias")},
        **{name: (lambda: rand(N, 5), or_none(parameter)) for name in ("scale", "shift")},
        **dict(history=(lambda: [rand(N, D)], are_dense(*FLOATS)), b=(lambda: [0.5], are_numbers)),
        **dict(x_scale=number, low=low),
    )
    place("linear_euler", fk.linear_euler, **head)
    place("linear_euler out", fk.linear_euler, **head, out=out, velocity_out=optional)
    place(
        "linear_euler patches",
        fk.linear_euler,
        **dict(x=(lambda: rand(N, 2, 4, 4), is_dense(F32, F64), "z"), z=(lambda: rand(2 * N, 4, 5), parameter)),
        **dict(weight=(lambda: rand(8, 5), parameter, "z"), h=number, patch=(2, or_none(is_int(1)))),
        **dict(order=("pqc", is_one_of("pqc", "cpq")), guidance=(2.0, or_none(is_number))),
    )
    times = (lambda: torch.linspace(0, 1, K + 1, dtype=F64), is_times)
    velocities = (lambda: rand(K, N, D), is_dense(*FLOATS, meta=True))
    states = (lambda: rand(K + 1, N, D), or_none(is_dense(*FLOATS, meta=True)))
    place("velocity_gram", fk.velocity_gram, v=velocities)
    place("velocity_gram x", fk.velocity_gram, v=(*velocities, "x"), x=states, times=(times[0], or_none(is_times)))
    table = is_dense(F64, meta=True)
    flag = (False, is_flag)
    place(
        "cost_from_gram",
        fk.cost_from_gram,
        gram=(lambda: torch.eye(K - 1, dtype=F64), table),
        times=(*times, "gram"),
        states=(*flag, "gram"),
    )
    cost, steps = (lambda: torch.ones(K + 1, K + 1, dtype=F64), table), (3, is_int(1, K))
    place("bellman", fk.bellman, cost=cost, steps=steps, carry=(1.0, within(0)))
    cube = (lambda: torch.ones(K + 1, K + 1, K + 1, dtype=F64), table)
    place(
        "bellman_pairs", fk.bellman_pairs, first=(lambda: torch.ones(K + 1, dtype=F64), table), cost=cube, steps=steps
    )
    bank = (lambda: rand(3, N, D), is_dense(F32, F64, meta=True), "v")
    index = (lambda: torch.zeros(N, dtype=torch.int64), is_dense(torch.int64, meta=True))
    vector = (lambda: torch.full((N,), 0.5), or_none(is_dense(*FLOATS, meta=True)))
    place(
        "segment_points",
        fk.segment_points,
        **dict(bank=bank, interval=index, sample=index, u=vector),
        dtype=(torch.bfloat16, or_none(lambda v: isinstance(v, torch.dtype) and v in (F32, *LOW))),
    )
    place(
        "straighten_loss",
        fk.straighten_loss,
        **dict(v=v, bank=bank, step_sizes=(lambda: torch.full((2,), 0.5), is_dense(*FLOATS, meta=True))),
        **dict(interval=index, sample=index, weight=vector, loss=("huber", is_one_of("l2", "huber"))),
        huber_c=(0.03, within(0)),
    )

    def layers(**changes):
        first = dict(map="linear", source=Source(0, 0, D), width=8, weight=rand(8, D), activation="silu")
        return [Layer(**(first | changes)), Layer("linear", Source(1, 0, 8), D, weight=rand(D, 8))]

    of_layers = (layers, lambda v: isinstance(v, (list, tuple)) and all(isinstance(a, Layer) for a in v))
    place(
        "mlp_sample",
        fk.mlp_sample,
        **dict(x=(lambda: rand(N, D), is_dense(F32)), step_sizes=(lambda: [0.5, 0.5], are_numbers)),
        **dict(layers=(lambda: layers(), of_layers[1]), weights=(torch.bfloat16, or_none(is_one_of(torch.bfloat16)))),
        trajectory=(True, is_flag),
    )

    def guided(unconditional, guidance):
        given = layers(shift=rand(1, 1, 8))
        other = (
            [Layer(**(vars(given[0]) | dict(shift=rand(1, 1, 8)))), given[1]]
            if unconditional is True
            else unconditional
        )
        return fk.mlp_sample(rand(N, D), [0.5], given, unconditional=other, guidance=guidance)

    place("mlp_sample guided", guided, unconditional=(True, nothing_else), guidance=(2.0, is_number))

    def layer(**changes):
        return fk.mlp_sample(rand(N, D), [0.5, 0.5], layers(**changes))

    place(
        "mlp_sample layer",
        layer,
        **dict(map=("linear", is_one_of("linear")), activation=("silu", is_one_of("silu", "none", "relu"))),
        **dict(source=(lambda: Source(0, 0, D), nothing_else), width=(8, is_int(8, 8))),
        **dict(weight=(lambda: rand(8, D), is_dense(F32)), eps=(1e-5, is_number), alpha=(0.0, is_number)),
        **{name: (lambda: rand(1, 1, 8), or_none(is_dense(F32))) for name in ("scale", "shift", "shift_each")},
        **dict(gain=(1.0, is_number), combine=("none", is_one_of("none")), other=(None, or_none(nothing_else))),
        first=(0, is_int(0, 0), "source"),
    )

    def update(from_start, which, factors, scale):
        return fk.mlp_sample(rand(N, D), [(True, [0], [0.5]), (from_start, which, factors, scale)], layers())

    place(
        "mlp_sample update",
        update,
        from_start=(False, is_flag, "step_sizes"),
        which=(lambda: [0, 1], are_numbers, "step_sizes"),
        factors=(lambda: [0.5, 0.5], are_numbers, "step_sizes"),
        scale=(0.5, is_number, "step_sizes"),
    )


def _schedules() -> None:
    times = (lambda: [0.0, 0.5, 1.0], is_times)
    grid = (lambda: [0.0, 0.25, 0.5, 1.0], or_none(is_times), "indices")
    indices = (lambda: (0, 2, 3), lambda v: isinstance(v, (list, tuple)) and list(v) == [0, 2, 3], "grid")
    interval = (lambda: (0.5, 1.5), or_none(lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and v[0] <= v[1]))
    place(
        "Schedule",
        lambda **kwargs: repr(fk.Schedule(**kwargs)),
        **dict(times=(times[0], is_times, "indices"), grid=grid, indices=indices),
        **dict(
            cost=(1.0, or_none(within(-math.inf))),
            uniform_cost=(2.0, or_none(lambda v: is_number(v) and v > -math.inf)),
        ),
        **dict(cost_interval=interval, samples_needed=(3, or_none(is_int(1))), notes=(lambda: {"a": 1}, is_dict)),
    )
    forced = (lambda: [0.5], are_numbers)
    place(
        "Schedule.uniform",
        fk.Schedule.uniform,
        **dict(steps=(3, is_int(1, 10**6)), start=(0.25, within(0, 1, "[)")), forced_knots=forced),
    )
    place(
        "Solver",
        lambda **kwargs: repr(fk.Solver(**kwargs)),
        **dict(times=(times[0], is_times), model_times=(lambda: [0.0, 0.5], are_numbers, "coefficients")),
        coefficients=(lambda: [[0.5, 0.0], [0.5, 0.5]], nothing_else),
        **dict(name=("mine", lambda v: isinstance(v, str)), notes=(lambda: {"a": 1}, is_dict)),
    )
    rows = (lambda: [[0.0, 0.5, 1.0], [0.0, 0.8, 1.0]], lambda v: isinstance(v, list) and all(map(is_times, v)))
    both = lambda v: isinstance(v, (list, Tensor)) and len(v) == 2 and are_numbers(v)  # noqa: E731
    named = (lambda: ["a", "b"], nothing_else)
    place(
        "SampleSchedules",
        lambda **kwargs: repr(fk.SampleSchedules(**kwargs)),
        **dict(times=rows, names=(named[0], lambda v: v is None), cost=(lambda: [1.0, 2.0], or_none(both))),
        notes=(lambda: {"a": 1}, is_dict),
    )
    plans = fk.SampleSchedules([[0.0, 0.5, 1.0], [0.0, 0.8, 1.0]], names=["a", "b"])
    place("SampleSchedules.of", plans.of, names=named)
    place("SampleSchedules[]", lambda name: plans[name], name=("a", lambda v: v in ("a", "b")))
    each = plans.to_dict()
    place(
        "SampleSchedules.from_dict",
        lambda **changes: fk.SampleSchedules.from_dict(each | changes),
        **dict(times=(each["times"], nothing_else), names=(each["names"], lambda v: v is None)),
        notes=(lambda: {}, is_dict),
    )
    saved = fk.Solver.heun(2).to_dict()

    def restored(**changes):
        return fk.Solver.from_dict(saved | changes)

    place("Solver.from_dict", restored, **{k: (lambda v=v: v, anything) for k, v in saved.items()})
    place("Solver.from_dict all", fk.Solver.from_dict, data=(lambda: saved, nothing_else, "name"))
    schedule, flag = (2, is_plan), (False, is_flag)
    place("Solver.of", fk.Solver.of, schedule=schedule)
    place("Solver.euler", fk.Solver.euler, schedule=schedule, model_times=(None, or_none(are_numbers)), inverse=flag)
    place("Solver.adams_bashforth", fk.Solver.adams_bashforth, schedule=schedule, order=(2, is_int(1)), inverse=flag)
    place("Solver.midpoint", fk.Solver.midpoint, schedule=schedule, inverse=flag)
    place("Solver.heun", fk.Solver.heun, schedule=schedule, inverse=flag)
    place(
        "stock_solvers",
        fk.stock_solvers,
        steps=(2, lambda v: isinstance(v, fk.Schedule) or is_times(v)),
        shift=(1.0, lambda v: is_number(v) or are_numbers(v)),
    )
    device = ("cpu", or_none(lambda v: isinstance(v, (str, torch.device)) and str(v) in ("cpu", "meta")))
    place("StepCost", fk.StepCost, times=(3, is_times), states=flag, device=device)
    v, x = (lambda: rand(3, N, D), is_noise), (lambda: rand(4, N, D), is_noise)
    place("StepCost.update", lambda v, x: fk.StepCost(3, states=True).update(v, x), v=v, x=x)
    place("StepCost.merge", lambda other: fk.StepCost(2).merge(other), other=(lambda: fk.StepCost(2), anything))
    place(
        "step_costs",
        fk.step_costs,
        v=v,
        times=(3, is_times),
        x=(x[0], or_none(is_noise)),
        group=(None, or_none(nothing_else)),
    )
    cost = (lambda: torch.ones(K + 1, K + 1, dtype=F64), is_dense(*FLOATS))
    place(
        "least_cost_schedules",
        fk.least_cost_schedules,
        cost=cost,
        times=(K, is_times, "cost"),
        steps=((1, 2), is_steps),
        **dict(gamma=(1.0, within(0)), forced_knots=((), are_numbers)),
    )


def _stages(cal) -> None:
    field, noise = (lambda: velocity, is_function), (lambda: rand(N, D), is_noise)
    plan, bar = (3, is_plan), (False, is_flag)
    place("rollout", fk.rollout, velocity=field, noise=noise, grid=(3, is_plan), progress=bar)
    place(
        "sample",
        fk.sample,
        velocity=field,
        noise=noise,
        schedule=plan,
        capture=(None, is_one_of(None, "auto")),
        check=(True, is_flag),
        progress=bar,
        differentiable=(False, is_flag),
    )
    place(
        "invert",
        fk.invert,
        **dict(
            velocity=field, data=noise, schedule=plan, round_trip=(True, is_flag), resample_with=(3, or_none(is_plan))
        ),
        **dict(capture=(None, is_one_of(None, "auto")), check=(True, is_flag), progress=bar),
    )
    place(
        "forward_pairs",
        fk.forward_pairs,
        **dict(
            velocity=field, data=noise, schedule=plan, round_trip=(True, is_flag), resample_with=(3, or_none(is_plan))
        ),
        **dict(chunk=(None, or_none(is_int(1))), progress=bar),
    )
    pixels = (lambda: rand(2, 1, 3, 3), nothing_else)
    ends = ((-1, 1), lambda v: are_numbers(v) and len(v) == 2 and v[0] < v[1])
    png = dict(grid=(True, lambda v: is_flag(v) and v), path=("samples.png", is_path), columns=(2, or_none(is_int(1))))
    place("save_images", fk.save_images, (OSError,), samples=pixels, value_range=ends, **png)
    is_evaluated = lambda v: isinstance(v, (fk.Schedule, fk.Solver)) or is_int(1, 10**6)(v)  # noqa: E731
    place(
        "evaluate_sampler",
        fk.evaluate_sampler,
        **dict(
            velocity=field,
            plans=(2, lambda v: is_evaluated(v) or all(map(is_evaluated, v.values() if is_dict(v) else v))),
            noise=noise,
        ),
        columns=(("endpoint", "straightness", "energy"), lambda v: len(v) == 0 or hasattr(v, "__next__")),
        teacher=(None, or_none(lambda v: is_function(v) or is_noise(v)), "teacher_solver", "velocity"),
        teacher_solver=(2, or_none(is_plan), "plans"),
        data=(lambda: rand(N + 1, D), or_none(lambda v: is_noise(v) and v.shape[1:] == (D,)), "velocity"),
        features=(lambda: lambda x: x, or_none(is_function)),
        value_range=ends,
        distances=(None, lambda v: v is None or v == {}),
        points=(1, is_int(1, 10_000)),
        tolerances=((0.1,), lambda v: hasattr(v, "__next__") or (are_numbers(v) and all(a > 0 for a in v))),
        **dict(chunk=(None, or_none(is_int(1))), seed=(0, is_int(-(2**63), 2**64 - 1))),
        **dict(keep_samples=(False, is_flag), progress=bar),
    )
    place(
        "log_likelihood",
        fk.log_likelihood,
        **dict(velocity=field, data=noise, solver=(1, is_plan), probes=(1, or_none(is_int(0, 10**6)))),
        **dict(
            distribution=("gaussian", is_one_of("rademacher", "gaussian")), levels=(None, lambda v: v is None, "data")
        ),
        **dict(value_range=ends, chunk=(None, or_none(is_int(1))), seed=(0, is_int(-(2**63), 2**64 - 1)), progress=bar),
    )
    names = or_none(lambda v: isinstance(v, str) and v != "")
    given = (lambda: {"c": rand(N, D)}, or_none(is_dict), "unconditional")

    net = Net()

    def fielded(**kwargs):
        f = fk.VelocityField(net, **kwargs)
        fk.sample(f, rand(N, D), 2)
        fk.sample(f.rows(slice(0, 2), N), rand(2, D), 2)

    place(
        "VelocityField",
        fk.VelocityField,
        **dict(net=(lambda: Net(), is_function), reverse_time=(False, is_flag), time_scale=(1.0, within(0))),
        **dict(time_offset=(0.5, within(-math.inf)), shared=(("c",), are_names)),
        **dict(sign=(1, or_none(lambda v: is_int(-1, 1)(v) and v != 0)), x_name=("x", names, "time_name")),
        **dict(time_name=("t", names), conditioning=given, guidance=(2.0, is_guidance)),
        **dict(unconditional=(given[0], or_none(is_dict)), packed=(True, is_flag)),
        **dict(
            dtype=(None, or_none(lambda v: isinstance(v, torch.dtype) and v in FLOATS)), time_column=(False, is_flag)
        ),
    )
    place(
        "VelocityField used",
        fielded,
        **dict(conditioning=given, unconditional=given, guidance=(2.0, is_guidance), packed=(True, is_flag)),
        dtype=(None, or_none(lambda v: isinstance(v, torch.dtype) and v in FLOATS)),
    )
    conditioned = fk.VelocityField(Net(), conditioning={"c": rand(N, D)})
    place("VelocityField.rows", conditioned.rows, index=(lambda: slice(0, 2), anything), n=(N, is_int(1)))
    place(
        "VelocityField.check",
        conditioned.check,
        reference=(lambda: conditioned, is_function),
        **dict(x=(lambda: rand(N, D), is_noise), times=((0.2, 0.6), are_within_1)),
    )
    two_times = fk.AverageVelocity(TwoTimed())
    place(
        "AverageVelocity",
        fk.AverageVelocity,
        net=(lambda: TwoTimed(), is_function),
        **dict(second_name=("s", lambda v: isinstance(v, str) and v != ""), second_is_size=(False, is_flag)),
    )
    place(
        "AverageVelocity.from_velocity",
        fk.AverageVelocity.from_velocity,
        velocity=(lambda: fk.VelocityField(Embedded()), lambda v: isinstance(v, nn.Module)),
        **dict(time_embedding=(None, or_none(is_one_of("time"))), width=(None, or_none(is_int(1)))),
    )
    place("AverageVelocity.on", two_times.on, schedule=(2, is_times))
    with torch.no_grad():
        at = (lambda: torch.zeros(N), anything)
        x = (lambda: rand(N, D), is_dense(*FLOATS, meta=True))
        place("AverageVelocity()", two_times, x=x, t=at, s=at)
        place("VelocityField()", conditioned, x=x, t=(lambda: torch.zeros(N), anything))
    some = dict(samples=(2, is_int(1)), chunk=(None, or_none(is_int(1))))
    place(
        "calibrate",
        fk.calibrate,
        **dict(
            velocity=field,
            noise=noise,
            grid=(K, is_times),
            steps=((1, 2), is_steps),
            max_regret=(0.5, or_none(within(0))),
        ),
        **dict(
            verify_noise=(lambda: rand(N, D) + 1, or_none(is_noise)),
            teacher_solver=("euler", is_one_of("euler", "heun")),
            effort=("schedule", is_one_of("schedule", "fit", "best")),
            evaluations=(None, lambda v: v is None),
            minutes=(None, lambda v: v is None),
            teacher_error=(None, or_none(is_int(0))),
            keep_bytes=(10**6, is_int(0, 10**5000)),
            forced_knots=(None, or_none(are_numbers)),
        ),
        **dict(chunk=(None, or_none(is_int(1))), progress=bar, seed=(3, or_none(is_int(-(2**63), 2**64 - 1)))),
        **dict(checkpoint=(None, or_none(is_path)), resume=(False, is_flag)),
        group=(None, or_none(nothing_else)),
    )
    place(
        "noise",
        fk.noise,
        n=(N, is_int(1)),
        shape=((2, 3), lambda v: isinstance(v, Iterator) or (isinstance(v, (list, tuple)) and all(map(is_int(1), v)))),
        seed=(3, is_int(-(2**63), 2**64 - 1)),
        rows=(None, lambda v: v is None or (isinstance(v, slice) and v.step in (None, 1))),
        dtype=(F32, is_one_of(F32, F64)),
        device=("cpu", or_none(lambda v: isinstance(v, (str, torch.device)) and str(v) in ("cpu", "meta"))),
    )
    place(
        "cal.measure_teacher",
        cal.measure_teacher,
        velocity=field,
        samples=(2, is_int(1)),
        noise=(None, or_none(is_noise)),
        chunk=(None, or_none(is_int(1))),
        group=(None, or_none(nothing_else)),
    )
    place("Calibration.merge", fk.Calibration.merge, calibrations=(lambda: [cal], lambda v: v is cal or v == [cal]))
    place(
        "Calibration",
        fk.Calibration,
        **dict(
            times=(cal.times, is_times),
            cost=(lambda: cal.cost, is_dense(F64)),
            schedules=(lambda: dict(cal.schedules), is_dict),
        ),
        **dict(provenance=(lambda: {}, or_none(is_dict)), gram=(lambda: cal.gram, or_none(is_dense(F64)))),
        **dict(solvers=(lambda: {}, or_none(is_dict)), verified=(lambda: {}, or_none(is_dict))),
        forced_knots=((), are_numbers),
    )
    place("cal.uniform", cal.uniform, steps=(2, is_int(1, 10**6)))
    place("cal[]", lambda steps: cal[steps], (KeyError,), steps=(2, is_int(1, K)))
    place("cal.choices", cal.choices, (KeyError,), steps=(2, is_int(1, K)))
    place("cal.best", cal.best, (KeyError,), steps=(2, is_int(1, K)))
    options = dict(velocity=(lambda: Net(), is_function), **some, gamma=(1.15, within(0)), probes=(2, is_int(1)))
    options |= dict(candidates=(lambda: [0.0, 0.1], are_numbers), metric=("dev", is_one_of("dev", "l1", "l2")))
    for objective, make in OBJECTIVES.items():
        args = {name: options[name] for name in list(inspect.signature(make).parameters)[2:] if name != "groups"}
        called = (objective, is_one_of(*OBJECTIVES), "velocity", "options")
        place(
            f"cal.find {objective}",
            cal.find,
            **dict(steps=((1, 2), is_steps), objective=called),
            **args,
            each=(False, is_flag, "objective"),
            group=(None, or_none(nothing_else)),
        )
    place("cal.save", cal.save, (OSError,), path=("c.json", is_path))
    cal.save("calibration.json")
    place(
        "Calibration.load",
        fk.Calibration.load,
        (OSError,),
        path=("calibration.json", is_path),
        velocity=(None, or_none(is_function)),
    )
    place(
        "export",
        fk.export,
        (OSError,),
        plan=(3, lambda v: is_plan(v) or isinstance(v, fk.Calibration)),
        to=("sdcpp", is_one_of(*RECEIVERS)),
        **dict(steps=(None, lambda v: v is None), path=(None, or_none(is_path)), knots_only=(False, is_flag)),
        like=(None, lambda v: v is None),
    )
    picture = (None, lambda v: v is None or (is_path(v) and str(v).endswith((".png", ".svg", ".pdf"))))
    place(
        "plot",
        fk.plot,
        (OSError,),
        calibration=(lambda: cal, nothing_else),
        path=picture,
        steps=(2, or_none(is_int(1, 3))),
    )
    of_cal = dict(velocity=field, calibration=(lambda: cal, nothing_else))
    place(
        "fit_solver",
        fk.fit_solver,
        **of_cal,
        **dict(steps=(2, is_int(1, K)), schedule=(None, or_none(lambda v: isinstance(v, (fk.Schedule, list))))),
        **dict(noise=(None, or_none(is_noise)), folds=(3, is_int(2)), order=(2, or_none(is_int(1)))),
        free_start=(None, or_none(is_flag)),
        **dict(ridge=(None, or_none(within(0, ends="[)"))), inverse=(False, is_flag), chunk=(None, or_none(is_int(1)))),
        teacher=(None, or_none(is_function)),
        group=(None, or_none(nothing_else)),
    )
    place(
        "polish",
        fk.polish,
        **of_cal,
        **dict(start=(fk.Solver.heun(2), lambda v: isinstance(v, (fk.Solver, fk.Schedule))), samples=(4, is_int(2))),
        **dict(iterations=(1, is_int(1)), robust=(False, is_flag), start_coefficients=(False, is_flag)),
        **dict(noise=(None, or_none(is_noise)), chunk=(None, or_none(is_int(1)))),
        teacher=(None, or_none(is_function)),
        progress=bar,
        group=(None, or_none(nothing_else)),
    )

    def of_loss(schedule):
        names, shapes = ("l2", "huber", "huber_per_element", "cauchy"), ("start", "uniform", "u_shaped", "ten")
        return dict(
            schedule=(schedule, lambda v: isinstance(v, fk.Schedule)),
            target=("boss", is_one_of("boss", "reflow", "distill"), "schedule"),
            loss=("huber", lambda v: is_one_of(*names)(v) or is_function(v)),
            huber_c=(0.03, within(0)),
            substeps=(4, is_int(1)),
            weighting=(None, or_none(lambda v: is_one_of("per_sample_normalised", "adaptive")(v) or are_numbers(v))),
            t_sampling=("start", or_none(lambda v: is_one_of(*shapes)(v) or is_function(v))),
            initial_speed=(1.5, within(-math.inf)),
            compared=("noise", is_one_of("data", "noise")),
            **dict(consistency=("split", is_one_of("split", "derivative")), instantaneous=(0.5, within(0, 1, "[]"))),
        )

    place("StraightenLoss", fk.StraightenLoss, **of_loss(lambda: cal[2]))
    straight = fk.StraightenLoss(cal[2], t_sampling="uniform")
    learned = fk.StraightenLoss(cal[2], target="on_policy", teacher=Net())
    known = (lambda: rand(3, N, D), is_dense(F32, F64))
    index = (lambda: torch.zeros(N, dtype=torch.int64), is_dense(torch.int64))
    student = (lambda: Net(), lambda v: isinstance(v, nn.Module))

    def losses(student, states, interval, sample, generator):
        return straight(student, fk.BankBatch(states, interval, sample), generator)

    place(
        "StraightenLoss()",
        losses,
        **dict(student=student, states=(*known, "sample", "interval"), interval=index, sample=(*index, "interval")),
        generator=(None, or_none(lambda v: isinstance(v, torch.Generator))),
    )
    module = (lambda: Net(), lambda v: isinstance(v, nn.Module))
    place(
        "add_lora",
        fk.add_lora,
        (ImportError, OSError),
        **dict(velocity=(*module, "lora"), lora=(2, lambda v: is_int(1)(v) or is_dict(v) or is_path(v))),
        name=("new", or_none(lambda v: isinstance(v, str) and v != "" and "." not in v)),
    )
    named = (None, or_none(lambda v: isinstance(v, str)))
    of_file = dict(folder=("lora", is_path), name=named, layout=(None, or_none(is_one_of("diffusers", "peft"))))
    unadapted = (OSError, ValueError)  # of any network here: without peft there is none with adapters
    place("save_lora", fk.save_lora, unadapted, student=module, **of_file)
    place("without_adapters", fk.without_adapters, unadapted, student=module)
    place("merge_lora", fk.merge_lora, unadapted, student=module)
    place(
        "Acceleration",
        fk.Acceleration,
        velocity=module,
        acceleration=module,
        v0_name=("v0", or_none(lambda v: isinstance(v, str) and v != "")),
    )
    place(
        "NoisePrediction",
        fk.NoisePrediction,
        net=module,
        path=("straight", is_one_of("straight", "variance_preserving")),
    )

    denoising = Net()

    def denoised(path):
        made = fk.from_denoiser(denoising, "data", path, time_range=(0.01, 2.0))
        fk.sample(made, made.initial(rand(N, D)), made.grid(2))

    is_table = lambda v: is_dense(F32, F64, torch.bfloat16, torch.float16)(v) and v.dim() == 1  # noqa: E731
    place(
        "from_denoiser",
        fk.from_denoiser,
        model=(lambda: Net(), is_function),
        **dict(predicts=("data", is_one_of("data", "noise", "v")), path=("variance_exploding", nothing_else)),
        **dict(time_range=((0.01, 2.0), lambda v: isinstance(v, (list, tuple, np.ndarray, Tensor)) and len(v) == 2)),
        **dict(time=("sigma", lambda v: v is None or is_function(v)), rounded=(False, is_flag)),
    )
    place("from_denoiser path", denoised, path=("variance_exploding", lambda v: is_table(v) or is_function(v)))
    made = fk.from_denoiser(Net(), time_range=(0.01, 2.0))
    are_times = lambda v: not isinstance(v, (str, bytes)) and not is_number(v)  # noqa: E731
    place("Denoiser.times", made.times, own=([0.01, 1.0], lambda v: are_times(v) and are_from(v, 0, 1e300)))
    place("Denoiser.own_times", made.own_times, t=([0.5, 1.0], lambda v: are_times(v) and are_from(v, made.start, 1)))
    place("Denoiser.grid", made.grid, steps=(3, is_int(1, 10**6)))
    place("Denoiser.initial", made.initial, noise=(lambda: rand(N, D), is_noise))
    at = (0.5, or_none(lambda v: isinstance(v, fractions.Fraction) or within(0.1, 1, "[]")(v)))
    place("Denoiser.state", made.state, z=(lambda: rand(N, D), is_noise), t=at)
    place("Denoiser.own_state", made.own_state, x=(lambda: rand(N, D), is_noise), t=at)
    place(
        "Blockwise",
        fk.Blockwise,
        networks=(lambda: [Net(), Net()], lambda v: isinstance(v, nn.Module)),
        schedule=(lambda: cal[2], lambda v: isinstance(v, fk.Schedule)),
    )
    factors = (lambda: torch.ones(N), or_none(lambda v: is_dense(*FLOATS)(v) and bool((v >= 0).all())), "states")
    place("Pairs", fk.Pairs, states=(lambda: rand(2, N, D), is_dense(F32, F64)), weight=factors)
    pairs = fk.Pairs(rand(2, N, D))
    drawing = (None, or_none(lambda v: isinstance(v, torch.Generator)))
    place(
        "Pairs.batch",
        pairs.batch,
        size=(None, or_none(is_int(1, 10**6))),
        generator=drawing,
        held_out=(1, is_int(0, len(pairs) - 1)),
    )
    place("Pairs.cat", fk.Pairs.cat, pairs=(lambda: [pairs, pairs], nothing_else))
    place(
        "couple",
        fk.couple,
        **dict(noise=(lambda: rand(N, D), or_none(is_noise), "data"), data=(lambda: rand(N, D), is_noise, "noise")),
        **dict(coupling=("ot", lambda v: is_one_of("ot", "sinkhorn")(v) or is_function(v)), reg=(0.5, within(0))),
        **dict(relative=(True, is_flag), cost=("squared", is_one_of("squared", "euclidean"))),
        **dict(
            batch=(None, or_none(is_int(1))), groups=(None, or_none(is_dense(torch.int64, torch.int32, torch.uint8)))
        ),
        **dict(generated=(lambda: rand(N, D), or_none(is_noise)), generator=drawing),
    )

    def is_start(v):
        return is_noise(v) or is_function(v)

    def is_shape(v):
        return isinstance(v, (list, tuple)) and all(is_int(1)(d) for d in v)

    def made(**given):
        before = set(Path().rglob("*"))
        try:
            fk.TrajectoryBank(**given).fill()
        finally:  # of a bank in a folder
            for path in sorted(set(Path().rglob("*")) - before, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()

    place(
        "TrajectoryBank",
        made,
        (OSError,),
        **dict(
            velocity=(lambda: Net(), is_function),
            schedules=(lambda: cal[2], lambda v: isinstance(v, fk.Schedule), "grid"),
        ),
        noise=((D,), lambda v: is_start(v) or is_shape(v), "data", "size"),
        data=(None, or_none(is_start), "noise", "size"),
        size=(None, or_none(is_int(1)), "noise", "data"),
        grid=(None, or_none(is_times), "schedules"),
        teacher_solver=(None, or_none(is_one_of("euler", "heun")), "data"),
        storage=("device", lambda v: is_one_of("device", "pinned", "shared")(v) or is_path(v)),
        dtype=(None, lambda v: v is None or is_one_of(F32, F64, torch.bfloat16)(v)),
        chunk=(3, is_int(1)),
        **dict(
            conditioning=(None, or_none(lambda v: v == {} or is_function(v))), guidance=(None, or_none(nothing_else))
        ),
        **dict(seed=(0, is_int(-(2**63), 2**64 - 1)), device=("cpu", or_none(is_one_of("cpu"))), progress=bar),
        **dict(group=(None, or_none(nothing_else)), held_out=(0, is_int(0, 0))),
    )
    filled = fk.TrajectoryBank(Net(), [cal[2], cal[3]], noise=(D,), size=N, progress=False).fill()
    place(
        "TrajectoryBank.sample",
        filled.sample,
        batch=(2, is_int(1)),
        generator=(None, or_none(lambda v: isinstance(v, torch.Generator))),
        schedule=(2, lambda v: v in (2, 3) or isinstance(v, fk.Schedule)),
        held_out=(1, or_none(is_int(0, N - 1))),
    )
    place(
        "TrajectoryBank.each",
        filled.each,
        start=(0, is_int(0, 1), "stop"),
        stop=(2, is_int(1, N), "start"),
        schedule=(2, lambda v: v in (2, 3) or isinstance(v, fk.Schedule)),
    )
    place("TrajectoryBank.ends", lambda count: filled.ends(count, 2), count=(2, is_int(1, N)))
    place(
        "TrajectoryBank.trajectories",
        lambda sample: filled.trajectories(sample, 2),
        sample=(
            torch.tensor([0, N - 1]),
            lambda v: (
                isinstance(v, torch.Tensor)
                and v.dtype == torch.int64
                and v.dim() == 1
                and bool(((v >= 0) & (v < N)).all())
            ),
        ),
    )
    place("TrajectoryBank.refresh", filled.refresh, fraction=(0.5, within(0, 1, ends="(]")))
    place("StraightenLoss.roll_out", learned.roll_out, student=student, states=known, chunk=(None, or_none(is_int(1))))
    place(
        "straighten",
        fk.straighten,
        (OSError,),
        **dict(student=(None, or_none(lambda v: isinstance(v, nn.Module)))),
        **dict(velocity=(lambda: Net(), is_function), **of_loss(lambda: cal[2])),
        noise=(
            (D,),
            lambda v: is_noise(v) or is_function(v) or (isinstance(v, (list, tuple)) and all(is_int(1)(d) for d in v)),
        ),
        **dict(
            iterations=(1, is_int(1)),
            batch=(2, is_int(1)),
            bank=(4, is_int(1), "noise"),
            refresh=(None, or_none(is_int(1))),
            refresh_fraction=(1.0, within(0, 1, ends="(]")),
        ),
        **dict(
            rollout_every=(3, is_int(1)),
            init=(None, or_none(lambda v: is_dict(v) or is_one_of("teacher", "keep")(v))),
        ),
        **dict(lr=(1e-3, within(0)), optimizer=(None, or_none(is_function)), warmup=(0, is_int(0))),
        **dict(
            decay=("none", is_one_of("cosine", "none")),
            clip=(1.0, or_none(within(0))),
            ema=(0.5, or_none(within(0, 1, "[)"))),
        ),
        **dict(grid=(None, or_none(is_times)), seed=(0, is_int(-(2**63), 2**64 - 1)), log_every=(1, is_int(1))),
        **dict(
            checkpoint=(None, or_none(is_path)), checkpoint_every=(5, is_int(1)), resume=(False, is_flag), progress=bar
        ),
        **dict(
            autocast=(None, or_none(lambda v: v is torch.bfloat16)),
            accumulate=(2, is_int(1)),
            gradient_checkpointing=(False, is_flag),
            lr_scheduler=(None, or_none(is_function), "warmup", "decay"),
        ),
        group=(None, or_none(nothing_else)),
        **dict(held_out=(2, is_int(0, 3), "bank"), evaluate_every=(1, or_none(is_int(1)), "held_out")),
        **dict(patience=(2, or_none(is_int(1)), "evaluate_every"), callbacks=((), are_callbacks)),
        keep_checkpoints=(1, or_none(is_int(1)), "checkpoint"),
    )
    place(
        "training_cost",
        fk.training_cost,
        **dict(student=(None, or_none(lambda v: isinstance(v, nn.Module)))),
        **dict(
            velocity=(lambda: Net(), is_function, "student"),
            schedule=(lambda: cal[2], is_plan, "grid"),
            measure=(False, is_flag),
        ),
        **dict(noise=((D,), lambda v: is_noise(v) or is_function(v) or isinstance(v, (list, tuple)))),
        **dict(iterations=(1, is_int(1)), batch=(2, is_int(1)), bank=(4, is_int(1), "noise")),
    )
    files = dict(checkpoint="trained.pt", noise=(D,), bank=4, progress=False)
    trained = fk.straighten(None, Net(), cal[2], iterations=1, batch=2, **files).student
    place(
        "evaluate_checkpoints",
        fk.evaluate_checkpoints,
        (OSError,),
        checkpoint=("trained.pt", nothing_else),
        **dict(student=(lambda: trained, nothing_else, "checkpoint")),
        plans=(2, lambda v: is_evaluated(v) or all(map(is_evaluated, v.values() if is_dict(v) else v))),
        **dict(noise=(lambda: rand(N, D), is_noise), velocity=(lambda: Net(), is_function), progress=bar),
    )
    numbers = ("tokens", "width", "layers", "iterations", "bank", "accumulate", "gpus")
    place(
        "training_plan",
        fk.training_plan,
        **dict(
            parameters=(1e6, within(1, 1e18, "[]"), "trained"), shape=((2, 3), lambda v: isinstance(v, (list, tuple)))
        ),
        **{name: (2, is_int(1), "batch") for name in numbers},
        **dict(batch=(4, is_int(1)), steps=(2, is_int(1), "grid"), grid=(4, is_int(1))),
        **dict(target=("boss", lambda v: isinstance(v, str)), conditioning=(3, is_int(0))),
        **{name: (True, is_flag) for name in ("guided", "ema", "gradient_checkpointing", "sharded")},
        **dict(trained=(None, or_none(within(1, 1e6, ends="[]"))), lora_rank=(None, or_none(is_int(1)), "trained")),
        **dict(bank_dtype=(F32, lambda v: v in (F32, torch.bfloat16)), dtype=(F32, lambda v: v in (F32, *LOW))),
        **dict(memory=(80e9, within(1, 1e18, "[]")), tflops=(9.0, within(1e-6, 1e9, "[]"))),
        **dict(utilisation=(0.4, within(1e-6, 1, "[]")), kept=(57.0, within(0, 1e6, "[]"))),
    )


def _others(cal) -> None:
    net = Net()

    def fused():
        return fk.fuse(nn.Sequential(nn.Linear(D + 1, D)), 2)

    sampler = fused()
    flat = lambda: nn.Sequential(nn.Linear(D + 1, D))  # noqa: E731
    is_shape = or_none(lambda v: isinstance(v, (list, tuple, torch.Size)) and all(is_int(1)(d) for d in v))
    place(
        "fuse",
        fk.fuse,
        **dict(velocity=(lambda: flat(), is_function), schedule=(2, is_plan), shape=(None, is_shape)),
        weights=(None, or_none(lambda v: isinstance(v, torch.dtype) and v in (F32, torch.bfloat16))),
    )
    is_float = is_dense(F32, *LOW)
    place("sampler()", sampler, noise=(lambda: rand(N, D), is_float))
    place("sampler.on", sampler.on, schedule=(2, is_plan))
    place(
        "sampler.run",
        sampler.run,
        **dict(noise=(lambda: rand(N, D), is_float), conditioning=(None, or_none(is_dict))),
        **dict(states=(False, is_flag), velocities=(False, is_flag), first=(0, is_int(0))),
    )
    place(
        "fuse_head",
        fk.fuse_head,
        **dict(velocity=(lambda: Net(), is_function), head=("last", or_none(is_one_of("last", "first")))),
    )

    def record(**kwargs):
        with fk.record_calls(**kwargs):
            fk.euler_step(rand(N, D), rand(N, D), 0.5)

    place(
        "record_calls",
        record,
        (OSError,),
        **dict(op=("euler_step", is_one_of("euler_step")), path=("calls.safetensors", is_path)),
        **dict(calls=(2, is_int(1)), max_gb=(1.0, within(0))),
    )

    def on(name):
        with fk.backend(name):
            pass

    place("backend", on, (fk.BackendError,), name=("cpu", is_one_of("auto", "", None, *backends.BACKENDS), "backend"))
    device = ("cpu", lambda v: isinstance(v, (str, torch.device)) or is_int(0)(v))
    place("explain", fk.explain, op=("euler_step", is_one_of(*OPS)), device=device)
    width = (8, is_int(1))
    place(
        "sinusoidal_embedding",
        networks.sinusoidal_embedding,
        t=(lambda: torch.zeros(N), anything),
        dim=(8, is_int(2)),
        scale=(1.0, is_number),
    )
    place("TimeEmbedding", networks.TimeEmbedding, frequencies=(8, is_int(2)), width=width)
    place("ResidualMLP", networks.ResidualMLP, dim=width, width=width, blocks=(1, is_int(0)), time_width=width)
    is_widths = (lambda: (8, 8, 8), lambda v: isinstance(v, (list, tuple)) and len(v) == 3)
    place("UNet", networks.UNet, channels=(1, is_int(1)), widths=is_widths, time_width=width)
    dit = dict(channels=(1, is_int(1)), size=(4, is_int(1)), patch=(2, is_int(1)), width=width, blocks=(1, is_int(0)))
    place("DiT", networks.DiT, **dit, heads=(2, is_int(1)), time_width=width)
    place("EmpiricalVelocity", closed_form.EmpiricalVelocity, data=(lambda: rand(N, D), is_noise))
    positive = lambda v: is_number(v) or are_numbers(v)  # noqa: E731
    place(
        "GaussianMixtureVelocity",
        closed_form.GaussianMixtureVelocity,
        **dict(means=(lambda: rand(2, D), is_noise), stds=(0.5, positive), weights=(None, or_none(positive))),
    )
    mixture = closed_form.GaussianMixtureVelocity(rand(2, D), 0.5)
    is_generator = or_none(lambda v: isinstance(v, torch.Generator))
    place("GaussianMixtureVelocity.sample", mixture.sample, n=(3, is_int(0)), generator=(None, is_generator))
    small = networks.ResidualMLP(D, 8, 1, 8)
    bundled.save_network(small, "net.safetensors")
    of_path = ("net.safetensors", is_path)
    place(
        "save_network",
        bundled.save_network,
        (OSError,),
        net=(lambda: small, nothing_else),
        path=("new.safetensors", is_path),
    )
    place("load_network", bundled.load_network, (OSError,), path=of_path)
    of_net = (lambda: bundled.load_network("net.safetensors"), lambda v: isinstance(v, nn.Module), "path")
    prefer = ("ema", lambda v: isinstance(v, str) and v != "")
    place("load_weights", fk.load_weights, (OSError,), net=of_net, path=of_path, prefer=prefer)
    place("network_notes", bundled.network_notes, (OSError,), path=of_path)
    _host_loops(), _k_diffusion()
    whole = lambda v: is_plan(v) and fk.Solver.of(v).reaches_data  # noqa: E731
    place("solver_sigmas", comfy.solver_sigmas, plan=(3, whole))
    place("solver_sampler", comfy.solver_sampler, plan=(3, lambda v: whole(v) or is_one_of(*comfy.SOLVERS)(v)))
    with contextlib.suppress(ImportError):
        diffusers = importlib.import_module("diffusers")
        from flowkernels.integrations.diffusers import sigmas_for, solver_scheduler

        stock = (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), nothing_else)
        is_held = lambda v: is_plan(v) or isinstance(v, fk.Calibration)  # noqa: E731
        is_euler = lambda v: is_plan(v) and (not isinstance(v, fk.Solver) or v.is_euler)  # noqa: E731
        place("solver_scheduler", solver_scheduler, solver=(3, is_held), like=stock)
        mu = (None, or_none(within(-math.inf)))
        place("sigmas_for", sigmas_for, schedule=(3, is_euler), scheduler=stock, mu=mu)
        importlib.import_module("transformers")
        _pipeline(diffusers)
    del net


class Host:
    def velocity(self, x_t, time):
        return velocity(x_t, torch.as_tensor(time))

    def sample(self):
        x = rand(N, D)
        for i in range(3):
            x = x + self.velocity(x, i / 3) / 3
        return x


def _host_loops() -> None:
    host = Host()
    is_pair = lambda v: isinstance(v, (list, tuple, np.ndarray)) and len(v) == 2 and v[0] != v[1]  # noqa: E731
    ends = (None, or_none(lambda v: is_pair(v) and all(map(within(-math.inf), v))))
    where = dict(
        owner=(lambda: host, nothing_else, "name"),
        name=("velocity", nothing_else),
        state=(None, is_one_of(None, "x_t")),
        time=(None, is_one_of(None, "time")),
        ends=ends,
        sign=(1, lambda v: type(v) is int and v in (1, -1)),
        check=(True, is_flag),
    )
    from_noise = lambda v: is_plan(v) and (s := fk.Solver.of(v)).times[0] == 0 and s.reaches_data  # noqa: E731
    place("host_loop", host_loops.host_loop, **where, solver=(3, from_noise), times=(None, or_none(nothing_else)))
    velocity_of = host_loops.host_velocity
    # called once beside the call that is recorded, whose arguments say the rest
    place("host_velocity", velocity_of, **where, call=(lambda: host.sample, nothing_else))
    known = velocity_of(host, "velocity", host.sample)
    x = (lambda: rand(N, D), lambda v: is_dense(*FLOATS)(v) and v.shape[1:] == (D,))
    place("HostVelocity", known, x=x, t=(0.5, are_within_one))
    place("HostVelocity.loop", known.loop, solver=(3, from_noise), check=(True, is_flag))


def _k_diffusion() -> None:
    sigmas = torch.tensor([9.0, 1.0, 0.0])
    denoised = lambda x, sigma: velocity(x, sigma) / 3  # noqa: E731

    def euler(model, x, sigmas, disable=None, order=1):
        for sigma, then in itertools.pairwise(sigmas):
            x = x + (x - model(x, sigma.expand(len(x)))) * (then / sigma - 1)
        return x

    def fall(v) -> bool:
        try:
            t = torch.as_tensor(v).double()
            return t.dim() == 1 and len(t) > 1 and bool((t.diff() < 0).all()) and bool(t[-1] == 0 and t[0] < math.inf)
        except Exception:
            return False

    def late(v) -> bool:
        given = not isinstance(v, (int, np.integer)) and is_plan(v)
        return given and (plan := fk.Solver.of(v)).times[0] > 0 and plan.reaches_data

    makes = lambda v: is_function(v) and not isinstance(v, nn.Module)  # noqa: E731
    place(
        "k_diffusion.sampler",
        k_diffusion.sampler,
        plan=([0.1, 0.5, 1], lambda v: late(v) or makes(v)),
        flow=(False, is_flag),
    )
    place(
        "k_diffusion sample",
        k_diffusion.sampler([0.1, 0.5, 1]),
        **dict(model=(lambda: denoised, is_function), x=(lambda: rand(N, D), is_noise)),
        **dict(
            sigmas=(sigmas, lambda v: v is None), extra_args=(None, or_none(lambda v: is_dict(v) and not v), "model")
        ),
        **dict(callback=(None, or_none(makes)), disable=(True, or_none(is_flag))),
    )
    place("k_diffusion.solver", k_diffusion.solver, sample=(lambda: euler, is_function), sigmas=(sigmas, fall))


def are_within_one(t) -> bool:
    try:
        with np.errstate(all="ignore"):
            t = np.asarray(t.detach().double() if isinstance(t, Tensor) else t)
        return t.dtype.kind in "fiu" and t.size in (1, N) and bool(((t >= 0) & (t <= 1)).all())
    except Exception:  # no numbers
        return False


def _pipeline(diffusers) -> None:
    from flowkernels.integrations.diffusers import pipeline_velocity

    sizes = dict(sample_size=2, in_channels=1, out_channels=1, num_layers=1, attention_head_dim=8)
    dims = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 16)
    net = diffusers.SD3Transformer2DModel(**sizes, num_attention_heads=2, **dims)
    pipe = diffusers.StableDiffusion3Pipeline(net, diffusers.FlowMatchEulerDiscreteScheduler(), *[None] * 7)
    texts = dict(prompt_embeds=rand(2, 4, 16), pooled_prompt_embeds=rand(2, 16))
    arguments = dict(height=16, width=16, guidance_scale=1.0, **texts)
    names = lambda v: isinstance(v, (list, tuple, set)) and set(v) <= set(arguments)  # noqa: E731
    place(
        "pipeline_velocity",
        lambda **given: pipeline_velocity(**arguments, **given),
        pipe=(lambda: pipe, nothing_else),
        batch_size=(None, or_none(is_int(1))),
        shared=(lambda: [], names),
        check=(False, is_flag),
    )
    velocity = pipeline_velocity(pipe, **arguments)
    x = (lambda: rand(N, 1, 2, 2), lambda v: is_dense(*FLOATS)(v) and v.shape[1:] == (1, 2, 2))
    place("PipelineVelocity", velocity, x=x, t=(0.5, are_within_one))
    place("PipelineVelocity.grid", velocity.grid, steps=(4, is_int(1, 100_000)))
    is_generator = or_none(lambda v: isinstance(v, torch.Generator))
    place("PipelineVelocity.noise", velocity.noise, n=(3, is_int(1)), generator=(None, is_generator))


# ---- the command line ----

TEXTS = [
    *(
        "",
        " ",
        "abc",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "0",
        "1.5",
        "-0.5",
        "1e-320",
        "1e3",
        "0x10",
        "٣",
        "²",
        "4 ",
        "3,4",
    ),
    *(
        "1208925819614629174706176",
        "-1208925819614629174706176",
        "9" * 5000,
        "18446744073709551616",
        "9223372036854775808",
    ),
    *(
        "none/x.json",
        ".",
        "folder",
        "a\tb",
        "x" * 3000,
        "1-",
        "-",
        "1-99999999999",
        "2-1",
        ",",
        "None",
        "True",
        "{}",
        "*",
    ),
]
MODULE = """
import torch
built = 0

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x, t):
        return self.linear(x)

def build():
    global built
    built += 1
    return Net()
"""


def is_text(parse: Callable, low: float, high: float, ends: str = "[]") -> Callable:
    def fine(text):
        try:
            value = parse(text)
        except (ValueError, TypeError):
            return False
        return (low < value or (ends[0] == "[" and value == low)) and (
            value < high or (ends[1] == "]" and value == high)
        )

    return fine


def _commands() -> None:
    Path("counted_models.py").write_text(MODULE)
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module("counted_models")

    class Refused(ValueError):
        """What a command line says on its error stream."""

    def run(words: list[str]) -> None:
        import io

        before, err = module.built, io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = command_line(words)
        if code:
            Count.evaluations += module.built - before
            said = err.getvalue()
            if code != 2 or said.count("\n") != 1 or not said.startswith("flowkernels: error: "):
                raise RuntimeError(f"exit {code}: {said[-300:]}")
            raise Refused(said)

    def command(name: str, good: str, also: tuple[str, ...] = (), **options) -> None:
        for option, fine in options.items():
            flag = "-n" if option == "n" else f"--{option.replace('_', '-')}"

            def call(text, flag=flag):
                run([name, *good.split(), f"{flag}={text}" if flag != "-n" else f"-n{text}"])

            said = (flag.lstrip("-"), "-n", *also)
            PLACES.append(Place(f"{name} {flag}", call, {"text": Arg(lambda: None, fine, said)}))

    positive, number = is_text(int, 1, 10**6), is_text(float, 0, 1e307, "()")
    seed = is_text(int, -(2**63), 2**64 - 2)
    none = lambda text: False  # noqa: E731
    model = "--model counted_models:build --shape 3"
    with fk.record_calls("euler_step", "calls.st"):
        fk.euler_step(rand(N, D), rand(N, D), 0.5)
    shared = dict(
        seed=seed, device=is_one_of("cpu"), shape=lambda text: all(map(is_text(int, 1, 10**6), text.split(",")))
    )
    command(
        "calibrate",
        f"{model} --out cli.json -n 4 --grid 4 --steps 2",
        **dict(
            n=positive,
            grid=lambda t: is_text(int, 2, 10_000)(t) or "," in t,
            knot=is_text(float, 0, 1, "[)"),
            steps=lambda t: all(c in "0123456789-, " for c in t),
            max_regret=number,
        ),
        **dict(
            verify_noise=positive, chunk=positive, out=lambda t: len(t) < 200, model=none, checkpoint=none, **shared
        ),
    )
    command("merge", "calibration.json --out cli.json", out=lambda t: len(t) < 200)
    command(
        "straighten",
        f"{model} --schedule calibration.json --steps 2 --out cli.safetensors --iterations 1",
        **dict(steps=none, iterations=positive, batch=positive, bank=positive, refresh=positive, lr=number, seed=seed),
        **dict(
            warmup=is_text(int, 0, 2**63),
            decay=none,
            target=none,
            t_sampling=none,
            loss=none,
            ema=is_text(float, 0, 1, "[)"),
        ),
        **dict(clip=is_text(float, 0, 1e307, "[)"), schedule=none, out=none, state=lambda t: 0 < len(t) < 200),
    )
    command(
        "sample",
        f"{model} --steps 2 -n 2 --out cli.npy",
        **dict(
            n=positive, steps=is_text(int, 1, 10**6), chunk=positive, method=none, schedule=none, out=none, **shared
        ),
    )
    command(
        "plan",
        "--parameters 1e6 --shape 2,3 --tokens 4 --width 8 --layers 2 --batch 8",
        **{name: positive for name in ("tokens", "width", "layers", "iterations", "bank")},
        **dict(
            lora_rank=none,
            trained=is_text(float, 1, 1e6),
            target=none,
            dtype=none,
            memory=number,
            tflops=number,
            gpus=none,
        ),
    )
    command("plot", "calibration.json --out none/x.png", ("out",), steps=none, out=none)
    command(
        "export", "calibration.json --to json --steps 2", to=is_one_of(*RECEIVERS), steps=is_text(int, 1, 2), out=none
    )
    command(
        "bench",
        "euler_step --list",
        threads=is_text(int, 1, 4096),
        seconds=number,
        minutes=number,
        out=is_one_of(".", "folder"),
    )
    command(
        "replay", "calls.st --seconds 0.01", threads=is_text(int, 1, 4096), seconds=number, backends=none, device=none
    )
    command("record", "euler_step --from counted_models.py", ("euler_step",), calls=none, max_gb=none, out=none)
    command("demo", "--data digits --out none/none", ("out",), seed=seed, data=none)


# ---- one call ----


class Hang(BaseException):
    pass


def _alarm(*_):
    raise Hang


def settings() -> tuple:
    """What a refused call may not have changed."""
    os.umask(mask := os.umask(0))
    return (
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), os.getcwd(), mask),
        *(backends._requested.get(), observers.present, torch.is_inference_mode_enabled()),
        *(torch.random.get_rng_state().sum().item(), sorted(os.listdir()), signal.getsignal(signal.SIGINT)),
    )


def names(message: str, wanted: set[str]) -> bool:
    """Whether it says which argument, and what was expected, shortly."""
    if len(message) > 1200 or not re.search(r": (expected|invalid choice)", message):
        return False
    # at the front, or as what another argument has to fit: "v: expected x's shape"
    patterns = (r"(?<![A-Za-z_]){}(?![A-Za-z_])[^:]*: (expected|invalid choice)", r"(?<![A-Za-z_]){}('s| = |, )")
    return any(re.search(p.format(re.escape(w)), message) for w in wanted for p in patterns)


@dataclass
class Outcome:
    kind: str
    detail: str = ""


def _fine(arg: Arg, value) -> bool:
    try:
        return bool(arg.fine(value))
    except Exception:  # of a value that cannot be looked at
        return False


def attempt(place: Place, bad: dict[str, Any]) -> Outcome:
    args = place.good() | bad
    wanted = {said for name in bad for said in (name, *place.args[name].said)}
    fine = {name: _fine(place.args[name], value) for name, value in bad.items()}
    Count.evaluations, before = 0, settings()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        place.call(**args)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except Hang:
        return Outcome("works" if all(fine.values()) else "hang")  # a million iterations take their time
    except Exception as e:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        said = f"{type(e).__name__}: {e}"
        if not isinstance(e, (TypeError, ValueError, *place.errors)) or isinstance(e, UnicodeError):
            return Outcome("unnamed", said)
        if not isinstance(e, place.errors) and not names(str(e), wanted):
            return Outcome("unnamed", said)
        evaluated = {"velocity", "net", "student", "noise", "optimizer", "loss"} & set(
            bad
        )  # what they do shows when they run
        if Count.evaluations and not evaluated and place.name != "cal.find endpoint":
            return Outcome("late", said)
        if settings() != before:
            return Outcome("state", said)
        return Outcome("named", said)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for path in Path().glob("*"):
            if path.name not in KEPT and path.is_file():
                path.unlink()
    wrong = [name for name, ok in fine.items() if not ok]
    return Outcome("nonsense", ", ".join(wrong)) if wrong else Outcome("works")


LARGE = {repr(10**6), repr(2**31)}
COUNTS = {"iterations", "grid", "plan", "schedule", "forward", "size"}  # of which as many are made as are asked for
KEPT = {"trained.pt", "calibration.json", "net.safetensors", "counted_models.py", "calls.st"}


def plan(calls: int, seed: int) -> list[tuple[int, dict[str, str]]]:
    """(place, {argument: value}) of each call: every argument with every value in an order of the seed's, a fifth of
    all calls with a second argument, and those over again where more are asked for."""
    draw = random.Random(seed)
    texts = {f"#{i}": t for i, t in enumerate(TEXTS)}
    every = []
    for i, p in enumerate(PLACES):
        for name in p.args:
            labels = texts if name == "text" else [v for v in VALUES if v not in LARGE or name not in COUNTS]
            every += [(i, {name: label}) for label in labels]
    draw.shuffle(every)
    found = []
    while len(found) < calls:
        i, bad = every[len(found) % len(every)]
        others = [a for a in PLACES[i].args if a not in bad]
        if others and (len(found) >= len(every) or draw.random() < 0.2):
            bad = bad | {draw.choice(others): draw.choice([v for v in VALUES if v not in LARGE])}
        found.append((i, bad))
    return found


def value(label: str):
    return TEXTS[int(label[1:])] if label.startswith("#") else VALUES[label]()


def build() -> None:
    """All places, in the current folder, which is emptied as it goes."""
    torch.manual_seed(0)
    Path("folder").mkdir(exist_ok=True)
    cal = fk.calibrate(velocity, rand(N, D), K, (1, 2, 3), progress=False)
    _ops(), _schedules(), _stages(cal), _others(cal), _commands()


@dataclass
class Counts:
    calls: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, where: str, outcome: Outcome) -> None:
        self.calls += 1
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        if outcome.kind in FAULTS:
            self.faults.append(f"{outcome.kind}: {where}: {' '.join(outcome.detail.split())[:300]}")


def run(calls: int, seed: int, start: int, log) -> Counts:
    """The calls of the plan from `start` on; `log` is told of each before it is made, and of its outcome after."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGVTALRM, _alarm)
    counts = Counts()
    for p in PLACES:
        if "text" not in p.args and start == 0:  # a command takes seconds
            counts.add(p.name, attempt(p, {}))
    for number, (i, labels) in enumerate(plan(calls, seed)[start:], start):
        p = PLACES[i]
        shown = (f"{k}={TEXTS[int(v[1:])]!r:.40}" if v.startswith("#") else f"{k}={v}" for k, v in labels.items())
        where = f"{p.name}({', '.join(shown)})"
        log(f"? {number} {where}")
        outcome = attempt(p, {name: value(label) for name, label in labels.items()})
        counts.add(where, outcome)
        log(f"= {number} {json.dumps([where, outcome.kind, outcome.detail[:400]])}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for one line before and after each call")
    args = parser.parse_args()
    log_file = open(args.log.absolute(), "a", buffering=1) if args.log else None  # noqa: SIM115, of the whole process
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        build()
        counts = run(args.calls, args.seed, args.start, lambda line: log_file and log_file.write(line + "\n"))
        os.chdir("/")
    for fault in counts.faults:
        print(fault)
    print(json.dumps(dict(calls=counts.calls, **counts.kinds)))


if __name__ == "__main__":
    main()
