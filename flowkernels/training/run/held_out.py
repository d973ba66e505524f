"""What a student is measured on: trajectories, or pairs, that it is not trained on."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling.loop import steps
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.run.apart import seed_apart
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.pairs import RunPairs
from flowkernels.training.run.settings import Settings
from flowkernels.training.students.average_velocity import AverageVelocity
from flowkernels.training.students.student import conditioned
from flowkernels.velocity.composite import Composite
from flowkernels.velocity.protocol import VelocityBase, as_given, resolve


@dataclass(frozen=True)
class Evaluation:
    """What was measured after so many iterations, each with its standard error over the trajectories: the mean squared
    L2 distance of samples to the teacher's, and the mean loss of each interval, N of them."""

    iteration: int
    endpoint_error: float
    endpoint_stderr: float
    interval_loss: list[float]
    interval_stderr: list[float]


class HeldOut:
    """The last trajectories of a run's bank, and what a student is measured by on them.

    solver: whose steps the samples make: those of the schedule that was given, or of targets "solver" and "endpoint"
    the solver; of "distill" its one step.
    Numbers of single trajectories come from `endpoint_errors` and `interval_losses` alone, of a slice of them: slices
    together are the whole, bit for bit but for what a network makes of batches of another size.
    """

    def __init__(self, bank: RunBank | RunPairs, settings: Settings):
        self.bank, self.objective, self.seed = bank, settings.objective, settings.seed
        self.count, self.size, self.first = bank.held_out, bank.held_of, bank.held_of - bank.held_out
        given = isinstance(settings.schedule, Solver) or self.objective.is_one_step
        self.solver = self.objective.solver if given else Solver.euler(settings.schedule)
        self.ranks = Ranks() if settings.group is None else settings.group

    def measured(self, student: nn.Module, iteration: int) -> Evaluation:
        """Of a student in eval mode."""
        errors, losses = self.endpoint_errors(student), self.interval_losses(student)
        each = torch.cat([errors[None], losses])
        mean, stderr = each.mean(1).tolist(), (each.std(1) / math.sqrt(self.count)).tolist()
        return Evaluation(iteration, mean[0], stderr[0], mean[1:], stderr[1:])

    @torch.no_grad()
    def endpoint_errors(self, student: nn.Module, solver: Solver | None = None, rows: slice | None = None) -> Tensor:
        """Squared L2 distances of samples to the teacher's, float64 `[m]` on the CPU."""
        if rows is None and not self.ranks.is_alone:
            return self._by_ranks(lambda rows: self.endpoint_errors(student, solver, rows))
        start, stop, _ = (rows or slice(None)).indices(self.count)
        ends, first, found = self.bank.ends(), self.bank.ends_begin, []
        for a in range(start, stop, self.bank.batch):
            part = ends.split(a - first, min(a + self.bank.batch, stop) - first)
            x = sampled(student, part, self.size, solver or self.solver)
            found.append(endpoint_errors(x, part.states[1]).cpu())
        return torch.cat(found)

    def some(self, count: int) -> BankBatch:
        """Trajectories to make samples of: those held out, or else the first ones."""
        if self.count:
            ends = self.bank.ends()
            return ends.split(0, min(count, len(ends.sample)))
        x, conditioning = self.bank.first(count)
        sample = torch.arange(len(x), device=x.device)
        return BankBatch(x[None], torch.zeros_like(sample), sample, size=self.size, conditioning=conditioning)

    @torch.no_grad()
    def interval_losses(self, student: nn.Module, rows: slice | None = None) -> Tensor:
        """The losses of each trajectory on each interval, unweighted, float64 `[N, m]` on the CPU. What a loss draws is
        the same in every call; of a target that changes with the training it is the last."""
        if rows is None and not self.ranks.is_alone:
            return self._by_ranks(lambda rows: self.interval_losses(student, rows))
        start, stop, _ = (rows or slice(None)).indices(self.count)
        objective, size, first, J = self.objective, self.size, self.first, len(self.objective.times) - 1
        generator = torch.Generator("cpu").manual_seed(seed_apart(self.seed))
        before, kept, whole, found = generator.get_state(), objective.rolled_out, None, []
        if objective.needs_roll_out:  # of all at once: a batch is of the states that were rolled out
            whole = self.bank.each(first + start, first + stop)
            index = torch.arange(first + start, first + stop, device="cpu")
            view = as_given(resolve(student).rows(index, size))  # whose conditioning may have a row for each
            objective.roll_out(view, whole.states, self.bank.batch)
        try:
            step = max(1, self.bank.batch // J)
            for a in range(start, stop, step):
                b = min(a + step, stop)
                if whole is None:
                    part = self.bank.each(first + a, first + b)
                else:
                    part = whole.split((a - start) * J, (b - start) * J)
                generator.set_state(before)
                losses = objective(student, part._replace(part=(a * J, b * J, self.count * J)), generator, 1.0)
                found.append(losses.per_sample.double().cpu())
        finally:
            objective.rolled_out = kept
        each = torch.cat(found).view(stop - start, J).T
        within = objective.interval_of(torch.arange(J, device="cpu"))
        return torch.stack([each[within == k].mean(0) for k in range(objective.knots.steps)])

    def _by_ranks(self, measure: Callable[[slice], Tensor]) -> Tensor:
        """Of all that are held out, of each rank's part `measure` here: as many on every rank, of which it may be that
        the first is of another's part."""
        mine, count = self.ranks.part(self.count), -(-self.count // self.ranks.size)
        first = min(mine.start, self.count - count)
        found = measure(slice(first, first + count))
        return self.ranks.gathered(found[..., mine.start - first : mine.stop - first], self.count, found.dim() - 1)


def sampled(student: nn.Module, batch: BankBatch, size: int, solver: Solver) -> Tensor:
    """Where the student's samples of a batch of whole trajectories, of so many, end: `[B, *shape]`."""
    torch.clear_autocast_cache()  # of weights as they were before
    *_, (x, _) = steps(learner_of(student, batch, size, solver), batch.states[0], solver)
    return x


def learner_of(student: nn.Module, batch: BankBatch, size: int, solver: Solver) -> VelocityBase:
    """The student on the trajectories of a batch, with their conditioning, for a solver's steps."""
    given = batch.conditioning
    learner = resolve(student).without_conditioning(given or ()).rows(batch.sample, size)
    if given and isinstance(learner, Composite):
        learner = learner.with_conditioning(given)
    elif given:
        learner = conditioned(student, learner, given)
    if isinstance(learner, AverageVelocity) and learner.knots is None:
        learner = learner.on(Schedule(solver.times))
    return learner.unfused()


@contextlib.contextmanager
def undisturbed(student: nn.Module) -> Iterator[None]:
    """Modes and buffers of the student's modules and torch's own generators are afterwards as they were before."""
    device = next(student.parameters()).device
    modes = [(module, module.training) for module in student.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())  # some count, or observe, in eval mode too
        for module in student.modules()
        for name, buffer in module._buffers.items()
        if isinstance(buffer, Tensor) and not buffer.is_inference()
    ]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):  # one that is expanded cannot be written into
                    buffer.copy_(before)
        torch.clear_autocast_cache()
