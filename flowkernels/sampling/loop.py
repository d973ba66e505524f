"""The loop: a solver's evaluations and updates, from noise to data or back."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels._guidance import guided
from flowkernels.ops.euler_step import euler_step, stepper
from flowkernels.ops.euler_step import reference as euler_reference
from flowkernels.ops.linear_update import adder, linear_update
from flowkernels.ops.linear_update import reference as linear_reference
from flowkernels.runtime.torch_private import innermost_transform, modes_are_on, while_loop
from flowkernels.solver import Solver, Update, euler_sizes, last_uses
from flowkernels.velocity.evaluate import checked, evaluate
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve
from flowkernels.velocity.time_embedding import rows_of_times

DIFFERENTIABLE = "one that gradients go through (differentiable=True), as the network that it is made of"


def shares_solvers(velocity: VelocityBase) -> bool:
    """Whether its loops may run on a solver that others run on as well: its class, which may be no other's base here,
    hands none on, and no mode sees tensors."""
    return vars(type(velocity)).get("shares_solvers", False) and not modes_are_on()


def initial_state(noise: Tensor) -> Tensor:
    """The state in float32, whatever the model computes in; float64 noise stays float64."""
    return noise if noise.dtype in (torch.float32, torch.float64) else noise.float()


def steps(
    velocity: Velocity,
    x: Tensor,
    solver: Solver,
    *,
    out: Tensor | None = None,
    keep: bool = False,
    differentiable: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The state after each evaluation of a solver, and that evaluation's velocity.

    x: the state that it begins with, `[n, *shape]`, float32 or float64. out: `[M+1, n, *shape]`, where all states go, x
    the first; else they share one buffer. keep: yield velocities, guidance applied, good until the next evaluation,
    and not None. differentiable: each state is a tensor of its own, in the graph of gradients.
    """
    velocity = resolve(velocity)
    fused = velocity.fused_steps(x, solver, out, keep)
    if fused is not None:
        expect(not differentiable, "velocity", DIFFERENTIABLE, type(velocity).__name__)
        return fused
    t = velocity.model_times(solver.model_times.clone(), x)
    transformed = out is None and innermost_transform() is not None  # into whose tensors none can be written
    return evaluated_steps(velocity, x, solver, t, out, keep, OPS if differentiable or transformed else None)


class AsFunctions:
    """Updates by ops that return a new state, for a compiler to take in."""

    def __init__(self, euler_step: Callable, linear_update: Callable):
        self.step, self.add = euler_step, linear_update

    def own(self, v: Tensor, kept: bool = False) -> Tensor:
        return v.clone() if kept else v

    def joined(self, v: Tensor, v_uncond: Tensor, w: float, dtype: torch.dtype) -> Tensor:
        return guided(v, v_uncond, w, dtype)

    def euler_step(self, i: int, x: Tensor, v: Tensor, h: float, v_uncond: Tensor | None, w: float) -> Tensor:
        return self.step(x, v, h, v_uncond=v_uncond, guidance=w)

    def linear_update(self, i: int, x: Tensor, v: list[Tensor], b: list[float], scale: float) -> Tensor:
        return self.add(x, v, b, scale=scale)


OPS = AsFunctions(euler_step, linear_update)
REFERENCE = AsFunctions(euler_reference.euler_step, linear_reference.linear_update)


class _InPlace:
    """Updates that write each state where it belongs: into the one buffer, or into its row of `out`."""

    def __init__(self, x: Tensor, out: Tensor | None, is_euler: bool):
        self.step, self.add = (stepper(x), None) if is_euler else (None, adder(x))
        self.x, self.out = x, out
        self.begin, self.end = (x.data_ptr(), x.data_ptr() + x.nbytes) if out is None else (0, 0)

    def own(self, v: Tensor, kept: bool = False) -> Tensor:
        """The velocity in memory that the update does not write to, nor, if it is kept, the network."""
        if kept or self.begin <= v.data_ptr() < self.end:
            return v.clone(memory_format=torch.contiguous_format)
        return v

    def joined(self, v: Tensor, v_uncond: Tensor, w: float, dtype: torch.dtype) -> Tensor:
        """Guidance applied, in one pass."""
        return linear_update(v_uncond.to(dtype), (v, v_uncond), (w, -w))

    def euler_step(self, i: int, x: Tensor, v: Tensor, h: float, v_uncond: Tensor | None, w: float) -> Tensor:
        return self.step(x, v, h, v_uncond, w, self.x if self.out is None else self.out[i + 1])

    def linear_update(self, i: int, x: Tensor, v: list[Tensor], b: list[float], scale: float) -> Tensor:
        return self.add(x, v, b, scale, self.x if self.out is None else self.out[i + 1])


def evaluated_steps(
    velocity: Velocity,
    x: Tensor,
    solver: Solver,
    t: Tensor,
    out: Tensor | None = None,
    keep: bool = False,
    functions: AsFunctions | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`steps` by calls of the velocity. Nothing here looks at a value: it can be recorded, and compiled.

    t: the times of all evaluations `[M]`, as the velocity takes them, on its device. functions: for a compiler, or for
    gradients.
    """
    velocity, updates = resolve(velocity), solver.updates()
    sizes = euler_sizes(updates)
    last = last_uses(updates) if sizes is None else range(len(updates))
    embeddings = [None] * len(updates)
    if velocity.has_time_embedding():
        embeddings = rows_of_times(velocity.embed_time(t.clone(), x), len(updates))
    start = x.contiguous()
    x = start.clone() if out is None else out[0].copy_(start)  # which the velocity may write to
    made, past = functions or _InPlace(x, out, sizes is not None), {}
    own, euler = made.own, made.euler_step
    for i, (update, moment, embedding) in enumerate(zip(updates, velocity.moments(t, x), embeddings, strict=True)):
        v, v_uncond, w = checked(x, t, i, *velocity.velocities_at(x, moment, embedding))
        # guidance is applied first to what is read again, and where the update has other terms of another dtype
        if v_uncond is not None and (last[i] > i or (len(update.which) > 1 and v.dtype != x.dtype)):
            v, v_uncond = made.joined(v, v_uncond, w, x.dtype), None
        else:
            v, v_uncond = own(v, last[i] > i), v_uncond if v_uncond is None else own(v_uncond)
        if sizes is not None:
            x = euler(i, x, v, sizes[i], v_uncond, w)
        else:
            past[i] = v
            begin = start if update.from_start else x
            x = made.linear_update(i, begin, *_terms(i, update, past, v_uncond, w), update.scale)
            past = {k: kept for k, kept in past.items() if last[k] > i}
        if keep and v_uncond is not None:
            v = guided(v, v_uncond, w, x.dtype)
        yield x, v if keep else None


def _terms(
    i: int, update: Update, past: dict[int, Tensor], v_uncond: Tensor | None, w: float
) -> tuple[list[Tensor], list[float]]:
    """What the update of evaluation i adds up, with the guidance that is still to be applied."""
    v, b = [], []
    for k, factor in zip(update.which, update.factors, strict=True):
        joint = k == i and v_uncond is not None
        v += [past[k], v_uncond] if joint else [past[k]]
        b += [factor * w, factor * (1 - w)] if joint else [factor]
    return v, b


def last_state(
    velocity: Velocity, x: Tensor, solver: Solver, t: Tensor, functions: AsFunctions | None = None
) -> Tensor:
    """The state after all `evaluated_steps`."""
    for step in evaluated_steps(velocity, x, solver, t, functions=functions):
        x, _ = step
    return x


def velocities_along(velocity: Velocity, x: Tensor, solver: Solver) -> Iterator[Tensor]:
    """The velocities of a solver's evaluations from the state x, guidance applied, in x's dtype."""
    for _, v in steps(velocity, x, solver, keep=True):
        yield v.to(x.dtype)


def traced_euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """The state after Euler's steps on `times`, float64 `[N+1]`, as torch.compile takes them: a loop of its graph, the
    same for any number of steps. A Python loop would be unrolled, for each N anew."""
    velocity = resolve(velocity)
    embedded = velocity.has_time_embedding()
    t, h = velocity.model_times(times[:-1], x), times.diff()

    def more(i, x):
        return (i < len(h)).all()

    def step(i, x):  # numbers of the velocity's are for it alone: the loop cannot take in one that was looked at before
        now = t.index_select(0, i.to(t.device, non_blocking=True))
        embedding = velocity.embed_time(now, x) if embedded else None
        v, v_uncond, w = evaluate(velocity, x, now.expand(len(x)).clone(), embedding)
        return i + 1, euler_step(x, v, h.index_select(0, i).reshape(()), v_uncond=v_uncond, guidance=w)

    i = torch.zeros(1, dtype=torch.int64, device="cpu")  # on the CPU: a GPU would be waited for before every step
    return while_loop(more, step, (i, x))[1]
