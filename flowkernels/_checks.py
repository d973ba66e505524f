"""Argument checks: every message names the argument, what was expected and what came."""

import functools
import inspect
import itertools
import math
import numbers
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class _Repr(reprlib.Repr):
    """Short, and of tensors, arrays and modules inside containers what `describe` says of them."""

    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxarray = 24
        self.maxstring = self.maxother = self.maxlong = 200

    def repr1(self, x, level):
        return describe(x) if isinstance(x, (Tensor, np.ndarray, nn.Module)) else super().repr1(x, level)


_repr = _Repr().repr


class FlowError(ValueError):
    """Of a flow that cannot be followed to its end: NaN or Inf, or steps that underflow."""


def describe(value) -> str:
    """A value as an error message shows it: one short line, whatever the value's own `repr` does."""
    try:
        if isinstance(value, Tensor):
            if value.is_nested:
                return f"a nested {value.dtype} tensor on {value.device}"  # of no one shape
            layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
            return f"a {layout}{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
        if isinstance(value, np.ndarray):
            return f"a numpy {value.dtype} array of shape {list(value.shape)}"
        if isinstance(value, nn.Module):
            return f"a module {type(value).__name__}"
        text = " ".join(_repr(value).split())
    except Exception:  # a repr that raises, or recurses
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:77]}..."


def expect(ok: bool, name: str, expected: str, got, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `ok`. got: the value, or what is to be said of it."""
    if not ok:
        told = isinstance(got, str) and got != ""
        raise error(f"{name}: expected {expected}, got {f'{got:.600}' if told else describe(got)}")


def expect_shown(ok: bool, name: str, expected: str, value, error: type[Exception] = ValueError) -> None:
    """The same, with the value in any case: a text in quotes."""
    if not ok:
        raise error(f"{name}: expected {expected}, got {describe(value)}")


def expect_tensor(value, name: str, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        expect(False, name, "a torch.Tensor", f"{type(value).__name__} {describe(value)}", TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        expect(False, name, " or ".join(str(d) for d in dtypes), value, TypeError)
    if value.layout is not torch.strided or value.is_nested:
        expect(False, name, "a dense tensor (.to_dense())", value, TypeError)
    return value


def expect_values(value, name: str, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    """A tensor that holds numbers, which one on the meta device does not."""
    expect_tensor(value, name, dtypes)
    expect(value.device.type != "meta", name, "a tensor with data, on the CPU or a GPU", value)
    return value


def expect_number(value, name: str):
    """A number of the ops, NaN and Inf included: a float, or a tensor of no dimensions as it is."""
    if type(value) is float or (isinstance(value, (int, float)) and not isinstance(value, bool) and _fits(value)):
        return value
    if isinstance(value, Tensor):
        expect(value.dim() == 0 and not _is_no_real(value.dtype), name, "a number", value, TypeError)
        expect(value.layout is torch.strided and value.device.type != "meta", name, "a number", value)
        expect(not value.requires_grad, name, "a number that needs no gradient", "a tensor with requires_grad")
        return value
    return _as_float(value, name, "a number")


def _fits(value: int | float) -> bool:
    """Whether it is a float64: not an integer beyond them all."""
    return torch.compiler.is_compiling() or -(2**1023) <= value <= 2**1023 or not isinstance(value, int)


def _is_no_real(dtype: torch.dtype) -> bool:
    return dtype.is_complex or dtype == torch.bool


def _as_float(value, name: str, expected: str) -> float:
    """A real number of any kind, numpy's and tensors' of no dimensions included, as Python's."""
    if isinstance(value, Tensor):
        known = value.dim() == 0 and not _is_no_real(value.dtype) and value.device.type != "meta"
    else:
        known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    expect_shown(known, name, expected, value, TypeError)
    try:
        return float(value)
    except (OverflowError, RuntimeError):  # an integer beyond float64; a tensor without data
        expect_shown(False, name, expected, value)


def expect_real(
    value,
    name: str,
    expected: str = "a finite number",
    ok: Callable[[float], bool] = lambda a: True,
    finite: bool = True,
) -> float:
    """A number for which `ok` holds, finite if so asked, as Python's float."""
    number = _as_float(value, name, expected)
    expect_shown((math.isfinite(number) or not finite) and ok(number), name, expected, value)
    return number


def expect_int(value, name: str, expected: str, least: int | None = None, most: int | None = None) -> int:
    """An integer, numpy's too and True not, from `least` to `most` and of 64 bits, as Python's."""
    least, most = -(2**63) if least is None else least, 2**63 - 1 if most is None else most
    _expect_integral(value, name, expected)
    expect_shown(least <= value <= most, name, expected, value)
    return int(value)


def expect_numbers(values, name: str, length: int | None = None) -> list:
    """A list of Python's numbers, all of them finite, as a JSON file has them."""
    known = isinstance(values, list) and all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)
    fits = known and (length is None or len(values) == length)
    expect(fits, name, f"a list of {'' if length is None else f'{length} '}finite numbers", values)
    return values


def _expect_integral(value, name: str, expected: str) -> None:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    expect_shown(integral, name, expected, value, TypeError)


def expect_positive_int(value, name: str) -> int:
    _expect_integral(value, name, "an integer")
    expect(value >= 1, name, "at least 1", value)
    expect(value < 2**63, name, "an integer of 64 bits", value)
    return int(value)


def expect_seed(value, name: str = "seed") -> int:
    """What `torch.Generator.manual_seed` takes."""
    _expect_integral(value, name, "an integer")
    return expect_int(value, name, "an integer of 64 bits", most=2**64 - 1)


def expect_bool(value, name: str) -> bool:
    if value is True or value is False:
        return value
    expect_shown(isinstance(value, (bool, np.bool_)), name, "True or False", value, TypeError)
    return bool(value)


def expect_choice(value, name: str, choices: Sequence):
    """One of a few names or constants; nothing that is only equal to one, such as True to 1."""
    known = any(value is c or (type(value) is type(c) and isinstance(c, (str, int)) and value == c) for c in choices)
    expect(known, name, one_of(choices), value)
    return value


def one_of(choices: Iterable) -> str:
    """'a', 'b' or 'c'."""
    *most, last = map(repr, choices)
    return f"{', '.join(most)} or {last}" if most else last


def expect_text(value, name: str, expected: str = "a text") -> str:
    expect_shown(isinstance(value, str), name, expected, value, TypeError)
    expect(value != "", name, expected, "''")
    return value


def expect_shape(value, name: str, expected: str, length: int | None = None) -> tuple[int, ...]:
    """Sizes of at least 1, as many as `length` or one at least, as Python's integers."""
    is_shape = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    expect_shown(is_shape, name, expected, value, TypeError)
    sizes = "a shape of at least one dimension, each >= 1" if length is None else expected
    expect_shown(len(value) == (length or len(value) or 1), name, sizes, value)
    return tuple(expect_int(size, name, sizes, 1) for size in value)


def expect_list(value, name: str, expected: str, ordered: bool = True) -> list:
    """The entries of a sequence or an iterator, which bytes are not, nor sets and dicts where the order counts, nor
    tensors of so many that they are none of entries."""
    unfit = isinstance(value, bytes) or (ordered and isinstance(value, (Set, Mapping)))
    try:
        entries = None if unfit or (isinstance(value, Tensor) and len(value) > 1 << 16) else list(value)
    except Exception:  # whatever its iterator raises
        entries = None
    expect_shown(entries is not None, name, expected, value, TypeError)
    return entries


def expect_callable(value, name: str, expected: str) -> Callable:
    """Something to call; a class is not meant by any argument, and would be made an object of."""
    expect_shown(callable(value) and not isinstance(value, type), name, expected, value, TypeError)
    if not torch.compiler.is_compiling() and _is_pipeline(type(value)):
        made = "flowkernels.integrations.diffusers.pipeline_velocity(pipe, prompt=prompts) makes one of a pipeline"
        expect(False, name, f"{expected}; {made}", type(value).__name__, TypeError)
    return value


@functools.lru_cache(4096)
def _is_pipeline(kind: type) -> bool:
    return any(base.__name__ == "DiffusionPipeline" for base in kind.__mro__)


def expect_takes(function, name: str, expected: str, *args, by_name: Iterable[str] = ()) -> None:
    """Something that may be called with these arguments, and some by name, as far as its signature says."""
    expect_callable(function, name, expected)
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(
            *args, **dict.fromkeys(by_name)
        )
    except TypeError as e:
        expect(False, name, expected, f"{describe(function)} ({e})", TypeError)
    except ValueError:  # of a builtin, which has none
        return


def expect_mapping(value, name: str, expected: str = "a dict with names as keys") -> Mapping[str, Any]:
    expect_shown(isinstance(value, Mapping), name, expected, value, TypeError)
    expect_shown(all(isinstance(key, str) for key in value), name, expected, value, TypeError)
    return value


def expect_dtype(value, name: str, dtypes: Sequence[torch.dtype | None]):
    expected = " or ".join(str(d) for d in dtypes)
    expect_shown(any(value is d for d in dtypes), name, expected, value, TypeError)
    return value


def expect_path(value, name: str) -> Path:
    fits = isinstance(value, (str, os.PathLike))
    path = Path(value) if fits and isinstance(os.fspath(value), str) else None
    expect_shown(path is not None, name, "a path", value, TypeError)
    expect_shown(path.name != "" and is_path(str(path)), name, "the path of a file", value)
    return path


def is_path(text: str) -> bool:
    """Whether a file may have such a path: no part of it is too long for a file system."""
    return "\0" not in text and all(len(os.fsencode(part)) <= 255 for part in Path(text).parts)


def expect_device(value, name: str = "device") -> torch.device | None:
    """None for torch's default device; else one that this torch can put tensors on."""
    try:
        return None if value is None else torch.empty(0, device=value).device
    except Exception as e:  # RuntimeError, TypeError, AssertionError: by what is wrong with it
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        expect(False, name, "a device of this torch build", f"{describe(value)} ({reason:.120})")


def expect_float64(value, name: str, expected: str) -> Tensor:
    """Real numbers in a tensor, an array or nested sequences, as a float64 tensor on the CPU without gradient.

    Of truth values, complex numbers and texts none are made.
    """
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        dense = given.layout is torch.strided and not given.is_nested
        bad = _is_no_real(given.dtype) or not dense or isinstance(value, (bytes, bytearray))
        if not bad:  # from the value itself: Python's floats have been rounded in `given`
            return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().contiguous()
    except Exception:  # by what is wrong with it; lists of objects raise what these do
        pass
    expect_shown(False, name, expected, value, TypeError)


MOST_STEPS = 1_000_000  # of a grid


def expect_room(size: int, name: str, what: str, got: str) -> None:
    """That the `size` bytes of something are not more than the machine's memory."""
    there = _memory()
    told = f"{got}: {size / 2**30:.3g} GiB of {what}"
    expect(size <= there, name, f"what fits into {there / 2**30:.3g} GiB of memory", told)


@functools.cache
def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 2**63


LOW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *LOW)


def expect_like(t: Tensor, name: str, x: Tensor) -> None:
    """A tensor of x's shape, where x is."""
    if t.shape != x.shape or t.device != x.device:
        expect(False, name, f"x's shape {list(x.shape)} on {x.device}", t)


def expect_out(t, name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A tensor to write to, of x's shape and where x is."""
    expect_tensor(t, name, dtypes)
    expect_like(t, name, x)
    if not t.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)
    ):
        expect(False, name, "a tensor with memory for each element", f"an expanded one, {describe(t)}")
    if not torch.compiler.is_compiling() and t.is_neg():  # which has no such views of its own to write to
        expect(False, name, "a tensor that is not a negated view (.resolve_neg())", f"one, {describe(t)}")


def expect_low(low, x: Tensor) -> None:
    """What a second output in low precision may be: None, a dtype, or a tensor of one and of x's shape."""
    if isinstance(low, Tensor):
        expect_out(low, "low", x, LOW)
    elif not (low is None or low is torch.bfloat16 or low is torch.float16):
        expect(False, "low", "torch.bfloat16, torch.float16 or a tensor of one of them", low, TypeError)


def is_waited_for(t: Tensor) -> bool:
    """Whether a look at its values waits for all that was asked of its device before."""
    return t.device.type != "cpu"


def expect_noise(noise, name: str = "noise", look: bool = True) -> Tensor:
    """Noise `[n, *shape]`: floating point, not empty; finite, where values are looked at."""
    expect_values(noise, name, FLOATS)
    if noise.dim() < 2 or noise.numel() == 0:
        expect(noise.dim() >= 2, name, "shape [n, *shape] with at least 2 dimensions", noise)
        expect(False, name, "at least one sample and one feature", noise)
    if look:
        expect_finite(noise, name)
    return noise


def is_finite(t: Tensor) -> bool:
    """No NaN or Inf. A finite sum has finite terms, and takes a third of the time; one that overflows tells nothing."""
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


def expect_finite(noise: Tensor, name: str) -> None:
    """No NaN or Inf (while compiled, values are not known yet)."""
    if not torch.compiler.is_compiling() and not is_finite(noise):
        bad = (~torch.isfinite(noise.flatten(1)).all(1)).nonzero()[0].item()
        expect(False, name, "finite values", f"NaN or Inf in sample {bad}")


def expect_times(times, name: str, whole: bool = True, falling: bool = False) -> Tensor:
    """Times as float64 on the CPU: strictly increasing from 0, or later, to 1; unless `whole`, to any before as well.
    An integer K means K uniform steps from 0 to 1. falling: they may be given from the last to the first."""
    compiling = torch.compiler.is_compiling()
    if isinstance(times, numbers.Integral) and not isinstance(times, bool):  # numpy's integers too
        expect(times >= 1, name, "at least 1 step", times)
        if compiling:
            return _uniform(times)
        expect(times <= MOST_STEPS, name, f"at most {MOST_STEPS:,} steps", times)
        return torch.linspace(0, 1, int(times) + 1, dtype=torch.float64, device="cpu")
    if compiling:
        t = torch.as_tensor(times, dtype=torch.float64, device="cpu").detach().contiguous()
    else:
        expected = "a number of steps or a sequence of times"
        if isinstance(times, Mapping):
            expected += ", such as one schedule of a calibration: cal[N] or cal.best(N)"
        t = expect_float64(times, name, expected)
    expect(t.dim() == 1 and len(t) >= 2, name, "a number of steps or at least two times in one dimension", times)
    if compiling:  # values are not known yet
        return t
    values = t.tolist()  # plain numbers: quicker than tensor operations for a few hundred
    if falling and all(map(operator.gt, values, values[1:])):
        t, values = t.flip(0), values[::-1]
    if not all(map(operator.lt, values, values[1:])):  # nothing is less than NaN; Inf is none of the ends below
        expect(all(map(math.isfinite, values)), name, "finite times", times)
        i, (a, b) = next((i, pair) for i, pair in enumerate(itertools.pairwise(values)) if pair[0] >= pair[1])
        falls = all(map(operator.gt, values, values[1:]))
        expected = "strictly increasing times" + (" t = 1 - sigma (fk.invert goes back from data)" if falls else "")
        expect(False, name, expected, f"times[{i}] = {a:.9g}, times[{i + 1}] = {b:.9g}")
    to_data = math.isclose(values[-1], 1, abs_tol=1e-12)
    if not (values[0] >= -1e-12 and (to_data or (values[-1] < 1 and not whole))):
        expected = "times from 0 (noise), or later, to 1 (data)" + ("" if whole else ", or before")
        expect(False, name, expected, f"times from {values[0]:.9g} to {values[-1]:.9g}")
    return t


def _uniform(steps) -> Tensor:
    """`torch.linspace(0, 1, steps + 1)`, to an ulp, for a compiler, which would make a constant of its `steps`."""
    i = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
    h = torch.ones((), dtype=torch.float64, device="cpu") / steps
    return torch.where(i < (steps + 1) // 2, i * h, 1 - (steps - i) * h)


def expect_finite_flow(x: Tensor, v: Iterable[Tensor], times: Tensor, first: int = 0, what: str = "step") -> None:
    """Raise unless the final state x `[n, *shape]` is finite, naming the sample, counted from `first`, and the step.

    times: of the velocities. what: "step", or "evaluation" where a step has several.

    An element that is not finite stays so under further steps, so the last state answers for all of them. The
    velocities v, step by step, are looked at on failure only: they may be computed again then.
    """
    if is_finite(x):
        return
    sample = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
    bad = (step for step, part in enumerate(v) if not torch.isfinite(part[sample]).all())
    step = next(bad, None)
    where = f" at {what} {step} (t = {times[step]:.6g})" if step is not None else ": the state overflows"
    expect(False, "velocity", "finite velocities", f"NaN or Inf in sample {first + sample}{where}", FlowError)
