"""Recorded calls: what the file gives back is what the op was given, and `replay` judges each backend by it."""

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from _contract import identical
from safetensors import safe_open
from safetensors.torch import save_file

import flowkernels as fk
from flowkernels.bench import replay
from flowkernels.bench.timers import WallClock
from flowkernels.cli.main import main
from flowkernels.models.networks import ResidualMLP
from flowkernels.ops import recorded_calls
from flowkernels.ops.mlp_sample import Layer, Source
from flowkernels.ops.public import OPS
from flowkernels.ops.recorded_calls import open_calls
from flowkernels.ops.samples import Sample
from flowkernels.runtime import environment, observers

SAMPLES = {op: importlib.import_module(f"flowkernels.ops.{op}.samples") for op in OPS}
CPU = torch.device("cpu")
ROOT = Path(fk.__file__).parents[1]


@pytest.fixture
def unasked(monkeypatch):
    """Nobody asks git and the system what they are, nor for the peak of memory: it takes longer than the calls."""
    monkeypatch.setattr(WallClock, "extra_memory", lambda *_: 0.0)
    monkeypatch.setattr(environment, "provenance", lambda device: {"torch": torch.__version__})


def call(op, sample):
    return getattr(fk, op)(*sample.args, **sample.kwargs)


def recorded(op, run, path, **options):
    """The calls that the file has after `run()`."""
    with fk.record_calls(op, path, **options):
        run()
    return open_calls(path).calls


def leaves(value):
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else [value]


def places(values):
    """Where each tensor begins, from the first that shares its memory."""
    first = {}
    tensors = [t for t in leaves(values) if isinstance(t, torch.Tensor) and t.numel()]
    return [t.data_ptr() - first.setdefault(t.untyped_storage().data_ptr(), t.data_ptr()) for t in tensors]


def overlaps(values):
    """For each tensor the first that begins where it does."""
    tensors = [t.data_ptr() for t in leaves(list(values)) if isinstance(t, torch.Tensor)]
    return [tensors.index(at) for at in tensors]


def assert_same(found, given):
    """Values bit for bit, layouts, sharing and alignment of tensors; equality and type of the rest."""
    found, given = leaves(list(found)), leaves(list(given))
    assert len(found) == len(given)
    for a, b in zip(found, given, strict=True):
        assert type(a) is type(b)
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert identical(a, b)
        assert a.stride() == b.stride()
        assert a.numel() == 0 or (a.data_ptr() - b.data_ptr()) % recorded_calls.PAGE == 0
    assert places(found) == places(given)


# what is stored


@pytest.mark.parametrize("op", OPS)
def test_arguments_of_every_sample_come_back(op, tmp_path, unasked):
    for sample in SAMPLES[op].sample_inputs():
        (found,) = recorded(op, lambda s=sample: call(op, s), tmp_path / "a")
        assert (found.op, found.count, found.device) == (op, 1, CPU)
        assert_same(found.arguments().values(), SAMPLES[op].to_op(sample))


@pytest.mark.parametrize("op", OPS)
def test_samples_to_op_and_back(op):
    for sample in SAMPLES[op].sample_inputs():
        args = SAMPLES[op].to_op(sample)
        assert_same(SAMPLES[op].to_op(SAMPLES[op].from_op(args)), args)


def in_place(x, v):
    low = torch.empty_like(x, dtype=torch.bfloat16)
    fk.euler_step(x, v, 0.5, v_uncond=v, guidance=2.0, out=x, low=low)


def rows_of_one_tensor(x, v):
    states = torch.stack([x, v, v])
    fk.linear_update(states[0], [states[1], v], [0.5, 2.0], out=states[2])


def velocity_over_history(x, v):
    weight, z = torch.randn(24, 5), torch.randn(7, 5)
    fk.linear_euler(x, z, weight, 0.5, history=[v], b=[0.25], velocity_out=v)


@pytest.mark.parametrize(
    ("op", "run", "only_written", "writes_what_it_reads"),
    [
        ("euler_step", in_place, ["low"], True),
        ("linear_update", rows_of_one_tensor, ["out"], False),
        ("linear_euler", velocity_over_history, ["out"], True),
    ],
)
def test_the_forms_that_write_to_a_tensor(op, run, only_written, writes_what_it_reads, tmp_path, unasked):
    given = []

    def see(name, args):
        names = [a.name for a in getattr(torch.ops.flowkernels, name).default._schema.arguments]
        copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in leaves(list(args))]
        given.append((name, dict(zip(names, args, strict=True)), copies))

    x, v = torch.randn(7, 24), torch.randn(7, 24)
    with observers.recorded(see):
        (found,) = recorded(op, lambda: run(x, v), tmp_path / "a")
    (name, args, copies), stored = given[0], found.arguments()
    assert found.op == name == f"{op}_out"
    assert found.in_place is writes_what_it_reads
    assert list(stored) == list(args)
    for a, b in zip(leaves(list(stored.values())), copies, strict=True):
        if isinstance(b, torch.Tensor) and not any(a is stored[k] for k in only_written):
            assert identical(a, b)
    for k in only_written:  # their old values are not stored
        assert stored[k].isnan().all()
    assert overlaps(stored.values()) == overlaps(args.values())


def euler(n, h=0.5, dtype=torch.float32):
    return fk.euler_step(torch.randn(n), torch.randn(n, dtype=dtype), h)


def test_one_call_of_each_signature(tmp_path, unasked):
    def run():
        for n, h in [(3, 0.1), (3, 0.2), (4, 0.1), (3, 0.3), (5, 0.1), (5, 0.1)]:
            euler(n, h)
        euler(3, 0.1, torch.bfloat16)
        x = torch.ones(3)
        fk.euler_step(x, x, 0.1)  # the same shapes, in one tensor

    found = recorded("euler_step", run, tmp_path / "a", calls=4)
    stored = [(c.args["x"]["shape"], c.args["h"], c.args["v"]["dtype"], c.count) for c in found]
    assert stored == [
        ([3], 0.1, "float32", 3),
        ([4], 0.1, "float32", 1),
        ([5], 0.1, "float32", 2),
        ([3], 0.1, "bfloat16", 1),
    ]
    with fk.record_calls("euler_step", tmp_path / "a", calls=4) as recording:
        run()
    assert (recording.seen, len(recording.calls)) == (8, 4)
    assert str(recording).endswith("; left out: signatures beyond 4 calls (--calls)")


def test_only_the_op_that_was_asked_for(tmp_path, unasked):
    def run():
        euler(3)
        fk.linear_update(torch.ones(3), [torch.ones(3)], [0.5])

    assert [c.op for c in recorded("linear_update", run, tmp_path / "a")] == ["linear_update"]


def test_memory_that_is_shared_or_equal_is_stored_once(tmp_path, unasked):
    bank, places = torch.randn(3, 50, 40), torch.arange(4)
    u = torch.rand(6)

    def run():
        fk.segment_points(bank, places % 2, places)
        fk.segment_points(bank, torch.arange(6) % 2, torch.arange(6), u)
        fk.segment_points(bank.clone(), places % 2, places, u[:4])

    found = recorded("segment_points", run, tmp_path / "a")
    assert len(found) == 3
    with safe_open(tmp_path / "a", "pt") as f:
        sizes = [f.get_tensor(name).numel() for name in f.keys()]  # noqa: SIM118
    assert sizes.count(bank.numel()) == 1
    assert (tmp_path / "a").stat().st_size < bank.nbytes + 10_000


def test_a_slice_takes_no_more_than_it_spans(tmp_path, unasked):
    x = torch.randn(1000, 1000)
    (found,) = recorded("euler_step", lambda: fk.euler_step(x[3], x[5].expand(1000), 0.5), tmp_path / "a")
    assert [r["bytes"] for r in found.regions] == [4000, 4000]


def test_calls_beyond_the_size_are_left_out(tmp_path, unasked):
    def run():
        for n in (10, 2000, 20):
            euler(n)

    path = tmp_path / "a"
    with fk.record_calls("euler_step", path, max_gb=1e-6) as recording:
        run()
    assert "a call of euler_step with 8e-06 GB for x, beyond 1e-06 GB in all (--max-gb)" in str(recording)
    stored = [c.arguments()["x"] for c in open_calls(path).calls]
    assert [len(x) for x in stored] == [10, 20]
    with pytest.raises(ValueError, match=r"euler_step: expected a call of it.*got none of 1; left out: .*1e-06 GB"):
        recorded("euler_step", lambda: euler(2000), path, max_gb=1e-6)
    assert len(open_calls(path).calls) == 2  # the file that was there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(op="euler"), "op: expected one of velocity_gram, .*, got 'euler'"),
        (dict(calls=0), "calls: expected at least 1, got 0"),
        (dict(max_gb=0), "max_gb: expected more than 0, got 0"),
        (dict(path="no/such/file"), "path: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    given = {"op": "euler_step", "path": tmp_path / "a", **options}
    with pytest.raises(ValueError, match=message):
        recorded(given.pop("op"), lambda: euler(3), given.pop("path"), **given)


def test_no_call(tmp_path):
    with pytest.raises(ValueError, match=r"euler_step: expected a call of it, to store in .*, got none of 0"):
        recorded("euler_step", lambda: None, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_what_was_seen(tmp_path):
    with pytest.raises(ZeroDivisionError):
        recorded("euler_step", lambda: (euler(3), 1 / 0), tmp_path / "a")
    assert len(open_calls(tmp_path / "a").calls) == 1
    assert not observers.present


def test_a_full_disk_does_not_stop_the_program(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    results = []

    def run():
        results.append(euler(3))
        monkeypatch.setattr(recorded_calls.Recording, "_store", full)
        results.extend([euler(4), euler(5)])

    with pytest.raises(OSError, match="No space left"):
        recorded("euler_step", run, tmp_path / "a")
    assert [len(r) for r in results] == [3, 4, 5]
    assert len(open_calls(tmp_path / "a").calls) == 1


def test_calls_of_every_kind_are_seen(tmp_path, unasked):
    """Of other threads, of the stages' loops and under torch.compile; beside the ranges of a profiler."""
    x, v = torch.randn(6), torch.randn(6)

    def seen(run):
        with fk.record_calls("euler_step", tmp_path / "a") as recording:
            run()
        return recording.seen

    def in_thread():
        thread = threading.Thread(target=euler, args=(3,))
        thread.start()
        thread.join()

    def profiled():
        with fk.profile_ranges():
            euler(3)
        euler(3)

    assert seen(lambda: fk.euler_step(x, v, 0.5)) == 1
    assert seen(in_thread) == 1
    assert seen(profiled) == 2
    assert seen(lambda: fk.sample(lambda x, t: -x, torch.ones(3, 4), 5)) == 5
    assert seen(lambda: fk.rollout(lambda x, t: -x, torch.ones(3, 4), 7)) == 7
    torch._dynamo.reset()
    assert seen(lambda: torch.compile(fk.euler_step, fullgraph=True, backend="aot_eager")(x, v, 0.5)) == 1
    assert not observers.present


@pytest.mark.parametrize("trajectory", [False, True])
def test_a_fused_sampler(trajectory, tmp_path):
    torch.manual_seed(0)
    fused = fk.fuse(ResidualMLP(dim=12, width=16, blocks=1, time_width=8).eval(), 3, shape=(12,))
    noise = torch.randn(5, 12)
    kept = dict(states=trajectory, velocities=trajectory)
    expected = fused.run(noise, **kept)
    (found,) = recorded("mlp_sample", lambda: fused.run(noise, **kept), tmp_path / "a")
    args = found.arguments()
    assert args["trajectory"] is trajectory
    result = torch.ops.flowkernels.mlp_sample(*args.values())
    assert identical(result if trajectory else result[:1], expected if trajectory else expected[:1])


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(13, 16), torch.nn.Linear(16, 12)

    def forward(self, x, t):
        return self.last(torch.nn.functional.silu(self.first(torch.cat([x, t[:, None]], 1))))


@torch.no_grad()
def test_a_fused_head(tmp_path):
    net = Plain().eval()
    head, noise = fk.fuse_head(net, "last"), torch.randn(5, 12)
    found = recorded("linear_euler", lambda: fk.sample(head, noise, 3), tmp_path / "a")
    check, step = found  # the first step is preceded by comparisons with the network's own velocity, at two times
    assert (check.op, check.count, check.args["h"]) == ("linear_euler_out", 2, 0.0)
    assert (step.op, step.count) == ("linear_euler_out", 3)


def test_calls_in_a_graph_are_refused_and_later_ones_are_not(tmp_path, monkeypatch, unasked):
    """As where a CUDA graph is being recorded, on a stand-in."""

    class OnGpu:
        is_cuda = True

        def __getattr__(self, name):
            return getattr(torch.ones(3), name)

    x = torch.ones(3)
    monkeypatch.setattr(recorded_calls, "_signature", lambda op, args: op)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with fk.record_calls("euler_step", tmp_path / "a") as recording:
        for _ in range(2):
            recording.see("euler_step", (OnGpu(), x, 0.5, None, 1.0, None))
        euler(3)
    assert recording.left_out == ["left out: calls in a CUDA graph being recorded, whose inputs hold no values yet"]
    assert (recording.seen, len(recording.calls)) == (3, 1)


# replay


def replayed(line, capsys):
    """(exit code, what it printed, what went to stderr) of `flowkernels replay` and the line, for a short time."""
    code = main(["replay", *map(str, line), "--seconds", "0.02"])
    out, err = capsys.readouterr()
    return code, out, err


def first_samples(op):
    """A few samples of an op, of each layout and dtype that come late among them too."""
    samples = [s for s in SAMPLES[op].sample_inputs() if s.args[0].numel()]
    return samples[:: max(1, len(samples) // 4)]


@pytest.mark.parametrize("op", OPS)
def test_every_backend_is_checked_and_timed_where_it_runs(op, tmp_path, capsys, unasked):
    chosen = first_samples(op)
    recorded(op, lambda: [call(op, s) for s in chosen], tmp_path / "a")
    line = [tmp_path / "a", "--backends", "cpu,reference,cuda", "--json"]
    code, out, err = replayed(line, capsys)
    results = json.loads(out)
    assert code == 0, err or [r for r in results["rows"] if r["gate"] != "ok"]
    assert len(results["rows"]) == 3 * len(open_calls(tmp_path / "a").calls)
    for row in results["rows"]:
        assert row["gate"] == "ok"
        if row["provider"] == "cuda":  # on the host
            assert row["p50_us"] == ""
            assert "emulated on the host" in row["note"]
        else:
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert results["made"]["torch"] == torch.__version__


def test_the_table(tmp_path, capsys):
    recorded("euler_step", lambda: [euler(3), euler(3), in_place(torch.randn(5, 7), torch.randn(5, 7))], tmp_path / "a")
    code, out, _ = replayed([tmp_path / "a"], capsys)
    assert code == 0
    assert f"{tmp_path / 'a'}: 2 calls of euler_step, made with device " in out
    assert "call 0: euler_step(x float32 [3], v float32 [3], h 0.5, guidance 1), 2 times (2 threads)" in out
    assert "low bfloat16 [5, 7]) in place, once" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("  cpu ", "  reference "))]
    assert [(row[0], row[-1]) for row in rows] == [("cpu", "ok"), ("reference", "ok")] * 2
    assert all(float(row[1]) > 0 for row in rows)
    assert "cuda: not run, emulated on the host, where time says nothing: --backends cuda compares its results" in out


def off(t):
    return t.mul_(1.05)


def tampered(op, monkeypatch):
    """The CPU kernel of the op gives something else."""
    module = importlib.import_module(f"flowkernels.ops.{op}")
    if op == "mlp_sample":
        run = module.Prepared.run
        monkeypatch.setattr(module.Prepared, "run", lambda self, x, out, *kept: (run(self, x, out, *kept), off(out))[0])
        return
    if hasattr(module, "OP"):
        holder, name = module.OP, "kernel"
    else:
        holder, name = module, "directly" if op == "straighten_loss" else "_kernel"
    right = getattr(holder, name)

    def wrong(C, *args):
        result = right(C, *args)
        if op == "straighten_loss":
            return (result[0], None if result[1] is None else off(result[1]))
        if op.startswith("bellman"):
            return result[0], result[1] + 1
        if name == "_kernel":
            return torch.where(result.isinf(), result, result * 1.05).to(result.dtype)
        off(args[-2] if op == "linear_euler" and args[-2] is not None else args[-3 if op == "linear_euler" else -2])
        return result

    monkeypatch.setattr(holder, name, wrong)
    if hasattr(module, "plain"):  # which goes by it
        monkeypatch.setattr(module, "plain", lambda *args: None)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_kernel_is_red_and_has_no_speed(op, tmp_path, capsys, monkeypatch, unasked):
    sample = next(s for s in reversed(list(SAMPLES[op].sample_inputs())) if s.args[0].numel() > 30)
    if op == "straighten_loss":  # whose gradient alone is wrong
        sample = Sample(sample.id, (sample.args[0].clone().requires_grad_(), *sample.args[1:]), sample.kwargs)
    recorded(op, lambda: call(op, sample), tmp_path / "a")
    tampered(op, monkeypatch)
    code, out, _ = replayed([tmp_path / "a"], capsys)
    cpu, reference = (line for line in out.splitlines() if line.startswith(("  cpu ", "  reference ")))
    assert code == 1
    assert cpu.split()[1:6] == ["-"] * 5
    assert " RED " in cpu
    assert reference.endswith("  ok")


@pytest.mark.parametrize("name", ["out", "low", "velocity_out"])
def test_a_wrong_output_of_the_form_that_writes(name, tmp_path, capsys, monkeypatch, unasked):
    """One of the three; in the second call onto what it reads, from where no other backend's result is left."""
    module = importlib.import_module("flowkernels.ops.linear_euler")
    right = module.OP.kernel

    def wrong(C, *args):
        right(C, *args)
        off(args[-3 + ["out", "low", "velocity_out"].index(name)])

    def run():
        x, z, weight = torch.randn(7, 24), torch.randn(7, 5), torch.randn(24, 5)
        for out in (torch.empty_like(x), x):
            low = torch.empty_like(x, dtype=torch.bfloat16)
            fk.linear_euler(x, z, weight, 0.5, out=out, low=low, velocity_out=torch.empty_like(low))

    recorded("linear_euler", run, tmp_path / "a")
    assert replayed([tmp_path / "a"], capsys)[0] == 0
    monkeypatch.setattr(module.OP, "kernel", wrong)
    code, out, _ = replayed([tmp_path / "a", "--backends", "reference,cpu"], capsys)
    gates = [line.split("  ")[-1] for line in out.splitlines() if line.startswith(("  cpu ", "  reference "))]
    assert code == 1
    assert [gate[:3] for gate in gates] == ["ok", "RED"] * 2


@pytest.mark.parametrize("op", OPS)
def test_parts_of_a_large_sample(op, monkeypatch):
    """Every part of a right result is right, all of it is looked at, and a wrong element is found in any part."""
    monkeypatch.setattr("flowkernels.ops.samples.PART", 2000 if op in ("mlp_sample", "velocity_gram") else 64)
    for sample in [*SAMPLES[op].sample_inputs()][:: 4 if op == "mlp_sample" else 1]:  # which takes a second each
        got = call(op, sample)
        error, bound, share = replay.check(op, sample, got, {})
        assert error <= bound
        assert share == 1
        first = leaves(got)[0]
        if first.numel() and first.is_floating_point() and not op.startswith("bellman"):
            place = tuple(n // 2 for n in first.shape) if op != "cost_from_gram" else (0, 1)
            first[place] += 10 * (1 + first[torch.isfinite(first)].abs().max())
            error, bound, _ = replay.check(op, sample, got, {})
            assert not error <= bound


def test_a_large_network_is_checked_on_some_samples(tmp_path, capsys, monkeypatch, unasked):
    monkeypatch.setattr(SAMPLES["mlp_sample"], "CHECKED", 5 * 4096 * 2)
    torch.manual_seed(0)
    layers = [Layer("linear", Source(0, 0, 64), 64, torch.randn(64, 64) / 8)]
    x = torch.randn(50, 64)
    recorded("mlp_sample", lambda: fk.mlp_sample(x, [0.5, 0.5], layers), tmp_path / "a")
    code, out, _ = replayed([tmp_path / "a"], capsys)
    assert code == 0
    assert "ok (10 % of the result compared)" in out


def test_an_op_that_raises(tmp_path, capsys, unasked):
    cost = torch.full((3, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="cost"):
        recorded("bellman", lambda: fk.bellman(cost, 2), tmp_path / "a")
    code, out, _ = replayed([tmp_path / "a"], capsys)
    assert code == 1
    assert out.count("raised ValueError: cost: expected no NaN or -Inf") == 2


def test_inputs_that_are_not_finite(tmp_path, capsys, unasked):
    recorded("euler_step", lambda: fk.euler_step(torch.full((3,), torch.nan), torch.ones(3), 0.5), tmp_path / "a")
    code, out, _ = replayed([tmp_path / "a"], capsys)
    assert code == 1
    assert out.count("the inputs hold NaN or Inf") == 2


# what replay refuses


def rewritten(path, change):
    """The file with other metadata."""
    with safe_open(path, "pt") as f:
        about, tensors = json.loads(f.metadata()["flowkernels"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    change(about)
    text = json.dumps(about)
    save_file(tensors, path, {"flowkernels": text, "sha256": recorded_calls._digest(text)})


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of a tensor": (flip, "expected the bytes that were written, got others in 0.v: the file is damaged"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "expected a file of `flowkernels record`, got"),
    "other text": (lambda p: p.write_text("no tensors"), "expected a file of `flowkernels record`, got"),
    "other tensors": (lambda p: save_file({"a": torch.ones(2)}, p), "got a safetensors file of something else"),
    "metadata": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"0.25", b"0.75")),
        "expected the metadata that was written, got other metadata: the file is damaged",
    ),
    "another format": (
        lambda p: rewritten(p, lambda a: a.update(format=2)),
        "expected a file of `flowkernels record` in format 1, got format 2",
    ),
    "another op": (lambda p: rewritten(p, lambda a: a.update(op="eular")), "expected calls of one of velocity_gram"),
    "another schema": (
        lambda p: rewritten(p, lambda a: a["calls"][0].update(schema="euler_step(Tensor x) -> Tensor")),
        "expected calls of the op as this flowkernels has it, got euler_step(Tensor x) -> Tensor, and euler_step is "
        "flowkernels::euler_step(Tensor x, Tensor v, float h,",
    ),
    "no calls": (lambda p: rewritten(p, lambda a: a.pop("calls")), "got one that is damaged (KeyError: 'calls')"),
}


def of_x(**changes):
    return lambda about: about["calls"][0]["args"]["x"].update(changes)


def of_region(**changes):
    return lambda about: about["calls"][0]["regions"][0].update(changes)


def of_call(**changes):
    return lambda about: about["calls"][0].update(changes)


def of_args(**changes):
    return lambda about: about["calls"][0]["args"].update(changes)


FORGED = [
    *(of_x(offset=offset) for offset in (-4, 2, 4, 4096, 2**70, "0", None, True)),
    *(of_x(shape=shape) for shape in ([], [-1], [0], [4], [2**40], [2**63, 2**63], [1.0], 3, None, [3, 1])),
    *(of_x(stride=stride) for stride in ([], [-1], [2], [2**62], ["1"], None)),
    *(of_x(dtype=dtype) for dtype in ("float64", "nn", "Tensor", "__name__", 3, None, ["float32"])),
    *(of_x(tensor=region) for region in (-1, 7, None, 0.0, "0")),
    *(of_x(device=device) for device in ("meta", "cuda:0", "no such", 3, None)),
    *(of_region(bytes=size) for size in (0, 8, 13, 2**50, 2**70, -12, "12", 12.0)),
    *(of_region(page=page) for page in (-1, 4096, 1, None)),
    *(of_region(device=device) for device in ("meta", "no such", 0)),
    *(of_region(data=data) for data in ("0.none", 0, [], {})),
    *(of_call(count=count) for count in (0, -1, 1.5, "1", None)),
    *(of_call(device=device) for device in ("meta", "no such", None)),
    *(of_call(**{key: value}) for key in ("op", "schema", "args", "regions") for value in (None, 3, [], {}, "x")),
    *(of_args(h=value) for value in (None, "0.5", True, [0.5], {"dtype": "float32"})),
    *(of_args(v=value) for value in (None, 1.0, [], {}, {"tensor": 0})),
    *(of_args(low=value) for value in (1, "float16", {"dtype": "int64", "more": 1}, {"dtype": "load"}, [])),
    of_args(another=1),
    *(lambda about, value=value: about.update(calls=value) for value in ([], {}, None, 3, [3], [None], "calls")),
    *(lambda about, value=value: about.update(made=value) for value in (None, [], {"a": []})),
    *(lambda about, value=value: about.update(sha256=value) for value in (None, [], {}, 3)),
    *(lambda about, value=value: about.update(op=value) for value in (None, [], {}, 3)),
    *(lambda about, value=value: about.update(format=value) for value in (None, [], {}, "1")),
]


@pytest.mark.parametrize("forged", range(len(FORGED)))
def test_forged_metadata_is_refused_before_a_tensor_is_made_of_it(forged, tmp_path, unasked):
    path = tmp_path / "a"
    recorded("euler_step", lambda: euler(3, 0.25), path)
    rewritten(path, FORGED[forged])
    with pytest.raises(ValueError, match=f"^{path}: expected"):
        open_calls(path).calls[0].arguments()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage, tmp_path, capsys, unasked):
    path = tmp_path / "a"
    recorded("euler_step", lambda: euler(3, 0.25), path)
    change, message = DAMAGE[damage]
    change(path)
    code, out, err = replayed([path], capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backends gpu", "--backends: expected names out of cuda, "),
        ("--device nowhere", "--device: expected a device of this torch build, got 'nowhere'"),
        ("--threads 0", "--threads: expected an integer of at least 1, got '0'"),
    ],
)
def test_options_of_replay(options, message, tmp_path, capsys, unasked):
    recorded("euler_step", lambda: euler(3), tmp_path / "a")
    code, _, err = replayed([tmp_path / "a", *options.split()], capsys)
    assert code == 2
    assert message in err


def test_a_backend_that_cannot_run_the_calls(tmp_path, capsys, unasked, monkeypatch):
    recorded("euler_step", lambda: euler(3), tmp_path / "a")
    monkeypatch.setattr(replay, "_why_not", lambda name, *_: "its factory burnt down" if name == "cuda" else None)
    code, out, _ = replayed([tmp_path / "a"], capsys)
    assert code == 0
    assert "cuda: not run, its factory burnt down" in out
    code, _, err = replayed([tmp_path / "a", "--backends", "cuda"], capsys)
    assert code == 2
    assert "--backends: expected backends that can run the calls, got 'cuda': its factory burnt down" in err


def test_interpreted_kernels_have_no_speed(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "interpreted" in replay._why_no_speed("triton", CPU)
    assert replay._why_no_speed("triton", gpu) is None
    monkeypatch.setenv("TRITON_INTERPRET", "true")
    assert "interpreted" in replay._why_no_speed("triton", gpu)
    assert [replay._why_no_speed(*where) for where in (("cuda", gpu), ("cpu", CPU), ("reference", CPU))] == [None] * 3


# record


SCRIPT = """
import sys
import helper
import torch
import flowkernels as fk

assert __name__ == "__main__"
print("script", sys.argv)
fk.sample(helper.velocity, torch.ones(3, 4), 5)
if "raise" in sys.argv:
    raise KeyError("half way")
fk.euler_step(torch.ones(3), torch.ones(3), 0.5)
if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder; beside it one with a script and what it imports."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "helper.py").write_text("def velocity(x, t):\n    return -x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    monkeypatch.delenv("FLOWKERNELS_DEBUG", raising=False)
    return tmp_path


def recorded_by(line, capsys):
    before = sys.argv, list(sys.path)
    code = main(["record", *line.split()])
    assert (sys.argv, list(sys.path)) == before
    assert not observers.present
    return code, *capsys.readouterr()


def test_record(folder, capsys, unasked):
    code, out, err = recorded_by("euler_step --from scripts/script.py -- --calls 0", capsys)
    assert (code, err) == (0, "")
    assert "script ['scripts/script.py', '--calls', '0']" in out
    assert "euler_step.safetensors: 2 of 6 calls of euler_step" in out
    found = open_calls("euler_step.safetensors")
    assert [(c.op, c.count) for c in found.calls] == [("euler_step_out", 5), ("euler_step", 1)]
    assert identical(found.calls[0].arguments()["x"], torch.ones(3, 4))


@pytest.mark.parametrize(
    ("args", "code", "message", "kept"),
    [
        ("x 0", 0, "", 2),
        ("x 3", 3, "flowkernels: scripts/script.py exited with code 3\n", 2),
        ("raise", 1, "KeyError: 'half way'\nflowkernels: scripts/script.py raised KeyError\n", 1),
    ],
)
def test_how_a_script_ends(args, code, message, kept, folder, capsys, unasked):
    got, out, err = recorded_by(f"euler_step --from scripts/script.py --out a -- {args}", capsys)
    assert got == code
    assert err.endswith(message)
    assert "runpy" not in err
    assert f"a: {kept} of " in out
    assert len(open_calls("a").calls) == kept


def test_ctrl_c_keeps_what_was_seen(folder, capsys, unasked):
    script = folder / "scripts" / "script.py"
    script.write_text(SCRIPT.replace('KeyError("half way")', "KeyboardInterrupt"))
    code, out, err = recorded_by("euler_step --from scripts/script.py --out a -- raise", capsys)
    assert (code, err) == (130, "flowkernels: interrupted\n")
    assert "a: 1 of 5 calls of euler_step" in out
    assert len(open_calls("a").calls) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eular --from scripts/script.py", "op: expected one of velocity_gram, "),
        ("euler_step --from nowhere.py", "--from: expected a Python script, got nowhere.py, which is no file"),
        ("euler_step", "the following arguments are required: --from"),
        ("euler_step --from scripts/script.py --out no/a", "--out: expected a folder that exists"),
        (
            "bellman --from scripts/script.py",
            "bellman: expected a call of it, to store in bellman.safetensors",
        ),
    ],
)
def test_what_record_refuses(line, message, folder, capsys, unasked):
    code, _, err = recorded_by(line, capsys)
    assert code == 2
    assert message in err
    assert not list(folder.glob("*.safetensors"))


def test_the_commands_as_they_are_installed(folder):
    def run(*line):
        command, env = [sys.executable, "-m", "flowkernels", *line], {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)

    done = run("record", "euler_step", "--from", "scripts/script.py", "--calls", "1", "--", "x", "7")
    assert done.returncode == 7, done.stderr
    assert "1 of 6 calls" in done.stdout
    done = run("replay", "euler_step.safetensors", "--seconds", "0.02", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "call 0: euler_step_out(x float32 [3, 4], v float32 [3, 4], h 0.2, guidance 1, out " in done.stdout
    assert "in place, 5 times (1 threads)" in done.stdout
    assert "cuda: not run, the tensors are on cpu" in done.stdout
