"""`Samples`: what solvers are fitted to and judged by, the teacher's states of n samples, and the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_noise, expect_positive_int
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.tried import FAILURES
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling.rollout import Trajectory, rollout
from flowkernels.sampling.teacher import Teacher
from flowkernels.sampling.teacher_solver import KnotStates
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.identity import warn_if_another
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve

FOLDS = 4  # of a cross-validation


def folds_of(n: int, folds: int = FOLDS) -> Tensor:
    """The fold of each of n >= 2 samples, int64 `[n]` on the CPU: the i-th one's is i modulo `folds`, of which there
    are no more than samples."""
    return torch.arange(n, device="cpu") % min(folds, n)


@dataclass
class Samples:
    """n samples: the teacher's states, and what evaluates a velocity, the teacher's or a student's, on them.

    teacher: evaluates them, in their order. x: the states, `[K+1, ., *shape]`, in the order that they were rolled out
        in. start: the place in the grid that they start from, and its time. folds: of each sample, int64 `[n]`, on the
        CPU. first: the velocities at the start, once they are known.
    """

    teacher: Teacher
    x: Tensor
    start: tuple[int, float]
    folds: Tensor
    times: Tensor
    first: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of(
        cls,
        velocity: Velocity,
        calibration: Calibration,
        noise: Tensor | None = None,
        chunk: int | None = None,
        *,
        folds: int = FOLDS,
        most: int | None = None,
        start: int = 0,
        proven: bool = False,
        teacher: Velocity | None = None,
        ranks: Ranks | None = None,
    ) -> "Samples":
        """Of those that a calibration keeps the first `most`, or of `noise`, rolled out anew; 2 or more.

        start: the place in the grid that they start from. proven: whether the velocity is for certain the one that the
        calibration was made with, whose first velocities are then the kept ones; teacher: that one, where it is not.
        ranks: which evaluate together, and roll out together; every one has the states of all samples.
        Warns of a network that trains, and of another velocity, as the caller of the caller's caller.
        """
        expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
        velocity = resolve(velocity).unfused()
        known_as = velocity if teacher is None else resolve(teacher, "teacher")
        if chunk is not None:
            expect_positive_int(chunk, "chunk")
        warn_if_training(velocity, stacklevel=5)
        known, kept = calibration.provenance, calibration.kept
        if noise is None:
            wanted = "one that keeps trajectories (noise= rolls the teacher out anew)"
            expect(kept is not None, "calibration", wanted, "one that keeps none")
            n, total = kept.x.shape[1], known.get("n_given", known.get("n", kept.x.shape[1]))
        else:
            shape = known.get("shape", list(expect_noise(noise).shape[1:]))
            expect(list(noise.shape[1:]) == shape, "noise", f"samples of the calibration's shape {shape}", noise)
            n = total = len(noise)
        n = min(n, most or n)
        expect(n >= 2, "calibration" if noise is None else "noise", "2 samples or more", f"{n}")
        proven = proven or warn_if_another(known_as, known, stacklevel=5)
        proven = noise is not None or (proven and known.get("sampler_weights") in (None, "torch.float32"))
        proven = proven and teacher is None  # a student has first velocities of its own
        evaluated = Teacher(velocity, total, chunk=chunk, ranks=ranks)
        if noise is not None:
            kept = _rolled_out(known_as, noise[:n], total, calibration.teacher_solver, evaluated.ranks)
            evaluated.evaluations = n * KnotStates.of(calibration.teacher_solver).evaluations
        times = calibration.times
        found = cls(evaluated, kept.x[:, :n], (start, times[start].item()), folds_of(n, folds), times)
        if proven:
            found.first = kept.v[start, :n].to(kept.x.dtype)
        return found

    def in_order(self, order: Sequence[int] | Tensor) -> "Samples":
        """The same samples, or some of them, in another order of their places."""
        places = torch.as_tensor(order, dtype=torch.int64, device="cpu")
        rows = places if self.teacher.order is None else self.teacher.order[places]
        known = self.teacher
        teacher = Teacher(known.velocity, known.total, order=rows, chunk=known.chunk, ranks=known.ranks)
        teacher.evaluations = known.evaluations
        known = {"first": self.first, "last": self.last}
        known = {name: v if v is None else v[places.to(v.device)] for name, v in known.items()}
        return replace(self, teacher=teacher, folds=self.folds[places], **known)

    def own(self, order: Sequence[int] | Tensor) -> "Samples":
        """The same, evaluated and counted by this process alone."""
        found = self.in_order(order)
        return replace(found, teacher=found.teacher.alone())

    def errors_of(
        self, solver: Solver, start: Tensor, end: Tensor, past: Sequence[Tensor] = (), first: int = 0
    ) -> Tensor:
        """Squared distances, float64 `[.]` on the CPU, of where a solver takes the samples from `first` on to the
        states `end`, from the states `start`; past: as `Teacher.run` has it."""
        alone = self.teacher.alone()

        def made(rows: slice) -> Tensor:
            _, x = alone.run(solver, start[rows], [v[rows] for v in past], first + rows.start)
            return endpoint_errors(x, end[rows]).to("cpu", torch.float64)

        try:
            errors = self.teacher.ranks.shared(len(start), made)
        except FAILURES:
            self.teacher.evaluations += int(self.teacher.ranks.total(torch.tensor(alone.evaluations, device="cpu")))
            raise
        self.teacher.evaluations += (solver.evaluations - len(past)) * len(start)
        return errors

    @property
    def n(self) -> int:
        return len(self.folds)

    @property
    def evaluations(self) -> float:
        """Made for each sample on average."""
        return self.teacher.evaluations / self.n

    def velocity_at_start(self, inverse: bool = False) -> Tensor:
        """At the first states of the n samples: the teacher's, or, where it may be another velocity's, its own.
        inverse: at their last states instead, where a solver from data to noise starts."""
        if inverse:
            if self.last is None:
                self.last = self.teacher.at(self.state(-1), self.times[-1].item())
            return self.last
        if self.first is None:
            place, t = self.start
            self.first = self.teacher.at(self.state(place), t)
        return self.first

    def state(self, i: int) -> Tensor:
        """`[n, *shape]` at knot i of the grid."""
        order = self.teacher.order
        return self.x[i] if order is None else self.x[i].index_select(0, order.to(self.x.device))

    def state_at(self, t: float) -> Tensor:
        """`[n, *shape]` at a time within the grid: between two knots on the line through the states there, which is the
        teacher's own way where its steps are Euler's."""
        j = int((self.times - t).abs().argmin())
        if abs(self.times[j].item() - t) <= 1e-9:
            return self.state(j)
        j = int(torch.searchsorted(self.times, t))
        low, high = self.times[j - 1 : j + 1].tolist()
        return torch.lerp(self.state(j - 1), self.state(j), (t - low) / (high - low))


def _rolled_out(velocity: VelocityBase, noise: Tensor, total: int, solver: Solver, ranks: Ranks) -> Trajectory:
    """The first samples, of this many in all, each rank its part of them."""
    if ranks.is_alone:
        return rollout(velocity.rows(slice(len(noise)), total), noise, solver)
    rows, of = ranks.part(len(noise)), None
    if rows.stop > rows.start:
        of = ranks.tried(lambda: rollout(velocity.rows(rows, total), noise[rows], solver))
    x, v = (ranks.gathered(t, len(noise), 1) for t in ((None, None) if of is None else (of.x, of.v)))
    return Trajectory(solver.times, x, v)
