"""Samplers in common use, as Solvers: DPM-Solver++, UniPC, DEIS, Heun and Euler, on straight paths.

Each is run on unit vectors in the place of x_0 and of the velocities, in float64: what comes out is its coefficients.
"""

import numbers
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flowkernels._checks import expect, expect_list, expect_positive_int, expect_real, expect_room, expect_times
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver

TRAINED = 1000  # the discrete times of training in diffusers' schedulers: sigmas and times are counted in them
FEW = 15  # steps: fewer end in lower orders, as diffusers has it
EXACT = 1e-5  # of what all methods are exact for: how far rounding may leave it
BELOW_ONE = 1e-6  # by which diffusers' UniPC begins below sigma = 1; the others begin further below it


def stock_solvers(
    steps: int | Schedule | Sequence[float] | Tensor, *, shift: float | Sequence[float] = 1.0
) -> dict[str, Solver]:
    """The samplers that pipelines come with, as Solvers of N evaluations, to compare with or to choose from.

    Names: `euler`, `heun`, `dpmpp_2m`, `dpmpp_3m` (DPM-Solver++, multistep), `unipc_2`, `unipc_3`, `deis_2`, `deis_3`,
    each with `, shift 3` behind it where the shift is not 1. On straight paths, alpha = t and sigma = 1 - t, these are
    linear in x_0 and the velocities, and keep x_0's coefficient 1. Some are equal where N is small: the first and the
    last steps are of lower order, so that order 3 differs from order 2 for N >= 5 alone.

    Args:
        steps: N, for N evaluations on the sigmas that diffusers' scheduler makes for N steps; or a Schedule or N+1
            increasing times, from 0 or later to 1, for the multistep methods on these knots, Heun left out.
        shift: of the sigmas, sigma' = shift sigma / (1 + (shift - 1) sigma), from 0.001 to 1000, or several; 1 with
            knots of one's own.

    With N each is what diffusers 0.42 computes, of order 2 or 3, with `use_flow_sigmas`, `flow_shift` and otherwise
    default settings, to float32's rounding. Its peculiarities are included: sigmas begin at 0.999 (DPM-Solver++, DEIS)
    or 1 - 1e-6 (UniPC), and the network gets times cut to thousandths; the flow's Euler and Heun begin at 1 and cut
    nothing. Euler is FlowMatchEulerDiscreteScheduler with `sigmas=linspace(1, 1/N, N)`, as pipelines call it. Heun,
    which takes no sigmas, has an odd number of evaluations, its last step from 0.001, shifted twice; there is none for
    an even N. In one thing DEIS differs: diffusers' ends at the last positive sigma, with noise in its samples; here it
    goes on to 0, by a step of first order.

    On knots of one's own, sigma = 1 is exact, its logarithm of the signal-to-noise ratio the limit -inf.

    Raises:
        ValueError, TypeError: naming the argument, before any work is done.

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), equations 9 and B.2-B.6; Zhao et al., UniPC (arXiv 2302.04867),
    algorithms 1 and 2 with B(h) = e^h - 1; Zhang and Chen, DEIS (arXiv 2204.13902), log-rho multistep. Checked against
    diffusers 0.42's schedulers (tests/test_stock.py).

    Examples:
        >>> solvers = fk.stock_solvers(4, shift=(1, 3))
        >>> solvers["unipc_2, shift 3"]
        Solver('unipc_2, shift 3', steps=4, evaluations=4, times=[0, 0.0999, 0.25, 0.499, 1])
    """
    expected = "a number from 0.001 to 1000, or several"
    one = isinstance(shift, (numbers.Real, str)) or (isinstance(shift, (Tensor, np.ndarray)) and shift.ndim == 0)
    shifts = [
        expect_real(s, "shift", expected, lambda a: 1e-3 <= a <= 1e3)
        for s in ([shift] if one else expect_list(shift, "shift", expected))
    ]
    expect(len(shifts) > 0, "shift", expected, "none")
    if not isinstance(steps, numbers.Integral):
        times = steps.times if isinstance(steps, Schedule) else expect_times(steps, "steps")
        expect(all(s == 1 for s in shifts), "shift", "1 with knots of one's own", shift)
        _expect_room(len(times), 1)
        sigmas = 1 - times.numpy()
        made = {"euler": Solver.euler(times)}
        return made | {k: _linear(k, times, times[:-1], step(sigmas, p)) for k, (step, _, p) in METHODS.items()}
    N = expect_positive_int(steps, "steps")
    _expect_room(N + 1, len(shifts))
    found = {}
    for s in shifts:
        for name, solver in _of_diffusers(N, s):
            name = name if s == 1 else f"{name}, shift {s:g}"
            found[name] = Solver(solver.times, solver.model_times, solver.coefficients, name, dict(shift=s))
    return found


def _expect_room(knots: int, shifts: int) -> None:
    expect_room(16 * len(METHODS) * shifts * knots**2, "steps", "coefficients", f"{knots - 1} steps")


def _of_diffusers(N: int, shift: float) -> Iterator[tuple[str, Solver]]:
    def shifted(sigmas: np.ndarray) -> np.ndarray:
        return np.minimum(shift * sigmas / (1 + (shift - 1) * sigmas), 1)

    yield "euler", Solver.euler(1 - np.append(shifted(np.linspace(1, 1 / N, N)), 0))
    if N % 2:
        last = shifted(np.array(1 / TRAINED)) if N > 1 else 1
        yield "heun", Solver.heun(1 - np.append(shifted(np.linspace(1, last, (N + 1) // 2)), 0))
    for name, (step, sigmas_of, order) in METHODS.items():
        sigmas = shifted(sigmas_of(N))
        sigmas[0] = min(sigmas[0], 1 - BELOW_ONE)
        given = torch.from_numpy(1 - np.floor(sigmas * TRAINED) / TRAINED)
        # rounded as there: near 1 it counts, as 1 - sigma has few digits
        sigmas = np.append(sigmas, 0).astype(np.float32).astype(np.float64)
        times = torch.from_numpy(1 - sigmas)
        times[0] = 0  # the state that it begins with is noise
        yield name, _linear(name, times, given, step(sigmas, order))


def _linear(name: str, times: Tensor, model_times: Tensor, rows: np.ndarray) -> Solver:
    """rows: the states after each evaluation, in x_0 and the velocities `[N, 1 + N]`."""
    b = torch.from_numpy(rows[:, 1:]).tril()
    off = (b.sum(1) - times[1:]).diff().abs().sum().item()  # of a constant velocity, for which all are exact
    closest = times.diff().min().item()
    expect(off < EXACT, "steps", f"knots that are far enough apart for {name!r} in float64", f"two {closest:.3g} apart")
    return Solver(times, model_times, b, name)


# ---- the methods: sigmas [N+1], order -> the states after each evaluation, in x_0 and the velocities, [N, 1 + N] ----


def _log_ratios(sigmas: np.ndarray) -> np.ndarray:
    """log(alpha / sigma), from -inf at sigma = 1 to inf at 0."""
    with np.errstate(divide="ignore"):
        return np.log(1 - sigmas) - np.log(sigmas)


def _run(sigmas: np.ndarray, predict: Callable, advance: Callable) -> np.ndarray:
    """predict(x, v, sigma) -> what a method extrapolates; advance(i, x, predictions so far) -> the next state."""
    units = np.eye(len(sigmas))
    x, predictions, states = units[0], [], []
    for i, sigma in enumerate(sigmas[:-1]):
        predictions.append(predict(x, units[1 + i], sigma))
        x = advance(i, x, predictions)
        x[0] = 1  # but for rounding, which near sigma = 1 is large: x_0 is a difference of two large parts there
        states.append(x)
    return np.stack(states)


def _data(x: np.ndarray, v: np.ndarray, sigma: float) -> np.ndarray:
    return x + sigma * v


def _noise(x: np.ndarray, v: np.ndarray, sigma: float) -> np.ndarray:
    return x - (1 - sigma) * v


def _order(order: int, i: int, N: int) -> int:
    """Of step i of N: what there are predictions for, and less at the end of few steps, as diffusers has it."""
    return 1 if i == N - 1 else min(order, i + 1, N - i if N < FEW else order)


def _dpm_solver(sigmas: np.ndarray, order: int) -> np.ndarray:
    """DPM-Solver++, multistep; the second order by its midpoint form."""
    lam, N = _log_ratios(sigmas), len(sigmas) - 1

    def advance(i: int, x: np.ndarray, m: list[np.ndarray]) -> np.ndarray:
        h, alpha, p = lam[i + 1] - lam[i], 1 - sigmas[i + 1], _order(order, i, N)
        first = (sigmas[i + 1] / sigmas[i]) * x - alpha * np.expm1(-h) * m[i]
        if p == 1:
            return first
        before = [(lam[i - j] - lam[i - j - 1]) / h for j in range(p - 1)]  # inf behind sigma = 1
        slopes = [(m[i - j] - m[i - j - 1]) / r for j, r in enumerate(before)]
        if p == 2:
            return first - 0.5 * alpha * np.expm1(-h) * slopes[0]
        r0, r1 = before
        share, bend = 0.0 if np.isinf(r1) else r0 / (r0 + r1), slopes[0] - slopes[1]
        of_slope, of_bend = np.expm1(-h) / h + 1, (np.expm1(-h) + h) / h**2 - 0.5
        return first + alpha * of_slope * (slopes[0] + share * bend) - alpha * of_bend * bend / (r0 + r1)

    return _run(sigmas, _data, advance)


def _unipc(sigmas: np.ndarray, order: int) -> np.ndarray:
    """UniPC with B(h) = e^h - 1, of data predictions; the corrector takes the evaluation that the next step has."""
    lam, N = _log_ratios(sigmas), len(sigmas) - 1
    corrected = np.eye(N + 1)[0]

    def solved(s: int, x: np.ndarray, m: list[np.ndarray], p: int, new: np.ndarray | None = None) -> np.ndarray:
        """From knot s to the next one: UniP, or UniC with the new prediction there."""
        h, alpha = lam[s + 1] - lam[s], 1 - sigmas[s + 1]
        of_h = np.expm1(-h)
        far = [(lam[s - j] - lam[s]) / h for j in range(1, p)]
        # a knot at sigma = 1 is infinitely far: its weight is 0
        nodes = [(r, (m[s - j] - m[s]) / r) for j, r in enumerate(far, 1) if np.isfinite(r)]
        halved = p == 2  # UniP 2 and UniC 1 have the weight 1/2, which is not the equations'
        if new is not None:
            nodes.append((1.0, new - m[s]))
            halved = p == 1
        right, phi, factorial = [], -of_h / h - 1, 1
        for k in range(1, len(nodes) + 1):
            right.append(phi * factorial / of_h)
            factorial *= k + 1
            phi = -phi / h - 1 / factorial
        weights = [0.5] * len(nodes)
        if nodes and not halved:
            weights = np.linalg.solve(np.vander([r for r, _ in nodes], increasing=True).T, right)
        more = sum((w * slope for w, (_, slope) in zip(weights, nodes, strict=True)), np.zeros(N + 1))
        return (sigmas[s + 1] / sigmas[s]) * x - alpha * of_h * (m[s] + more)

    def advance(i: int, x: np.ndarray, m: list[np.ndarray]) -> np.ndarray:
        nonlocal corrected
        if i:
            corrected = solved(i - 1, corrected, m[:-1], min(order, i, N - i + 1), m[-1])
        return solved(i, corrected, m, min(order, i + 1, N - i))

    return _run(sigmas, _data, advance)


def _deis(sigmas: np.ndarray, order: int) -> np.ndarray:
    """DEIS: polynomials in log rho through noise predictions, integrated over rho = sigma / alpha."""
    u, N = -_log_ratios(sigmas), len(sigmas) - 1
    points, weights = np.polynomial.legendre.leggauss(32)

    def advance(i: int, x: np.ndarray, e: list[np.ndarray]) -> np.ndarray:
        p, alpha = _order(order, i, N), 1 - sigmas[i + 1]
        if p == 1:  # on straight paths Euler's step
            return x + (sigmas[i] - sigmas[i + 1]) * np.eye(N + 1)[1 + i]
        nodes = [j for j in range(i, i - p, -1) if np.isfinite(u[j])]  # of one at sigma = 1 the weight is 0
        at = (u[i] + u[i + 1]) / 2 + (u[i + 1] - u[i]) / 2 * points
        sizes = (u[i + 1] - u[i]) / 2 * weights * np.exp(at)
        total = x / (1 - sigmas[i])
        for j in nodes:
            total = (
                total + (sizes * np.prod([(at - u[k]) / (u[j] - u[k]) for k in nodes if k != j], axis=0)).sum() * e[j]
            )
        return alpha * total

    return _run(sigmas, _noise, advance)


def _from_below_one(N: int) -> np.ndarray:
    return (1 - np.linspace(1, 1 / TRAINED, N + 1))[:0:-1]  # by diffusers' operations: a digit moves a cut time


def _from_one(N: int) -> np.ndarray:
    return np.linspace(1, 1 / TRAINED, N + 1)[:-1]


METHODS = {
    "dpmpp_2m": (_dpm_solver, _from_below_one, 2),
    "dpmpp_3m": (_dpm_solver, _from_below_one, 3),
    "unipc_2": (_unipc, _from_one, 2),
    "unipc_3": (_unipc, _from_one, 3),
    "deis_2": (_deis, _from_below_one, 2),
    "deis_3": (_deis, _from_below_one, 3),
}
