"""What a callback of `straighten` is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowkernels._checks import expect_positive_int, expect_shown, expect_takes

CALLBACK = "functions of one TrainingEvent"


@dataclass(frozen=True, eq=False)
class TrainingEvent:
    """What `fk.straighten` tells each of its `callbacks`, once an iteration is done with all that belongs to it.

    kind: "log", a row of the history; "evaluate", one of the evaluations but the first; "checkpoint", one has been
        written; "end", of the training, whatever ended it.
    iteration: iterations done; iterations: how many there are to be.
    loss, lr, grad_norm, interval_loss: of the last row of the history, floats and N of them; None before the first.
    endpoint_error, endpoint_stderr, held_out_loss, held_out_stderr: of the last evaluation, floats and N of them; None
        where there is none.
    checkpoint: the file that was written last; None before the first.
    student: that which is trained, to be read, with its last weights.

    Examples:
        >>> teacher = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> told = []
        >>> settings = dict(noise=(2,), iterations=20, bank=32, batch=8, progress=False)
        >>> result = fk.straighten(None, teacher, fk.Schedule.uniform(2), grid=8, callbacks=[told.append], **settings)
        >>> [(event.kind, event.iteration) for event in told]
        [('log', 1), ('log', 11), ('log', 20), ('end', 20)]
        >>> told[-1].samples(4).shape
        torch.Size([4, 2])
    """

    kind: str
    iteration: int
    iterations: int
    student: nn.Module = field(repr=False)
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    interval_loss: Sequence[float] | None = None
    endpoint_error: float | None = None
    endpoint_stderr: float | None = None
    held_out_loss: Sequence[float] | None = None
    held_out_stderr: Sequence[float] | None = None
    checkpoint: Path | None = None
    make_samples: Callable[[int], Tensor] | None = field(default=None, repr=False)

    def samples(self, count: int = 16) -> Tensor:
        """Samples `[m, *shape]` with the weights that would be returned now, on the schedule or solver of the
        evaluations, of the same noise every time: that of the trajectories that are held out, or else of the first ones
        of the bank, m = `count` of them or as many as there are. With `refresh` they are drawn anew with the others."""
        return self.make_samples(expect_positive_int(count, "count"))

    @property
    def scalars(self) -> dict[str, float]:
        """The numbers that are new with this event, by names as loggers have them; "interval_loss/0" is that of the
        first interval."""
        log, evaluated = (
            ("loss", "lr", "grad_norm", "interval_loss"),
            ("endpoint_error", "endpoint_stderr", "held_out_loss"),
        )
        found: dict[str, float] = {}
        for name in {"log": log, "evaluate": evaluated}.get(self.kind, ()):
            value = getattr(self, name)
            if isinstance(value, float):
                found[name] = value
            else:
                found |= {f"{name}/{k}": each for k, each in enumerate(value)}
        return found


def expect_callbacks(value: Any, name: str) -> tuple[Callable[[TrainingEvent], Any], ...]:
    given = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    expect_shown(given, name, f"a list of {CALLBACK}", value, TypeError)
    for callback in value:
        expect_takes(callback, name, CALLBACK, None)
    return tuple(value)
