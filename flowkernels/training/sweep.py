"""Evaluation of the checkpoints of a training, one beside the other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_list, expect_noise, expect_path, expect_shown
from flowkernels.evaluation.evaluate import evaluate_sampler
from flowkernels.evaluation.evaluation import Evaluation
from flowkernels.evaluation.plans import Plans
from flowkernels.runtime.ranks import Ranks
from flowkernels.training.run import team_checkpoint
from flowkernels.training.run.checkpoint import checks_of, read_checkpoint
from flowkernels.training.run.numbered import numbered
from flowkernels.training.students.modules import copied, expect_weights, load_weights
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.protocol import Velocity, resolve

NO_PLANS = "plans of the student: a Schedule, a Solver, a number of steps, or several"


@no_grad
def evaluate_checkpoints(
    checkpoint: str | Path | Sequence[str | Path],
    student: nn.Module,
    velocity: Velocity,
    plans: Plans,
    noise: Tensor,
    *,
    progress: bool = False,
    **settings: Any,
) -> Evaluation:
    """The student of a training as it was at each of its checkpoints, by `fk.evaluate_sampler`, on the same noise.

    Args:
        checkpoint: that of `straighten(checkpoint=, keep_checkpoints=)`, which stands for the numbered ones beside it
            and itself, or with a group a folder of them; or a list of files, or of that folder's folders. Files that
            are two names of one are evaluated once; two of one iteration with other weights are refused.
        student: a network of the trained one's layout, in whose copy the weights are put, one checkpoint after the
            other: the averaged ones where there are such. It stays as it is.
        velocity: the teacher, whose samples are made once.
        plans: that the student is sampled with, as for `evaluate_sampler`, without names.
        noise: `[n, *shape]`, other than that of the training.
        progress: show a progress bar of the checkpoints.
        settings: further arguments of `evaluate_sampler`.

    Returns:
        Evaluation, with rows in the order of the iterations, whose names are "iteration 500" and so on.

    Raises:
        TypeError, ValueError, OSError: naming the argument; of a checkpoint that is damaged or does not fit, its file.

    Examples:
        >>> net, plan = torch.nn.Linear(3, 2), fk.Schedule.uniform(2)
        >>> teacher = fk.VelocityField(net, time_column=True)
        >>> settings = dict(noise=(2,), grid=8, bank=32, iterations=20, progress=False)
        >>> files = dict(checkpoint="run.pt", checkpoint_every=10, keep_checkpoints=None)
        >>> trained = fk.straighten(None, teacher, plan, **settings, **files)
        >>> found = fk.evaluate_checkpoints("run.pt", trained.student, teacher, plan, torch.randn(16, 2))
        >>> [row.name for row in found.rows]
        ['iteration 10', 'iteration 20']
    """
    expect(isinstance(student, nn.Module), "student", "an nn.Module", student, TypeError)
    named = isinstance(plans, Mapping) and any(isinstance(key, str) for key in plans)
    expect_shown(not named, "plans", NO_PLANS, plans, TypeError)
    expect_noise(noise), expect_bool(progress, "progress"), resolve(velocity)
    keep, net, found = settings.pop("keep_samples", False), copied(student).eval(), {}
    hashes: dict[int, str] = {}
    for path in tqdm(_files(checkpoint), "checkpoints", disable=not progress, leave=False):
        saved = _read(path)
        with checks_of(path):
            state = averaged_weights(saved)
            expect_weights(net, state, "checkpoint")
            known = hashes.setdefault(saved["iteration"], tensors_hash(state))
            got = f"two of iteration {saved['iteration']}"
            expect(known == tensors_hash(state), "checkpoint", "files of one training", got)
        if saved["iteration"] in found:
            continue
        load_weights(net, state)
        given = {f"iteration {saved['iteration']}": (net, plans)}
        one = evaluate_sampler(velocity, given, noise, keep_samples=True, **settings)
        if not found:  # its samples are made once
            first, teacher_samples = one, one.teacher_samples
            settings = {key: value for key, value in settings.items() if key != "teacher_solver"}
            settings["teacher"] = teacher_samples
        found[saved["iteration"]] = one if keep else _without_samples(one)
    each = [found[iteration] for iteration in sorted(found)]
    rows = [row for one in each for row in one.rows if row.steps is not None]
    rows += [row for row in first.rows if row.steps is None]  # of an adaptive method, with the teacher
    likelihoods = {name: value for one in each for name, value in one.likelihoods.items()}
    return replace(first, rows=tuple(rows), likelihoods=likelihoods, teacher_samples=teacher_samples if keep else None)


def averaged_weights(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint the student's state dict, its averages in it where there are some."""
    average = saved["average"] or {}
    prefix = "module."
    return saved["student"] | {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}


def _read(path: Path) -> dict[str, Any]:
    """That of one process, or that of a group's ranks, by this process alone."""
    return team_checkpoint.read(path, {}, [], Ranks(None)) if path.is_dir() else read_checkpoint(path)


def _without_samples(found: Evaluation) -> Evaluation:
    return replace(found, rows=tuple(replace(row, samples=None) for row in found.rows), teacher_samples=None)


def _files(given: Any) -> list[Path]:
    if not isinstance(given, (str, Path)):
        files = [expect_path(path, "checkpoint") for path in expect_list(given, "checkpoint", "a file, or a list")]
        expect(len(files) > 0, "checkpoint", "at least one file", "none")
        return files
    path = expect_path(given, "checkpoint")
    files = team_checkpoint.checkpoints_in(path)
    files = files or [*numbered(path).values(), *([path] if path.exists() else [])]
    expect(len(files) > 0, "checkpoint", "a training checkpoint, or numbered ones beside it", f"{path}, none of which")
    return files
