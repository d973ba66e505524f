"""`Teacher`: a velocity on the samples that it is asked about, at single times and along a solver."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flowkernels._checks import expect_finite_flow
from flowkernels._guidance import guided
from flowkernels.ops.linear_update import linear_update
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling import loop
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import evaluate
from flowkernels.velocity.field import float64_device
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve

ROWS_BYTES = 5 << 19  # of the states of several times that are evaluated at once: calibrate's chunks at K = 100
AGREE = 1e-2  # of a velocity's size, beyond what batches of other sizes round to in bfloat16
OWN = 0.25  # of how far the velocities of two times are apart: nearer to one than that, it is of that time


def velocity_at(velocity: VelocityBase, x: Tensor, t: float | Tensor) -> Tensor:
    """That of all of x `[n, *shape]` at one time, or at times `[n]` in float64; guidance applied, with gradients where
    it has them."""
    where = dict(dtype=torch.float64, device=float64_device(x.device))
    now = t.to(**where) if isinstance(t, Tensor) else torch.full((len(x),), t, **where)
    v, v_uncond, w = evaluate(velocity, x, now)
    return v if v_uncond is None else guided(v, v_uncond, w, x.dtype)


def _agree(alone: Tensor, together: Tensor) -> bool:
    size, off = (v.double().flatten(1).norm(dim=1) for v in (alone, together - alone))
    return bool((off <= AGREE * size).all())


class Teacher:
    """A velocity on samples in an order of their own: evaluated in chunks, with each sample's conditioning and with
    guidance, and counted.

        teacher = Teacher(velocity, 100, order=torch.tensor([7, 3, 12]), chunk=2)
        v = teacher.at(x, 0.5)           # of samples 7, 3 and 12, whose states are x
        v = teacher.at(x[1:], 0.5, 1)    # of samples 3 and 12
        teacher.evaluations              # 5

    Args:
        velocity: any velocity; of a `FusedSampler` its own.
        total: the number of samples that conditioning with one row a sample is of.
        solver: whose steps `flow` and `fused_flow` make.
        order: int64 `[n]`, on the CPU: the samples' places among these; None takes all as they come.
        chunk: samples evaluated at once; None evaluates all.
        ranks: processes that evaluate together: each is asked for all samples, evaluates its part of them, and is given
            those of all. But for `parts`, `flow` and `fused_flow`, which are of this one alone.

    fused: what makes all of the solver's steps in one call, of a velocity that has such; or None.
    evaluations: of single samples, so far; guidance makes no two of one.
    takes_rows: whether the velocity takes a time for each row, and more rows than samples (`at_times`); None: unknown.
    takes_each: whether it takes a time for each sample (`at_each`); None: unknown.
    """

    def __init__(
        self,
        velocity: Velocity,
        total: int,
        *,
        solver: Solver | None = None,
        order: Tensor | None = None,
        chunk: int | None = None,
        ranks: Ranks | None = None,
    ):
        given = resolve(velocity)
        self.ranks = Ranks() if ranks is None else ranks
        self.fused, self.velocity = None if solver is None else given.fused_run(solver), given.unfused()
        self.total, self.solver, self.order, self.chunk, self.evaluations = total, solver, order, chunk, 0
        self._fields: dict[tuple[int, int], VelocityBase] = {}  # of samples from .. to
        self.takes_rows: bool | None = None
        self.takes_each: bool | None = None
        self._knows_rows = False  # by more rows than samples

    def alone(self) -> "Teacher":
        """The same of this process alone, counted by itself."""
        found = copy.copy(self)
        found.ranks, found.evaluations = Ranks(), 0
        return found

    def chunks(self, n: int) -> Iterator[slice]:
        """Parts of n samples that are evaluated at once."""
        step = self.chunk or max(1, n)
        return (slice(begin, min(begin + step, n)) for begin in range(0, n, step))

    def parts(self, n: int, first: int = 0) -> Iterator[tuple[slice, VelocityBase]]:
        """The parts of n samples from `first` on, and the velocity of each."""
        for part in self.chunks(n):
            yield part, self._field(first + part.start, first + part.stop)

    def _field(self, start: int, stop: int) -> VelocityBase:
        if (start, stop) in self._fields:
            return self._fields[start, stop]
        field = self.velocity.rows(self._index(start, stop), self.total)
        if self.order is None:  # in an order the rows are copies, of perhaps large conditioning
            self._fields[start, stop] = field
        return field

    def _index(self, start: int, stop: int) -> Tensor | slice:
        return slice(start, stop) if self.order is None else self.order[start:stop]

    def at(self, x: Tensor, t: float, first: int = 0) -> Tensor:
        """The velocities at one time t of the samples from `first` on, whose states are x `[n, *shape]`: guidance
        applied, in the state's dtype, in memory of their own."""
        out = self.ranks.shared(len(x), lambda rows: self._at(x[rows], t, first + rows.start))
        self.evaluations += len(x)
        return out

    def _at(self, x: Tensor, t: float, first: int) -> Tensor:
        out = torch.empty_like(x)
        for part, field in self.parts(len(x), first):
            out[part] = velocity_at(field, x[part], t)
        return out

    def at_each(self, x: Tensor, times: Tensor) -> Tensor:
        """The velocities of all samples, whose states are x `[n, *shape]`, each at its own time, float64 `[n]`.

        One call of the network where it takes these; whether it does is found out once, where the times make a
        difference, at the cost of four rows: the samples of the first and the last time, alone, at both. Else a call
        for the samples of each time.
        """
        t, field = times.to("cpu", torch.float64), self._field(0, len(x))
        first, last = int(t.argmin()), int(t.argmax())
        if t[first] == t[last]:
            return self.at(x, t[first].item())
        found = None
        if self.takes_each is not False:
            try:
                found = velocity_at(field, x, t)
            except Exception:  # whatever a callable makes of several times
                if self.takes_each:
                    raise
            self.evaluations += len(x)
        if self.takes_each is None:
            self.takes_each = False if found is None else self._is_of_each(x, t, found, [first, last])
        if self.takes_each:
            return found.to(x.dtype)
        out = torch.empty_like(x)
        for now in t.unique().tolist():
            rows = (t == now).nonzero().flatten()
            out[rows] = velocity_at(self._field_of(rows), x[rows], now).to(x.dtype)
            self.evaluations += len(rows)
        return out

    def _is_of_each(self, x: Tensor, t: Tensor, found: Tensor, rows: list[int]) -> bool | None:
        """Whether velocities of a whole batch are those of each sample alone at its own time, in two rows of different
        times: nearer to these than to those of the other time. None where the two times' are equal but for rounding."""
        decided = True
        for row, other in (rows, rows[::-1]):
            field, state = self._field_of(torch.tensor([row], device="cpu")), x[[row]]
            own, another = (velocity_at(field, state, t[[at]]).double() for at in (row, other))
            self.evaluations += 2
            off, apart = (own - found[[row]].double()).norm(), (own - another).norm()
            rounding = 64 * torch.finfo(found.dtype).eps * own.norm()
            if not off <= torch.maximum(rounding, OWN * apart):
                return False
            decided = decided and bool(apart > 4 * rounding)
        return True if decided else None

    def at_times(self, x: Tensor, times: Sequence[float], first: int = 0) -> Tensor:
        """The velocities `[m, n, *shape]` at m times, of each of which x `[m, n, *shape]` has the states of all samples
        from `first` on: what `at` gives for each time, in as few calls of the network as `chunk` rows allow.

        Without a chunk a call has rows whose states take 2.5 MiB, or all samples at one time if these are more. A
        velocity that does not take rows of several times, such as one that looks at the first alone or has its own
        conditioning of n samples, is found out, once, and evaluated time by time: at the cost of four rows, and of the
        last time's again where these told nothing.
        """
        m, n = x.shape[:2]
        most = self.chunk or max(n, ROWS_BYTES // max(1, x[:1, :1].nbytes))
        found = None
        if m > 1 and most > n and self._takes_rows(x, times, first):
            found = self._by_rows(x, times, first, most)
        if found is None:
            single = [self.at(states, t, first) for states, t in zip(x, times, strict=True)]
            found = torch.stack(single) if single else torch.empty_like(x)
        return found

    def _by_rows(self, x: Tensor, times: Sequence[float], first: int, most: int) -> Tensor | None:
        """None where the first such call shows that the velocity is another one there."""
        m, n = x.shape[:2]
        alone = self.alone()
        try:
            out = self.ranks.shared(n, lambda part: alone._all_rows(x[:, part], times, first + part.start, most), 1)
        except Exception as e:
            if self._knows_rows or isinstance(e, (ConnectionError, TimeoutError)):  # of ranks that are lost
                raise
            self.takes_rows = False
            self.evaluations += int(self.ranks.total(torch.tensor(alone.evaluations, device="cpu")))
            return None
        self.evaluations += m * n
        if not self._knows_rows:
            self._knows_rows = self.takes_rows = _agree(self.at(x[-1], times[-1], first), out[-1])
        return out if self.takes_rows else None

    def _field_of(self, samples: Tensor) -> VelocityBase:
        """Of samples in any order, perhaps more than once."""
        return self.velocity.rows(samples if self.order is None else self.order[samples], self.total)

    def _takes_rows(self, x: Tensor, times: Sequence[float], first: int) -> bool:
        if self.takes_rows is None:
            pair, samples = x[[0, -1], 0], torch.tensor([first] * 2, device="cpu")
            at = torch.tensor([times[0], times[-1]], dtype=torch.float64, device="cpu")
            self.evaluations += 4
            try:
                field = self._field(first, first + 1)
                alone = torch.cat([velocity_at(field, pair[i : i + 1], at[i : i + 1]) for i in range(2)])
                together = velocity_at(self._field_of(samples), pair, at)
            except Exception:  # whatever a callable makes of other rows than those of its samples
                self.takes_rows = False
            else:
                self.takes_rows = _agree(alone, together)
        return self.takes_rows

    def _all_rows(self, x: Tensor, times: Sequence[float], first: int, most: int) -> Tensor:
        m, n = x.shape[:2]
        states, out = x.flatten(0, 1), torch.empty_like(x)
        rows, at = out.flatten(0, 1), torch.tensor(times, dtype=torch.float64, device="cpu").repeat_interleave(n)
        samples = torch.arange(n, device="cpu").repeat(m) + first
        for begin in range(0, m * n, most):
            part = slice(begin, begin + most)
            rows[part] = velocity_at(self._field_of(samples[part]), states[part], at[part])
            self.evaluations += len(rows[part])
        return out

    def run(
        self, solver: Solver, start: Tensor, past: Sequence[Tensor] = (), first: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """(velocities of a solver's evaluations, last state) from the states `start` of the samples from `first` on.

        past: the velocities of the first evaluations, where they are known: those are not made.
        """
        if not self.ranks.is_alone:
            return self._run_by_ranks(solver, start, past, first)
        v, b, a = list(past), solver.coefficients.tolist(), solver.start_coefficients.tolist()
        for i in range(len(v), solver.evaluations):
            x = linear_update(start, v, b[i - 1][:i], scale=a[i - 1]) if i else start
            v.append(self.at(x, solver.model_times[i].item(), first))
        return v, linear_update(start, v, b[-1], scale=a[-1])

    def _run_by_ranks(
        self, solver: Solver, start: Tensor, past: Sequence[Tensor], first: int
    ) -> tuple[list[Tensor], Tensor]:
        known, alone = len(past), self.alone()

        def made(rows: slice) -> Tensor:
            v, x = alone.run(solver, start[rows], [t[rows] for t in past], first + rows.start)
            return torch.stack([*v[known:], x])

        *v, x = self.ranks.shared(len(start), made, 1)
        self.evaluations += (solver.evaluations - known) * len(start)
        return [*past, *v], x

    def flow(
        self, x: Tensor, first: int = 0, *, out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The steps of the solver, with time embeddings made ahead, as `loop.steps` yields them: of the samples from
        `first` on, all at once, from their states x. ValueError for NaN or Inf at the end, naming sample and step."""
        field = self._field(first, first + len(x))
        for step in loop.steps(field, x, self.solver, out=out, keep=keep):
            self.evaluations += len(x)
            yield step
        expect_finite_flow(step[0], loop.velocities_along(field, x, self.solver), *self._counted(first))

    def fused_flow(
        self, x: Tensor, first: int = 0, *, states: bool = False, velocities: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same in one call of `fused`: (last states, states, velocities), with velocities looked at as by `flow`
        (a kernel on a GPU does not look by itself)."""
        run = self.fused.rows(self._index(first, first + len(x)), self.total)
        self.evaluations += self.solver.evaluations * len(x)
        found = last, _, v = run.run(x, states=states, velocities=velocities, first=first)
        if v is not None:
            expect_finite_flow(last, v, *self._counted(first))
        return found

    def _counted(self, first: int) -> tuple[Tensor, int, str]:
        """What `expect_finite_flow` says where it was by."""
        single = self.solver.evaluations == self.solver.steps
        return self.solver.model_times, first, "step" if single else "evaluation"
