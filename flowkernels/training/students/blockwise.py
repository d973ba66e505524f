"""`Blockwise`: a network for each interval of a schedule, as one velocity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_list
from flowkernels.schedule import Schedule
from flowkernels.training.students.modules import copied, unwrapped
from flowkernels.velocity.composite import Composite, answer_of, expect_state
from flowkernels.velocity.field import VelocityField, float64_device
from flowkernels.velocity.protocol import VelocityBase, is_per_sample, on_tensors

NEAR = 1e-6  # as close below a knot, a time is that of the knot: those in float32 are


class Blockwise(Composite):
    """One network for each interval of a schedule: a sample's velocity is that of the network of the interval that its
    time is in; at a knot, of the interval that begins there.

    Each network is a velocity `net(x, t)`, such as a `VelocityField` with its conditioning, which follows the samples.
    Keyword arguments of a call reach the networks, tensors of n rows by their samples. All are in memory: N times the
    weights of one. `fk.straighten(None, velocity, schedule, target="blockwise")` trains copies of the velocity's, and
    with a `weighting` of 1 for one interval and 0 for the others that one's alone.

    Args:
        networks: N modules, each with weights of its own, or one, of which N copies are made.
        schedule: of N steps; a time outside, t `[n]`, is an error.

    networks: the `nn.ModuleList`. knots: the times of the schedule, numbers. forced_knots: those inside, which no step
    of a calibrated schedule spans.

    A batch of times on a GPU is waited for, once, to know how many samples each network has; in the loops of
    `fk.sample` and the others, whose times are on the CPU, nothing is. `fk.fuse` and `capture="compile"`, which need
    the same network at every step, do not take one.

    Raises TypeError, ValueError, naming the argument. Source: a model for each interval of noise levels, eDiff-I (arXiv
    2211.01324), here for the steps of a schedule.

    Examples:
        >>> student = fk.Blockwise([fk.VelocityField(torch.nn.Linear(3, 2), time_column=True) for _ in range(2)],
        ...                        fk.Schedule([0, 0.4, 1]))
        >>> student(torch.zeros(3, 2), torch.tensor([0.1, 0.4, 1.0])).shape
        torch.Size([3, 2])
    """

    def __init__(self, networks: nn.Module | Sequence[nn.Module], schedule: Schedule):
        super().__init__()
        expected = "a Schedule, such as cal[4], with an interval for each network"
        expect(isinstance(schedule, Schedule), "schedule", expected, schedule, TypeError)
        self.knots = tuple(schedule.times.tolist())
        many = isinstance(networks, nn.ModuleList) or not isinstance(networks, nn.Module)
        expected = f"{schedule.steps} modules, one for each interval, or one to copy"
        given = list(expect_list(networks, "networks", expected)) if many else [networks]
        for net in given:
            expect(isinstance(net, nn.Module), "networks", expected, net, TypeError)
        if not many:
            given = [_copied(networks) for _ in range(schedule.steps)]
        expect(len(given) == schedule.steps, "networks", expected, f"{len(given)}")
        weights = [id(p) for net in given for p in net.parameters()]
        expect(len(weights) == len(set(weights)), "networks", "weights of their own for each", "shared parameters")
        self.networks = nn.ModuleList(given)
        self.forced_knots = self.knots[1:-1]

    @classmethod
    def of(cls, student: nn.Module) -> "Blockwise | None":
        """It that is a student, or in a wrapper or the `VelocityField` that a student is."""
        for part in (student, VelocityField.of(unwrapped(student)).net):
            if isinstance(found := unwrapped(part), cls):
                return found
        return None

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        return times

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        expect_state(x, t)
        interval, counts = self._intervals(t)
        if len(x) in counts:  # of an empty batch any
            return answer_of(self.networks[counts.index(len(x))], "networks", x, x, _on(t, x), **kwargs)
        order, found = interval.argsort(stable=True), []
        for network, rows in zip(self.networks, order.split(counts), strict=True):
            if len(rows):
                rows = rows.to(x.device)
                given = {k: _of_rows(value, rows, len(x)) for k, value in kwargs.items()}
                part = network.rows(rows, len(x)) if isinstance(network, VelocityBase) else network
                found.append(answer_of(part, "networks", x[rows], x[rows], _on(t, x)[rows], **given))
        joined = torch.cat(found)
        found.clear()  # their memory
        return joined[order.argsort().to(x.device)]

    def _intervals(self, t: Tensor) -> tuple[Tensor, list[int]]:
        """That of each time, where the times are, and how many are in each, all that is read from there."""
        device = float64_device(t.device)
        t = t.detach().to(device, torch.float64)
        outside = (t >= self.knots[0] - NEAR).logical_and_(t <= self.knots[-1] + NEAR).logical_not_()
        interval = torch.zeros_like(t, dtype=torch.int64)
        for knot in self.forced_knots:
            interval += t + NEAR >= knot
        each = interval == torch.arange(len(self.networks), device=device)[:, None]
        *counts, bad = torch.cat([each, outside[None]]).sum(1).cpu().tolist()
        if bad:
            got = f"{t[outside][0].item():.6g}"
            expect(False, "t", f"times in [{self.knots[0]:.6g}, {self.knots[-1]:.6g}], that of the networks", got)
        return interval, counts

    def extra_repr(self) -> str:
        return f"knots={[round(t, 4) for t in self.knots]}"


def _on(t: Tensor, x: Tensor) -> Tensor:
    """The times where the state is: one for all as a constant, for which nothing is copied."""
    device = float64_device(x.device)
    if t.device == device:
        return t
    if t.is_cpu and len(t) and bool((t == t[0]).all()):
        return torch.full((len(t),), t[0].item(), dtype=t.dtype, device=device)
    return t.to(device)


def _of_rows(value: Any, rows: Tensor, n: int) -> Any:
    return on_tensors(value, lambda t: t[rows.to(t.device)] if is_per_sample(t, n) else t)


def _copied(network: nn.Module) -> nn.Module:
    """A copy, but for the conditioning of a field, which all share."""
    new = copied(network)
    if isinstance(network, VelocityField):
        new.conditioning, new.unconditional = dict(network.conditioning), dict(network.unconditional)
    return new
