"""Straighten: fine-tune a student so that each interval of a schedule is one exact Euler step."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowkernels._checks import (
    describe,
    expect,
    expect_bool,
    expect_choice,
    expect_float64,
    expect_int,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_seed,
    expect_takes,
)
from flowkernels._files import expect_target
from flowkernels.fusion.sampler import FusedSampler
from flowkernels.ops import segment_points, straighten_loss
from flowkernels.ops._library import is_transformed
from flowkernels.sampling.loop import initial_state
from flowkernels.schedule import Schedule
from flowkernels.training.bank import _expect_memory, _noise_identity, _noise_source, _teacher_grid, knots
from flowkernels.training.checkpoint import (
    HISTORY,
    architecture,
    checks_of,
    copied,
    expect_optimizer,
    expect_optimizer_state,
    expect_progress,
    expect_random_states,
    expect_setting,
    expect_storable,
    expect_weights,
    load_weights,
    optimizer_identity,
    plain_state,
    read_checkpoint,
    unwrapped,
    write_checkpoint,
)
from flowkernels.velocity.evaluate import expect_velocity, warn_if_training
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.identity import identity
from flowkernels.velocity.protocol import resolve
from flowkernels.velocity.provenance import Identity, hash_of

OPTIMIZER = "a function of parameters that returns an optimiser, or None"


@dataclass(frozen=True)
class Straightened:
    """What `straighten` returns.

    student: the trained network in eval mode, with its averaged weights when `ema` is on.
    history: lists of equal length: iteration, loss, lr, grad_norm; and `interval_loss`, one list of N a row, the mean
    loss of each interval since the last row (NaN for one that was not drawn).
    """

    student: nn.Module
    history: dict[str, list] = field(repr=False)


@torch.inference_mode(False)  # which enables gradients too: a caller's no_grad and inference_mode do not count
def straighten(
    student: nn.Module | None,
    velocity,
    schedule: Schedule,
    *,
    noise: Tensor | Sequence[int] | Callable[[int, torch.Generator], Tensor],
    iterations: int,
    batch: int = 128,
    bank: int = 1024,
    refresh: int | None = None,
    u: str = "start",
    loss: str = "l2",
    huber_c: float = 0.03,
    weight: Sequence[float] | Tensor | None = None,
    init: str | Mapping[str, Tensor] | None = None,
    lr: float = 2e-4,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    warmup: int = 100,
    decay: str = "cosine",
    clip: float | None = 1.0,
    ema: float | None = 0.999,
    grid: int | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    log_every: int = 10,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    progress: bool = True,
) -> Straightened:
    """Fine-tune `student` so that on every interval of `schedule` it is the teacher's straight line.

    On an interval `[t_a, t_b]` with teacher states x_a, x_b: input `x = (1-u) x_a + u x_b` at
    `t = t_a + u (t_b - t_a)`, target `(x_b - x_a) / (t_b - t_a)`. Intervals and samples are drawn uniformly. The
    teacher's trajectories are rolled out on the schedule's fine grid, in memory; only the N+1 knots are kept.

    Args:
        student: the network to train, in place; None trains a copy of the teacher (its conditional field, if guided).
            It may be compiled, or in DataParallel or DistributedDataParallel: files and copies are of what they wrap,
            as is what `ema` returns.
        velocity: the teacher; `VelocityField`, any callable `velocity(x, t)`, or a `FusedSampler`.
        schedule: from `calibrate`; its grid is the teacher's.
        noise: a tensor `[bank, *shape]` (a fixed bank of that many samples), a shape (standard normal noise of it), or
            a function `(n, generator) -> [n, *shape]`, the generator on the CPU. Per-sample conditioning of a
            `VelocityField` needs a tensor of as many samples.
        iterations: optimiser steps in all; a resumed run counts those before.
        batch: samples an iteration. bank: trajectories kept, where `noise` is not a tensor.
        refresh: iterations after which the bank is rolled out anew from fresh noise; None never.
        u: "start", u = 0, BOSS as published; or "uniform", u in [0, 1], piecewise reflow.
        loss: "l2" or "huber" (pseudo-Huber with constant `huber_c`); see `ops.straighten_loss`.
        weight: a factor on the loss of each interval, N numbers; None weighs all alike.
        init: what the student starts from: "teacher" its weights, "keep" the student's own, or a state dict, such as
            EMA weights. None: the teacher's where it has any, else the student's own.
        lr, warmup, decay: peak learning rate, iterations of linear warm-up, then "cosine" to zero or "none".
        optimizer: parameters -> optimiser; None is Adam. Its learning rate is set to the schedule above.
        clip: largest norm of the gradient, or None.
        ema: decay of the averaged weights that are returned, or None to return the last ones.
        grid: the teacher's fine grid, for a schedule that has none.
        seed: of noise, samples, intervals and u.
        log_every: iterations a row of the history.
        checkpoint: file that keeps the whole state of the training, written every `checkpoint_every` iterations and at
            the end; whole or not at all. Where one cannot be written, as on a full disk, a warning says so, the one
            before stays and the training goes on.
        resume: go on from `checkpoint` if it exists; on the same machine the result is that of an uninterrupted run,
            bit for bit. An interrupted run loses the iterations since its last checkpoint. One of another run is
            refused: of other settings, teacher (weights, convention, conditioning; a warning says what cannot be
            read), noise, student or optimiser.
        progress: show a progress bar.

    Before the teacher is rolled out, the student is tried on a batch, and its state on the format of checkpoints. A
    caller's `no_grad` and `inference_mode` do not count; in `torch.autocast` both networks compute in its dtype.

    Returns:
        Straightened(student, history).

    Raises:
        TypeError, ValueError: naming the argument, before any work is done; for NaN or Inf in the loss, the iteration.

    Source: BOSS (arXiv 2312.16414), straightening stage; `u="uniform"` is piecewise rectified flow, and on the one
    interval [0, 1] rectified flow (arXiv 2209.03003).
    """
    expected = "a Schedule, such as cal[4]: a student learns Euler steps (of a solver: Schedule(solver.times))"
    expect(isinstance(schedule, Schedule), "schedule", expected, schedule, TypeError)
    expect_velocity(velocity)
    teacher, velocity = velocity, velocity.velocity if isinstance(velocity, FusedSampler) else velocity
    _expect_no_wrapped_field(velocity, "velocity")
    teacher_grid, indices = _teacher_grid(schedule, grid)
    iterations = expect_positive_int(iterations, "iterations")
    batch, bank = expect_positive_int(batch, "batch"), expect_positive_int(bank, "bank")
    log_every = expect_positive_int(log_every, "log_every")
    checkpoint_every = expect_positive_int(checkpoint_every, "checkpoint_every")
    if refresh is not None:
        refresh = expect_positive_int(refresh, "refresh")
        expect(not isinstance(noise, Tensor), "noise", "a shape or a function, with refresh", noise)
    expect_choice(u, "u", ("start", "uniform")), expect_choice(loss, "loss", ("l2", "huber"))
    expect_choice(decay, "decay", ("cosine", "none"))
    # plain numbers: a checkpoint with numpy's would not load
    huber_c = expect_real(huber_c, "huber_c", "a positive number", _is_squared)
    lr = expect_real(lr, "lr", "a positive number", lambda a: a > 0)
    clip = None if clip is None else expect_real(clip, "clip", "a positive number or None", lambda a: a > 0)
    ema = None if ema is None else expect_real(ema, "ema", "a number in [0, 1) or None", lambda a: 0 <= a < 1)
    warmup, seed = expect_int(warmup, "warmup", "a number of iterations", 0), expect_seed(seed)
    resume, progress = expect_bool(resume, "resume"), expect_bool(progress, "progress")
    N = schedule.steps
    if weight is not None:
        expected = f"{N} finite numbers >= 0, one for each interval"
        weight = expect_float64(weight, "weight", expected).float()
        ok = weight.shape == (N,) and bool((weight >= 0).all()) and bool(torch.isfinite(weight).all())
        expect(ok, "weight", expected, weight)
    made_of_class = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if optimizer is not None and not made_of_class:
        expect_takes(optimizer, "optimizer", OPTIMIZER, [])
    if checkpoint is not None:
        checkpoint = expect_path(checkpoint, "checkpoint")
        expect(checkpoint.parent.is_dir(), "checkpoint", "a path in a folder that exists", str(checkpoint))
        expect_target(checkpoint, "checkpoint")

    cached = getattr(nn.utils.parametrize, "_cache_enabled", 0)  # weights as they were at their first use
    expect(not cached, "student", "training outside of torch.nn.utils.parametrize.cached()", "a call inside of it")
    expect(not is_transformed(), "student", "training outside of torch.func and dual_level", "a call inside of them")
    student = _own_student(student, velocity)
    for name, net in (("velocity", velocity), ("student", student)):
        if isinstance(net, nn.Module) and not isinstance(net, VelocityField):
            expect_takes(net, name, "a network net(x, t)", None, None)
    parameters = [p for p in student.parameters() if p.requires_grad]
    expect(len(parameters) > 0, "student", "a module with trainable parameters", type(student).__name__)
    device = parameters[0].device
    draw_noise = _noise_source(noise, device)
    _expect_memory(noise, bank, batch, N)
    size = len(noise) if isinstance(noise, Tensor) else bank
    fused = device.type in ("cpu", "cuda")  # one kernel a step: 4 ms less a step for the digits network on 2 cores
    opt = optimizer(parameters) if optimizer else torch.optim.Adam(parameters, lr=lr, fused=fused)
    if not isinstance(opt, torch.optim.Optimizer):
        expect(False, "optimizer", OPTIMIZER, f"one that returns {describe(opt)}", TypeError)
    expect_optimizer(opt, parameters)
    known = identity(velocity)
    setting = dict(
        **dict(times=schedule.times.tolist(), grid=teacher_grid.tolist(), iterations=iterations),
        **dict(batch=batch, bank=size, refresh=refresh, u=u, loss=loss, huber_c=huber_c, lr=lr, warmup=warmup),
        **dict(decay=decay, clip=clip, ema=ema, seed=seed, log_every=log_every),
        weight=None if weight is None else weight.tolist(),
        **dict(teacher=known.parameters, noise=_noise_identity(noise)),
    )
    fields = dict(teacher_field=_field_identity(velocity), student_field=_field_identity(student))
    setting |= fields | dict(optimizer=optimizer_identity(opt))
    saved = None
    if checkpoint is not None and resume and checkpoint.exists():
        saved = read_checkpoint(checkpoint, stacklevel=4)
        before = saved["version"] == 1 and saved["setting"].get("teacher") == known.of_state
        with checks_of(checkpoint):
            expect_setting(saved, setting | (dict(teacher=known.of_state) if before else {}))
            expect_progress(saved, iterations, log_every, N)
            expect_random_states(saved)
            expect_weights(student, saved["student"], "checkpoint", exact=True)
    _initialise(student, velocity, init)
    warn_if_training(velocity, stacklevel=4)

    average = None
    if ema is not None:
        with torch.device("cpu"):  # of its counter
            average = torch.optim.swa_utils.AveragedModel(copied(student), multi_avg_fn=_warmed_up_average(ema))
    setting |= dict(student=architecture(student), attributes=known.attributes)
    generator = torch.Generator().manual_seed(seed)
    history = {k: [] for k in HISTORY}
    times = schedule.times.to(device)
    h = times.diff()
    start, (totals, counts) = 0, torch.zeros(2, N, dtype=torch.float32, device="cpu")
    if saved is not None:
        _warn_of_doubts(checkpoint, saved["setting"].get("attributes"), known)
        with checks_of(checkpoint):
            expect_setting(saved, dict(student=setting["student"]))
            expect_optimizer_state(saved["optimizer"], opt, parameters)
            if average is not None:
                expect_weights(average, saved["average"], "checkpoint", exact=True)
                done, n = saved["iteration"], int(saved["average"]["n_averaged"])
                expect(n == done, "checkpoint", f"an average of {done} iterations", f"{n}")
                average.load_state_dict(saved["average"])
            load_weights(student, saved["student"])
            opt.load_state_dict(opt.state_dict() | {"state": saved["optimizer"]["state"]})
        history, start, totals, counts = (saved[k] for k in ("history", "iteration", "totals", "counts"))
        generator.set_state(saved["bank_rng"])  # the bank is rolled out again, from the noise it was made of
    bank_rng = generator.get_state()

    def state(iteration: int) -> dict:
        return dict(
            **dict(setting=setting, iteration=iteration, history=history, bank_noise=bank_noise),
            **dict(student=plain_state(student), optimizer=opt.state_dict()),
            average=None if average is None else average.state_dict(),
            **dict(bank_rng=bank_rng, rng=generator.get_state(), global_rng=_global_rng()),
            **dict(totals=totals, counts=counts),
        )

    def bank_of(x: Tensor) -> Tensor:
        return knots(teacher, x, teacher_grid, indices, batch, progress)

    def velocities(net: nn.Module, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        torch.clear_autocast_cache()  # of weights as they were before a step, or without a graph
        learner = resolve(net).rows(s, size)
        v = learner(x, learner.time_for(t, x.float()))
        if not isinstance(v, Tensor) or v.shape != x.shape:
            expect(False, "student", f"a velocity of x's shape {list(x.shape)}", v)
        return v.to(x.dtype) if torch.float64 in (v.dtype, x.dtype) else v

    if start < iterations:
        first = draw_noise(size, generator)
        bank_noise = tensors_hash({"noise": first})[:16] if callable(noise) else None
        if saved is not None and saved.get("bank_noise") is not None:
            expected = "a function that draws what it drew before, from the same generator"
            expect(bank_noise == saved["bank_noise"], "noise", expected, "other values (resume=False starts anew)")
        if checkpoint is not None:
            expect_storable(state(start))
        _try_once(student, initial_state(first), times, batch, velocities)
        states = bank_of(first)
    if saved is not None:
        generator.set_state(saved["rng"])
        _restore_global_rng(saved["global_rng"])

    def save(iteration: int) -> None:
        try:
            write_checkpoint(checkpoint, state(iteration))
        except Exception as e:  # a full disk, say: what is in memory is worth more than an error
            kept = "is kept; the training goes on" if checkpoint.exists() else "was not made; the training goes on"
            text = (
                f"checkpoint: iteration {iteration} could not be written ({type(e).__name__}: {e}); {checkpoint} {kept}"
            )
            warnings.warn(text, UserWarning, stacklevel=4)

    student.train()
    bar = tqdm(total=iterations, initial=start, desc="straighten", disable=not progress, leave=False, unit="it")
    with bar:
        for it in range(start, iterations):
            if refresh is not None and it and it % refresh == 0:
                bank_rng = generator.get_state()
                x = draw_noise(size, generator)
                bank_noise = tensors_hash({"noise": x})[:16] if callable(noise) else None
                states = bank_of(x)
            rate = lr * _rate(it, iterations, warmup, decay)
            for group in opt.param_groups:
                group["lr"] = rate

            interval = torch.randint(N, (batch,), generator=generator, device="cpu")
            pick = torch.randint(size, (batch,), generator=generator, device="cpu")
            random = u == "uniform"
            where = torch.zeros(batch, dtype=torch.float32, device="cpu")
            if random:
                where.uniform_(generator=generator)
            i, s, where = interval.to(device), pick.to(device), where.to(device)
            x = segment_points(states, i, s, where if random else None)
            t = times[i] + where * h[i]
            v = velocities(student, x, t, s)
            weights = None if weight is None else weight.to(device)[i]
            mean, each, _ = straighten_loss(v, states, h, i, s, weight=weights, loss=loss, huber_c=huber_c)
            opt.zero_grad(set_to_none=True)
            mean.backward()
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
            value = mean.item()
            if not (math.isfinite(value) and math.isfinite(norm.item())):
                got = f"loss {value}, gradient norm {norm.item()} at iteration {it}"
                expect(False, "student", "a finite loss and gradient (a smaller lr?)", got)
            opt.step()
            if average is not None:
                average.update_parameters(unwrapped(student))

            totals.index_add_(0, interval, each.float().cpu())
            counts.index_add_(0, interval, torch.ones_like(where.cpu()))
            if it % log_every == 0 or it == iterations - 1:
                row = dict(
                    iteration=it, loss=value, lr=rate, grad_norm=norm.item(), interval_loss=(totals / counts).tolist()
                )
                for key, entry in row.items():
                    history[key].append(entry)
                totals.zero_(), counts.zero_()
                bar.set_postfix(loss=f"{value:.4g}")
            bar.update()
            if checkpoint is not None and ((it + 1) % checkpoint_every == 0 or it == iterations - 1):
                save(it + 1)

    torch.clear_autocast_cache()
    if average is not None:
        result = copied(student)
        load_weights(result, average.module.state_dict())
        return Straightened(result.eval(), history)
    return Straightened(student.eval(), history)


def _try_once(student: nn.Module, noise: Tensor, times: Tensor, batch: int, velocities) -> None:
    """A forward and backward pass of a copy, before the work of a bank; the caller's generators stay as they are."""
    try:
        net = copied(student).train()
    except ValueError:  # not needed without an average
        return
    devices = [noise.device] if noise.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        s = torch.arange(batch, dtype=torch.int64, device=noise.device) % len(noise)
        v = velocities(net, noise[s], times[:1].expand(batch), s)
        expect(v.requires_grad, "student", "a velocity with a gradient in its weights", "one without")
        try:
            v.float().square().mean().backward()
        except RuntimeError as e:
            raise ValueError(f"student: expected a velocity that can be differentiated, got RuntimeError: {e}") from e


def _is_squared(c: float) -> bool:
    """Whether c^2 is a positive number in float32, in which a GPU computes the loss: with Inf nothing is trained."""
    return c > 0 and 1e-38 < c * c < 3e38


def _rate(it: int, iterations: int, warmup: int, decay: str) -> float:
    if it < warmup:
        return (it + 1) / warmup
    if decay == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (it - warmup) / max(1, iterations - warmup)))


def _warmed_up_average(decay: float):
    """Exponential moving average whose decay grows to `decay` as (1+n)/(10+n), so that short runs are not held back."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        rate = min(decay, (1 + n.item()) / (10 + n.item()))
        for a, c in zip(averaged, current, strict=True):
            a.lerp_(c.to(a.dtype), 1 - rate)

    return average


def _own_student(student, velocity) -> nn.Module:
    """The module to train: the one given, or a copy of the teacher."""
    teacher_is_module = isinstance(velocity, nn.Module)
    if student is None:
        expect(teacher_is_module, "student", "a module, where the teacher is not one to copy", "None")
        student = velocity.without_guidance() if isinstance(velocity, VelocityField) else velocity
        student = copied(student)
        for p in student.parameters():
            p.requires_grad_(p.is_floating_point())
        return _trainable(student)
    expect(isinstance(student, nn.Module), "student", "an nn.Module or None", student, TypeError)
    _expect_no_wrapped_field(student, "student")
    _trainable(student)
    if teacher_is_module:
        shared = set(map(id, student.parameters())) & set(map(id, velocity.parameters()))
        got = f"{len(shared)} parameters of the teacher's"
        expect(not shared, "student", "weights of its own (None trains a copy of the teacher)", got)
    return student


def _expect_no_wrapped_field(velocity, name: str) -> None:
    """A wrapper of a field hides its conditioning."""
    inner = unwrapped(velocity) if isinstance(velocity, nn.Module) else velocity
    wrapped = inner is not velocity and isinstance(inner, VelocityField)
    expect(
        not wrapped, name, "VelocityField(torch.compile(net), ...), the wrapper inside", f"{type(velocity).__name__}"
    )


def _trainable(student: nn.Module) -> nn.Module:
    """The student, with weights that can be written to and conditioning that can be saved for a gradient."""
    for name, t in itertools.chain(student.named_parameters(), student.named_buffers()):
        expected = "weights made outside of torch.inference_mode, with values"
        lazy = nn.parameter.is_lazy(t)  # of which nothing can be asked
        why = "not initialised" if lazy else "on the meta device" if t.is_meta else "made in it" * t.is_inference()
        expect(not why, "student", expected, f"{name!r}, {why}")
    if isinstance(student, VelocityField):
        for k, v in student.conditioning.items():
            if isinstance(v, Tensor) and v.is_inference():
                student.conditioning[k] = v.clone()
    return student


def _warn_of_doubts(checkpoint: Path, attributes: str | None, known: Identity) -> None:
    """Say what cannot tell whether the teacher is the one that it was."""
    doubts = [f"{what} unknown ({why})" for what, why in known.unknown.items()]
    if attributes is not None and known.attributes is not None and attributes != known.attributes:
        doubts.append("other attributes of its modules")
    if doubts:
        text = f"checkpoint: expected the teacher that {checkpoint} was made with, got {', '.join(doubts)}"
        warnings.warn(text, UserWarning, stacklevel=4)


def _field_identity(velocity) -> str | None:
    """The hash of a field's convention and conditioning; None if they cannot be read."""
    field = velocity if isinstance(velocity, VelocityField) else VelocityField(nn.Identity())
    return hash_of({k: v for k, v in field.settings().items() if k != "packed"}, "", {})


def _initialise(student: nn.Module, velocity, init) -> None:
    """Load the weights that training starts from."""
    net, state, name = _network(student), init, "init"
    if not isinstance(init, Mapping):
        known = init is None or (isinstance(init, str) and init in ("teacher", "keep"))
        expect(known, "init", "'teacher', 'keep', a state dict or None", init)
        has_weights = isinstance(velocity, nn.Module) and any(True for _ in velocity.parameters())
        expect(init != "teacher" or has_weights, "init", "a teacher with weights, for 'teacher'", velocity)
        if not has_weights or init == "keep":
            return
        state, name = plain_state(_network(velocity)), "student"
    expect_weights(net, state, name)
    load_weights(net, state)


def _network(module: nn.Module) -> nn.Module:
    return module.net if isinstance(module, VelocityField) else module


def _global_rng() -> dict:
    """Random states outside the generator: dropout draws from them."""
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _restore_global_rng(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
