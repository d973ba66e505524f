"""`flowkernels tune` without a GPU: the search on kernels in Triton's interpreter, whose results are compared as ever,
with times that a test has planted; its table, and who reads it."""

import contextlib
import importlib
import itertools
import json
import logging
import operator
import re
import time

import pytest
import torch
from triton.runtime.errors import OutOfResources

from flowkernels._files import sealed
from flowkernels.bench import suite, tune
from flowkernels.bench.case import Case, Work, ours
from flowkernels.bench.tune import Tuner, candidates
from flowkernels.cli import main
from flowkernels.ops import triton_common, tuned
from flowkernels.ops.bellman import bellman
from flowkernels.ops.bellman.samples import Sample, error_and_bound
from flowkernels.ops.bellman.triton_kernel import CONFIGS, SEARCH
from flowkernels.ops.public import OPS
from flowkernels.runtime import environment
from flowkernels.runtime.backends import backend

CPU = torch.device("cpu")
STEP, CHECK = CONFIGS["bellman_step"], CONFIGS["bellman_check"]
FAST = {**STEP, "BLOCK_J": 16, "num_warps": 2}
GPU = "Some GPU 80GB"


class Clock:
    """In place of a GPU's: seconds of a call are `planted(configs in use)`, times a drift."""

    def __init__(self, planted):
        self.planted, self.seen, self.drift = planted, [], itertools.repeat(1.0)

    def plan(self, call):
        return 3, 1e-3

    def seconds(self, call, loops):
        assert loops == 3
        self.seen.append(dict(triton_common._configs))
        return next(self.drift) * self.planted(triton_common._configs)


def at(kernel, times, otherwise=1.0):
    """Seconds by the kernel's configuration."""
    shipped = CONFIGS[kernel]
    return lambda configs: next((s for config, s in times if config == configs.get(kernel, shipped)), otherwise)


def small(K):
    """A case as the benchmark has them."""
    cost = torch.rand(K + 1, K + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = Sample("", (cost, 2), {})
    work = Work(ours(lambda: bellman(*sample.args), CPU), lambda got: error_and_bound(sample, got))
    return Case(f"K={K}", K, lambda: work)


@pytest.fixture(autouse=True)
def no_kernel_for_few_knots(monkeypatch, request):
    """So that the small cases here launch the kernels of many."""
    if request.function is test_the_tables_of_ops:
        return
    module = importlib.import_module("flowkernels.ops.bellman.triton_kernel")
    for name in module.HELD:
        monkeypatch.delitem(CONFIGS, name)
        monkeypatch.delitem(SEARCH, name)
    monkeypatch.setattr(module, "HELD", ())


@pytest.fixture
def cases(monkeypatch):
    """Two of them, for a search that is short."""
    monkeypatch.setitem(SEARCH, "bellman_step", {"BLOCK_J": (16, 32), "num_warps": (2, 4)})
    monkeypatch.setitem(SEARCH, "bellman_check", {"BLOCK": (64, 128)})
    return [small(3), small(4)]


@pytest.fixture
def works(cases):
    return {cases[0].name: cases[0].make()}


def search(clock, works, kernel="bellman_step", tried=None, said=None, **options):
    tuner = Tuner(clock, (said if said is not None else []).append)
    tried = tried or [STEP, {**STEP, "BLOCK_J": 64}, FAST, {**STEP, "BLOCK_K": 16}]
    return tuner.search(kernel, tried, works, {}, **options)


@pytest.fixture
def launched(monkeypatch):
    """`launched(config, then)`: after a launch with the configuration, `then(arguments)`."""
    launch = triton_common.launch

    def plant(config, then):
        def planted(kernel, grid, *args, on, config, **constants):
            launch(kernel, grid, *args, on=on, config=config, **constants)
            if config == of:
                then(args)

        of = config
        monkeypatch.setattr(triton_common, "launch", planted)

    return plant


# ---- the search ----


def test_candidates_begin_with_the_shipped_one():
    tried = candidates(STEP, SEARCH["bellman_step"])
    assert tried[0] == STEP
    assert len(tried) == 27 == len({tuple(sorted(c.items())) for c in tried})
    assert FAST in tried
    assert candidates({"BLOCK": 8, "num_warps": 4}, {"num_warps": (2,)}) == [
        {"BLOCK": 8, "num_warps": 4},
        {"BLOCK": 8, "num_warps": 2},
    ]


def test_the_fastest_is_found(works):
    found = search(Clock(at("bellman_step", [(FAST, 0.7), ({**STEP, "BLOCK_K": 16}, 0.8)])), works)
    assert (found.best, found.shipped) == (FAST, STEP)
    assert (found.tried, found.of) == (4, 4)
    assert (found.best_seconds, found.shipped_seconds) == pytest.approx((0.7, 1.0))
    assert not found.wrong
    assert not found.skipped


def test_times_are_taken_beside_the_shipped_one():
    """On a machine that slows down, the last of many is found all the same."""
    tried = candidates(STEP, SEARCH["bellman_step"])
    assert len(tried) > 2 * tune.FINALISTS
    clock = Clock(at("bellman_step", [(tried[-1], 0.9)]))
    clock.drift = itertools.accumulate(itertools.repeat(1.02), operator.mul)
    nothing = Work({"flowkernels cpu": lambda: None}, lambda got: (0.0, 1.0))
    assert search(clock, {"nothing": nothing}, tried=tried).best == tried[-1]


@pytest.mark.parametrize("gain", [0.0, 0.005])
def test_the_shipped_one_stays_where_nothing_is_clearly_faster(works, gain):
    found = search(Clock(at("bellman_step", [(FAST, 1.0 - gain)])), works)
    assert found.best == STEP
    assert found.best_seconds == found.shipped_seconds == pytest.approx(1.0)


def test_the_shipped_one_stays_within_noise(works):
    """One that is faster by half in three rounds of five has the better median."""
    rounds = itertools.cycle([0.5, 1.1, 0.5, 1.1, 0.5])
    clock = Clock(lambda configs: next(rounds) if configs["bellman_step"] == FAST else 1.0)
    assert search(clock, works, tried=[STEP, FAST]).best == STEP
    often = itertools.cycle([0.5, 1.1, 0.5, 0.5, 0.5, 0.5])
    clock = Clock(lambda configs: next(often) if configs["bellman_step"] == FAST else 1.0)
    assert search(clock, works, tried=[STEP, FAST]).best == FAST


def test_all_works_count(cases):
    """One that is faster on one and slower on the other, by more, is not faster."""
    works = {case.name: case.make() for case in cases}
    order = itertools.count()
    clock = Clock(lambda configs: (0.5, 3.0)[next(order) % 2] if configs["bellman_step"] == FAST else 1.0)
    assert search(clock, works, tried=[STEP, FAST]).best == STEP
    clock = Clock(lambda configs: (0.5, 1.5)[next(order) % 2] if configs["bellman_step"] == FAST else 1.0)
    found = search(clock, works, tried=[STEP, FAST])
    assert found.best == FAST
    assert found.best_seconds == pytest.approx(0.75**0.5)


def test_a_wrong_one_is_dropped_and_said(works, launched):
    launched(FAST, lambda args: args[3].add_(1.0))  # values
    said = []
    found = search(Clock(at("bellman_step", [(FAST, 0.1)])), works, said=said)
    assert found.best == STEP
    assert list(found.wrong) == ["BLOCK_J=16 BLOCK_K=32 num_warps=2"]
    (line,) = said
    assert re.fullmatch(r"WRONG: bellman_step with BLOCK_J=16 BLOCK_K=32 num_warps=2: error \d > 0, K=3", line)


def test_one_that_does_not_run_is_skipped(works, launched):
    def fail(args):
        raise OutOfResources(300_000, 232_448, "shared memory")

    launched(FAST, fail)
    found = search(Clock(at("bellman_step", [(FAST, 0.1)])), works)
    assert found.best == STEP
    (reason,) = found.skipped.values()
    assert reason.startswith("OutOfResources: out of resource: shared memory, Required: 300000")
    assert found.tried == 4

    launched(STEP, fail)  # the shipped one: the others are compared with the first that runs
    found = search(Clock(at("bellman_step", [(FAST, 0.1)])), works)
    assert found.best == FAST
    assert found.shipped_seconds != found.shipped_seconds
    assert len(found.skipped) == 1


def test_a_gpu_that_is_lost_ends_it(works, launched):
    lost = []

    def wait():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    launched(FAST, lambda args: lost.append(1))
    with pytest.raises(RuntimeError, match=r"bellman_step with BLOCK_J=16 .* left the GPU unusable .*illegal"):
        Tuner(Clock(at("bellman_step", [])), wait=wait).search("bellman_step", [STEP, FAST], works, {})


def test_time_that_is_over_ends_it_with_what_is_known(works):
    asked = itertools.count()
    clock = Clock(at("bellman_step", [(FAST, 0.7)]))
    tried = [STEP, {**STEP, "BLOCK_J": 64}, FAST, {**STEP, "BLOCK_K": 64}]
    found = search(clock, works, tried=tried, spent=lambda: next(asked) == 2)
    assert (found.tried, found.of, found.best) == (3, 4, FAST)
    found = search(clock, works, tried=tried, spent=lambda: True)
    assert (found.tried, found.best) == (1, STEP)


# ---- ops and their cases ----


def test_kernel_by_kernel_on_cases_that_launch_them(cases):
    fast_check = {**CHECK, "BLOCK": 64}
    times = {"bellman_check": [(fast_check, 0.5)], "bellman_step": [(FAST, 0.5)]}

    def planted(configs):
        return at("bellman_check", times["bellman_check"])(configs) * at("bellman_step", times["bellman_step"])(configs)

    clock = Clock(planted)
    found, left = tune.tune({"bellman": cases}, Tuner(clock), {}, float("inf"))
    assert not left
    assert {t.kernel: t.best for t in found} == {"bellman_check": fast_check, "bellman_step": FAST}
    assert [t.cases for t in found] == [["K=4", "K=3"]] * 2
    of_step = [configs for configs in clock.seen if "bellman_step" in configs]
    assert of_step
    assert all(configs["bellman_check"] == fast_check for configs in of_step)  # the best so far


def test_a_kernel_that_no_case_launches_stays(cases):
    clock = Clock(lambda configs: 1.0)
    found, left = tune.tune({"bellman": cases[:1], "euler_step": cases[:1]}, Tuner(clock), {}, float("inf"))
    assert [t.kernel for t in found] == ["bellman_check", "bellman_step"]
    assert left == {"euler_step": "no case of the benchmark launches it"}


def test_a_case_that_does_not_fit_is_left_out(cases):
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory")

    said = []
    too_large = Case("large", 1, make)
    found = Tuner(None, said.append).cases_of([too_large, cases[0]], {})
    assert found == {"bellman_check": [cases[0]], "bellman_step": [cases[0]]}
    assert said == ["large: left out, it does not fit into the GPU's memory"]


@pytest.mark.parametrize("op", OPS)
def test_the_benchmark_launches_them(op):
    """Through the provider of its cases that tuning takes. The smallest, since they are interpreted."""
    configs, said = tuned.kernels(op)[0], []
    smallest = min(suite.cases(op, CPU), key=lambda case: case.size)
    found = Tuner(None, said.append).cases_of([smallest], {})
    assert found
    assert found.keys() <= configs.keys()
    assert said == []


def test_a_few_cases_of_many():
    def case(name, size, quick=False):
        return Case(name, size, None, quick=quick)

    many = [case("a", 1), case("b", 5, True), case("c", 3), case("d", 9), case("e", 7), case("f", 2)]
    assert [c.name for c in tune._few(many)] == ["b", "d", "c"]
    assert [c.name for c in tune._few(many[:1])] == ["a"]


def test_minutes(cases, monkeypatch):
    """Kernels share them; what they do not suffice for stays."""
    now = itertools.count()  # a second passes with each look at the clock, and none otherwise
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    tuner = Tuner(Clock(at("bellman_step", [(FAST, 0.5)])))
    found, left = tune.tune({"bellman": cases[:1]}, tuner, {}, 8 / 60)
    assert [(t.kernel, t.tried, t.of) for t in found] == [("bellman_check", 2, 2), ("bellman_step", 1, 4)]
    assert not left
    now = itertools.count()
    found, left = tune.tune({"bellman": cases[:1]}, tuner, {}, 6 / 60)
    assert [(t.kernel, t.tried, t.of) for t in found] == [("bellman_check", 1, 2)]
    assert left == {"bellman_step": "the time was over"}
    now = itertools.count()
    found, left = tune.tune({"bellman": cases[:1]}, tuner, {}, 1 / 6000)
    assert not found
    assert left == dict.fromkeys(("bellman_check", "bellman_step"), "the time was over")


@pytest.mark.parametrize("op", OPS)
def test_the_tables_of_ops(op):
    configs, tried = tuned.kernels(op)
    assert configs.keys() >= tried.keys()
    for kernel, config in configs.items():
        assert kernel.startswith(op)
        tuned._expect_config(config, kernel, config, tried.get(kernel, {}))
    for spans in tried.values():
        assert all(len(set(values)) == len(values) > 1 for values in spans.values())


# ---- the table ----


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one GPU, as far as tables go; the user's cache is in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    source = dict(device=GPU, driver="580.1", cuda="13.0", torch="2.13", flowkernels="1", commit="c", date="2026-01-02")
    for name, value in dict(
        **dict(device_count=lambda: 1, current_device=lambda: 0, get_device_name=lambda device=None: GPU),
        **dict(is_initialized=lambda: True, device=lambda device: contextlib.nullcontext(), synchronize=lambda: None),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(environment, "provenance", lambda device: source)
    for cached in (tuned.asked, tuned.of_device):
        cached.cache_clear()
    yield tmp_path / "cache/flowkernels/triton-some-gpu-80gb.json"
    for cached in (tuned.asked, tuned.of_device):
        cached.cache_clear()


def table(**changes):
    return dict(format=1, device=GPU, date="2026-01-02", configs={"bellman_step": FAST}) | changes


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(sealed(content)))
    return path


def test_the_default_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for cache, folder in [("/c", "/c"), ("", "/home/someone/.cache"), ("relative", "/home/someone/.cache")]:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        path = tuned.default_path("NVIDIA H100 80GB HBM3")
        assert str(path) == f"{folder}/flowkernels/triton-nvidia-h100-80gb-hbm3.json"


def test_the_table_in_the_cache_is_used(gpu):
    written(gpu, table())
    assert triton_common.config_of(CONFIGS, "bellman_step") == FAST
    assert triton_common.config_of(CONFIGS, "bellman_check") == CHECK
    gpu.unlink()  # it has been read
    assert triton_common.config_of(CONFIGS, "bellman_step") == FAST


def test_kernels_are_launched_with_it(gpu, monkeypatch):
    written(gpu, table())
    seen = []
    monkeypatch.setattr(triton_common, "launch", lambda kernel, *args, on, config, **constants: seen.append(config))
    kernels = importlib.import_module("flowkernels.ops.bellman.triton_kernel")
    monkeypatch.setattr(kernels, "_refuse", lambda *args: None)  # nothing has been written
    with backend("triton"):
        bellman(torch.zeros(5, 5, dtype=torch.float64), 2)
    assert seen == [CHECK, FAST, FAST]


def test_no_table_is_no_warning(gpu, caplog):
    assert triton_common.config_of(CONFIGS, "bellman_step") == STEP
    assert not caplog.records


@pytest.mark.parametrize("where", ["in the interpreter", "before CUDA is in use", "turned off"])
def test_where_no_table_is_read(gpu, monkeypatch, where):
    written(gpu, table())
    if where == "in the interpreter":
        monkeypatch.setattr(triton_common, "INTERPRETED", True)
    elif where == "turned off":
        monkeypatch.setenv(tuned.VARIABLE, "")
    else:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert triton_common.config_of(CONFIGS, "bellman_step") == STEP


BAD = {
    "format": (table(format=2), r"format: expected 1, got 2"),
    "device": (table(device="Another GPU"), r"device: expected 'Some GPU 80GB', got Another GPU"),
    "no json": ("{", r"expected a table of `flowkernels tune`, .*\.json is truncated or not JSON"),
    "no table": ("[1]", r"expected a table of `flowkernels tune`, got \[1\]"),
    "no configs": ('{"format": 1, "device": "Some GPU 80GB"}', r"configs: expected configurations by kernel, got None"),
    "kernel": (table(configs={"bellmann": FAST}), r"configs\.bellmann: expected a kernel .*, got 'bellmann'"),
    "config": (table(configs={"bellman_step": 3}), r"configs\.bellman_step: expected values of BLOCK_J, .*, got 3"),
    "missing": (
        table(configs={"bellman_step": {"BLOCK_J": 16, "num_warps": 2}}),
        r"configs\.bellman_step\.BLOCK_K: expected a value, got none",
    ),
    "name": (
        table(configs={"bellman_step": FAST | {"BLOCK_M": 16}}),
        r"configs\.bellman_step\.BLOCK_M: expected one of BLOCK_J, BLOCK_K, num_warps, got 'BLOCK_M'",
    ),
    "value": (
        table(configs={"bellman_step": FAST | {"BLOCK_J": 24}}),
        r"configs\.bellman_step\.BLOCK_J: expected one of 32, 16, 64, got 24",
    ),
    "type": (
        table(configs={"bellman_check": CHECK | {"num_warps": True}}),
        r"configs\.bellman_check\.num_warps: expected one of 4, 1, 2, got True",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_table(gpu, bad, monkeypatch, caplog, tmp_path):
    """In the cache it is left out with one warning; one that was asked for is an error."""
    content, message = BAD[bad]
    written(gpu, content)
    with caplog.at_level(logging.WARNING, "flowkernels"):
        assert [triton_common.config_of(CONFIGS, "bellman_step") for _ in range(2)] == [STEP] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"shipped configurations of Triton kernels are used: {gpu}: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.getMessage())

    path = written(tmp_path / "mine.json", content)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    for cached in (tuned.asked, tuned.of_device):
        cached.cache_clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            triton_common.config_of(CONFIGS, "bellman_step")


def test_a_table_that_was_changed(gpu):
    content = sealed(table())
    content["configs"]["bellman_step"] = STEP
    written(gpu, json.dumps(content))
    with pytest.raises(ValueError, match=f"^{gpu}: expected .* is damaged .its sha256 is that of other contents"):
        tuned.read(gpu, GPU)
    del content["sha256"]
    written(gpu, json.dumps(content))
    with pytest.warns(UserWarning, match=f"^{gpu} has no sha256"):
        assert tuned.read(gpu, GPU) == content


def test_a_table_that_was_asked_for(gpu, monkeypatch, tmp_path):
    written(gpu, table())
    path = tmp_path / "mine.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with pytest.raises(ValueError, match=rf"^{path}: expected a table .*, got FileNotFoundError"):
        triton_common.config_of(CONFIGS, "bellman_step")
    written(path, table(configs={"bellman_check": CHECK | {"BLOCK": 64}}))
    assert triton_common.config_of(CONFIGS, "bellman_check")["BLOCK"] == 64
    assert triton_common.config_of(CONFIGS, "bellman_step") == STEP


def test_use_comes_before_a_table(gpu):
    written(gpu, table())
    with triton_common.use({"bellman_check": CHECK | {"BLOCK": 64}}):
        assert triton_common.config_of(CONFIGS, "bellman_check")["BLOCK"] == 64
        assert triton_common.config_of(CONFIGS, "bellman_step") == STEP
    assert triton_common.config_of(CONFIGS, "bellman_step") == FAST


def test_watch():
    with triton_common.watch() as outer:
        with triton_common.watch() as inner:
            triton_common.config_of(CONFIGS, "bellman_step")
        triton_common.config_of(CONFIGS, "bellman_check")
    triton_common.config_of(CONFIGS, "bellman_step")
    assert inner == {"bellman_step"}
    assert outer == {"bellman_step", "bellman_check"}


# ---- the command ----


@pytest.fixture
def command(gpu, cases, monkeypatch):
    """`flowkernels tune bellman` on the interpreter, FAST being twice as fast."""
    monkeypatch.setattr(tune, "_gpu", lambda name: CPU)
    monkeypatch.setattr(tune, "timer", lambda device: Clock(at("bellman_step", [(FAST, 5e-6)], 1e-5)))
    monkeypatch.setattr(suite, "cases", lambda op, device: cases[:1])
    return gpu


def test_the_command_writes_a_table_that_is_used(command, capsys):
    assert main.main(["tune", "bellman"]) == 0
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["bellman_step"].split()[1:] == ["10", "5", *tune._words(FAST).split()]
    assert lines["bellman_check"].split()[1:] == ["10", "10", *tune._words(CHECK).split(), "(as", "shipped)"]
    assert out.endswith(f"{command}: 2 kernels on {GPU}, used from now on\n")
    assert "bellman_step: 4 of 4 configurations tried, on K=3" in err
    told = json.loads(command.read_text())
    assert told["configs"] == {"bellman_check": CHECK, "bellman_step": FAST}
    about = ("format", "device", "driver", "cuda", "hip", "torch", "flowkernels", "commit", "date")
    assert [told[k] for k in about] == [1, GPU, "580.1", "13.0", "", "2.13", "1", "c", "2026-01-02"]
    assert told["triton"]
    times = told["times"]["bellman_step"]
    assert (times["shipped_us"], times["best_us"], times["tried"], times["of"]) == (10.0, 5.0, 4, 4)
    assert triton_common.config_of(CONFIGS, "bellman_step") == FAST
    assert tuned.in_words() == f"{command}, of 2026-01-02, for 2 kernels"


def test_what_is_not_tuned_now_is_kept(command, capsys):
    kept = {"euler_step": {"BLOCK": 1024, "num_warps": 8}}
    written(
        command, table(configs=kept | {"bellman_check": CHECK | {"BLOCK": 64}}, times={"euler_step": {"best_us": 1}})
    )
    assert main.main(["tune", "bellman"]) == 0
    told = json.loads(command.read_text())
    assert told["configs"] == kept | {"bellman_check": CHECK, "bellman_step": FAST}
    assert told["times"].keys() == {"euler_step", "bellman_check", "bellman_step"}
    written(command, table(device="Another GPU", configs=kept))
    assert main.main(["tune", "bellman"]) == 0
    assert "flowkernels: warning: what is replaced is kept in no part" in capsys.readouterr().err
    assert json.loads(command.read_text())["configs"].keys() == {"bellman_check", "bellman_step"}


def test_another_file(command, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.json"
    assert main.main(["tune", "bellman", "--out", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"; FLOWKERNELS_TRITON_CONFIGS={path} makes use of it\n")
    assert not command.exists()
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    for cached in (tuned.asked, tuned.of_device):
        cached.cache_clear()
    assert triton_common.config_of(CONFIGS, "bellman_step") == FAST


def test_a_wrong_result_fails_the_command(command, launched, capsys):
    launched(FAST, lambda args: args[3].add_(1.0))
    assert main.main(["tune", "bellman"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^bellman_step: 1 WRONG: \d > 0, K=3$", out, re.MULTILINE)
    assert "WRONG: bellman_step with BLOCK_J=16" in err
    assert json.loads(command.read_text())["configs"]["bellman_step"] == STEP


def test_ctrl_c_writes_nothing(command, monkeypatch, capsys):
    before = json.dumps(table())
    written(command, before)

    def interrupted(self, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "search", interrupted)
    assert main.main(["tune", "bellman"]) == 130
    assert command.read_text() == before
    assert list(command.parent.iterdir()) == [command]
    assert triton_common._configs is None


def test_time_that_is_over_is_said(command, monkeypatch, capsys):
    now = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    assert main.main(["tune", "bellman", "--minutes", str(8 / 60)]) == 0
    out = capsys.readouterr().out
    assert "bellman_step: 3 of 4 configurations not tried, 0.133333 minutes being over\n" in out
    assert command.exists()
    command.unlink()
    assert main.main(["tune", "bellman", "--minutes", "0.0001"]) == 1
    out = capsys.readouterr().out
    assert "bellman_step: stays as it is, the time was over\n" in out
    assert out.endswith("not written, nothing was tuned\n")
    assert not command.exists()


REFUSED = {
    "tune": r"--device: expected a GPU that .* run on, got 'cuda:0': TRITON_INTERPRET=1 has them interpreted, where",
    "tune bellman --device gpus": r"--device: expected a GPU that Triton kernels run on, got 'gpus': ",
    "tune bellmann": r"OP: expected one of velocity_gram, .*, got bellmann",
    "tune --minutes 0": r"--minutes: expected a positive number, got '0'",
    "tune --out no/such/folder.json": r"--out: expected a folder that exists and can be written to, got no/such",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_any_work(line, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(suite, "cases", None)
    assert main.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    with pytest.raises(ValueError, match=f"^flowkernels: error: {REFUSED[line]}"):
        raise ValueError(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main.main(["tune"]) == 2
    assert "got 'cuda:0': torch sees no GPU" in capsys.readouterr().err
    assert main.main(["tune", "--device", "cpu"]) == 2
    assert "got 'cpu': it is none" in capsys.readouterr().err


def test_refused_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"got 'cuda:3': there is 1, counted from 0$"):
        tune._gpu("cuda:3")


def test_info_says_which_table_is_in_use(gpu, monkeypatch, tmp_path):
    def after(value):
        tuned.asked.cache_clear()
        monkeypatch.setenv(tuned.VARIABLE, value)
        return tuned.in_words()

    assert tuned.in_words() == f"shipped (there is no {gpu})"
    written(gpu, table(format=3))
    assert tuned.in_words() == f"shipped ({gpu}: format: expected 1, got 3)"
    assert after("") == "shipped (FLOWKERNELS_TRITON_CONFIGS is empty)"
    path = written(tmp_path / "mine.json", table())
    assert after(str(path)) == f"{path}, of 2026-01-02, for 1 kernels"
    written(path, table(format=3))
    assert after(str(path)) == f"none: {path}: format: expected 1, got 3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert after(str(path)) == f"{path} on a GPU, of FLOWKERNELS_TRITON_CONFIGS"
