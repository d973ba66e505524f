"""Argument checks: every message names the argument, what was expected and what came."""

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def describe(value) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:77]}..."


def expect(ok: bool, name: str, expected: str, got, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `ok`."""
    if not ok:
        raise error(f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def expect_tensor(value, name: str, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        expect(False, name, "a torch.Tensor", f"{type(value).__name__} {describe(value)}", TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        expect(False, name, " or ".join(str(d) for d in dtypes), value, TypeError)
    return value


def expect_values(value, name: str, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    """A tensor that holds numbers, which one on the meta device does not."""
    expect_tensor(value, name, dtypes)
    expect(value.device.type != "meta", name, "a tensor with data, on the CPU or a GPU", value)
    return value


def expect_number(value, name: str) -> None:
    if isinstance(value, (int, float)):
        return
    expect(isinstance(value, Tensor) and value.dim() == 0, name, "a number", describe(value), TypeError)
    expect(not value.requires_grad, name, "a number that needs no gradient", "a tensor with requires_grad")


def expect_positive_int(value, name: str) -> int:
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    expect(integer, name, "an integer", describe(value), TypeError)
    expect(value >= 1, name, "at least 1", value)
    return int(value)


LOW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *LOW)


def expect_like(t: Tensor, name: str, x: Tensor) -> None:
    """A tensor of x's shape, where x is."""
    if t.shape != x.shape or t.device != x.device:
        expect(False, name, f"x's shape {list(x.shape)} on {x.device}", t)


def expect_low(low, x: Tensor) -> None:
    """What a second output in low precision may be: None, a dtype, or a tensor of one and of x's shape."""
    if isinstance(low, Tensor):
        expect_tensor(low, "low", LOW)
        expect_like(low, "low", x)
    elif low is not None:
        expect(low in LOW, "low", "torch.bfloat16, torch.float16 or a tensor of one of them", low, TypeError)


def expect_noise(noise, name: str = "noise") -> Tensor:
    """Noise `[n, *shape]`: floating point, not empty, finite (while compiled, values are not known yet)."""
    expect_values(noise, name, FLOATS)
    expect(noise.dim() >= 2, name, "shape [n, *shape] with at least 2 dimensions", noise)
    expect(noise.numel() > 0, name, "at least one sample and one feature", noise)
    if not torch.compiler.is_compiling() and not torch.isfinite(noise).all():
        bad = (~torch.isfinite(noise.flatten(1)).all(1)).nonzero()[0].item()
        expect(False, name, "finite values", f"NaN or Inf in sample {bad}")
    return noise


def expect_times(times, name: str) -> Tensor:
    """Times as float64 on the CPU: strictly increasing from 0 to 1. An integer K means K uniform steps."""
    if isinstance(times, numbers.Integral) and not isinstance(times, bool):  # numpy's integers too
        expect(times >= 1, name, "at least 1 step", times)
        if torch.compiler.is_compiling():
            return _uniform(times)
        return torch.linspace(0, 1, int(times) + 1, dtype=torch.float64, device="cpu")
    try:
        t = torch.as_tensor(times, dtype=torch.float64, device="cpu").detach().contiguous()
    except (TypeError, ValueError, RuntimeError):
        expect(False, name, "a number of steps or a sequence of times", times, TypeError)
    expect(t.dim() == 1 and len(t) >= 2, name, "a number of steps or at least two times in one dimension", times)
    if torch.compiler.is_compiling():  # values are not known yet
        return t
    values = t.tolist()  # plain numbers: quicker than tensor operations for a few hundred
    expect(all(map(math.isfinite, values)), name, "finite times", times)
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if a >= b:
            expect(False, name, "strictly increasing times", f"times[{i}] = {a:.9g}, times[{i + 1}] = {b:.9g}")
    ends = math.isclose(values[0], 0, abs_tol=1e-12) and math.isclose(values[-1], 1, abs_tol=1e-12)
    if not ends:
        expect(False, name, "times from 0 (noise) to 1 (data)", f"times from {values[0]:.9g} to {values[-1]:.9g}")
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
    if torch.isfinite(x).all():
        return
    sample = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
    bad = (step for step, part in enumerate(v) if not torch.isfinite(part[sample]).all())
    step = next(bad, None)
    where = f" at {what} {step} (t = {times[step]:.6g})" if step is not None else ": the state overflows"
    expect(False, "velocity", "finite velocities", f"NaN or Inf in sample {first + sample}{where}")
