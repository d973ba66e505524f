"""Training checkpoints: written whole, and of those that are read everything is checked before it is used."""

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import describe, expect
from flowkernels._files import SUM, VALUES, damaged, expect_unchanged, warn_of_no_sum, whole_file
from flowkernels._weights import read_torch
from flowkernels.runtime.sharded import alike, is_sharded, local
from flowkernels.runtime.torch_private import tree_leaves, tree_map
from flowkernels.training.run import team_checkpoint
from flowkernels.training.run.evaluations import EVALUATIONS, expect_evaluations
from flowkernels.training.run.numbered import keep_numbered, numbered
from flowkernels.training.run.optimizers import PLACES, counted_in_groups
from flowkernels.training.run.random_states import global_rng, seed_of_rank
from flowkernels.training.run.settings import Settings
from flowkernels.training.students.modules import expect_weights, plain_state
from flowkernels.training.students.student import trained_parameters
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.identity import warn_of_doubts
from flowkernels.velocity.provenance import Identity

FORMAT, VERSION = "flowkernels.straighten", 2
HISTORY = ("iteration", "loss", "lr", "grad_norm", "interval_loss")
KEYS = {"setting", "iteration", "history", "student", "optimizer", "average"}
KEYS |= {"bank_rng", "rng", "global_rng", "totals", "counts", "bank_noise"}
ROLLED_OUT = "rolled_out"  # weights, of a run on its student's own samples alone
BANK_DRAWN = "bank_drawn"  # how much had been drawn, of a bank with seeds of its own alone
LR_SCHEDULER = "lr_scheduler"  # its state, of a run that has one alone
BEGAN_AT = "began_at"  # the error that the student had before it was trained, where a solver goes with it
DROPPED = ("iterations",)  # settings of before that runs need not share
RENAMED = {"u": "t_sampling", "weight": "weighting"}  # settings, since
SINCE_2 = {"teacher_field", "student_field", "optimizer", "student"}  # settings that version 1 does not have


def _expect(ok: bool, expected: str, got) -> None:
    if not ok:
        expect(False, "checkpoint", expected, f"{describe(got)}")


@contextlib.contextmanager
def checks_of(path: Path) -> Iterator[None]:
    """Errors of the block name the checkpoint; what else it raises is an error of that kind."""
    try:
        yield
    except Exception as e:
        text = e if isinstance(e, ValueError) else f"checkpoint: expected a whole one, got {type(e).__name__}: {e}"
        raise ValueError(f"{text} ({path})") from e


def expect_storable(state: dict) -> None:
    """Raise if a checkpoint of this state could not be read again; tensors, which can, are left out."""

    def small(leaf):
        leaf = local(leaf) if is_sharded(leaf) else leaf
        return leaf.new_empty(0) if type(leaf) in (Tensor, nn.Parameter) else leaf

    try:
        state = tree_map(small, state)
        tensors_hash(state)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(state, path)
            read_torch(path, "state", "tensors and plain values")
    except Exception as e:  # whatever the state holds
        expected = "a student and an optimiser whose state is tensors and plain values (or checkpoint=None)"
        raise ValueError(f"checkpoint: expected {expected}, got {type(e).__name__}: {e}") from e


def write_checkpoint(path: Path, state: dict) -> None:
    state = {"format": FORMAT, "version": VERSION, **state}
    with whole_file(path) as partial:
        torch.save({**state, SUM: tensors_hash(state)}, partial)


def read_checkpoint(path: Path, stacklevel: int = 3) -> dict:
    """What a checkpoint holds; ValueError if it is not what was written. What its parts are is not looked at."""
    wanted, how = "a training checkpoint", "is truncated or not one"
    saved = read_torch(path, "checkpoint", wanted)
    with damaged("checkpoint", wanted, path, how):
        kind = saved["format"]
        if kind == FORMAT and saved.get("version") in (1, VERSION):
            _expect_plain_tensors(saved, path.stat().st_size)
            if saved["version"] == VERSION:
                expect_unchanged(saved.pop(SUM), tensors_hash(saved))
    expect(kind == FORMAT, "checkpoint", f"a file of format {FORMAT!r}", f"{path} of format {describe(kind)}")
    with checks_of(path):
        version = saved.get("version")
        expect(
            version in (1, VERSION), "checkpoint", f"version 1 or {VERSION}", f"{path} of version {describe(version)}"
        )
        if version == 1:
            saved.setdefault("bank_noise", None)
        _expect_keys(saved)
        known = {name: value for name, value in saved["setting"].items() if name not in DROPPED}
        saved["setting"] = {RENAMED.get(name, name): value for name, value in known.items()}
    if version == 1:
        warn_of_no_sum(path, stacklevel)
    return saved


def _expect_keys(saved: dict) -> None:
    there = saved.keys() - {"format", "version", ROLLED_OUT, BANK_DRAWN, BEGAN_AT, LR_SCHEDULER, EVALUATIONS}
    _expect(there == KEYS, f"{sorted(KEYS)}", sorted(saved, key=str))
    _expect(isinstance(saved["setting"], dict), "settings", saved["setting"])
    _expect(type(saved["bank_noise"]) in (str, type(None)), "a hash of the bank's noise", saved["bank_noise"])


def _expect_plain_tensors(saved, size: int) -> None:
    tensors = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, Tensor)]
    for t in tensors:
        plain = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_quantized
        if not plain or t.device.type != "cpu":
            raise ValueError(f"{describe(t)} in it is not a plain one")
    if sum(t.numel() * t.element_size() for t in tensors) > 4 * size + VALUES:
        raise ValueError("its tensors are larger than the file")


def checkpoint_to_resume(
    settings: Settings, setting: dict[str, Any], student: nn.Module, teacher: Identity, stacklevel: int
) -> dict[str, Any] | None:
    """The checkpoint that a run goes on from, where there is one; None to start anew.

    setting: what the runs must share, all but "attributes", those of the teacher, of which a warning tells. Raises
    ValueError, naming the file, where it is of another run or none that a run writes; the optimiser's state and the
    average are looked at by `State.load`.
    """
    path = newest_checkpoint(settings)
    if path is None:
        return None
    if settings.group is not None:
        saved = _read_of_ranks(path, settings, student)
    else:
        try:
            saved = read_checkpoint(path, stacklevel + 1)
        except ValueError as e:
            raise ValueError(f"{e}{_before(settings.checkpoint, path)}") from e
    shared = {name: value for name, value in setting.items() if name != "attributes"}
    if saved["version"] == 1 and saved["setting"].get("teacher") == teacher.of_state:
        shared["teacher"] = teacher.of_state
    with checks_of(path):
        expect_weights(student, saved["student"], "checkpoint", exact=True)
        _expect_setting(saved, shared)
        drawn = saved.get(BANK_DRAWN, 1)
        _expect(type(drawn) is int and drawn > 0, f"a number of chunks as {BANK_DRAWN}", drawn)
        began = saved.get(BEGAN_AT, 0.0)
        # NaN or Inf of a student whose samples were not finite
        _expect(type(began) is float and not began < 0, f"a mean squared distance as {BEGAN_AT}", began)
        _expect((ROLLED_OUT in saved) == settings.objective.needs_roll_out, f"{ROLLED_OUT} where it is used", [*saved])
        if ROLLED_OUT in saved:
            expect_weights(student, saved[ROLLED_OUT], "checkpoint", exact=True)
        of_scheduler = settings.lr_scheduler is not None
        _expect((LR_SCHEDULER in saved) == of_scheduler, f"{LR_SCHEDULER} where there is one", [*saved])
        _expect_progress(saved, settings)
        expect_evaluations(saved, settings, student)
        _expect_random_states(saved)
    warn_of_doubts("checkpoint", path, saved["setting"].get("attributes"), teacher, stacklevel + 1)
    done, keep = saved["iteration"], settings.keep_checkpoints
    if keep != 1 and path == settings.checkpoint and done not in numbered(path):
        with contextlib.suppress(OSError):  # of a run that ended between the two
            keep_numbered(path, done, keep)
    return saved


def _read_of_ranks(path: Path, settings: Settings, student: nn.Module) -> dict[str, Any]:
    ranks = settings.group
    saved = team_checkpoint.read(path, plain_state(student), trained_parameters(student), ranks)
    saved["version"] = VERSION
    if saved["global_rng"] is None:
        seed_of_rank(settings.seed, ranks.rank, saved["iteration"])
        saved["global_rng"] = global_rng()
    with checks_of(path):
        _expect_keys(saved)
    return saved


def newest_checkpoint(settings: Settings) -> Path | None:
    """What a run goes on from, where there is something; ValueError for numbered ones that starting anew would mix with
    its own."""
    path = settings.checkpoint
    if path is None:
        return None
    beside = {} if settings.keep_checkpoints == 1 else numbered(path)
    if settings.group is not None:
        there = settings.group.first(lambda: team_checkpoint.checkpoints_in(path))
        if settings.resume:
            return there[-1] if there else None
        beside = {} if settings.keep_checkpoints == 1 else dict(enumerate(there))
    if not settings.resume:
        expected = "a name without numbered checkpoints of another run beside it, with resume=False"
        expect(not beside, "checkpoint", expected, f"{next(iter(beside.values()), None)}")
        return None
    return path if path.exists() else next(reversed(beside.values()), None)


def _before(path: Path, bad: Path) -> str:
    """What is there beside a checkpoint that is damaged, as the end of an error."""
    for file in reversed(numbered(path).values()):
        if not file.samefile(bad):
            with contextlib.suppress(ValueError, OSError):
                done = read_checkpoint(file)["iteration"]
                return f"; the one before it, {file}, is whole: of iteration {done}, to be put in its place"
    return ""


def _expect_setting(saved: dict, setting: dict) -> None:
    """Raise unless the checkpoint is of a run with this setting, and says no more."""
    known = saved["setting"]
    more = dict.fromkeys((key for key in known if key not in setting and key != "attributes"), "nothing")
    for key, value in (setting | more).items():
        there = key in known or saved["version"] == VERSION or key not in SINCE_2
        have = known.get(key, "nothing")
        if there and repr(have) != repr(value):  # of numbers exact, and of anything else no error
            got = f"{key} = {have!r}"
            expect(False, "checkpoint", f"one of this run ({key} = {value!r}); resume=False starts anew", got)


def _expect_progress(saved: dict, settings: Settings) -> None:
    """Raise unless the number of iterations, the history and the sums of losses are those of such a run."""
    done, history = saved["iteration"], saved["history"]
    iterations, N = settings.iterations, settings.objective.knots.steps
    _expect(type(done) is int and done >= 1, "a number of iterations", done)
    way_out = "of a run that has done no more (resume=False starts anew)"
    expect(done <= iterations, "checkpoint", f"at most iterations = {iterations}, {way_out}", f"one after {done}")
    rows = [it for it in range(done) if settings.is_regular(it)]
    if done - 1 not in rows and repr(history.get("iteration") if isinstance(history, dict) else None) != repr(rows):
        rows.append(done - 1)  # at the end of a run
    _expect(isinstance(history, dict) and set(history) == set(HISTORY), f"a history of {list(HISTORY)}", history)
    for column in history.values():
        fits = isinstance(column, list) and len(column) == len(rows)
        _expect(fits, f"a history of {len(rows)} rows", column)
    _expect(repr(history["iteration"]) == repr(rows), f"rows of iterations 0 to {rows[-1]}", history["iteration"])
    for name in ("loss", "lr", "grad_norm"):
        plain = all(type(value) is float and math.isfinite(value) for value in history[name])
        _expect(plain, "a history of finite numbers", f"{name} = {describe(history[name])}")
    for row in history["interval_loss"]:
        fits = isinstance(row, list) and len(row) == N and all(type(value) is float for value in row)
        _expect(fits, f"a history of {N} losses a row", row)
    for name in ("totals", "counts"):
        _expect_alike(saved[name], torch.zeros(N, dtype=torch.float32, device="cpu"), name)
        _expect(bool(saved[name].isfinite().all()), f"finite {name}", saved[name].tolist())


def _expect_random_states(saved: dict) -> None:
    everywhere = saved["global_rng"]
    known = isinstance(everywhere, dict) and set(everywhere) == {"cpu", "cuda"} and isinstance(everywhere["cuda"], list)
    _expect(known, "states of the random generators", everywhere)
    for state in (saved["bank_rng"], saved["rng"], everywhere["cpu"]):
        try:
            torch.Generator("cpu").set_state(state)
        except Exception as e:
            raise ValueError(
                f"checkpoint: expected the state of a random generator, got {describe(state)} ({e})"
            ) from e
    like = torch.zeros(16, dtype=torch.uint8, device="cpu")
    for state in everywhere["cuda"]:
        _expect_alike(state, like, "the state of a GPU's random generator")


def expect_optimizer_state(saved, opt, parameters: list[nn.Parameter], varies: Collection[str] = ()) -> None:
    """Raise unless the state is of the form that a step of the optimiser makes, which is what it is compared with: a
    step of size zero. Its kernels do not look at shapes. varies: names in its groups that are not compared."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    for p in parameters:
        p.grad = None
    own = opt.state_dict()
    _expect(isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys(), "an optimiser's state", saved)
    groups, counted = saved["param_groups"], counted_in_groups(opt)
    fits = isinstance(groups, list) and len(groups) == len(own["param_groups"])
    _expect(fits and all(isinstance(g, dict) for g in groups), f"{len(own['param_groups'])} groups", groups)
    for have, want in zip(groups, own["param_groups"], strict=True):
        _expect(repr(have.get("params")) == repr(want["params"]), "the optimiser's parameters", have.get("params"))
        for key in (have.keys() & want.keys()) - {*PLACES, *varies, *counted}:
            _expect(repr(have[key]) == repr(want[key]), f"an optimiser with {key} = {want[key]!r}", have[key])
        for key in counted & want.keys():
            _expect(key in have, f"an optimiser's {key}", [*have])
            _expect_alike(have[key], want[key], key)
    _expect(isinstance(saved["state"], dict), "the state of parameters", saved["state"])
    for i, have in saved["state"].items():
        want = own["state"].get(i)
        fits = type(i) is int and want is not None and isinstance(have, dict) and have.keys() == want.keys()
        _expect(fits, "the state of the optimiser's parameters", f"{describe(have)} of parameter {describe(i)}")
        for key, value in want.items():
            _expect_alike(have[key], value, f"{key!r} of parameter {i}")
            counts = key == "step" and not 0 <= float(have[key]) < math.inf
            _expect(not counts, "a number of steps", have[key])


def load_optimizer_state(opt: torch.optim.Optimizer, saved: dict) -> None:
    """Take the state that `expect_optimizer_state` has found to fit, sharded as the optimiser's own."""
    own = opt.state_dict()
    state = {
        i: {key: alike(value, own["state"][i][key]) for key, value in have.items()}
        for i, have in saved["state"].items()
    }
    groups = [
        mine | {key: alike(group[key], mine[key]) for key in counted_in_groups(opt) & mine.keys()}
        for group, mine in zip(saved["param_groups"], own["param_groups"], strict=True)
    ]
    opt.load_state_dict({"state": state, "param_groups": groups})


def _expect_alike(have, want, what: str) -> None:
    if isinstance(want, Tensor):
        fits = isinstance(have, Tensor) and have.shape == want.shape and have.dtype == want.dtype
        _expect(fits, f"{what} as {describe(want)}", have)
    else:
        _expect(type(have) is type(want), f"{what} of type {type(want).__name__}", have)
