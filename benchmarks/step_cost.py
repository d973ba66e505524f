"""All step costs from velocities: one Gram matrix, against the published loop over pairs of knots."""

from collections.abc import Iterator

import torch

import flowkernels as fk
from flowkernels.bench.case import Case, Work, ours
from flowkernels.ops.cost_from_gram.reference import cost_from_gram

from .velocity_gram import gram, velocities


def pairwise(v: torch.Tensor, x: torch.Tensor, t: list[float]) -> torch.Tensor:
    """BOSS (arXiv 2312.16414) as published: one squared norm over the batch for each pair of knots."""
    cost = torch.full((len(t), len(t)), torch.inf, dtype=torch.float64, device=v.device)
    for k in range(1, len(t)):
        for j in range(k):
            residual = x[j] + (t[k] - t[j]) * v[j] - x[k]
            cost[j, k] = residual.square().sum() / v.shape[1]
    return cost


def cases(device) -> Iterator[Case]:
    def case(K, n, D, dtype=torch.float32, loop=True, **which):
        def make():
            v, times = velocities(K, n, D, device, dtype), torch.linspace(0, 1, K + 1, dtype=torch.float64)
            on_device = times.to(device)

            def by_torch():
                return cost_from_gram(gram(v) / n, on_device)

            def by_raw_product():  # what the increments are for: the same from products of the velocities themselves
                flat = v.flatten(1).float()
                raw = (flat @ flat.T).double()
                a = raw[1:, 1:] - raw[1:, :-1] - raw[:-1, 1:] + raw[:-1, :-1]
                return cost_from_gram(a / n, on_device)

            calls = ours(lambda: fk.step_costs(v, times), device)
            calls |= {"torch eager": by_torch, "torch raw product": by_raw_product}
            if loop:
                x = torch.cat([v.new_zeros(1, n, D, dtype=torch.float32), v.float()])
                x[1:] /= K
                for k in range(1, K + 1):
                    x[k] += x[k - 1]
                calls["published loop"] = lambda: pairwise(v, x, times.tolist())
            truth = None

            def check(got):
                nonlocal truth
                if truth is None:
                    a = v.flatten(1).double().diff(dim=0)
                    truth = cost_from_gram((a @ a.T).cpu() / n, times)
                got, (j, k) = got.cpu(), torch.triu_indices(K + 1, K + 1, 2)
                error = ((got[j, k] - truth[j, k]).abs() / truth[j, k]).max().item() if len(j) else 0.0
                # a loop over states carries their rounding: float32 states allow no more
                return error, 1e-5

            return Work(calls, check, moved=v.nbytes, flops=K * (K - 1) * n * D, unit=str(dtype)[6:])

        curves = {"velocities, K * n * D": K * n * D} if dtype == torch.float32 else {}
        return Case(f"K={K}, n={n}, D={D}, {str(dtype)[6:]}", K * n * D, make, **which, curves=curves)

    yield case(100, 100, 3072, main=True)
    yield case(100, 100, 3072, torch.bfloat16, loop=False)
    yield case(50, 256, 64, quick=True)
    yield case(100, 1024, 64)
    yield case(256, 100, 3072, loop=False)
