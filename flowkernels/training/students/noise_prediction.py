"""`NoisePrediction`: a network that predicts noise, as a velocity."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_bool, expect_choice
from flowkernels.ops.library import is_transformed
from flowkernels.ops.linear_update import linear_update
from flowkernels.solver import Solver
from flowkernels.velocity.composite import Composite, answer_of, expect_state
from flowkernels.velocity.field import float64_device
from flowkernels.velocity.time_embedding import Embedding

BETA = (0.85, 12.0)  # of the noise, a thousand times that of a step: Stable Diffusion's ends, between them linear


def straight(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, 1 - t


def variance_preserving(t: Tensor) -> tuple[Tensor, Tensor]:
    """The diffusion's integral, in closed form (arXiv 2011.13456, eq. 33)."""
    s, (least, most) = 1 - t, BETA
    log = -(most - least) * s * s / 4 - least * s / 2
    return log.exp(), (-torch.expm1(2 * log)).sqrt()


PATHS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "variance_preserving": variance_preserving,
    "straight": straight,
}


class NoisePrediction(Composite):
    """A network that predicts the noise e of states `x = alpha(t) x_1 + sigma(t) e`, as a velocity: sampled on a
    schedule by the first-order steps of that path, from t to s

        alpha(s) x_1 + sigma(s) e,    e = net(x, t),    x_1 = (x - sigma(t) e) / alpha(t)

    which are DDIM's, and exact where e and x_1 stay the same along the way. `fk.sample(student, noise, schedule)` and
    what else runs a schedule makes them; other solvers and `capture` are refused but on the straight path, where they
    are Euler's. `straighten(target="noise")` trains it.

    Args:
        net: predicts the noise, `net(x, t)`; a `VelocityField` may say its convention of time and its conditioning.
        path: "variance_preserving", `alpha = exp(-(12 - 0.85) (1-t)^2 / 4 - 0.85 (1-t) / 2)`, sigma^2 = 1 - alpha^2: a
            diffusion's with Stable Diffusion's first and last noise, linear between them, at the step 1000 (1 - t). At
            t = 0 alpha is 0.04. "straight", `alpha = t`, sigma = 1 - t: its schedules begin after t = 0, where noise
            tells nothing of the data.

    A call `student(x, t)` is the velocity `alpha' x_1 + sigma' e` on the straight path, and `student(x, t, noise=True)`
    the noise, on each; x is `[n, *shape]`, t is `[n]`.

    Raises TypeError, ValueError, naming the argument. Source: DDIM (arXiv 2010.02502), in Rectified Diffusion (arXiv
    2410.07303).

    Examples:
        >>> net = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> fk.sample(fk.NoisePrediction(net), torch.zeros(4, 2), 4).shape
        torch.Size([4, 2])
    """

    def __init__(self, net: nn.Module, path: str = "variance_preserving"):
        super().__init__()
        expect(isinstance(net, nn.Module), "net", "an nn.Module", net, TypeError)
        self.path = expect_choice(path, "path", tuple(PATHS))
        self.net = net

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times `[n]`, float64."""
        return PATHS[self.path](t.to(float64_device(t.device), torch.float64))

    def forward(self, x: Tensor, t: Tensor, noise: bool = False) -> Tensor:
        expect_state(x, t)
        if not expect_bool(noise, "noise"):
            self._expect_straight()
        e = answer_of(self.net, "net", x, x, t)
        if noise:
            return e
        looked_at = t.is_cpu and not (torch.compiler.is_compiling() or is_transformed())  # and nothing is waited for
        if looked_at and not bool((after := t > 0).all()):
            got = f"{t[~after][0].item():.6g}"
            expect(False, "t", "times after 0, where noise tells nothing of the data", got)
        return (x - e) / t.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))

    def velocities(
        self, x: Tensor, t: Tensor, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        self._expect_straight()
        return super().velocities(x, t, embedding)

    def fused_steps(
        self, x: Tensor, solver: Solver, out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]] | None:
        """The path's own steps on the knots of a schedule, with the mean velocities of each."""
        if self.path == "straight":
            begins = min(solver.model_times.tolist())
            expected = "times after 0, where noise tells nothing of the data on a straight path"
            expect(begins > 0, "schedule", expected, f"{begins:.6g}")
            return None
        own = solver.is_euler and not solver.is_inverse
        expect(own, "schedule", "a schedule, for a NoisePrediction, whose steps are its own", solver)
        return self._steps(x, solver.times, out, keep)

    def _steps(
        self, x: Tensor, times: Tensor, out: Tensor | None, keep: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        start = x.contiguous()
        x = start.clone() if out is None else out[0].copy_(start)
        alphas, sigmas = (part.tolist() for part in self.coefficients(times))
        for k, (now, then) in enumerate(itertools.pairwise(times.tolist())):
            at = torch.full((len(x),), now, dtype=torch.float64, device=float64_device(x.device))
            e = self(x, at, noise=True).to(x.dtype)
            ratio = alphas[k + 1] / alphas[k]
            b = sigmas[k + 1] - ratio * sigmas[k]
            v = torch.add(x * ((ratio - 1) / (then - now)), e, alpha=b / (then - now)) if keep else None
            x = linear_update(x, (e,), (b,), scale=ratio, out=x if out is None else out[k + 1])
            yield x, v

    def _expect_straight(self) -> None:
        got = "a NoisePrediction on another path, which makes its own steps on a schedule (fk.sample, capture=None)"
        expect(self.path == "straight", "velocity", "one that is known at a state and a time", got)

    def extra_repr(self) -> str:
        return f"path={self.path!r}"
