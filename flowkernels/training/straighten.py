"""Straighten: fine-tune a student so that each interval of a schedule is one exact Euler step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_takes
from flowkernels._warnings import warn
from flowkernels.calibration.polish import polish_on
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import Loss, TSampling
from flowkernels.training.pairs.pairs import Pairs
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.checkpoint import BANK_DRAWN, checkpoint_to_resume, expect_storable
from flowkernels.training.run.cost import cost_of
from flowkernels.training.run.evaluations import Evaluations
from flowkernels.training.run.events import TrainingEvent
from flowkernels.training.run.held_out import HeldOut, learner_of, undisturbed
from flowkernels.training.run.loop import train
from flowkernels.training.run.lora import lora_student
from flowkernels.training.run.optimizers import optimizer_identity, own_optimizer
from flowkernels.training.run.pairs import RunPairs
from flowkernels.training.run.random_states import seed_of_rank
from flowkernels.training.run.schedulers import Scheduler
from flowkernels.training.run.settings import Settings
from flowkernels.training.run.state import State
from flowkernels.training.run.team import Team, in_a_team
from flowkernels.training.run.trajectories import trajectories_of
from flowkernels.training.run.watch import result
from flowkernels.training.students.adapters import network_of
from flowkernels.training.students.lora_files import base_hash
from flowkernels.training.students.modules import architecture, shares_weights
from flowkernels.training.students.precision import expect_castable
from flowkernels.training.students.recomputed import recomputed
from flowkernels.training.students.student import (
    expect_no_wrapped_field,
    expect_trainable_here,
    field_identity,
    initialise,
    own_student,
    trained_parameters,
    try_student,
)
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.identity import identity
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve
from flowkernels.velocity.provenance import Identity

log = logging.getLogger("flowkernels")
POLISHED = 512  # samples of a bank on which a solver is polished again, at most


@dataclass(frozen=True)
class Straightened:
    """What `straighten` returns.

    student: the trained network in eval mode, with its averaged weights when `ema` is on: then a copy without wrappers,
    or the student itself where it cannot be copied.
    history: lists of equal length: iteration, loss, lr, grad_norm; and `interval_loss`, one list of N a row, the mean
    loss of each interval since the last row (NaN for one that was not drawn).
    solver: of targets "solver" and "endpoint", the one to sample the student with: that which it was trained for, or
    that polished again, on samples of the bank, where it is better by more than a standard error on those held out (of
    the polish: the student has seen them). None of other targets.
    errors: the mean squared L2 distance of samples to the teacher's, on the trajectories that are held out: of the
    network that the training began from, on the schedule or with the solver that was given, and of `student`, with
    `solver` where there is one. None where nothing is held out.
    evaluations: with `evaluate_every`, lists of equal length: iteration, how many were done; endpoint_error, as
    `errors`, with the solver that was given; interval_loss, the N mean losses of the intervals, unweighted; and the
    standard errors of both over the trajectories, endpoint_stderr and interval_stderr. All of the weights that would
    have been returned then.
    best: with `patience`, the iterations that the weights of `student` had: those of the least endpoint_error, which
    is the less to be trusted for having been chosen by it.
    """

    student: nn.Module
    history: dict[str, list] = field(repr=False)
    solver: Solver | None = None
    errors: tuple[float, float] | None = None
    evaluations: dict[str, list] | None = field(default=None, repr=False)
    best: int | None = None


@in_a_team
def straighten(
    student: nn.Module | None,
    velocity: Velocity | None,
    schedule: Schedule | Solver,
    *,
    noise: Tensor | Sequence[int] | Callable[[int, torch.Generator], Tensor] | None = None,
    iterations: int,
    batch: int = 128,
    bank: int | TrajectoryBank | Pairs | Callable[[int, torch.Generator], Pairs] = 1024,
    refresh: int | None = None,
    refresh_fraction: float = 1.0,
    target: str = "boss",
    t_sampling: TSampling | None = None,
    loss: Loss | None = None,
    huber_c: float = 0.03,
    weighting: Sequence[float] | Tensor | str | None = None,
    consistency: str = "split",
    instantaneous: float = 0.5,
    rollout_every: int = 50,
    substeps: int = 4,
    initial_speed: float = 1.5,
    compared: str = "data",
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
    lora: Any = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    held_out: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[TrainingEvent], Any]] = (),
    keep_checkpoints: int | None = 1,
    group: Any = None,
) -> Straightened:
    """Fine-tune `student` so that on every interval of `schedule` it is the teacher's straight line, or has another
    `target`.

    On an interval `[t_a, t_b]` with teacher states x_a, x_b: input `x = (1-u) x_a + u x_b` at
    `t = t_a + u (t_b - t_a)`, target `(x_b - x_a) / (t_b - t_a)`. Intervals and samples are drawn uniformly. The
    teacher's trajectories are rolled out on the schedule's fine grid, in memory; only the knots are kept.

    Args:
        student: the network to train, in place; None trains a copy of the teacher (its conditional field, if guided).
            It may be compiled, or in DataParallel or DistributedDataParallel: files and copies are of what they wrap,
            as is what `ema` returns. It may be sharded by `fully_shard`, the network inside a `VelocityField`.
        velocity: the teacher; `VelocityField`, any callable `velocity(x, t)`, or a `FusedSampler`. It may be None
            where the bank is of pairs.
        schedule: from `calibrate`; its grid is the teacher's. It may begin later than a `grid` that is given. For
            target="solver" a Solver, such as `fk.fit_solver(velocity, cal, 4)`, and for "endpoint" best one that
            `fk.polish` has found from it, with `grid`.
        noise: the states at the grid's first time: a tensor `[bank, *shape]` (a fixed bank of that many samples), a
            shape (standard normal noise of it), or a function `(n, generator) -> [n, *shape]`, the generator on the
            CPU. Per-sample conditioning of a `VelocityField` needs a tensor of as many samples.
        iterations: optimiser steps in all; a resumed run counts those before. A finished one goes on where there are
            to be more: with decay="none" it is then the longer run, bit for bit (of target="annealed_reflow" but for
            beta); the cosine is from there on that of the longer run, and rises where it had come down.
        batch: samples an iteration; for target="endpoint" each makes all of the solver's evaluations.
        bank: trajectories kept, where `noise` is not a tensor; or a `TrajectoryBank` with noise, or data, of its own,
            which is filled where it is not: for one that is elsewhere than on the device, serves several runs, or
            carries conditioning.
            For "reflow" and other targets of one whole interval also `fk.Pairs` of noise and data, such as `fk.couple`
            makes, or a function `(n, generator) -> Pairs` that makes each batch, n = `batch`, with a coupling of its
            own; then there is no noise, nor a grid.
        refresh: iterations after which trajectories are rolled out anew from fresh noise; None never.
            refresh_fraction: of the bank, the oldest ones; in parts of `batch`, or of the bank's own `chunk`.
        target: what is learned, as `fk.StraightenLoss` has it: "boss", the intervals of the schedule; "reflow", the one
            from its first knot to its last; "annealed_reflow", the same into a smaller student; "distill", that in one
            step; "acceleration", the paths of a `fk.Acceleration`, "noise" those of a `fk.NoisePrediction`;
            "average_velocity", from any time to any later one, of a `fk.AverageVelocity`, for any number of steps;
            "blockwise", the intervals by a `fk.Blockwise`, a network for each; "next_knot" and "velocity_matching",
            where the teacher's states between two knots lead; "on_policy", the teacher's velocity along the student's
            own steps; "solver", the steps of a Solver on the student's own states, beside the teacher's; "endpoint",
            where a Solver's steps end, through all of them.
        t_sampling: the distribution of u: "start", u = 0, BOSS as published; "uniform", piecewise reflow; "u_shaped";
            "ten"; or a function. None takes the target's own. loss, huber_c: "l2", "huber", "huber_per_element",
            "cauchy", a function or None, the target's own, and the constant. weighting: a factor on the loss of each
            interval, "per_sample_normalised", "adaptive" or None. See `fk.StraightenLoss`. A resumed run cannot tell
            one function from another.
        consistency, instantaneous: of target="average_velocity": "split" or "derivative", and the share of examples
            whose two times are one. See `fk.StraightenLoss`.
        rollout_every: of target="on_policy" and "solver", iterations after which the student's own samples are taken
            anew: N - 1 evaluations of the bank without gradients.
        substeps: of target="next_knot" and "velocity_matching": steps in each interval whose states the bank has, at
            most, as the grid allows; N * substeps + 1 in place of N + 1.
        initial_speed: of target="acceleration", the initial velocity over the mean one.
        compared: of target="noise", what the loss compares, "data" or "noise".
        init: what the student starts from: "teacher" its weights, "keep" the student's own, or a state dict, such as
            EMA weights. None: the teacher's where it has any, else the student's own. A student whose layers hold
            adapters of peft's, or weights by weight_norm and the like, takes those of a network without.
        lr: peak learning rate.
        warmup: iterations of linear warm-up.
        decay: of the learning rate after it, "cosine" to zero or "none".
        optimizer: parameters -> optimiser; None is Adam. Its learning rate is set to the schedule above, if there is no
            `lr_scheduler`: that of the group whose own is the largest, and the others' in proportion. One with
            `train()` and `eval()`, as those of schedulefree, is switched where it has to be, and its own average takes
            the place of `ema`'s; decay="none" goes with it. On a GPU the weights are kept a second time, unless it is
            torch's Adam, AdamW, SGD or Adagrad with fused=True.
        clip: largest norm of the gradient, or None.
        ema: decay of the averaged weights that are returned, or None to return the last ones. Of the trained parameters
            a second set is kept, of bfloat16 or float16 in float32; sharded ones stay so. They are returned in a copy
            of the student, or, where copy.deepcopy does not make one (as of what is sharded), in the student itself.
        grid: the teacher's fine grid, for a schedule that has none.
        seed: of noise, samples, intervals and u. All but the noise are drawn where the bank is: on a GPU by a generator
            of its own, from seeds that the CPU's draws, so that they are others than on the CPU, the same in every run.
        log_every: iterations a row of the history. Between rows nothing waits for a GPU: a loss that is not finite is
            found there, at a row or a checkpoint, and no step is taken from it on.
        checkpoint: file that keeps the whole state of the training, written every `checkpoint_every` iterations and at
            the end; whole or not at all. Where one cannot be written, as on a full disk, a warning says so, the one
            before stays and the training goes on.
        resume: go on from `checkpoint` if it exists; on the same machine the result is that of an uninterrupted run,
            bit for bit. An interrupted run loses the iterations since its last checkpoint. One of another run is
            refused: of other settings, teacher (weights, convention, conditioning; a warning says what cannot be
            read), noise, student or optimiser.
        progress: show a progress bar.
        autocast: the dtype, torch.bfloat16, in which the student is evaluated by torch.autocast, also inside of a
            caller's; weights, gradients, loss and averages keep theirs, and the teacher with its bank is as the
            caller's context has it. float16 is refused: it would need a scaled loss. None: as the context has it.
        held_out: so many of the last trajectories of the bank, or pairs, are not trained on; of a function's pairs as
            many are drawn beside. None is 0, of targets "solver" and "endpoint" one in 8, at most 256, of at least 64.
            `refresh` draws them anew with the others.
        evaluate_every: iterations after which the student is evaluated on these, and before the first one and at the
            end: on `schedule` or the solver (of "distill" in one step), and by the loss of each interval with the same
            u each time. Nothing of the training changes by it.
        patience: evaluations without a smaller endpoint error after which the training ends. Then, or at the end, the
            best weights are returned, which the checkpoint has beside the last. A resumed run may have another number.
        callbacks: functions of a `fk.TrainingEvent`, each called after a row of the history, an evaluation and a
            checkpoint, and at the end; one that returns True ends the training. Where one raises, a checkpoint is
            written first.
        group: a `torch.distributed.ProcessGroup`, such as `torch.distributed.group.WORLD` under torchrun, whose W ranks
            train one student: all make the same call, each has 1/W of every batch (`batch` is a multiple of W) and of
            the bank, and all have the history, solver and errors of the whole, bit for bit. The student is bare, which
            DistributedDataParallel then wraps in the run (with the first rank's weights), or is in it already, or has
            weights sharded by `torch.distributed.fsdp.fully_shard` (FSDP2): then, where there is `ema`, it gets the
            averaged weights itself. None: a wrapped or sharded student's own. What ranks learn does not depend on W but
            for rounding; dropout, which is drawn from `seed` and the rank, and batch norms aside. `checkpoint` is then
            a folder, in which `torch.distributed.checkpoint` writes; a run goes on from it with any W.
        keep_checkpoints: how many checkpoints stay: 1, `checkpoint` alone; k, beside it the last k with their
            iterations, such as run-000500.pt of run.pt; None, all. Where run.pt is missing a run goes on from the last
            of these; where it is damaged, the error names the one before.
        accumulate: parts in which a batch is computed, one after the other, their gradients added up: the memory of one
            part, the steps of the whole batch. What is drawn for the batch is divided, so that the gradient is that of
            the whole; but dropout draws anew in each part, and a batch norm takes the statistics of a part. A network
            with `no_sync`, as DistributedDataParallel has it, sends its gradients with the last part alone.
        gradient_checkpointing: compute activations again in the backward pass, in place of keeping them: by the model's
            own switch, where it has one (diffusers' `enable_gradient_checkpointing`, transformers'), else of its
            repeated blocks (entries of a ModuleList or Sequential, of one class), else of the network, which helps
            target="endpoint" alone: then it keeps of each evaluation the state. Same gradients, another forward's time.
            A resumed run may have it otherwise.
        lr_scheduler: optimiser -> one of `torch.optim.lr_scheduler`, in the place of `warmup` and `decay`: a step of it
            behind each iteration; `ReduceLROnPlateau` makes one at each row of the history, of its loss. `lr` is then
            Adam's, and an `optimizer` has rates of its own.
        lora: train low-rank adapters in place of the weights, as `fk.add_lora` has them: a rank, a `peft.LoraConfig`, a
            dict of its settings, or a saved adapter to train on. Teacher and student are then one copy of the weights,
            of which neither gradients nor the optimiser's state are held, and checkpoints have the adapters alone. The
            network and a `student` that is given stay as they are; what comes back is made of it. `init` is None or
            "keep", or an adapter to start from, its state dict or path. `fk.save_lora` writes the result. Learning
            rates are about ten times those of all weights.

    Before the teacher is rolled out, the student is tried on a batch, and its state on the format of checkpoints. A
    caller's `no_grad` and `inference_mode` do not count; in `torch.autocast` both networks compute in its dtype.
    Of targets "solver" and "endpoint" a UserWarning says where the student, on what is held out, is farther from the
    teacher than what it began from, as it may be where the given solver is near already.

    Returns:
        Straightened(student, history, solver, errors, evaluations, best).

    Raises:
        TypeError, ValueError: naming the argument, before any work is done; for NaN or Inf in the loss, the iteration.

    Source: BOSS (arXiv 2312.16414), straightening stage; `t_sampling="uniform"` is piecewise rectified flow, and
    `target="reflow"` rectified flow (arXiv 2209.03003). Those of the other settings are in `fk.StraightenLoss`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> teacher = fk.VelocityField(net, time_column=True)
        >>> schedule = fk.Schedule([0, 0.25, 0.5, 1])
        >>> trained = fk.straighten(None, teacher, schedule, noise=(2,), iterations=2, bank=32, batch=8, grid=8)
        >>> x1 = fk.sample(trained.student, torch.randn(4, 2), schedule)
    """
    settings = Settings(
        velocity=velocity,
        schedule=schedule,
        grid=grid,
        noise=noise,
        iterations=iterations,
        batch=batch,
        bank=bank,
        refresh=refresh,
        refresh_fraction=refresh_fraction,
        target=target,
        t_sampling=t_sampling,
        loss=loss,
        huber_c=huber_c,
        weighting=weighting,
        consistency=consistency,
        instantaneous=instantaneous,
        rollout_every=rollout_every,
        substeps=substeps,
        initial_speed=initial_speed,
        compared=compared,
        lr=lr,
        optimizer=optimizer,
        warmup=warmup,
        decay=decay,
        clip=clip,
        ema=ema,
        seed=seed,
        log_every=log_every,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
        autocast=autocast,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        lr_scheduler=lr_scheduler,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        callbacks=callbacks,
        keep_checkpoints=keep_checkpoints,
        lora=lora,
        group=group,
    )
    objective = settings.objective
    teacher = None if velocity is None else resolve(velocity)
    if teacher is not None:
        velocity = as_given(teacher.unfused())
        expect_no_wrapped_field(velocity, "velocity")
    expect_trainable_here()
    if settings.lora is None:
        student = own_student(student, velocity, objective.student_from)
    else:
        student = lora_student(student, velocity, objective, settings.lora, init, settings.seed)
    objective.expect_student(student)
    for name, net in (("velocity", velocity), ("student", student)):
        plain = isinstance(net, nn.Module) and not isinstance(net, VelocityBase)
        if plain and not settings.carries_conditioning:
            expect_takes(net, name, "a network net(x, t)", None, None)
    team = Team(settings.group, student, objective, settings.batch)
    parameters = trained_parameters(student)
    device = parameters[0].device
    expect_castable(parameters, settings.autocast)
    trajectories = trajectories_of(settings, device, settings.progress)
    opt = own_optimizer(optimizer, parameters, settings.lr)
    known = Identity() if velocity is None else identity(velocity)
    trajectories.expect_teacher(known)
    setting = settings.identity() | {
        "bank": trajectories.size,
        "teacher": known.parameters,
        "noise": trajectories.identity,
        "teacher_field": None if velocity is None else field_identity(velocity),
        "student_field": field_identity(student),
        "optimizer": optimizer_identity(opt),
        "student": architecture(student),
        "attributes": known.attributes,
    }
    scheduler = None if lr_scheduler is None else Scheduler(settings.lr_scheduler, opt, settings.iterations)
    if scheduler is not None:
        setting["lr_scheduler"] = scheduler.identity()
    if settings.checkpoint is not None and shares_weights(student):
        setting["base"] = base_hash(network_of(VelocityField.of(student)))
    team.expect_same(setting)
    saved = checkpoint_to_resume(settings, setting, student, known, stacklevel=4)
    if settings.lora is None:
        initialise(student, velocity, init)
    team.share_weights()
    if velocity is not None:
        warn_if_training(velocity, stacklevel=4)
    evaluated = settings.evaluate_every
    state = State(
        student,
        opt,
        trajectories,
        setting,
        steps=objective.knots.steps,
        ema=settings.ema,
        seed=settings.seed,
        in_place=shares_weights(student),
        scheduler=scheduler,
        evaluations=None if evaluated is None else Evaluations(evaluated, settings.patience is not None),
        team=team,
    )
    if settings.group is not None:
        seed_of_rank(settings.seed, settings.group.rank)
    if saved is not None:
        state.load(saved, settings.checkpoint)
    held_out = HeldOut(trajectories, settings)
    if state.iteration < settings.iterations or objective.needs_roll_out or objective.refits or held_out.count:
        _fill(trajectories, state, settings, saved)
    if saved is not None and objective.needs_roll_out:
        state.roll_out_again(objective)
    if saved is not None:
        state.load_random_states(saved)
    elif held_out.count:
        state.began_at = _error(student, held_out, held_out.solver)
    train(state, settings, held_out)
    trained, solver, errors = result(state), None, None
    if objective.refits:
        solver = _polished_again(trained, trajectories, settings, team)
    if state.began_at is not None:
        errors = state.began_at, _error(trained, held_out, solver or held_out.solver)
        if objective.refits:
            _warn_if_worse(*errors, held_out.count, objective.target)
    rows, best = None, None
    if state.evaluations is not None:
        rows, best = state.evaluations.rows, state.evaluations.best_iteration
    return Straightened(trained, state.history, solver, errors, rows, best)


def _error(student: nn.Module, held_out: HeldOut, solver: Solver) -> float:
    """The mean squared distance of its samples to the teacher's, of the trajectories held out."""
    with undisturbed(student):
        return held_out.endpoint_errors(student.eval(), solver).mean().item()


def _warn_if_worse(before: float, after: float, n: int, target: str) -> None:
    if not after <= before:
        told = f"target={target!r}: on {n} trajectories that were not trained on, samples of the student are farther"
        hint = "keep what it began from, or train longer or with a smaller lr"
        rms = (
            f"(rms {after**0.5:.4g}) than those of the network it began from with the given solver ({before**0.5:.4g})"
        )
        warn(f"{told} from the teacher's {rms}; {hint}", stacklevel=4)


def _polished_again(student: nn.Module, bank: RunBank | RunPairs, settings: Settings, team: Team) -> Solver:
    """The solver of the run, for what the student has become; of weighted pairs as it was: a polish has no weights."""
    count = max(2, min(POLISHED, bank.size))
    if team.is_given:  # what any number of ranks divides that divides a batch
        count = max(bank.batch, count // bank.batch * bank.batch)
    drawn = bank.sample(torch.Generator().manual_seed(settings.seed), count)
    if drawn.weight is not None:
        return settings.objective.solver
    ends = drawn.states if drawn.ends else drawn.states[[0, -1]][:, drawn.columns]
    drawn, ends = team.every_example(drawn, ends)
    solver = settings.objective.solver
    found = polish_on(learner_of(student, drawn, bank.size, solver), solver, ends, settings.grid, bank.batch)
    return found if team.ranks.is_alone else Solver.from_dict(team.ranks.from_first(found.to_dict()))


def _fill(bank: RunBank | RunPairs, state: State, settings: Settings, saved: Mapping[str, Any] | None) -> None:
    """Roll the teacher out, after what can fail has been tried."""
    starts, conditioning = bank.draw(state.generator)
    if saved is not None and saved["bank_noise"] is not None:
        expected = "a function that draws what it drew before, from the same generator"
        expect(bank.noise_hash == saved["bank_noise"], "noise", expected, "other values (resume=False starts anew)")
    if settings.checkpoint is not None:
        expect_storable(state.contents())
    objective = settings.objective
    team = state.team
    part = -(-bank.batch // team.ranks.size // settings.accumulate)
    with recomputed(state.student, settings.gradient_checkpointing):
        trial = try_student(state.student, starts, bank.size, part, objective.tried, conditioning)
    team.asks_all = not trial.idle
    team.expect_asked(trial.idle)
    cost = cost_of(settings, state.student, bank, trial, state.iteration, asks=False, ranks=team.ranks.size)
    log.info("straighten: %s", cost.line)
    bank.roll_out(None if saved is None else saved.get(BANK_DRAWN))
