"""Log-likelihoods of data under a flow: the divergence of its velocity, integrated from data to noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    expect,
    expect_bool,
    expect_choice,
    expect_int,
    expect_noise,
    expect_positive_int,
    expect_room,
    expect_seed,
    expect_times,
)
from flowkernels.evaluation.images import RANGE, expect_range
from flowkernels.ops.linear_update import linear_update
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher import Teacher, velocity_at
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve

EXACT = 64  # features up to which the trace is exact where nothing is said
PROBES = 4  # else
PROBE_DISTRIBUTIONS = ("rademacher", "gaussian")
MOST_PROBES = 1 << 20
ON_LEVELS = 1e-3  # of a level: how near data have to be to one


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihoods of data under a flow.

    nats: log p(x) of each sample, natural logarithm, float64 `[n]` on the CPU; of data on levels, of these.
    probe_error: its standard error by the scatter of the probes, float64 `[n]`; None where the trace is exact, or of
        one probe.
    noise: the data's noise `[n, *shape]`, where the flow's way back ends.
    features: of one sample. probes: of the trace; 0 where it is exact. evaluations: of the velocity, of each sample.
    offset: what bits per dimension hold beside those of the density: log2 of the levels per unit of the data.

    Examples:
        >>> found = fk.log_likelihood(lambda x, t: torch.zeros_like(x) * x, torch.zeros(3, 2), 4)
        >>> round(found.mean, 6)  # of two standard normal coordinates, -log(2 pi)
        -1.837877
    """

    nats: Tensor
    probe_error: Tensor | None
    noise: Tensor
    features: int
    probes: int
    evaluations: int
    offset: float = 0.0

    @property
    def mean(self) -> float:
        """Of log p over the samples, in nats."""
        return self.nats.mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over samples, with what the probes scatter in it; None of one sample."""
        return (self.nats.std() / len(self.nats) ** 0.5).item() if len(self.nats) > 1 else None

    @property
    def bits_per_dim(self) -> float:
        """`-mean / (D log 2)`, of data on levels that of their probabilities. Lower is better."""
        return -self.mean / (self.features * math.log(2))

    @property
    def bits_error(self) -> float | None:
        """The standard error of `bits_per_dim`."""
        error = self.standard_error
        return None if error is None else error / (self.features * math.log(2))

    def __str__(self) -> str:
        nats, bits = ("" if e is None else f" +- {e:.2g}" for e in (self.standard_error, self.bits_error))
        trace = "exact trace" if self.probes == 0 else f"{self.probes} probe{'s' * (self.probes > 1)}"
        if self.probe_error is not None:
            trace += f", their standard error {self.probe_error.square().mean().sqrt():.2g} nats a sample"
        offset = f", {self.offset:.4g} of it for the levels" if self.offset else ""
        return (
            f"log p {self.mean:.6g}{nats} nats, {self.bits_per_dim:.5g}{bits} bits per dimension{offset} "
            f"({len(self.nats)} samples, {self.evaluations} evaluations of each, {trace})"
        )


@no_grad
def log_likelihood(
    velocity: Velocity,
    data: Tensor,
    solver: Schedule | Solver | int | Sequence[float] | Tensor = 50,
    *,
    probes: int | None = None,
    distribution: str = "rademacher",
    levels: int | None = None,
    value_range: Sequence[float] = RANGE,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Likelihood:
    """log p(x) of data under a velocity's flow: `log p(x_1) = log N(x_0; 0, 1) - integral of div v(x_t, t) dt`, along
    the flow from x_1 at t = 1 back to x_0 at t = 0.

    Args:
        velocity: any velocity whose output can be differentiated by its state, with its guidance and conditioning; of
            a `FusedSampler` its own. A student that is straight on some knots alone has no flow between them.
        data: `[n, *shape]`, floating point. Float64 data are computed in float64 throughout (with a network of
            float64): where the result is to be nearer than float32 brings it.
        solver: N for N uniform steps, a Schedule or times from t = 0 to 1, of the classical Runge-Kutta method: 4
            evaluations a step, the first of all at t = 1. Or a Solver from data to noise, one with model_times before 1
            for velocities that are not defined there.
        probes: of Hutchinson's estimate of the divergence, the mean over probes e of `e^T (dv/dx) e`, one product with
            the Jacobian for each; the same ones along the way (FFJORD). 0 takes the exact trace, D products. None: 0 up
            to 64 features, else 4.
        distribution: of the probes' coordinates: "rademacher", -1 or 1, or "gaussian".
        levels: that the data are on, from value_range[0] to [1], such as 256 of images of 8 bits. They are
            dequantised: level k becomes `low + (k + w) (high - low) / levels` with uniform w in [0, 1), and log p is a
            lower bound of that of the levels, with `D log((high - low) / levels)` beside that of the density. None:
            the density of the data as they are.
        value_range: (low, high) of the levels.
        chunk: samples computed at once, each with the graph of one evaluation; None computes all. Changes nothing but
            rounding.
        seed: of probes and of dequantisation; the i-th sample's are its own.
        progress: show a progress bar.

    Returns:
        Likelihood.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf the sample; for a velocity that gradients of x do not
            go through.

    Source: Grathwohl et al., FFJORD (2019), equations 4 and 8; Hutchinson, A stochastic estimator of the trace (1990);
    dequantisation: Theis, van den Oord and Bethge, A note on the evaluation of generative models (2016).

    Examples:
        >>> velocity = lambda x, t: x  # data are e times the noise
        >>> found = fk.log_likelihood(velocity, torch.zeros(2, 3, dtype=torch.float64))
        >>> round(found.mean, 6)  # -3/2 log(2 pi) - 3
        -5.756816
    """
    known = resolve(velocity)
    expect_noise(data, "data")
    n, D = len(data), data[0].numel()
    plan = _solver_of(solver)
    expected = "a number of probes, 0 for the exact trace, or None"
    default = 0 if D <= EXACT else PROBES
    probes = default if probes is None else expect_int(probes, "probes", expected, 0, MOST_PROBES)
    expect_room(8 * max(1, probes) * D, "probes", "probes of a sample", f"{probes}")
    expect_choice(distribution, "distribution", PROBE_DISTRIBUTIONS)
    chunk = None if chunk is None else expect_positive_int(chunk, "chunk")
    seed, progress = expect_seed(seed), expect_bool(progress, "progress")
    low, high = expect_range(value_range)
    generator = torch.Generator("cpu").manual_seed(seed)
    offset = 0.0
    if levels is not None:
        levels = expect_int(levels, "levels", "an integer of at least 2", 2)
        offset = math.log2(levels / (high - low))
        data = _dequantised(data, levels, low, high, generator)
    warn_if_training(velocity)
    teacher, found, noise = Teacher(known, n, chunk=chunk), [], []
    with tqdm(total=n * plan.evaluations, desc="log_likelihood", disable=not progress, leave=False) as bar:
        for part, field in teacher.parts(n):
            drawn = _probes(part.stop - part.start, data.shape[1:], probes, distribution, generator)
            x, change = _back(field, initial_state(data[part]), plan, drawn, bar)
            density = -(x.double().square().flatten(1).sum(1) + D * math.log(2 * math.pi)) / 2
            found.append((density[:, None] + change).cpu())
            noise.append(x)
            bad = (~found[-1].isfinite().all(1)).nonzero()
            got = f"NaN or Inf in sample {part.start + bad[0].item()}" if len(bad) else ""
            expect(len(bad) == 0, "velocity", "finite velocities and derivatives", got)
    each = torch.cat(found)
    error = (each.std(1) / probes**0.5) if probes > 1 else None
    nats = each.mean(1) - offset * D * math.log(2)
    return Likelihood(nats, error, torch.cat(noise), D, probes, plan.evaluations, offset)


def _solver_of(given: Schedule | Solver | int | Sequence[float] | Tensor) -> Solver:
    if isinstance(given, Solver):
        begin, end = given.times[[0, -1]].tolist()
        whole = abs(begin - 1) <= 1e-12 and abs(end) <= 1e-12
        expect(whole, "solver", "a solver from data, at t = 1, to noise, at t = 0 (inverse=True)", given)
        expect(given.keeps_start, "solver", "start coefficients of 1, as Runge-Kutta and multistep methods have", given)
        return given
    times = given.times if isinstance(given, Schedule) else expect_times(given, "solver")
    expect(times[0].abs().item() <= 1e-12, "solver", "a schedule from t = 0", given)
    return runge_kutta(times.flip(0))


def runge_kutta(times: Tensor) -> Solver:
    """The classical Runge-Kutta method of order 4 on knots, rising or falling: 4 evaluations a step."""
    N, h = len(times) - 1, times.diff().tolist()
    expect_room(8 * (8 * N) ** 2, "solver", "coefficients of Runge-Kutta's method", f"{N} steps")
    at, b = times[:-1].repeat_interleave(4), torch.zeros(4 * N, 4 * N, dtype=torch.float64, device="cpu")
    done = torch.zeros(4 * N, dtype=torch.float64, device="cpu")
    weights = torch.tensor([1, 2, 2, 1], dtype=torch.float64, device="cpu") / 6
    for k in range(N):
        i = 4 * k
        at[i + 1 : i + 3] = times[k] + h[k] / 2
        at[i + 3] = times[k + 1]
        b[i : i + 3] = done
        for stage, part in enumerate((0.5, 0.5, 1.0)):
            b[i + stage, i + stage] = part * h[k]
        done = done.clone()
        done[i : i + 4] = h[k] * weights
        b[i + 3] = done
    return Solver(times, at, b, "runge-kutta 4")


def _dequantised(data: Tensor, levels: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    at = (data.double() - low) * ((levels - 1) / (high - low))
    k = at.round()
    off = (at - k).abs().flatten(1).amax(1)
    bad = ((off > ON_LEVELS) | (k.flatten(1).amin(1) < 0) | (k.flatten(1).amax(1) > levels - 1)).nonzero()
    got = f"others in sample {bad[0].item()}" if len(bad) else ""
    expect(len(bad) == 0, "data", f"values on {levels} levels from {low:g} to {high:g}", got)
    like = dict(dtype=torch.float64, device="cpu")
    w = torch.stack([torch.rand(data.shape[1:], generator=generator, **like) for _ in range(len(data))])
    return (low + (k + w.to(k.device)) * ((high - low) / levels)).to(data.dtype)


def _probes(n: int, shape: torch.Size, count: int, distribution: str, generator: torch.Generator) -> Tensor | None:
    """float32 `[count, n, *shape]` on the CPU, each sample's own whatever the chunk; None for the exact trace."""
    if count == 0:
        return None
    size, like = (count, *shape), dict(dtype=torch.float32, device="cpu", generator=generator)
    if distribution == "gaussian":
        return torch.stack([torch.randn(size, **like) for _ in range(n)], 1)
    return torch.stack([2 * torch.randint(2, size, **like) - 1 for _ in range(n)], 1)


def _back(field: VelocityBase, x: Tensor, solver: Solver, probes: Tensor | None, bar: tqdm) -> tuple[Tensor, Tensor]:
    """The noise of data x `[n, *shape]`, and the integral of the divergence on the way, float64 `[n, probes or 1]`."""
    probes = None if probes is None else probes.to(x)
    start = x
    change = none = torch.zeros(len(x), 1 if probes is None else len(probes), dtype=torch.float64, device=x.device)
    updates, past = solver.updates(), {}
    last = {k: i for i, update in enumerate(updates) for k in update.which}
    for i, (update, t) in enumerate(zip(updates, solver.model_times.tolist(), strict=True)):
        past[i] = _derivative(field, x, t, probes)
        begin, change = (start, none) if update.from_start else (x, change)
        x = linear_update(begin, [past[k][0] for k in update.which], list(update.factors))
        for k, factor in zip(update.which, update.factors, strict=True):
            change = change + factor * past[k][1]
        past = {k: kept for k, kept in past.items() if last.get(k, -1) > i}
        bar.update(len(x))
    return x, change


def _derivative(field: VelocityBase, x: Tensor, t: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """v(x, t), and of each sample its divergence, exact or by each probe: float64 `[n, probes or 1]`."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        v = velocity_at(field, at, t)
        if probes is not None:
            found = [(_product(v, at, e) * e).double().flatten(1).sum(1) for e in probes]
            return v.detach(), torch.stack(found, 1)
        total, flat = 0.0, torch.zeros_like(x).flatten(1)
        for j in range(flat.shape[1]):
            direction = flat.clone()
            direction[:, j] = 1
            total = total + _product(v, at, direction.view(x.shape)).double().flatten(1)[:, j : j + 1]
        return v.detach(), total


def _product(v: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """`e^T (dv/dx)`."""
    try:
        return torch.autograd.grad(v, x, e, retain_graph=True)[0].detach()
    except RuntimeError as problem:
        told = str(problem)
        if "does not require grad" in told or "appears to not have been used" in told:
            text = "one that gradients of x go through, as of a torch network without torch.no_grad"
            expect(False, "velocity", text, told)
        raise
