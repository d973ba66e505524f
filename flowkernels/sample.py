"""Sample on a schedule: the Euler loop of the rollout, keeping only the state."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from tqdm import tqdm

from flowkernels import capture as captured
from flowkernels._checks import expect, expect_finite_flow, expect_noise, expect_times
from flowkernels.fuse import FusedSampler
from flowkernels.fuse_head import FusedHead
from flowkernels.ops import euler_step
from flowkernels.rollout import euler, initial_state, replay, step_times
from flowkernels.schedule import Schedule
from flowkernels.velocity_field import evaluate, has_time_embedding, warn_if_training


@torch.no_grad()
def sample(
    velocity,
    noise: Tensor,
    schedule: Schedule | int | Sequence[float] | Tensor,
    *,
    capture: str | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples at t = 1: one Euler step from each knot of the schedule to the next.

    Args:
        velocity: callable `velocity(x, t)`, as for `rollout`; guidance of a `VelocityField` is fused into the step. A
            `FusedSampler` makes all steps in one call.
        noise: `[n, *shape]`.
        schedule: a Schedule, N for N uniform steps, or N+1 increasing times from 0 to 1.
        capture: how the N steps run.
            None: a Python loop.
            "graph": one CUDA graph of the whole loop, on a GPU. It is recorded at the first call and replayed after;
            recorded anew when times, shape, dtype or device change, and when tensors of the velocity (parameters,
            buffers, conditioning) move to other memory or its settings change. Values written into that memory are
            picked up.
            "compile": the unrolled loop through `torch.compile(fullgraph=True)`. Every number of steps, schedule,
            shape and dtype compiles anew, which takes seconds to minutes and grows with N.
            "auto": "graph" on a GPU; None on a CPU, where there is nothing to record and a compilation has to pay off.
            The last 16 recorded loops are kept, none longer than its velocity. A velocity that looks at values on
            the host can be neither recorded nor compiled. What a graph does not see: changes inside objects that are
            no tensors, modules, functions or short containers.
        progress: show a progress bar; a captured loop, which is one call, has none.

    Inside `torch.compile(fullgraph=True, dynamic=True)` the loop is one graph whatever the number of steps, the
    schedule (a Schedule, an integer or a tensor; a list of numbers is compiled anew for each) and the guidance weight.
    Values are not looked at there: NaN and Inf show in the result, and times are taken to increase from 0 to 1.
    Neither a captured loop nor a `FusedSampler` or fused head, which are compiled already, goes in there.

    Returns:
        `[n, *shape]`, float32 (float64 for float64 noise). On all knots of a rollout's grid this is its last state,
        bit for bit; captured, to rounding.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        RuntimeError: for a velocity that cannot be captured, what stopped it.
    """
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
    if torch.compiler.is_compiling():
        return _traced(velocity, noise, times, capture)
    if isinstance(velocity, FusedSampler):
        return velocity.on(times)(noise)
    x0 = initial_state(expect_noise(noise))
    mode = captured.choose(capture, x0.device)
    warn_if_training(velocity)
    if mode is not None:
        x1 = captured.run(mode, velocity, x0, times)
    else:
        steps = euler(velocity, x0, times, keep=False)
        for step in tqdm(steps, "sample", len(times) - 1, disable=not progress, leave=False):
            x1 = step[0]
    expect_finite_flow(x1, replay(velocity, x0, times), times)
    return x1


def _traced(velocity, noise: Tensor, times: Tensor, capture: str | None) -> Tensor:
    """The loop as torch.compile takes it: a loop of its graph. A Python loop would be unrolled, for each N anew."""
    fused = isinstance(velocity, (FusedSampler, FusedHead))
    expect(not fused, "velocity", "a network inside torch.compile, which fuses on its own", type(velocity).__name__)
    expect(capture in (None, "auto"), "capture", "None or 'auto' inside torch.compile", capture)
    warn_if_training(velocity)
    x = initial_state(expect_noise(noise)).contiguous()
    t, h, embedded = step_times(times, x), times.diff(), has_time_embedding(velocity)

    def more(i, x):
        return (i < len(h)).all()

    def step(i, x):  # numbers of the velocity's are for it alone: the loop cannot take in one that was looked at before
        now = t.index_select(0, i.to(x.device, non_blocking=True))
        embedding = velocity.time_embedding(now) if embedded else None
        v, v_uncond, w = evaluate(velocity, x, now.expand(len(x)).clone(), embedding)
        return i + 1, euler_step(x, v, h.index_select(0, i).reshape(()), v_uncond=v_uncond, guidance=w)

    i = torch.zeros(1, dtype=torch.int64, device="cpu")  # on the CPU: a GPU would be waited for before every step
    return while_loop(more, step, (i, x))[1]
