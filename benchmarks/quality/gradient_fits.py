"""Solvers that are fitted by gradients through all their evaluations: what others publish, to compare with.

Both see the calibration's noises, a quarter of which only choose between the states of the optimisation (by the mean
squared error), and the teacher's ends of these. Evaluations are counted, a pass back as two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkernels import Solver

CHECKS = 25  # how often the samples that choose are looked at


@dataclass(frozen=True)
class Descent:
    """Iterations of Adam, samples in each, and the learning rates of `bespoke` and `ld3` at the first, which fall to 0
    with a cosine. steps: the N that it is worth, None for all."""

    iterations: int = 600
    batch: int = 64
    bespoke: float = 0.01
    ld3: float = 0.03
    steps: tuple[int, ...] | None = None


@dataclass
class Pairs:
    """Noise and the teacher's ends of it. velocity: index -> the velocity of these samples."""

    velocity: Callable[[Tensor], Callable]
    noise: Tensor
    ends: Tensor

    def __post_init__(self):
        n = len(self.noise)
        self.chosen_by, self.fitted = torch.arange(n // 4), torch.arange(n // 4, n)

    def errors(self, plan: "Plan", index: Tensor, noise: Tensor | None = None) -> Tensor:
        """Of each sample, the squared distance to the teacher's end, over its dimension."""
        x0 = self.noise[index] if noise is None else noise
        off = run(self.velocity(index), x0, *plan.tables()) - self.ends[index]
        return off.square().flatten(1).mean(1)


def run(velocity: Callable, x0: Tensor, times: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x_{i+1} = a[i] x_0 + sum of b[i, l] v_l, in the noise's dtype, differentiable in all."""
    times, a, b = (table.to(x0) for table in (times, a, b))
    x, seen = x0, []
    for i in range(len(times)):
        seen.append(velocity(x, times[i].expand(len(x))))
        x = a[i] * x0 + sum(b[i, k] * v for k, v in enumerate(seen))
    return x


class Plan(nn.Module):
    """What is optimised. tables: times of the network [N], a [N], b [N, N], which depend on the parameters."""

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def solver(self, name: str) -> Solver:
        times, a, b = (table.detach() for table in self.tables())
        knots = torch.linspace(0, 1, len(times) + 1, dtype=torch.float64)
        return Solver(knots, times, b, name, start_coefficients=a)


class Times(Plan):
    """Knots as sums of a softmax, and times of the network within half the shortest step of them, as LD3 has both; the
    coefficients are Adams-Bashforth's of the order on these knots, 1 (Euler) or 2."""

    def __init__(self, N: int, order: int):
        super().__init__()
        self.order = order
        self.sizes = nn.Parameter(torch.zeros(N, dtype=torch.float64))
        self.moved = nn.Parameter(torch.zeros(N, dtype=torch.float64))

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        h, N = self.sizes.softmax(0), len(self.sizes)
        begins = h.cumsum(0) - h
        most = h.detach().min().item() / 2
        given = begins + torch.cat([torch.zeros(1, dtype=h.dtype), self.moved[1:].clamp(-most, most)])
        steps = torch.diag(h)
        if self.order == 2 and N > 1:
            before = h[1:] ** 2 / (2 * h[:-1])
            steps = steps + torch.diag(torch.cat([h[:1] * 0, before])) - torch.diag(before, -1)
        return given, torch.ones_like(h), steps.cumsum(0)


class Everything(Plan):
    """Times of the network and all coefficients, x_0's too, from a solver's."""

    def __init__(self, start: Solver):
        super().__init__()
        for name, table in dict(times=start.model_times, a=start.start_coefficients, b=start.coefficients).items():
            setattr(self, name, nn.Parameter(table.clone()))

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.times.clamp(0, 1 - 1e-3), self.a, self.b.tril()


def descend(
    pairs: Pairs, plan: Plan, how: Descent, rate: float, g: torch.Generator, loss: Callable, near: "Near | None" = None
) -> float:
    """Adam on the plan; leaves it at the state that is best on the samples that choose, and returns its error there.

    near: noise that is optimised too.
    """
    optimizer = torch.optim.Adam(plan.parameters(), lr=rate)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / how.iterations)) / 2)
    best, kept = math.inf, None
    every, order = max(1, how.iterations // CHECKS), torch.empty(0, dtype=torch.int64)
    for k in range(how.iterations + 1):
        if k % every == 0 or k == how.iterations:
            with torch.no_grad():
                error = pairs.errors(plan, pairs.chosen_by).mean().item()
            if error < best:
                best, kept = error, {name: p.detach().clone() for name, p in plan.state_dict().items()}
        if k == how.iterations:
            break
        if len(order) < how.batch:
            order = pairs.fitted[torch.randperm(len(pairs.fitted), generator=g)]
        index, order = order[: how.batch], order[how.batch :]
        noise = (pairs.noise if near is None else near.noise)[index].clone().requires_grad_()
        errors = pairs.errors(plan, index, noise)
        optimizer.zero_grad()
        loss(errors).backward()
        if near is not None:
            near.move(plan, index, errors.detach(), noise)
        nn.utils.clip_grad_norm_(plan.parameters(), 1.0)
        optimizer.step(), falls.step()
    plan.load_state_dict(kept)
    return best


class Near:
    """LD3's noise near each sample's: within a radius of it, moved by a step of gradient descent where that helps."""

    def __init__(self, pairs: Pairs, N: int):
        D = pairs.noise[0].numel()
        self.pairs, self.noise, self.radius, self.rate = pairs, pairs.noise.clone(), 0.001 * D / N**2, 12 / N

    @torch.no_grad()
    def move(self, plan: Plan, index: Tensor, errors: Tensor, noise: Tensor) -> None:
        off = noise - self.rate * noise.grad - self.pairs.noise[index]
        norm = off.flatten(1).norm(dim=1).view(-1, *[1] * (off.dim() - 1))
        tried = self.pairs.noise[index] + off * (self.radius / norm.clamp(min=1e-30)).clamp(max=1)
        better = self.pairs.errors(plan, index, tried) < errors
        self.noise[index[better]] = tried[better]


def ld3(pairs: Pairs, N: int, how: Descent, g: torch.Generator) -> Solver:
    """Learning to Discretize: the times alone, for Euler and for Adams-Bashforth 2, of which the better one on the
    samples that choose is taken; the loss allows each sample another noise near its own.

    As its authors' code has it (github.com/vinhsuhi/LD3): the knots' parameters, decoupled times of the network, the
    radius 0.001 D / N^2 and the step 12 / N of the noise, the choice of the best state by validation, and the clipped
    gradient. Otherwise: Adam with a cosine for RMSprop and SGD with rates that fall at plateaus, larger batches.

    Source: Tong et al., Learning to Discretize Denoising Diffusion ODEs (arXiv 2405.15506).
    """
    found = []
    for order in (1, 2) if N > 1 else (1,):
        plan = Times(N, order)
        error = descend(pairs, plan, how, how.ld3, g, torch.mean, Near(pairs, N))
        found.append((error, order, plan))
    _, order, plan = min(found, key=lambda f: f[0])
    return plan.solver(f"ld3, {'euler' if order == 1 else 'adams-bashforth 2'}")


def bespoke(pairs: Pairs, N: int, how: Descent, g: torch.Generator) -> Solver:
    """Bespoke Non-Stationary: times and all coefficients, from Adams-Bashforth 2 on uniform knots; the loss is the mean
    logarithm of the samples' errors (PSNR), or their mean, of which the better one on the samples that choose is taken.

    Otherwise than the paper: the first time is free as well, and the start is of second order.

    Source: Shaul et al., Bespoke Non-Stationary Solvers (arXiv 2403.01329), algorithm 2 and equation 15.
    """
    found = []
    for name, loss in (("psnr", lambda e: (e + 1e-12).log().mean()), ("mse", torch.mean)):
        plan = Everything(Solver.adams_bashforth(N, 2))
        found.append((descend(pairs, plan, how, how.bespoke, g, loss), name, plan))
    _, name, plan = min(found, key=lambda f: f[0])
    return plan.solver(f"bespoke non-stationary, {name}")
