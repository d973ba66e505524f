"""The `flowkernels` command: demo, calibrate, straighten, plan, sample, evaluate, export, plot, bench, tune, record,
replay and info."""

import argparse
import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import flowkernels as fk
from flowkernels import _entry, _options, _weights
from flowkernels._checks import expect_times
from flowkernels._files import write_or_keep
from flowkernels.bench import command as bench
from flowkernels.bench import record, replay, tune
from flowkernels.calibration.effort import EFFORTS
from flowkernels.cli import demo, evaluate, plan
from flowkernels.cli.inputs import (
    InputError,
    check_paths,
    draw_noise,
    in_its_words,
    load_calibration,
    load_model,
    load_scheduler,
    network_of,
    own_line,
    read_calibration,
    require,
)
from flowkernels.cli.outputs import SAMPLE_FORMATS, save_samples
from flowkernels.evaluation.images import expect_image_folder
from flowkernels.integrations.export import RECEIVERS, Export
from flowkernels.models.bundled import BUNDLED, save_network
from flowkernels.ops import tuned
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends
from flowkernels.runtime.environment import environment
from flowkernels.sampling.teacher_solver import EULER, NAMES
from flowkernels.schedule import forced_places
from flowkernels.training.losses import LOSSES
from flowkernels.training.students.lora import expect_peft
from flowkernels.training.t_sampling import T_SAMPLINGS
from flowkernels.training.targets.table import TARGETS
from flowkernels.velocity.identity import parameter_hash

METHODS = ("euler", "ab2", "ab3", "heun", "best")
ANEW = "another --state, without --resume, starts anew"
VERIFY = 1  # the seed of the noises that are verified on, after that of the others


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message.removeprefix('argument '):.600} ({self.prog} --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit code.

    0; 1 if a benchmark failed or a kernel's result was wrong; 2 on bad input; 130 on Ctrl-C; 141 where nobody reads
    what it prints any more.
    """
    _entry.imported()
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        shown = set()
        warnings.showwarning = lambda message, *_: _warn(str(message), shown)
        try:
            try:
                return _run(sys.argv[1:] if argv is None else argv)
            finally:
                sys.stdout.flush()  # here, where a closed pipe is no error
        except KeyboardInterrupt:
            print("flowkernels: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            return 141
        except Exception as e:
            if os.environ.get("FLOWKERNELS_DEBUG") == "1":
                raise
            plain = isinstance(e, (InputError, ValueError, TypeError, OSError, RuntimeError)) and str(e).strip()
            text = str(e) if plain else f"{type(e).__name__}: {e}"
            if not isinstance(e, InputError):
                text += f"{own_line(e)} (FLOWKERNELS_DEBUG=1 shows all)"
            print(f"flowkernels: error: {' '.join(text.split()):.1000}", file=sys.stderr)
            return 2


def _run(argv: list[str]) -> int:
    of_script = argv.index("--") if argv[:1] == ["record"] and "--" in argv else len(argv)
    args = _parser().parse_args(argv[:of_script])
    args.script_args = argv[of_script + 1 :]
    return args.command(args) or 0


def _warn(text: str, shown: set[str]) -> None:
    if text not in shown:  # a file may be read twice
        print(f"flowkernels: warning: {text}", file=sys.stderr)
    shown.add(text)


# What the commands take


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flowkernels", description="Few-step sampling of flow-matching models (BOSS).")
    parser.add_argument("--version", action="version", version=f"flowkernels {fk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> Callable:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
        sub.set_defaults(command=run)
        return sub.add_argument

    def takes_model(add: Callable) -> None:
        names = " or ".join(sorted(BUNDLED))
        builds = "module:function that builds a network, a VelocityField or any callable velocity(x, t)"
        add("--model", required=True, help=f"{names}, or {builds}")
        kinds = "weights for it: .safetensors, an index or folder of shards, or a torch file of tensors"
        add("--checkpoint", type=_options.path, help=kinds)
        add("--prefer", default="ema", help="which weights of the checkpoint: ema where there are such, raw, or a name")
        add("--shape", type=_shape, help="of one sample, such as 3,32,32; needed unless a model or schedule says it")
        add("--seed", type=_options.seed, default=0, help="seed of the noise")
        add("--device", type=_device, default=torch.device("cpu"), help="torch device")

    add = command("demo", _demo, "Calibrate, straighten and sample a bundled model, and write a report folder.")
    add("--data", choices=sorted(BUNDLED), default="digits", help="bundled model")
    add("--out", type=_options.path, default=Path("flowkernels-report"), help="report folder")
    add("--seed", type=_options.seed, default=0, help="seed of all noise")

    add = command("calibrate", _calibrate, "Find the schedule of least cost for each number of steps.")
    takes_model(add)
    add("-n", type=_options.positive, default=1024, help="noises rolled out")
    add("--grid", type=_grid, default=100, help="K, uniform fine steps of the teacher, or its times, such as 0.1,0.5,1")
    steps = (
        "the teacher's on the grid: Heun's take 2 evaluations each, and half as many end nearer to the true solution"
    )
    add("--teacher-solver", choices=NAMES, default=EULER, help=steps)
    own = "noises on which to measure how far the teacher itself ends from a finer solution; none if not given, "
    own += "or up to 64 with --effort best"
    add("--teacher-error", type=_options.positive, help=own)
    knot = "time of the grid that every schedule is to have, as no step may span it; once for each"
    add("--knot", type=_options.from_0_below_1, action="append", help=knot)
    add("--steps", type=_steps, default=_steps("1-10"), help="numbers of steps, such as 1-10 or 2,4,8")
    add(
        "--max-regret",
        type=_options.above_0,
        help="stop once no schedule costs this share more than needed, such as 0.02",
    )
    efforts = "schedules alone; solvers too, of up to 2 N evaluations a noise for every N; or the best a budget can buy"
    add("--effort", choices=EFFORTS, default="schedule", help=efforts)
    add("--evaluations", type=_options.positive, help="budget of --effort best, of single noises with the rollout's")
    add("--minutes", type=_options.above_0, help="budget of --effort best, as time")
    add("--verify-noise", type=_options.positive, help="other noises to measure endpoint errors on; none if not given")
    add("--chunk", type=_options.positive, help="noises rolled out at once; by memory if not given")
    add("--state", type=_file, help="file that keeps what has been done, written as the calibration goes on")
    add("--resume", action="store_true", help="go on from --state")
    add("--out", type=_file, required=True, help="calibration file to write (.boss.json)")

    add = command("merge", _merge, "Make one calibration of those of parts of the noise, by other machines perhaps.")
    add("parts", type=_options.path, nargs="+", metavar="FILE", help="calibration files, each of another --seed")
    add("--out", type=_file, required=True, help="calibration file to write (.boss.json)")

    add = command("straighten", _straighten, "Fine-tune a student so that every step of a schedule is straight.")
    takes_model(add)
    add("--schedule", type=_options.path, required=True, help="calibration file")
    add("--steps", type=_options.steps, required=True, help="number of steps N, of the calibration")
    add("--iterations", type=_options.positive, default=2000, help="optimiser steps")
    add("--batch", type=_options.positive, default=128, help="samples an iteration")
    add("--bank", type=_options.positive, default=1024, help="trajectories kept in memory")
    add("--refresh", type=_options.positive, help="iterations after which the bank is made anew; never if not given")
    add("--lr", type=_options.above_0, default=2e-4, help="peak learning rate")
    add("--warmup", type=_options.integer(0), default=100, help="iterations of warm-up")
    add("--decay", choices=["cosine", "none"], default="cosine", help="of the learning rate")
    targets = [name for name, row in TARGETS.items() if row.is_plain]
    add("--target", choices=targets, default="boss", help="what is learned; see fk.StraightenLoss")
    add("--t-sampling", choices=list(T_SAMPLINGS), help="where on an interval to train; the target's own if not given")
    add("--substeps", type=_options.positive, default=4, help="of next_knot and velocity_matching, in each interval")
    add("--loss", choices=list(LOSSES), default="l2", help="squared error, pseudo-Huber or Cauchy's")
    add(
        "--ema",
        type=_options.from_0_below_1,
        default=0.999,
        help="decay of the averaged weights; 0 turns it off",
    )
    add(
        "--clip",
        type=_options.from_0,
        default=1.0,
        help="largest gradient norm; 0 turns it off",
    )
    rank = "train adapters of this rank in place of the weights (peft); --lr of about ten times as much"
    add("--lora", type=_options.positive, metavar="RANK", help=rank)
    add("--adapter", type=_options.path, metavar="FOLDER", help="with --lora, where to write the adapter alone")
    add("--state", type=_file, help="training checkpoint, written as the training goes on")
    add("--resume", action="store_true", help="go on from --state")
    add("--out", type=_file, required=True, help="weights of the student to write (.safetensors)")

    add = command("sample", _sample, "Draw samples on a schedule of a calibration, or on uniform steps.")
    takes_model(add)
    add("-n", type=_options.positive, default=16, help="samples")
    add("--schedule", type=_options.path, help="calibration file; uniform steps if not given")
    add("--steps", type=_options.steps, required=True, help="number of steps N")
    methods = "Euler steps; Adams-Bashforth 2 or 3 or Heun on the same knots; or what the calibration found best"
    add("--method", choices=METHODS, default="euler", help=methods)
    add("--chunk", type=_options.positive, help="samples drawn at once; all if not given")
    add("--out", type=_file, required=True, help=f"file to write: {', '.join(SAMPLE_FORMATS)}, of a grid of all")
    add("--png", type=_options.path, metavar="FOLDER", help="folder for each sample as an image of its own")

    add = command("evaluate", evaluate.run, "A table of samplers for each number of steps, on the same noise.")
    takes_model(add)
    evaluate.add_arguments(add, _steps, _file)

    plan.add_arguments(command("plan", plan.run, "What a training takes on paper: a model, not a measurement."), _shape)

    add = command("export", _export, "A schedule or a solver of a calibration in the form that another sampler takes.")
    add("file", type=_options.path, metavar="FILE", help="calibration file (.boss.json)")
    add("--to", choices=list(RECEIVERS), required=True, help="the sampler that is to take it")
    add("--steps", type=_options.steps, help="number of steps N, whose best is taken; needed unless there is one")
    lost = "leave out coefficients that the sampler cannot run, and a start below sigma = 1 as it takes it"
    add("--knots-only", action="store_true", help=lost)
    written = "file to write, of diffusers a folder, of comfy-nodes FOLDER/CARD.boss.json; the screen if not given"
    stock = "of diffusers: the folder of the scheduler that it replaces, or of its pipeline: how the network is called"
    add("--like", type=_options.path, help=stock)
    add("--out", type=_options.path, help=written)

    add = command("plot", _plot, "Sigmas beside stock schedules, step costs and errors of a calibration, as a picture.")
    add("file", type=_options.path, metavar="FILE", help="calibration file (.boss.json)")
    add("--steps", type=_options.steps, help="number of steps N that is shown; 4, or the middle one, if not given")
    add("--out", type=_file, required=True, help="file to write: .png, .svg or .pdf")

    bench.add_arguments(command("bench", bench.run, "Time the kernels and their peers, side by side."))
    tune.add_arguments(command("tune", _tune, "Find the fastest configurations of the Triton kernels on this GPU."))

    text = "Run a script and store the real inputs of an op's calls, for replay."
    record.add_arguments(command("record", record.run, text))
    replay.add_arguments(command("replay", replay.run, "Check and time each backend on stored calls."))

    add = command("info", _info, "Versions, hardware, and which op has which backend or why not.")
    add("--json", action="store_true", help="as JSON")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(_options.positive(part.strip()) for part in text.split(","))
    if math.prod(shape) > _options.MOST:
        raise argparse.ArgumentTypeError(f"expected at most {_options.MOST:,} entries, got {_options.shown(text)}")
    return shape


def _steps(text: str) -> list[int]:
    """'1-10', '2,4,8' or both, as sorted numbers."""
    ranges = [[_options.steps(end.strip()) for end in part.split("-", 1)] for part in text.split(",")]
    if any(ends[0] > ends[-1] for ends in ranges):
        raise argparse.ArgumentTypeError(f"expected numbers of steps such as 1-10 or 2,4,8, got {text!r}")
    steps = {n for ends in ranges for n in range(ends[0], ends[-1] + 1)}
    return sorted(steps)


def _grid(text: str) -> int | list[float]:
    """'100' steps, or times."""
    if "," not in text:
        return _options.steps(text)
    return [_options.number("times such as 0.1,0.5,1", math.isfinite)(t.strip()) for t in text.split(",")]


def _file(text: str) -> Path:
    """To be written. A path forgets that a name ends in a slash."""
    if text.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    return Path(text)


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except Exception as e:  # an unknown name, or a build without it
        got = f"{_options.shown(text)} ({str(e).splitlines()[0]:.200})"
        raise argparse.ArgumentTypeError(f"expected a device of this torch build, got {got}") from e


# The commands


def _demo(args) -> None:
    demo.run(args.data, args.out, seed=args.seed)


def _check_state(args) -> None:
    there = args.state is not None and args.state.exists()
    require(args.resume or not there, f"--state: {args.state} exists; --resume goes on from it")
    require(there or not args.resume, f"--resume: expected --state FILE of an earlier run, got {args.state}")


def _of_state():
    return in_its_words({"checkpoint: ": "--state: ", "resume=False starts anew": ANEW})


def _calibrate(args) -> None:
    check_paths(args)
    _check_state(args)
    with in_its_words({"grid: ": "--grid: ", "forced_knots: ": "--knot: "}):
        times = expect_times(args.grid, "grid")
        forced = forced_places(args.knot or (), times)
    K = len(times) - 1
    require(args.steps[-1] <= K, f"--steps: expected at most --grid {K}, got {args.steps[-1]}")
    enough = f"--steps: expected at least {len(forced) + 1}, one more than --knot, got {args.steps[0]}"
    require(args.steps[0] > len(forced), enough)
    velocity, shape, _ = load_model(args)
    noise = draw_noise(args.n, shape, args.seed).to(args.device)
    held_out = draw_noise(args.verify_noise, shape, args.seed + VERIFY).to(args.device) if args.verify_noise else None
    budgets = {"evaluations: ": "--evaluations: ", "minutes: ": "--minutes: "}
    with _of_state(), in_its_words(budgets):
        calibration = fk.calibrate(
            velocity,
            noise,
            times,
            args.steps,
            max_regret=args.max_regret,
            teacher_solver=args.teacher_solver,
            teacher_error=args.teacher_error,
            effort=args.effort,
            evaluations=args.evaluations,
            minutes=args.minutes,
            forced_knots=args.knot,
            verify_noise=held_out,
            chunk=args.chunk,
            checkpoint=args.targets.get("state"),
            seed=args.seed,
        )
    write_or_keep(args.targets["out"], "--out", calibration.save)
    print(calibration)
    if calibration.tried:
        print(f"\n{calibration.report()}\n")
    found = f"{len(calibration)} schedules" + (f" and {len(calibration.solvers)} solvers" if calibration.tried else "")
    print(f"{args.out}: {found} from {calibration.provenance['n']} noises and {K} fine steps")


def _merge(args) -> None:
    check_paths(args)
    with in_its_words({"calibrations: ": "FILE: "}):
        merged = fk.Calibration.merge([read_calibration(path, "FILE") for path in args.parts])
    write_or_keep(args.targets["out"], "--out", merged.save)
    print(merged)
    print(f"{args.out}: {len(merged)} schedules from {merged.provenance['n']} noises of {len(args.parts)} files")


def _straighten(args) -> None:
    check_paths(args, ".safetensors")
    _check_state(args)
    calibration = load_calibration(args)
    velocity, shape, _ = load_model(args, calibration)
    require(network_of(velocity) is not None, f"--model: expected a torch.nn.Module to train, got {args.model}")
    _weights.expect_storable(network_of(velocity).state_dict(), "--model")
    require(args.adapter is None or args.lora is not None, "--adapter: expected --lora RANK with it, got none")
    if args.lora is not None:
        try:
            expect_peft()
        except ImportError as e:
            raise InputError(f"--{e}") from e
    fk.Calibration.load(args.schedule, velocity)  # warns if it was made for another model
    with _of_state(), in_its_words({"lora: ": "--lora: "}):
        result = fk.straighten(
            None,
            velocity,
            calibration[args.steps],
            noise=lambda n, generator: draw_noise(n, shape, generator).to(args.device),
            iterations=args.iterations,
            batch=args.batch,
            bank=args.bank,
            refresh=args.refresh,
            target=args.target,
            t_sampling=args.t_sampling,
            substeps=args.substeps,
            loss=args.loss,
            lr=args.lr,
            warmup=args.warmup,
            decay=args.decay,
            clip=args.clip or None,
            ema=args.ema or None,
            checkpoint=args.targets.get("state"),
            seed=args.seed,
            lora=args.lora,
        )
    if args.adapter is not None:
        write_or_keep(args.adapter, "--adapter", lambda path: fk.save_lora(result.student, path))
    notes = {"straightened_from": parameter_hash(velocity)}
    if args.target != "reflow":  # whose students are for any
        times = calibration[args.steps].times.tolist()
        notes["times"] = [times[0], times[-1]] if TARGETS[args.target].whole else times
    student = network_of(result.student if args.lora is None else fk.merge_lora(result.student)).cpu()

    def save(path: Path) -> None:
        if args.model in BUNDLED:  # with its architecture, so that `load_network` rebuilds it from the file alone
            save_network(student, path, **notes)
        else:
            _weights.write(path, student.state_dict(), notes=notes)

    write_or_keep(args.targets["out"], "--out", save)
    loss = result.history["loss"]
    print(f"{args.out}: straightened for {args.steps} steps, loss {loss[0]:.4g} -> {loss[-1]:.4g}")


def _sample(args) -> None:
    check_paths(args, *SAMPLE_FORMATS)
    calibration = load_calibration(args) if args.schedule else None
    velocity, shape, notes = load_model(args, calibration)
    _check_images(args, shape)
    schedule = calibration[args.steps] if calibration else fk.Schedule.uniform(args.steps)
    teacher = notes.get("straightened_from")
    if calibration and (teacher is None or teacher != calibration.provenance.get("parameters_sha256")):
        fk.Calibration.load(args.schedule, velocity)  # warns if it was made for another model
    if teacher and notes.get("times", schedule.times.tolist()) != schedule.times.tolist():
        knots = " ".join(f"{t:.3g}" for t in notes["times"])
        warnings.warn(f"--checkpoint: {args.checkpoint} was straightened for the knots {knots}", stacklevel=1)
    plan = _method(args.method, schedule, calibration)
    trained = teacher is not None and args.method != "euler"
    require(not trained, f"--method: expected euler, which {args.checkpoint} was straightened for, got {args.method}")
    parts = draw_noise(args.n, shape, args.seed).to(args.device).split(args.chunk or args.n)
    samples = torch.cat([fk.sample(velocity, part, plan, progress=True).cpu() for part in parts])
    write_or_keep(args.targets["out"], "--out", lambda path: save_samples(path, samples))
    if args.png is not None:
        write_or_keep(args.png, "--png", lambda path: fk.save_images(samples, path, grid=False))
    solver = fk.Solver.of(plan)
    print(
        f"{args.out}: {args.n} samples of shape {list(shape)}, {args.steps} steps, "
        f"{solver.evaluations} evaluations ({solver.name})"
    )


def _check_images(args, shape: tuple[int, ...]) -> None:
    """Whether samples can be the images that are to be written, and where."""
    image = len(shape) == 3 and shape[0] in (1, 3)
    for option, wanted in (("--out", args.out.suffix == ".png"), ("--png", args.png is not None)):
        require(image or not wanted, f"{option}: expected shape [1 or 3, H, W] for a .png, got {list(shape)}")
    if args.png is not None:
        try:
            expect_image_folder(args.png, "--png")
        except (OSError, ValueError) as e:
            raise InputError(str(e)) from e


def _method(name: str, schedule: fk.Schedule, calibration: fk.Calibration | None) -> fk.Schedule | fk.Solver:
    if name == "best":
        require(calibration is not None, "--method: expected --schedule FILE with best")
        return calibration.best(schedule.steps)
    if name == "heun":
        return fk.Solver.heun(schedule)
    return schedule if name == "euler" else fk.Solver.adams_bashforth(schedule, int(name[-1]))


def _export(args) -> None:
    require(args.file.is_file(), f"FILE: expected a file, got {args.file}, which is not one")
    calibration, inputs = read_calibration(args.file, "FILE"), [("FILE", args.file)]
    words = {
        "plan: exp": "--to: exp",
        "steps: exp": "--steps: exp",
        "like: exp": "--like: exp",
        "knots_only=True (--knots-only)": "--knots-only",
    }
    with in_its_words(words):
        like = None if args.like is None else load_scheduler(args.like)
        made = Export(calibration, args.to, args.steps, args.knots_only, like)
    if args.out is None:
        require(made.text is not None, f"--out: expected a place for what {args.to} takes")
        print(made.text)
    else:
        write_or_keep(made.expect_path(args.out, "--out", inputs), "--out", made.write)
        print(f"{args.out}: {made.told}")
    print(made.words, file=sys.stderr)


def _plot(args) -> None:
    check_paths(args, ".png", ".svg", ".pdf")
    require(args.file.is_file(), f"FILE: expected a file, got {args.file}, which is not one")
    calibration = read_calibration(args.file, "FILE")
    with in_its_words({"steps: exp": "--steps: exp", "calibration: exp": "FILE: exp"}):
        figure = fk.plot(calibration, steps=args.steps)
    from flowkernels.calibration.figure import write  # brings matplotlib along, which nothing else needs

    write_or_keep(args.targets["out"], "--out", lambda path: write(figure, path))
    print(f"{args.out}: {calibration!r}")


def _tune(args) -> int:
    check_paths(args)
    return tune.run(args)


def _info(args) -> None:
    device = dict(cuda="cuda", triton="cpu" if backends.triton_interpreted() else "cuda", cpu="cpu", reference="cpu")
    table = {op: {b: backends.why_not(b, device[b], op) for b in backends.BACKENDS} for op in OPS}
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    chosen = {d: _chosen(d) for d in devices}
    triton = None if backends.triton_error() else importlib.import_module("triton").__version__
    here = environment() | {"triton": triton}
    if args.json:
        told = {"environment": here, "ops": table, "has_run": backends.HAS_RUN, "chosen": chosen}
        told["triton_configurations"] = tuned.in_words()
        print(json.dumps(told, indent=1))
        return
    for key, value in here.items():
        print(f"{key.replace('_', ' '):<18} {'-' if value is None else value}")
    reasons = list(dict.fromkeys(why for cells in table.values() for why in cells.values() if why))
    print("\n" + "".join(f"{c:<18}" for c in ["op", *backends.BACKENDS]).rstrip())
    for op, cells in table.items():
        marks = ("yes" if cells[b] is None else f"no ({reasons.index(cells[b]) + 1})" for b in backends.BACKENDS)
        print("".join(f"{c:<18}" for c in [op, *marks]).rstrip())
    for i, reason in enumerate(reasons):
        print(f"({i + 1}) {reason}")
    print("\nwhere the kernels have run:")
    for name, where in backends.HAS_RUN.items():
        print(f"  {name:<16}{where}")
    print("\nwhat a call takes, such as:")
    for line in chosen.values():
        print(f"  {line}")
    print(f"\nconfigurations of Triton kernels: {tuned.in_words()}")


def _chosen(device: str) -> str:
    try:
        return backends.explain("euler_step", device)
    except backends.BackendError as e:  # asked for by FLOWKERNELS_BACKEND
        return f"an error: {e}"
