"""Students: made, given the weights that they start from, evaluated and tried."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_takes
from flowkernels._guidance import guided
from flowkernels.ops.library import is_transformed
from flowkernels.runtime.sharded import is_fully_sharded, local
from flowkernels.runtime.torch_private import keeps_parametrized
from flowkernels.training.students.average_velocity import AverageVelocity
from flowkernels.training.students.blockwise import Blockwise
from flowkernels.training.students.modules import (
    copied,
    plain_state,
    shares_weights,
    trained_by_name,
    unwrapped,
)
from flowkernels.training.students.precision import autocast
from flowkernels.training.students.second_time import TwoTimes
from flowkernels.training.students.starting import start_from
from flowkernels.training.students.trial import Trial
from flowkernels.training.students.unchanged import unchanged
from flowkernels.velocity.composite import Composite
from flowkernels.velocity.evaluate import evaluate
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve
from flowkernels.velocity.provenance import hash_of


def expect_trainable_here() -> None:
    """Raise inside of contexts in which weights or gradients are not those of ordinary training."""
    expected = "training outside of torch.nn.utils.parametrize.cached()"
    expect(not keeps_parametrized(), "student", expected, "a call inside of it")
    expect(not is_transformed(), "student", "training outside of torch.func and dual_level", "a call inside of them")


def own_student(
    student: nn.Module | None, velocity: Velocity, made: Callable[[nn.Module], nn.Module] = lambda copied: copied
) -> nn.Module:
    """The module to train: the one given, or what is made of a copy of the teacher."""
    teacher_is_module = isinstance(velocity, nn.Module)
    if student is None:
        expect(teacher_is_module, "student", "a module, where the teacher is not one to copy", "None")
        try:
            student = copied(as_given(resolve(velocity).without_guidance()))
        except ValueError as e:
            raise ValueError(f"student: expected a network of its own, for a teacher that is not copied ({e})") from e
        for p in student.parameters():
            p.requires_grad_(p.is_floating_point())
        return _trainable(made(student))
    expect(isinstance(student, nn.Module), "student", "an nn.Module or None", student, TypeError)
    expect_no_wrapped_field(student, "student")
    _trainable(student)
    if teacher_is_module:
        shared = set(map(id, student.parameters())) & set(map(id, velocity.parameters()))
        shared = shared or set(_places(student, trained=True)) & set(_places(velocity))
        got = f"{len(shared)} parameters of the teacher's"
        expect(not shared, "student", "weights of its own (None trains a copy of the teacher)", got)
    return student


def _places(module: nn.Module, trained: bool = False) -> Iterator[tuple[torch.device, int]]:
    """Where its parameters lie in memory: those of `load_state_dict(..., assign=True)` lie where they were."""
    for p in module.parameters():
        if (p.requires_grad or not trained) and not nn.parameter.is_lazy(p):
            t = local(p.detach())
            if type(t) is Tensor and (place := t.data_ptr()):  # of other classes, and of meta, there is none
                yield p.device, place


def expect_no_wrapped_field(velocity: Velocity, name: str) -> None:
    """A wrapper of a field hides its conditioning."""
    inner = unwrapped(velocity)
    wrapped = (inner is not velocity or is_fully_sharded(inner)) and isinstance(inner, VelocityBase)
    expected = "VelocityField(torch.compile(net), ...), the wrapper inside"
    expect(not wrapped, name, expected, type(velocity).__name__)


def _trainable(student: nn.Module) -> nn.Module:
    """The student, with weights that can be written to and conditioning that can be saved for a gradient."""
    for name, t in itertools.chain(student.named_parameters(), student.named_buffers()):
        expected = "weights made outside of torch.inference_mode, with values"
        lazy = nn.parameter.is_lazy(t)  # of which nothing can be asked
        why = "not initialised" if lazy else "on the meta device" if t.is_meta else "made in it" * t.is_inference()
        expect(not why, "student", expected, f"{name!r}, {why}")
    for field in student.modules():
        for k, v in field.conditioning.items() if isinstance(field, VelocityField) else ():
            if isinstance(v, Tensor) and v.is_inference():
                field.conditioning[k] = v.clone()
    return student


def initialise(student: nn.Module, velocity: Velocity, init) -> None:
    """Load the weights that training starts from."""
    net, state, name = VelocityField.of(student).net, init, "init"
    inner = unwrapped(net)
    if not isinstance(init, Mapping):
        known = init is None or (isinstance(init, str) and init in ("teacher", "keep"))
        expect(known, "init", "'teacher', 'keep', a state dict or None", init)
        has_weights = isinstance(velocity, nn.Module) and any(True for _ in velocity.parameters())
        expect(init != "teacher" or has_weights, "init", "a teacher with weights, for 'teacher'", velocity)
        if not has_weights or init == "keep":
            return
        teacher = VelocityField.of(velocity).net
        state, name = plain_state(teacher), "student"
        blocks = None if isinstance(unwrapped(teacher), Blockwise) else Blockwise.of(student)
        if blocks is not None:  # each starts from the teacher
            for network in blocks.networks:
                start_from(VelocityField.of(network).net, state, name, teacher)
            return
    if isinstance(inner, TwoTimes) and not inner.is_of(state):  # of the network of one time that it was made of
        net = inner.net
    start_from(net, state, name, None if state is init else teacher)


def trained_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What an optimiser is given."""
    parameters = list(trained_by_name(student).values())
    expect(len(parameters) > 0, "student", "a module with trainable parameters", type(student).__name__)
    return parameters


def field_identity(velocity: Velocity) -> str | None:
    """The hash of a field's convention and conditioning; None if they cannot be read."""
    settings = VelocityField.of(velocity).settings() | {"conditioning": dict(resolve(velocity).conditioning)}
    new = {k for k in ("time_offset", "shared") if not settings[k]}  # hashes of before are without them
    return hash_of({k: v for k, v in settings.items() if k not in {"packed", *new}}, "", {})


def student_velocity(
    student: nn.Module,
    x: Tensor,
    t: Tensor,
    sample: Tensor,
    n: int,
    conditioning: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    **given: Any,
) -> Tensor:
    """The student's velocities `[B, *shape]`, with their graph, at the points x `[B, *shape]` and times t `[B]` of the
    samples `[B]` of n; what comes back is checked for shape. conditioning: with a row for each point, in place of its
    own of those names. dtype: of autocast, None as the caller has it. given: further arguments, of a student that takes
    them."""
    torch.clear_autocast_cache()  # of weights as they were before a step, or without a graph
    learner = resolve(student).without_conditioning(conditioning or ()).rows(sample, n)
    if conditioning and isinstance(learner, Composite):
        learner = learner.with_conditioning(conditioning)
    elif conditioning and isinstance(learner, AverageVelocity):
        learner = conditioned(student, learner, conditioning)
    elif conditioning:
        learner, given = conditioned(student, learner, {**conditioning, **given}), {}
    with autocast(dtype, x.device):
        v = learner(x, learner.time_for(t, x.float()), **given)
    if not isinstance(v, Tensor) or v.shape != x.shape:
        expect(False, "student", f"a velocity of x's shape {list(x.shape)}", v)
    if torch.is_grad_enabled() and not v.requires_grad:
        expect(False, "student", "a velocity with a gradient in its weights", "one without")
    return v.to(x.dtype) if torch.float64 in (v.dtype, x.dtype) else v


def conditioned(student: nn.Module, learner: VelocityBase, conditioning: Mapping[str, Tensor]) -> VelocityField:
    """A student with conditioning of a batch; TypeError for a network that does not take it."""
    expect_no_wrapped_field(student, "student")
    field = VelocityField.of(as_given(learner)).with_conditioning(conditioning)
    expect_takes_conditioning(field, conditioning, "student")
    return field


def expect_takes_conditioning(field: VelocityField, conditioning: Mapping[str, Tensor], name: str) -> None:
    """That its network takes what a bank carries; TypeError, naming the argument that it is."""
    names, net = ", ".join(sorted(conditioning)), unwrapped(field.net)
    by_place = [] if field.x_name else [None] if field.time_name or field.time_column else [None, None]
    by_name = {name for name in (field.x_name, field.time_name) if name} | field.conditioning.keys()
    if isinstance(field, AverageVelocity):
        by_name.add(field.second_name)
    expect_takes(net, name, f"a network that takes {names}, which the bank carries", *by_place, by_name=by_name)


def student_derivative(
    student: AverageVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    v: Tensor,
    sample: Tensor,
    n: int,
    conditioning: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`AverageVelocity.derivative` of the samples `[B]` of n, in x's dtype; with conditioning and dtype as for
    `student_velocity`."""
    torch.clear_autocast_cache()
    learner = student.without_conditioning(conditioning or ()).rows(sample, n)
    learner = conditioned(student, learner, conditioning) if conditioning else learner
    with autocast(dtype, x.device):
        return learner.derivative(x, t, s, v).to(x.dtype)


@no_grad
def teacher_velocity(
    teacher: Velocity,
    x: Tensor,
    t: Tensor,
    sample: Tensor,
    n: int,
    conditioning: Mapping[str, Tensor] | None = None,
    guidance: str | None = None,
) -> Tensor:
    """A teacher's velocities with guidance, `[B, *shape]` in x's dtype, at points x and times t `[B]` of the samples
    `[B]` of n; with conditioning as for `student_velocity`, of which `guidance` is the weight of guidance."""
    field = resolve(teacher).unfused().without_conditioning(conditioning or ()).rows(sample, n)
    if conditioning:
        given = dict(conditioning)
        weight = None if guidance is None else given.pop(guidance)
        field = VelocityField.of(as_given(field)).with_conditioning(given, weight)
    v, v_uncond, w = evaluate(field, x, t.to(x.device, torch.float64))
    return v.to(x.dtype) if v_uncond is None else guided(v, v_uncond, w, x.dtype)


def try_student(
    student: nn.Module,
    starts: Tensor,
    n: int,
    batch: int,
    losses: Callable[..., Tensor],
    conditioning: Mapping[str, Tensor] | None = None,
    passes: int = 1,
) -> Trial:
    """A forward and backward pass, before the work of a bank, after which the student and the caller's generators are
    as they were; and what it takes.

    starts: states `[m, *shape]` of the first of n trajectories, and their conditioning.
    losses: (student, states, sample, n, conditioning) -> their mean, of the samples `[B]`. passes: of which the last
    is timed, and in a second one looked at what is kept: which keeps torch from seeing what is written to meanwhile.
    """
    trial = Trial(batch)
    devices = {t.device for t in itertools.chain([starts], student.parameters()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices), unchanged(student) as changed:
        student.train()
        sample = torch.arange(batch, dtype=torch.int64, device=starts.device) % len(starts)
        given = None if conditioning is None else {key: rows[sample] for key, rows in conditioning.items()}
        for again in range(passes):
            student.zero_grad(set_to_none=True)
            with trial.timed(starts.device):
                with trial.looked_at(student) if again else contextlib.nullcontext():
                    loss = losses(student, starts, sample, n, given)
                try:
                    loss.backward()
                except RuntimeError as e:
                    expected = "a velocity that can be differentiated"
                    raise ValueError(f"student: expected {expected}, got RuntimeError: {e}") from e
        trial.idle = frozenset(id(p) for p in student.parameters() if p.requires_grad and p.grad is None)
    if shares_weights(student):  # files of adapters have no others
        expected = "a network whose adapters are all that training changes, for lora"
        expect(not changed, "student", expected, f"one that changes its buffers too: {', '.join(changed):.200}")
    return trial
