"""FastGen (NVlabs/FastGen): a bank as the data of its knowledge distillation, and straightening as a method of its own.

    from fastgen.configs.methods.config_kd import create_config
    from fastgen.utils import LazyCall as L
    from flowkernels.integrations.fastgen import PathLoader, StraightenModel, t_list

    config = create_config()
    config.model_class = L(StraightenModel)(config=None)             # or KDModel, FastGen's own
    config.model.student_sample_steps, config.model.student_sample_type = 4, "ode"
    config.model.sample_t_cfg.t_list = t_list(cal[4])
    config.dataloader_train = L(PathLoader)(storage="bank", batch_size=64)

FastGen's time is 1 - t, from 1, noise, to 0, data, and its networks of rectified flow predict -dx/dt; none is asked at
a time above 0.999, so that its samples begin at 0.999 of the noise: a calibration for it begins there too, with
`grid=torch.linspace(0.001, 1, K + 1)` and 0.999 times the noise. Written against commit 34f30e8 of 2026-02-25;
docs/trainers.md says what ran. Nothing of FastGen is imported before `StraightenModel` is asked for.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_int, expect_positive_int, expect_seed
from flowkernels.schedule import Schedule
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.bank.starts import generator_of
from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import StraightenLoss
from flowkernels.velocity.field import VelocityField

MAX_T = 0.999  # of its RFNoiseSchedule


def t_list(schedule: Schedule, max_t: float = MAX_T) -> list[float]:
    """A schedule as FastGen's `sample_t_cfg.t_list`: 1 - t, falling to 0.

    Raises TypeError, ValueError, naming `schedule`, for one that begins above `max_t` in FastGen's time, which its
    networks refuse.

    Examples:
        >>> t_list(fk.Schedule([0.001, 0.25, 1]))
        [0.999, 0.75, 0.0]
    """
    expect(isinstance(schedule, Schedule), "schedule", "a Schedule, such as cal[4]", schedule, TypeError)
    times = [round(1 - t, 12) for t in schedule.times.tolist()]
    way_out = f"calibrate with grid=torch.linspace({1 - max_t:.6g}, 1, K + 1)"
    expected = f"one that begins at {1 - max_t:.6g} or later: {way_out}"
    expect(times[0] <= max_t, "schedule", expected, f"one that begins at {1 - times[0]:.6g}")
    return times


class PathLoader:
    """Batches of a bank's trajectories without end, as FastGen's multi-step knowledge distillation takes them: a dict
    of "real" `[B, *shape]`, where they end; "path" `[B, N, *shape]`, the states at the knots before; "noise", the first
    of these; and "condition".

    Args:
        storage: a folder with a whole bank, or a `TrajectoryBank`. schedule: whose knots, of several that it has.
        batch_size: B, of this process.
        condition: the name of the bank's conditioning that FastGen's network is given as `condition`. None takes the
            only one, a dict of all where there are several, and nothing where there is none.
        seed: of the draws. Each batch has its own, by its number, of which every rank takes its share: a training that
            is resumed draws what it would have drawn.
        sampler_start_idx: the number of samples before the first batch, of all ranks; None, which FastGen's trainer
            replaces, is 0.

    Raises TypeError, ValueError, naming the argument.

    Examples:
        >>> bank = fk.TrajectoryBank(lambda x, t: -x, fk.Schedule([0, 0.5, 1]), noise=(3,), size=8, grid=4).fill()
        >>> batch = next(iter(PathLoader(bank, batch_size=2)))
        >>> batch["path"].shape, batch["real"].shape
        (torch.Size([2, 2, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        storage: str | Path | TrajectoryBank,
        *,
        batch_size: int,
        schedule: Any = None,
        condition: str | None = None,
        seed: int = 0,
        sampler_start_idx: int | None = 0,
    ):
        self.bank = storage if isinstance(storage, TrajectoryBank) else TrajectoryBank.open(storage)
        self.batch_size, self.schedule = expect_positive_int(batch_size, "batch_size"), schedule
        self.bank.trajectories(torch.zeros(1, dtype=torch.int64), schedule)  # that it is filled, and has the schedule
        names = sorted(self._conditioning(0))
        known = condition is None or condition in names
        expect(known, "condition", f"None, or a name of the bank's conditioning {names}", repr(condition))
        self.condition = names[0] if condition is None and len(names) == 1 else condition
        self.seed = expect_seed(seed)
        before = 0 if sampler_start_idx is None else sampler_start_idx
        self.sampler_start_idx = expect_int(before, "sampler_start_idx", "a number of samples, or None", 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, world = _rank()
        number = self.sampler_start_idx // (self.batch_size * world)
        while True:
            generator = generator_of(self.seed, number)
            drawn = torch.randint(self.bank.size, (world, self.batch_size), generator=generator, device="cpu")[rank]
            yield self._batch(drawn)
            number += 1

    def _batch(self, sample: Tensor) -> dict[str, Any]:
        states, given = self.bank.trajectories(sample, self.schedule)
        path = states[:-1].transpose(0, 1).contiguous()
        batch = {"real": states[-1], "path": path, "noise": path[:, 0]}
        if given:
            batch["condition"] = given if self.condition is None else given[self.condition]
        return batch

    def _conditioning(self, sample: int) -> dict[str, Tensor]:
        return self.bank.trajectories(torch.tensor([sample]), self.schedule)[1] or {}


def _rank() -> tuple[int, int]:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def __getattr__(name: str):
    if name != "StraightenModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _straighten_model()
    return found


def _straighten_model() -> type:
    try:
        from fastgen.methods import FastGenModel
    except ImportError as e:
        raise ImportError("StraightenModel needs FastGen (pip install -e . in a clone of NVlabs/FastGen)") from e

    class StraightenModel(FastGenModel):
        """`fk.StraightenLoss` on the intervals of `sample_t_cfg.t_list`, of batches with "real", "path" and "condition"
        as FastGen's knowledge distillation has them: a `PathLoader`'s, or FastGen's own. Sampling in
        `student_sample_steps` with `student_sample_type="ode"` is Euler's on these knots, what it is trained for.

        settings: of the loss; a subclass has others, such as `settings = dict(t_sampling="uniform")`.
        """

        settings: ClassVar[dict[str, Any]] = {}

        def build_model(self):
            super().build_model()
            self.load_student_weights_and_ema()
            times, steps = self.config.sample_t_cfg.t_list, self.config.student_sample_steps
            expected = f"student_sample_steps + 1 = {steps + 1} times, such as t_list(cal[{steps}])"
            expect(times is not None and len(times) == steps + 1, "sample_t_cfg.t_list", expected, times)
            kind = self.config.student_sample_type
            expect(kind == "ode", "student_sample_type", "'ode', whose steps are Euler's", repr(kind))
            objective = StraightenLoss(Schedule([1 - t for t in times]), **self.settings)
            has = "a target of the states at the knots, or at the first and the last"
            expect(len(objective.times) in (2, steps + 1), "settings", has, self.settings)
            object.__setattr__(self, "objective", objective)  # not a part of the model: it has no weights

        def single_train_step(self, data: dict[str, Any], iteration: int):
            condition = data.get("condition")
            states = torch.cat([data["path"], data["real"][:, None]], 1).transpose(0, 1)
            states = states.to(torch.float64 if states.dtype == torch.float64 else torch.float32)
            steps, n = self.config.student_sample_steps, states.shape[1]
            expected = f"[B, {steps}, *shape], the states at all times of t_list but the last"
            expect(len(states) == steps + 1, "path", expected, data["path"])
            if len(self.objective.times) == 2:  # of one interval, from noise to data
                states, steps = states[[0, -1]], 1
            interval = torch.randint(steps, (n,), device=states.device)
            batch = BankBatch(states.contiguous(), interval, torch.arange(n, device=states.device))
            student = VelocityField(
                self.net, reverse_time=True, conditioning={"condition": condition, "fwd_pred_type": "flow"}
            )
            loss = self.objective(student, batch).loss
            noise = torch.randn_like(data["real"])
            sample = functools.partial(
                self.generator_fn,
                net=self.net_inference,
                noise=noise,
                condition=condition,
                student_sample_steps=self.config.student_sample_steps,
                student_sample_type=self.config.student_sample_type,
                t_list=self.config.sample_t_cfg.t_list,
                precision_amp=self.precision_amp_infer,
            )
            return {"total_loss": loss, "straighten_loss": loss}, {"gen_rand": sample, "input_rand": noise}

    StraightenModel.__qualname__ = "StraightenModel"  # which a config that was saved names
    return StraightenModel
