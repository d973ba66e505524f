"""What every op goes through: all its sample inputs on every backend, against float64 and under torch.compile."""

import importlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ops_cases
import pytest
import torch
from _contract import identical, tensors
from _pairs import covering, exhaustive, words_of

import flowkernels as fk
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import arrange, closeness, op_args
from flowkernels.runtime.backends import BACKENDS, backend

SAMPLES = {op: importlib.import_module(f"flowkernels.ops.{op}.samples") for op in OPS}
FUNCTIONS = {op: getattr(fk, op) for op in OPS}
CASES = [(op, s) for op in OPS for s in SAMPLES[op].sample_inputs()]


def of_each_kind() -> list[tuple]:
    """Of each op samples with every dtype, layout and option, and without."""
    of_ops = ([case for case in CASES if case[0] == op] for op in OPS)
    return [case for cases in of_ops for case in covering(cases, lambda case: words_of(case[1].id), together=1)]


KINDS = of_each_kind()


def over(cases):
    return pytest.mark.parametrize(("op", "sample"), [pytest.param(op, s, id=f"{op}-{s.id}") for op, s in cases])


def call(op, sample):
    return FUNCTIONS[op](*sample.args, **sample.kwargs)


# the arguments that have a gradient
DIFFERENTIABLE = {op: which for op in OPS if (which := getattr(ops_cases.of(op), "GRADIENTS", ()))}


def with_gradient(arg):
    if isinstance(arg, list):
        return [with_gradient(a) for a in arg]
    return arg.detach().requires_grad_() if isinstance(arg, torch.Tensor) else arg


@pytest.fixture
def poisoned():
    """Every torch.empty holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_every_op_has_samples():
    for op in OPS:
        ids = [s.id for o, s in CASES if o == op]
        assert len(ids) == len(set(ids)) >= 10
        assert all(
            identical(a.args[0], b.args[0]) for a, b in zip(*(SAMPLES[op].sample_inputs() for _ in "ab"), strict=True)
        )


@pytest.mark.parametrize(("name", "threads"), [*((b, 2) for b in BACKENDS), ("cpu", 1)])
@over(CASES)
def test_against_float64(op, sample, name, threads, record_property):
    torch.set_num_threads(threads)
    with backend(name):
        error, bound = SAMPLES[op].error_and_bound(sample, call(op, sample))
    record_property(op, closeness((error, bound)))  # for scripts/test_seeds
    assert error <= bound


def places(t):
    """The largest number of t and the last: where in its elements, and how large."""
    known = t.double().abs().masked_fill(~t.double().isfinite(), -1).flatten()
    found = {len(known) - 1, int(known.argmax())} if len(known) else ()
    return [(i, known[i].item()) for i in sorted(found) if known[i] >= 0]


def off(result, which, place, error):
    """The result with one number off; an update's low-precision copy is that of the state with the error."""
    parts = [t.clone(memory_format=torch.contiguous_format) for t in tensors(result)]
    t = parts[which].view(-1)
    before = t[place].clone()
    t[place] += error if t.is_floating_point() else 1
    if t[place] == before:  # half an ulp, or less
        t[place] = torch.nextafter(before, torch.full_like(before, math.inf)) if t.is_floating_point() else before + 1
    return parts


@over(CASES)
def test_an_error_of_four_bounds_is_found(op, sample):
    """In any number of any result. How much a bound is at that place is found from what an error of 1000 shows as."""
    result = call(op, sample)
    state_and_copy = len(tensors(result)) == 2 and sample.kwargs.get("low") is not None

    def check(*error):
        parts = off(result, *error)
        if state_and_copy:
            parts[1] = parts[0].to(parts[1].dtype)
        found = parts if isinstance(result, tuple) else parts[0]
        return SAMPLES[op].error_and_bound(sample, type(result)(*found) if hasattr(result, "_fields") else found)

    for which, t in enumerate(tensors(result)[:1] if state_and_copy else tensors(result)):
        for place, size in places(t):
            probe = 1000 * max(size, 1.0)
            error, bound = check(which, place, probe)
            four = 4 * bound * probe / error
            error, bound = check(which, place, four)
            assert error > bound
            assert four <= 1e-3 * probe  # and a bound is small


@over(CASES)
def test_same_bits_every_run_from_poisoned_memory(op, sample, poisoned):
    with backend("cpu"):
        first, second = call(op, sample), call(op, sample)
        torch.use_deterministic_algorithms(False)
        third = call(op, sample)
    assert identical(first, second)
    assert identical(first, third)


def opcheck(op, sample, *utils):
    args = tuple(with_gradient(a) if i in DIFFERENTIABLE.get(op, ()) else a for i, a in enumerate(op_args(op, sample)))
    torch.library.opcheck(getattr(torch.ops.flowkernels, op).default, args, test_utils=utils)


@over(CASES)
def test_opcheck(op, sample):
    opcheck(op, sample, "test_schema", "test_autograd_registration", "test_faketensor")


@over(KINDS)
def test_opcheck_of_what_is_compiled(op, sample):
    opcheck(op, sample, "test_aot_dispatch_dynamic")


# schema, fake and gradient are those of the op; what a backend may get wrong is what it aliases, writes to and returns
OTHERS = [b for b in BACKENDS if b != "cpu"]
ON_OTHERS = [(*case, name) for i, case in enumerate(KINDS) for name in (OTHERS if exhaustive() else [OTHERS[i % 3]])]


@pytest.mark.parametrize(
    ("op", "sample", "name"), [pytest.param(op, s, b, id=f"{op}-{s.id}-{b}") for op, s, b in ON_OTHERS]
)
def test_opcheck_of_other_backends(op, sample, name):
    with backend(name):
        opcheck(op, sample, "test_schema", "test_faketensor")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["sliced", "permuted", "reversed", "channels_last", "expanded", "misaligned"])
@over([next(c for c in CASES if c[0] == op and c[1].args[0].dim() == 4) for op in DIFFERENTIABLE if op[-4:] != "loss"])
def test_gradients_that_arrive_in_any_layout(op, sample, layout, name):
    """Those of every output, against the same numbers side by side. The loss has one number: test_straighten_loss."""
    leaves = [with_gradient(a) if i in DIFFERENTIABLE[op] else a for i, a in enumerate(op_args(op, sample))]
    with backend(name):
        outputs = getattr(torch.ops.flowkernels, op)(*leaves[:-1], torch.bfloat16)
    arriving = [arrange(torch.randn(out.shape).to(out.dtype), layout) for out in outputs]
    inputs = [t for a in leaves for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    got, expected = (
        torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
        for gradients in (arriving, [g.contiguous() for g in arriving])
    )
    assert identical(got, expected)
    x = torch.stack([g.float() for g in arriving]).sum(0)
    torch.testing.assert_close(got[0], x.to(got[0].dtype))


@over(KINDS[::2])  # a compilation takes 0.2 s
def test_compiles_in_one_graph(op, sample):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[op], fullgraph=True, backend="aot_eager")
    got, expected = compiled(*sample.args, **sample.kwargs), call(op, sample)
    assert identical(got, expected)
    assert [t.stride() for t in tensors(got)] == [t.stride() for t in tensors(expected)]


@over([next(c for c in CASES if c[0] == op and c[1].args[0].numel() > 3) for op in OPS])
def test_compiles_with_inductor(op, sample):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[op], fullgraph=True, backend="inductor")
    assert identical(compiled(*sample.args, **sample.kwargs), call(op, sample))


LAYER = "3x64xx4x1152-float32-norm-scale-shift"
SHARED = "threads-n131x65-steps3"


@over([c for c in CASES if c[1].id in ("14x5x205-bfloat16", "65-steps64", "5x6561-float32", LAYER, SHARED)])
def test_calls_from_several_python_threads(op, sample):
    expected = call(op, sample)

    def run(_):
        torch.set_num_threads(2)  # a setting of the calling thread
        return [call(op, sample) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        results = [r for results in pool.map(run, range(4)) for r in results]
    assert len(results) == 20
    assert all(identical(r, expected) for r in results)


# a torch operation on two threads would hang in the children, so there the kernels alone touch what is large
FORK = """
import mmap, multiprocessing, sys
import numpy, torch
from flowkernels import euler_step, linear_update, mlp_sample, velocity_gram
from flowkernels.ops.mlp_sample import Layer, Source

n = 1 << 17
torch.set_num_threads(2)
x = torch.from_numpy(numpy.sin(numpy.arange(n, dtype=numpy.float32)))

def run(gram, state):
    gram.copy_(velocity_gram(x.view(8, -1)).view(-1))
    euler_step(x, x, 0.1, out=state)
    linear_update(state, [x, x], [0.2, 0.3], out=state)
    layers = [Layer("linear", Source(0, 0, 64), 64, state[:4096].view(64, 64))]
    state[: 1 << 14].copy_(mlp_sample(x[: 1 << 14].view(256, 64), [0.01] * 10, layers).view(-1))

def run_in_child():
    out = torch.frombuffer(mmap.mmap(-1, 4 * (n + 49)), dtype=torch.float32).split([49, n])
    child = multiprocessing.get_context("fork").Process(target=run, args=out)
    child.start()
    child.join(20)
    if child.is_alive():
        child.kill()
        sys.exit("the child hangs")
    assert child.exitcode == 0
    return out

before = run_in_child()
print("forked before any use of threads", flush=True)
assert (x.exp() + 1).sum() > 0
after_torch = run_in_child()
print("forked after torch has used them", flush=True)
expected = torch.empty(49), torch.empty(n)
run(*expected)
after_kernels = run_in_child()
print("forked after the kernels have used them", flush=True)
for got in (before, after_torch, after_kernels):
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
"""


def test_runs_in_a_forked_child():
    """With two threads set. What is printed tells how far it came."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
