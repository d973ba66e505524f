"""`flowkernels evaluate`: a table of a model's samplers for each number of steps."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import _options, _weights
from flowkernels._checks import expect
from flowkernels._files import damaged, expect_file, whole_folder, write_or_keep
from flowkernels.cli.inputs import (
    InputError,
    check_paths,
    draw_noise,
    in_its_words,
    load_model,
    network_of,
    read_calibration,
    require,
)
from flowkernels.evaluation.evaluate import DEFAULT
from flowkernels.evaluation.evaluation import FORMATS
from flowkernels.evaluation.features import NETWORKS
from flowkernels.evaluation.images import expect_image_folder, expect_images
from flowkernels.evaluation.measure import COLUMNS

STEPS = range(1, 11)  # where neither a calibration nor the caller says
OTHER_NOISE = 2  # the seed after those of what was calibrated and verified on
UNIFORM, SCHEDULE, BEST, STUDENT, TEACHER = "uniform", "schedule", "best", "student", "teacher"
GRIDS = re.compile(rf"({TEACHER}|({UNIFORM}|{SCHEDULE}|{BEST}|{STUDENT})_\d+|dopri5_[\w.-]+)\.png")
SHOWN = 64  # samples of a grid
DATA_FORMATS = (".npy", ".pt", ".safetensors")


def add_arguments(add: Callable, steps: Callable, file: Callable) -> None:
    """steps, file: types of options."""
    add("-n", type=_options.positive, default=1024, help="samples of each")
    plans = "calibration file, for its schedules and best plans and its teacher's steps; uniform steps alone without"
    add("--schedule", type=_options.path, help=plans)
    add("--steps", type=steps, help="numbers of steps, such as 1-10 or 2,4,8; the calibration's, or 1-10")
    student = "weights of a straightened student, evaluated on the schedules that it was trained for"
    add("--student", type=_options.path, help=student)
    add("--data", type=_options.path, help=f"samples of the data, for distances: {', '.join(DATA_FORMATS)}")
    add("--columns", type=_columns, default=list(DEFAULT), help=f"some of {','.join(COLUMNS)}")
    add("--features", choices=list(NETWORKS), help="whose Inception features distances are taken in; none: the samples")
    add("--points", type=_options.positive, default=4, help="of each interval, for straightness")
    add("--chunk", type=_options.positive, help="samples evaluated at once; all if not given")
    add("--png", type=_options.path, metavar="FOLDER", help="folder for a picture of the first samples of each")
    add("--out", type=file, help=f"file to write: {', '.join(FORMATS)}")


def _columns(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in COLUMNS]:
        got = _options.shown(unknown[0])
        raise argparse.ArgumentTypeError(f"expected some of {','.join(COLUMNS)}, got {got}")
    return found


def run(args: argparse.Namespace) -> None:
    """The command."""
    check_paths(args, *FORMATS)
    calibration = read_calibration(args.schedule, "--schedule") if args.schedule else None
    steps = _steps(args, calibration)
    folder = None if args.png is None else _checked(lambda: expect_image_folder(args.png, "--png", GRIDS))
    velocity, shape, _ = load_model(args, calibration)
    if folder is not None:
        _checked(lambda: expect_images(torch.zeros(1, *shape), "--png"))
    noise = draw_noise(args.n, shape, min(args.seed + OTHER_NOISE, 2**64 - 1)).to(args.device)
    data = None if args.data is None else read_samples(args.data, shape).to(args.device)
    plans = _plans(args, calibration, steps, velocity)
    words = {f"{option}: exp": f"--{option}: exp" for option in ("data", "columns", "features", "noise")}
    with in_its_words(words | {"noise: exp": "-n: exp"}):
        found = fk.evaluate_sampler(
            velocity,
            plans,
            noise,
            columns=args.columns,
            teacher_solver=None if calibration is None else calibration.teacher_solver,
            data=data,
            features=args.features,
            points=args.points,
            chunk=args.chunk,
            seed=args.seed,
            keep_samples=folder is not None,
            progress=True,
        )
    print(found.report())
    if args.out is not None:
        write_or_keep(args.targets["out"], "--out", found.save)
        print(f"{args.out}: {len(found.rows)} rows")
    if folder is not None:
        write_or_keep(folder, "--png", lambda path: _write_grids(path, found))
        print(f"{args.png}: the first {min(args.n, SHOWN)} samples of each")


def _checked(look: Callable):
    try:
        return look()
    except (OSError, ValueError) as e:
        raise InputError(str(e)) from e


def _steps(args: argparse.Namespace, calibration: fk.Calibration | None) -> list[int]:
    there = STEPS if calibration is None else sorted({*calibration, *calibration.solvers})
    steps = list(there) if args.steps is None else args.steps
    missing = [] if calibration is None else [n for n in steps if n not in there]
    require(not missing, f"--steps: expected some of {there}, those of {args.schedule}, got {missing[:5]}")
    return steps


def _plans(args, calibration: fk.Calibration | None, steps: list[int], velocity):
    if calibration is None:
        plans = {UNIFORM: steps}
    else:
        plans = {UNIFORM: [calibration.uniform(n) for n in steps]}
        plans[SCHEDULE] = [calibration[n] for n in steps if n in calibration]
        best = [calibration.best(n) for n in steps]
        plans |= {BEST: best} if any(isinstance(plan, fk.Solver) for plan in best) else {}
        plans = {name: of for name, of in plans.items() if of}
    if args.student is None:
        return plans
    with in_its_words({"--checkpoint: ": "--student: "}):
        trained, _, notes = load_model(argparse.Namespace(**{**vars(args), "checkpoint": args.student}), calibration)
    same = network_of(trained) is network_of(velocity)
    require(not same, f"--student: expected {args.model} to build a new network at each call, got the same one again")
    knots = notes.get("times")
    on = plans.get(SCHEDULE, [fk.Schedule.uniform(n) for n in steps])
    if knots is not None and len(knots) > 2:
        on = [plan for plan in on if plan.times.tolist() == knots]
        known = " ".join(f"{t:.3g}" for t in knots)
        require(len(on) > 0, f"--student: expected one of these schedules, got {args.student} of the knots {known}")
    return plans | {STUDENT: (trained, on)}


def read_samples(path: Path, shape: tuple[int, ...]) -> Tensor:
    """float32 `[m, *shape]`, of a file of one array, or of the one named "samples"."""
    wanted = f"floating-point samples of shape [m, {', '.join(map(str, shape))}]"
    require(path.suffix in DATA_FORMATS, f"--data: expected a file ending in {' or '.join(DATA_FORMATS)}, got {path}")

    def read() -> Tensor:
        if path.suffix == ".npy":
            with damaged("--data", wanted, expect_file(path, "--data")):
                array = np.load(path, allow_pickle=False)
                return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        if path.suffix == ".pt":
            found = _weights.read_torch(path, "--data", wanted)
        else:
            found = _weights.read(path, "--data", wanted)[0]
        found = found.get("samples", next(iter(found.values()), None)) if isinstance(found, dict) else found
        expect(isinstance(found, Tensor), "--data", wanted, found)
        return found

    found = _checked(read)
    fits = found.is_floating_point() and found.dim() > 1 and len(found) and tuple(found.shape[1:]) == tuple(shape)
    require(bool(fits), f"--data: expected {wanted}, got {list(found.shape)} of {found.dtype}")
    return found.float()


def _write_grids(path: Path, found: fk.Evaluation) -> None:
    with whole_folder(path) as folder:
        if found.teacher_samples is not None:
            fk.save_images(found.teacher_samples[:SHOWN], folder / f"{TEACHER}.png")
        for row in found.rows:
            if row.samples is not None:
                name = row.name.replace(" ", "_") if row.steps is None else f"{row.name}_{row.steps}"
                fk.save_images(row.samples[:SHOWN], folder / f"{name}.png")
