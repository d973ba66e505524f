"""`AverageVelocity`: a network of two times, which tells how far to go in one step of any size."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowkernels._checks import FLOATS, describe, expect, expect_bool, expect_tensor, expect_text, expect_times
from flowkernels.schedule import Schedule
from flowkernels.training.students.second_time import TwoTimes
from flowkernels.velocity.field import VelocityField, exact_time, float64_device
from flowkernels.velocity.hashes import IN_PLACE, unwrapped
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve
from flowkernels.velocity.time_embedding import Embedding

NEAR = 1e-6  # to a knot: times may have been rounded to float32


class AverageVelocity(VelocityField):
    """A network of two times: the average velocity u(x, t, s) from the time t to a later s, of the flow through x at t.

    `x_s = x_t + (s - t) u(x_t, t, s)` is one step of any size, and with s = t it is the velocity itself. Called with
    x `[n, *shape]` and t, s `[n]`. `student.on(schedule)` is a velocity (x, t) for stages: at each knot the average
    velocity to the next, so that N steps of Euler are N evaluations, whatever N.

    `AverageVelocity.from_velocity(teacher)` makes one of a network of one time. `straighten(..., target=
    "average_velocity")` trains one.

    Args:
        net: any callable `net(x, t, s=s, **conditioning)`; an `nn.Module` becomes a submodule. The wrapper
            of torch.compile or DistributedDataParallel is to be inside of this one.
        second_name: keyword name of the second time, such as "r", "timestep_r" or "dt".
        second_is_size: the network takes `time_scale * (s - t)` there, the size of the step. False: the second time, in
            the convention of the first.
        convention: the other arguments of `VelocityField`, by name: reverse_time, time_scale, conditioning, ...

    Raises TypeError, ValueError, naming the argument.

    Source: MeanFlow (arXiv 2505.13447), whose time runs from data to noise: its u(z, r, t) of z at the time t is here
    -u(z, 1 - t, 1 - r); `reverse_time=True` wraps such a network.

    Examples:
        >>> class Net(torch.nn.Module):  # of x' = x: exact
        ...     def forward(self, x, t, s):
        ...         h = (s - t).view(-1, 1)
        ...         return x * torch.where(h > 0, torch.expm1(h) / h.clamp_min(1e-9), 1)
        >>> student = fk.AverageVelocity(Net())
        >>> [round(fk.sample(student.on(N), torch.ones(1, 1), N).item(), 4) for N in (1, 4)]
        [2.7183, 2.7183]
    """

    def __init__(self, net: Any, *, second_name: str = "s", second_is_size: bool = False, **convention: Any):
        super().__init__(net, **convention)
        expect_text(second_name, "second_name", "the name of an argument")
        taken = second_name in {self.x_name, self.time_name, *self.conditioning}
        expect(not taken, "second_name", "another name than those of x, the time and conditioning", second_name)
        expect(not self.time_column, "time_column", "False for a network of two times", self.time_column)
        _expect_second_time(net, second_name)
        self.second_name = second_name
        self.second_is_size = expect_bool(second_is_size, "second_is_size")
        self.knots: Tensor | None = None
        self._second: Tensor | None = None  # the second times of one call
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def from_velocity(
        cls, velocity: Velocity, *, time_embedding: str | None = None, width: int | None = None
    ) -> "AverageVelocity":
        """A copy of a pretrained network of one time that takes two: what a small MLP makes of the step's size s - t is
        added to its embedding of the time. The MLP's last layer is zero, so that at first u(x, t, s) = v(x, t).

        Args:
            velocity: an `nn.Module`, or a `VelocityField` of one, whose convention and conditioning are kept; guidance
                is left out, for the student to learn.
            time_embedding: the name of the submodule that returns features of the time, `[n, ..., width]`, such as
                "time_text_embed" of diffusers' transformers; more may be in them already, such as pooled text. None
                looks for a usual name ("time", "time_text_embed", "time_embed", "t_embedder", ...).
            width: of these features; None takes the width of the submodule's last linear layer.

        Raises TypeError, ValueError, naming the argument; where the features are of another shape, at the first call.

        Examples:
            >>> net = fk.VelocityField(torch.nn.Linear(2, 2), time_column=True)
            >>> fk.AverageVelocity.from_velocity(net)
            Traceback (most recent call last):
            ValueError: time_column: expected False (or AverageVelocity around a net(x, t, s) of your own), got True
        """
        velocity = as_given(resolve(velocity).without_guidance())
        expect(isinstance(velocity, nn.Module), "velocity", "a network that is a module", velocity, TypeError)
        return cls.of_network(copy.deepcopy(velocity), time_embedding, width)

    @classmethod
    def of_network(
        cls, velocity: nn.Module, time_embedding: str | None = None, width: int | None = None
    ) -> "AverageVelocity":
        """`from_velocity` of that network itself, not of a copy."""
        field = VelocityField.of(velocity)
        expected = "False (or AverageVelocity around a net(x, t, s) of your own)"
        expect(not field.time_column, "time_column", expected, True)
        net = TwoTimes(field.net, time_embedding, width, field.time_scale)
        return cls(net, second_name="step", second_is_size=True, **field.settings()).train(velocity.training)

    def settings(self) -> dict:
        return super().settings() | dict(second_name=self.second_name, second_is_size=self.second_is_size)

    def convention(self) -> dict:
        said = dict(second_name=self.second_name, second_is_size=self.second_is_size)
        return super().convention() | said | ({} if self.knots is None else dict(knots=tuple(self.knots.tolist())))

    def on(self, schedule: Schedule | int | Sequence[float] | Tensor) -> "AverageVelocity":
        """The velocity (x, t) on a schedule: at each of its knots but the last, the average velocity to the next. The
        network is shared.

        schedule: a Schedule, N for N uniform steps, or N + 1 increasing times. Another time than its knots is an error
        that names it; where it would have to be waited for, as on a GPU, the velocity there is NaN. Stages refuse a
        schedule that leaves out one of its knots, from the first that they take on.
        """
        times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
        return self.replaced(knots=times.clone(), _tables={})  # the caller may write to what it gave

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        expect_tensor(x, "x", FLOATS), expect_tensor(t, "t", FLOATS)
        expect(x.dim() > 0, "x", "states [n, *shape]", x)
        expect(t.shape == x.shape[:1], "t", f"times of shape [{len(x)}]", t)
        if s is None:
            expected = "the second time (student.on(schedule) is the velocity on a schedule's knots)"
            expect(self.knots is not None, "s", expected, "None")
            return super().forward(x, t)
        expect_tensor(s, "s", FLOATS)
        expect(s.shape == t.shape, "s", f"times of shape [{len(x)}]", s)
        return VelocityField.forward(self.replaced(_second=exact_time(s)), x, t)

    def call_network(
        self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], embedding: Embedding | None = None
    ) -> Tensor:
        device = float64_device(t.device)
        now = exact_time(t).to(device, torch.float64)
        s = self._next_knot(now) if self._second is None else self._second.to(device, torch.float64)
        s = s if len(s) == len(now) else torch.cat([s, s])  # of both halves of a packed call
        second = self.time_scale * (s - now) if self.second_is_size else self.network_time(s)
        kwargs = {**kwargs, self.second_name: VelocityBase.time_for(self, second, x)}
        return super().call_network(x, t, kwargs)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """du/dt along the flow `[n, *shape]`, where x changes by v and s stays: `v . du/dx + du/dt`, by forward-mode
        differentiation, without a graph.

        x, v: `[n, *shape]`. t, s: `[n]`. Attention of torch's is computed by products of matrices; ValueError for a
        network with an operation that has no forward-mode derivative.
        """
        field = self.replaced(net=unwrapped(self.net, of=IN_PLACE))  # of compiled code and hooks none is known
        along = (v.to(x.dtype), torch.ones_like(t))
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(lambda x, t: field(x, t, s), (x, t), along)[1]
        except (RuntimeError, NotImplementedError) as e:
            said = (str(e).strip() or "no message").splitlines()[0]
            expected = "a network whose operations have forward-mode derivatives (consistency='split' needs none)"
            raise ValueError(f"net: expected {expected}, got {type(e).__name__}: {said[:200]}") from e

    def has_time_embedding(self) -> bool:
        return False

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        if self.knots is not None:
            self._expect_knots(times)
            self._expect_steps(times)
        return super().model_times(times, x)

    def _expect_steps(self, times: Tensor) -> None:
        """That a loop evaluates at every knot to the last, from any: a step over several is another average's."""
        if torch.compiler.is_compiling() or not times.is_cpu:
            return
        begun = self.knots[:-1][-len(times) :]
        if len(times) != len(begun) or bool(((times.to(torch.float64) - begun).abs() > NEAR).any()):
            knots, got = ([round(k, 4) for k in of.tolist()] for of in (self.knots[:-1], times))
            expected = f"every knot that steps begin at, {knots}, or the last ones (student.on(another schedule))"
            expect(False, "schedule", expected, f"evaluations at {got}")

    def _next_knot(self, t: Tensor) -> Tensor:
        """The knots after those that the times t `[n]` are, float64; NaN after another time."""
        self._expect_knots(t)
        knots = self._tables.get(t.device)
        if knots is None:
            knots = self.knots.to(t.device)
            if not torch.compiler.is_compiling():  # whose loops may not change anything
                self._tables[t.device] = knots
        distance, place = (t[:, None] - knots[:-1]).abs().min(1)
        return knots[1:][place].where(distance <= NEAR, torch.nan)

    def _expect_knots(self, t: Tensor) -> None:
        """Looked at where nothing has to be waited for."""
        if torch.compiler.is_compiling() or not t.is_cpu:
            return
        bad = (t.to(torch.float64)[:, None] - self.knots[:-1]).abs().amin(1) > NEAR
        if bool(bad.any()):
            knots = [round(k, 4) for k in self.knots[:-1].tolist()]
            expect(False, "t", f"one of the knots {knots} that a step begins at", f"{t[bad][0].item():.6g}")


def _expect_second_time(net: Any, name: str) -> None:
    inner = unwrapped(net)
    try:
        parameters = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner).parameters
    except (TypeError, ValueError):  # of a builtin, which has none
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = name in parameters and parameters[name].kind in kinds
    takes = takes or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    expected = f"a network of two times, net(x, t, {name}={name}) (AverageVelocity.from_velocity makes one)"
    expect(takes, "net", expected, describe(inner), TypeError)
