"""Sample on a schedule or by a solver: the loop, of which only the last state is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    expect,
    expect_bool,
    expect_finite,
    expect_finite_flow,
    expect_noise,
    expect_times,
    is_waited_for,
)
from flowkernels.ops.library import is_batched, is_finite, is_plain_state
from flowkernels.sampling import capture as capture_module
from flowkernels.sampling.loop import (
    DIFFERENTIABLE,
    OPS,
    initial_state,
    last_state,
    shares_solvers,
    steps,
    traced_euler,
    velocities_along,
)
from flowkernels.sampling.sample_schedules import SampleSchedules, run_each
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.protocol import Velocity, as_given, resolve
from flowkernels.velocity.provenance import warn_of_another_pipeline


@no_grad
def sample(
    velocity: Velocity,
    noise: Tensor,
    schedule: Schedule | Solver | SampleSchedules | int | Sequence[float] | Tensor,
    *,
    capture: str | None = None,
    check: bool = True,
    progress: bool = False,
    differentiable: bool = False,
) -> Tensor:
    """Samples at a schedule's last time, t = 1: one Euler step from each knot to the next, or the steps of a solver.

    Args:
        velocity: callable `velocity(x, t)`, as for `rollout`; guidance of a `VelocityField` is fused into the step. A
            `FusedSampler` makes all steps in one call.
        noise: `[n, *shape]`, the state at the schedule's first time.
        schedule: a Schedule, N for N uniform steps from 0 to 1, or N+1 increasing times from any to any in [0, 1], such
            as `[0.4, 0.7]`; or a Solver from noise to data, whose updates are `linear_update` of as few velocities as
            it needs; or `SampleSchedules` with a row for each sample: N calls of the network for the whole batch where
            it takes a time for each sample, which is found out at the cost of a few rows, else a call for each time.
            From data to noise, falling times included, goes `invert`.
        capture: how the N steps run.
            None: a Python loop.
            "graph": one CUDA graph of the whole loop, on a GPU. It is recorded at the first call and replayed after;
            recorded anew when times, solver, shape, dtype or device change, and when tensors of the velocity
            (parameters, buffers, conditioning) move to other memory or its settings change. Values written into that
            memory are picked up.
            "compile": the unrolled loop through `torch.compile(fullgraph=True)`. Every number of steps, schedule,
            shape and dtype compiles anew, which takes seconds to minutes and grows with N.
            "auto": "graph" on a GPU; None on a CPU, where there is nothing to record and a compilation has to pay off.
            The last 16 recorded loops are kept, none longer than its velocity. A velocity that looks at values on
            the host can be neither recorded nor compiled. What a graph does not see: changes inside objects that are
            no tensors, modules (TorchScript's are such objects), functions or short containers; it goes on with the
            tensors that they had.
        check: look for NaN and Inf, and raise. On a GPU noise and samples are looked at together, so that it is waited
            for once, behind the last step. False looks at nothing and waits for nothing: they show in the samples, as
            they do inside `torch.vmap`. A `FusedSampler` looks for them on a CPU, in passing, and not on a GPU.
        progress: show a progress bar; a captured loop, which is one call, has none.
        differentiable: False: no gradients go through, whatever requires them. True: those of a loop written in torch,
            of any order, to the noise, the network's parameters and its conditioning, where the caller has gradients
            on. Memory is that loop's, of activations of all evaluations; a velocity
            `lambda x, t: torch.utils.checkpoint.checkpoint(net, x, t, use_reentrant=False)` keeps those of one. Not
            with capture, inside torch.compile, or through what makes its own steps (`FusedSampler`, `FusedHead`,
            `Acceleration`).

    Inside `torch.compile(fullgraph=True, dynamic=True)` the loop is one graph whatever the number of steps, the
    schedule (a Schedule, an integer or a tensor; a list of numbers is compiled anew for each) and the guidance weight.
    A solver's loop is unrolled: compiled anew for each solver, but for those of the same form (as many evaluations, the
    same velocities in each update) with dynamic=True. Its direction is not looked at.
    Values are not looked at there: NaN and Inf show in the result, and times are taken to increase.
    Neither a captured loop nor a `FusedSampler` or fused head, which are compiled already, goes in there.

    Returns:
        `[n, *shape]`, float32 (float64 for float64 noise). On all knots of a rollout's grid this is its last state,
        bit for bit; captured, to rounding. A solver that is nothing but Euler steps on its knots gives what its
        schedule gives, bit for bit.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step (for a solver with several
            evaluations a step, the evaluation).
        RuntimeError: for a velocity that cannot be captured, what stopped it.

    Examples:
        >>> fk.sample(lambda x, t: -x, torch.ones(1, 2), 2)  # two Euler steps of dx/dt = -x
        tensor([[0.2500, 0.2500]])
        >>> x1 = fk.sample(lambda x, t: -x, torch.ones(1, 2), fk.Solver.adams_bashforth(8, order=2))
        >>> noise = torch.ones(1, 2, requires_grad=True)
        >>> fk.sample(lambda x, t: -x, noise, 2, differentiable=True).sum().backward()
        >>> noise.grad
        tensor([[0.2500, 0.2500]])
    """
    if torch.compiler.is_compiling():
        expected = "False inside torch.compile (compile the network, and not the loop)"
        expect(not differentiable, "differentiable", expected, differentiable)
        return _traced(velocity, noise, schedule, capture)
    expect_bool(differentiable, "differentiable")
    if isinstance(schedule, SampleSchedules):
        expect(capture in (None, "auto"), "capture", "None or 'auto' for a schedule for each sample", capture)
        expect_bool(progress, "progress")
        expect(not differentiable, "differentiable", "False for a schedule for each sample", differentiable)
        warn_if_training(velocity, stacklevel=4)
        warn_of_another_pipeline(schedule, resolve(velocity).provenance, stacklevel=4)
        return run_each(resolve(velocity), noise, schedule, expect_bool(check, "check"))
    if isinstance(schedule, Solver) and schedule.is_inverse:
        expect(False, "schedule", "a solver from noise to data (fk.invert runs it)", schedule)
    known = resolve(velocity)
    warn_of_another_pipeline(schedule, known.provenance, stacklevel=4)
    solver = expect_solver(schedule, "schedule", shared=shares_solvers(known))
    return run(known, noise, solver, capture, check, progress, differentiable=differentiable)


def run(
    velocity: Velocity,
    noise: Tensor,
    solver: Solver,
    capture: str | None,
    check: bool,
    progress: bool,
    name: str = "noise",
    bar: str = "sample",
    differentiable: bool = False,
) -> Tensor:
    """The last state of a solver, in either direction. name: of the argument `noise`; bar: of the progress bar."""
    known, velocity = resolve(velocity), as_given(velocity)
    fused = known.fused_run(solver)
    check = expect_bool(check, "check")
    expect_bool(progress, "progress")
    if differentiable:
        expect(capture in (None, "auto"), "capture", "None with differentiable=True", capture)
        expect(not known.is_fused, "velocity", DIFFERENTIABLE, type(known).__name__)
        capture = None
    if fused is not None:
        return fused(noise)
    if check and is_plain_state(noise):  # most: what follows, in less time
        x0 = noise
    else:
        x0 = initial_state(expect_noise(noise, name, look=False))
        if check and not (is_waited_for(x0) or is_batched(x0)):
            expect_finite(noise, name)
    mode = capture_module.choose(capture, x0.device)
    if mode != "graph":  # which knows what it has looked at before
        warn_if_training(velocity, stacklevel=5)
    if mode is not None:
        x1 = capture_module.run(mode, velocity, x0, solver)
    else:
        made = steps(known, x0, solver, differentiable=differentiable)
        for step in tqdm(made, bar, solver.evaluations, leave=False) if progress else made:
            x1, _ = step
    if check and not is_finite(x1):
        expect_finite(noise, name)
        what = "step" if solver.evaluations == solver.steps else "evaluation"
        with torch.no_grad():
            expect_finite_flow(x1, velocities_along(velocity, x0, solver), solver.model_times, what=what)
    return x1


def _traced(velocity: Velocity, noise: Tensor, schedule, capture: str | None) -> Tensor:
    """As torch.compile takes it: a solver unrolled, Euler's steps as a loop of its graph."""
    expected = "a network inside torch.compile, which fuses on its own"
    expect(not resolve(velocity).is_fused, "velocity", expected, type(velocity).__name__)
    expect(capture in (None, "auto"), "capture", "None or 'auto' inside torch.compile", capture)
    each = isinstance(schedule, SampleSchedules)
    expect(not each, "schedule", "one for all samples inside torch.compile", "SampleSchedules")
    warn_if_training(velocity)
    x = initial_state(expect_noise(noise)).contiguous()
    if isinstance(schedule, Solver):
        return last_state(velocity, x, schedule, resolve(velocity).model_times(schedule.model_times, x), OPS)
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
    return traced_euler(velocity, x, times)
