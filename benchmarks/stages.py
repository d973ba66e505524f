"""Whole stages on the bundled digits model: on our kernels, on their plain torch references, and written by hand."""

import itertools
from collections.abc import Iterator

import torch

import flowkernels as fk
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.bundled import BUNDLED


def cases(device) -> Iterator[Case]:
    def noise(n):
        return torch.randn(n, *BUNDLED["digits"].shape, generator=torch.Generator().manual_seed(0)).to(device)

    def model():
        return BUNDLED["digits"].load().to(device)

    def sampling(n, steps):
        def make():
            net, x0 = model(), noise(n)

            @torch.no_grad()
            def by_hand():
                x = x0
                for i in range(steps):
                    x = x + net(x, torch.full((n,), i / steps, device=device)) / steps
                return x

            truth = fk.sample(net.double(), x0.double(), steps)
            net.float()
            size, fused = truth.abs().max().item(), fk.fuse(net, steps)
            calls = ours(lambda: fk.sample(net, x0, steps), device)
            return Work(
                calls | {"flowkernels fused": lambda: fk.sample(fused, x0, steps), "torch eager": by_hand},
                # the network's own rounding, carried over the steps
                lambda got: ((got - truth).abs().max().item() / size, 1e-4),
            )

        return Case(f"sample, n={n}, N={steps}", n, make, quick=n == 1, main=n == 256)

    def calibration(n, K):
        def make():
            net, x0 = model(), noise(n)
            with fk.backend("reference"):
                truth = fk.calibrate(net.double(), x0.double(), K, progress=False)
            net.float()

            def check(got):
                error = max(abs(got[N].cost / truth[N].cost - 1) for N in truth)
                return error, 1e-4

            fused = fk.fuse(net, K)
            calls = ours(lambda: fk.calibrate(net, x0, K, progress=False), device)
            return Work(calls | {"flowkernels fused": lambda: fk.calibrate(fused, x0, K, progress=False)}, check)

        return Case(f"calibrate, n={n}, K={K}", n * K, make)

    def bookkeeping(features):
        """What `calibrate` costs beside the network: the velocity is there already, and costs nothing."""
        n = K = 100

        def make():
            x0 = torch.randn(n, features, generator=torch.Generator().manual_seed(0)).to(device)
            velocities = itertools.cycle([torch.sin(x0 + 3 * i / K) for i in range(K)])

            def velocity(x, t):
                return next(velocities)

            def three_stages():
                teacher = fk.rollout(velocity, x0, K)
                return fk.least_cost_schedules(fk.step_costs(teacher.v, teacher.times), teacher.times)

            truth = fk.least_cost_schedules(
                fk.step_costs(torch.stack(list(itertools.islice(velocities, K))).double(), K), K
            )
            calls = {
                "flowkernels calibrate": lambda: fk.calibrate(velocity, x0, K, progress=False),
                "flowkernels three stages": three_stages,
            }
            return Work(calls, lambda got: (max(abs(got[N].cost / truth[N].cost - 1) for N in truth), 1e-4))

        return Case(f"calibrate beside the network, n={n}, K={K}, D={features}", n * K * features, make)

    def straightening(batch, iterations):
        def make():
            net, x0 = model(), noise(256)
            schedule = fk.calibrate(net, x0[:64], 20, 4, progress=False)[4]

            def run():
                return fk.straighten(
                    None, net, schedule, noise=x0, iterations=iterations, batch=batch, progress=False
                ).history["loss"]

            with fk.backend("reference"):
                truth = run()

            def check(got):
                return max(abs(a / b - 1) for a, b in zip(got, truth, strict=True)), 1e-2

            return Work(ours(run, device), check)

        return Case(f"straighten, {iterations} iterations of {batch}", batch, make)

    yield sampling(1, 8)
    yield sampling(256, 8)
    yield calibration(256, 100)
    for features in (64, 784, 3072):
        yield bookkeeping(features)
    yield straightening(64, 20)
    yield straightening(256, 20)
