"""Whole samplers of multilayer perceptrons in one call, beside the same loop run and compiled by torch."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import flowkernels as fk
from flowkernels.bench.case import Case, Small, Work, ours
from flowkernels.models.bundled import BUNDLED
from flowkernels.ops.mlp_sample import Plan, Prepared, Tables, mlp_sample
from flowkernels.ops.mlp_sample.samples import Network, error_and_bound
from flowkernels.runtime import backends

WITHOUT = "flowkernels without activations"
READ = "a loop that reads the weights"


def perceptron(dim: int, width: int, device) -> nn.Sequential:
    """x and t in one row -> three hidden layers with SiLU -> velocity."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
        *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)),
    )
    return net.to(device).eval().requires_grad_(False)


def loop(net, steps: int):
    """The Euler loop written by hand."""

    def run(x):
        for i in range(steps):
            t = x.new_full((len(x), 1), i / steps)
            x = x + net(torch.cat([x, t], 1)) / steps
        return x

    return run


def solver_loop(net, solver: fk.Solver):
    """The updates of a solver written by hand."""
    updates, times = solver.updates(), solver.model_times.tolist()

    def run(x):
        start, velocities = x, []
        for t, (from_start, which, factors, scale) in zip(times, updates, strict=True):
            velocities.append(net(torch.cat([x, x.new_full((len(x), 1), t)], 1)))
            x = start if from_start else x
            x = x if scale == 1 else scale * x
            for i, factor in zip(which, factors, strict=True):
                x = x + factor * velocities[i]
        return x

    return run


def fitted_like(steps: int) -> fk.Solver:
    """All velocities in every update and times of its own, as a fit has them; the coefficients are near Euler's."""
    g, times = torch.Generator().manual_seed(0), torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    b = 1 / steps + torch.randn(steps, steps, generator=g, dtype=torch.float64) / (10 * steps)
    return fk.Solver(times, times[:-1] + 0.3 / steps, b.tril(), "dense")


def with_free_start(solver: fk.Solver) -> fk.Solver:
    """The same with other coefficients of x_0 than 1."""
    return replace(solver, start_coefficients=torch.linspace(0.95, 0.6, solver.evaluations, dtype=torch.float64))


def low_loop(net, steps: int):
    """The same with a bfloat16 network on a float32 state."""
    low = fk.VelocityField(net, dtype=torch.bfloat16, time_column=True)

    def run(x):
        for i in range(steps):
            x = x + low(x, x.new_full((len(x),), i / steps)).float() / steps
        return x

    return run


def relative_error(got, truth) -> float:
    return ((got - truth).abs().max() / truth.abs().max()).item()


def cases(device) -> Iterator[Case]:
    def case(n, width=256, dim=64, steps=8, weights=torch.float32, shares=False, **which):
        def make():
            net, x = perceptron(dim, width, device), torch.randn(n, dim, device=device)
            sampler = fk.fuse(net, steps, weights=weights)
            truth = loop(net.double(), steps)(x.double())
            net.float()
            eager = loop(net, steps)
            peers = {"torch eager": lambda: eager(x)}
            compiled = torch.compile(eager, fullgraph=True, dynamic=False)
            peers["torch compile"] = lambda: compiled(x)
            if weights == torch.float32:
                # as wrong as torch's own sums, twice, and a rounding of the state at every step
                bound = 2 * relative_error(eager(x), truth) + steps * torch.finfo(torch.float32).eps
            else:
                low = low_loop(perceptron(dim, width, device).bfloat16(), steps)
                low_compiled = torch.compile(low, fullgraph=True, dynamic=False)
                peers["torch compile, bfloat16"] = lambda: low_compiled(x)
                bound = 2 * relative_error(low(x), truth)
            macs = n * steps * (2 * dim * width + 2 * width * width)
            calls = ours(lambda: sampler(x), device)
            if shares:  # what the activations take; the result is the other call's
                linear = fk.fuse(
                    nn.Sequential(*(layer for layer in net if isinstance(layer, nn.Linear))), steps, weights=weights
                )
                result = sampler(x)
                calls[WITHOUT] = lambda: (linear(x), result)[1]
            if n == 1 and (C := backends.extension()) is not None and x.is_cpu and weights == torch.float32:
                read, result = torch.zeros(macs // steps), sampler(x)
                where = read.data_ptr(), len(read), steps
                calls[READ] = lambda: (read, C.read_again(*where, torch.get_num_threads()), result)[2]
            return Work(
                calls | peers,
                lambda got: (relative_error(got, truth), bound),
                moved=x.nbytes * 2,
                flops=2 * macs,
                unit=str(weights)[6:],
            )

        curves = {}
        if weights == torch.float32:
            curves |= {"samples, width 256": n} if width == 256 else {}
            curves |= {f"width, {n} samples": width} if n in (1, 256) else {}
        name = f"{dim} -> {width} x 3 -> {dim}, N={steps}, n={n}, {str(weights)[6:]} weights"
        return Case(name, n, make, **which, curves=curves)

    def solved(n, solver, name, width=256, dim=64):
        def make():
            net, x = perceptron(dim, width, device), torch.randn(n, dim, device=device)
            sampler = fk.fuse(net, solver)
            truth = solver_loop(net.double(), solver)(x.double())
            net.float()
            eager = solver_loop(net, solver)
            compiled = torch.compile(eager, fullgraph=True, dynamic=False)
            terms = sum(len(update.which) + (update.scale != 1) for update in solver.updates())
            bound = 2 * relative_error(eager(x), truth) + terms * torch.finfo(torch.float32).eps
            return Work(
                ours(lambda: sampler(x), device)
                | {"torch eager": lambda: eager(x), "torch compile": lambda: compiled(x)},
                lambda got: (relative_error(got, truth), bound),
                moved=x.nbytes * 2,
                flops=2 * n * solver.evaluations * (2 * dim * width + 2 * width * width),
                unit="float32",
            )

        # beside the Euler steps of the same network in `case`
        return Case(f"{dim} -> {width} x 3 -> {dim}, N={solver.evaluations}, n={n}, {name}", n, make)

    def residual(n, K):
        def make():
            net = BUNDLED["digits"].load().to(device).requires_grad_(False)
            x0 = torch.randn(n, *BUNDLED["digits"].shape, generator=torch.Generator().manual_seed(0)).to(device)
            sampler = fk.fuse(net, K)

            def by_hand(velocity):
                @torch.no_grad()
                def run():
                    x = x0
                    states, velocities = x.new_empty(K + 1, *x.shape), x.new_empty(K, *x.shape)
                    states[0] = x
                    for i in range(K):
                        v = velocity(x, x.new_full((n,), i / K))
                        x = x + v / K
                        states[i + 1], velocities[i] = x, v
                    return states, velocities

                return run

            truth = fk.rollout(net.double(), x0.double(), K)
            net.float()

            def error(got):
                states, velocities = got if isinstance(got, tuple) else (got.x, got.v)
                return max(relative_error(states, truth.x), relative_error(velocities, truth.v))

            eager = by_hand(net)
            bound = 2 * error(eager()) + 8 * torch.finfo(torch.float32).eps
            calls = ours(lambda: fk.rollout(sampler, x0, K), device)
            calls |= {"torch eager": eager, "torch compile": by_hand(torch.compile(net, fullgraph=True))}
            return Work(calls, lambda got: (error(got), bound), moved=x0.nbytes * (2 * K + 2))

        return Case(f"digits model, rollout, K={K}, n={n}", n * K, make)

    yield case(1, quick=True)
    for n in (16, 64, 256, 1024):
        yield case(n, shares=n >= 64)
    for n in (1, 64, 256, 1024):
        yield case(n, weights=torch.bfloat16, shares=n >= 64, main=n == 1024)
    for n in (1, 256):
        yield solved(n, fk.Solver.adams_bashforth(8), "Adams-Bashforth 2")
        yield solved(n, fitted_like(8), "dense solver")
        yield solved(n, with_free_start(fitted_like(8)), "dense solver, free start")
    yield residual(512, 100)
    for n in (2, 4, 8):
        yield case(n)
    yield case(4096, main=True)
    for width in (64, 128, 512, 1024):
        yield case(1, width)
        yield case(256, width)
    yield case(16, 1024)
    yield case(4096, 64)
    yield case(4096, 1024)
    yield case(1, 64, dim=2)
    yield case(4096, 64, dim=2)
    yield case(256, 1024, weights=torch.bfloat16)


def small(device) -> Small:
    net = Network(64, 1, 1).add(64, activation="silu").head().sample("")
    x, h, layers = net.args
    x, layers = x.to(device), [replace(a, weight=a.weight.to(device), shift=a.shift.to(device)) for a in layers]
    first, last = layers
    C, out, step_sizes = backends.extension(), torch.empty_like(x), torch.tensor(h, dtype=torch.float64)
    prepared = C and Prepared(Plan(C, 64, layers, None), step_sizes, Tables(layers), None, 1.0)

    def inner():
        prepared.run(x, out)
        return out

    def eager():
        hidden = F.silu(F.linear(x, first.weight, first.shift[0, 0]))
        return x + h[0] * F.linear(hidden, last.weight, last.shift[0, 0])

    return Small(lambda: mlp_sample(x, h, layers), inner, eager, lambda got: error_and_bound(net, got.cpu()))
