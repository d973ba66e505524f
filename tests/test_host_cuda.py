"""The CUDA kernels on the host, beyond their results: the checked build, orders of threads, coalescing, seeded bugs."""

import importlib
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _host_cuda
import ops_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowkernels as fk
from flowkernels.ops.library import DTYPE_CODES
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import generator
from flowkernels.runtime import backends
from flowkernels.runtime.backends import CUDA_OPS, backend

ROOT = Path(__file__).parents[1]
OPS = [op for op in OPS if op in CUDA_OPS]
SAMPLES = {op: importlib.import_module(f"flowkernels.ops.{op}.samples") for op in OPS}

# Elements of all arguments, over which a sample is left out: the checked build takes some 100 ns for each access.
LARGEST_CHECKED = 20_000
LARGEST_ORDERED = 50_000


def tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def leaves(values):
    """Tensors among these and in the attributes of these."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        return leaves(list(values.values()))
    if isinstance(values, list | tuple):
        return [t for v in values for t in leaves(v)]
    return leaves(vars(values)) if hasattr(values, "__dict__") else []


def up_to(largest):
    """Every op's samples of up to so many elements."""
    cases = [(op, s) for op in OPS for s in SAMPLES[op].sample_inputs()]
    return [(op, s) for op, s in cases if sum(t.numel() for t in leaves([s.args, s.kwargs])) <= largest]


def over_samples(largest):
    params = [pytest.param(op, s, id=f"{op}-{s.id}") for op, s in up_to(largest)]
    return pytest.mark.parametrize(("op", "sample"), params)


def uses_cp_async(op):
    return "cp_async" in (ROOT / f"csrc/{op}/cuda.cu").read_text()


# ---- the checked build ----


class Watch(TorchDispatchMode):
    """Registers the memory of tensors that come to be, and keeps it. What torch.empty gives is not initialised; what
    any other operation makes or writes to is."""

    def __init__(self, module):
        super().__init__()
        self.module, self.kept, self.inside = module, {}, False

    def register(self, t, initialised, name):
        storage = t.untyped_storage()
        self.kept[storage.data_ptr()] = storage
        self.module.buffer(storage.data_ptr(), storage.nbytes(), t.element_size(), initialised, name)

    def enter_op(self):
        """Torch takes a mode away while an operation runs under it, and ours make their tensors there."""
        if not self.inside:
            self.inside = True
            self.__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flowkernels":
            try:
                return func(*args, **(kwargs or {}))
            finally:
                if self.inside:
                    self.inside = False
                    self.__exit__(None, None, None)
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1]
        writes = func._schema.is_mutable
        for t in tensors([result, args] if writes else result):
            if writes or t.untyped_storage().data_ptr() not in self.kept:
                self.register(t, not name.startswith(("empty", "new_empty")), f"tensor {len(self.kept)} ({name})")
        return result


@pytest.fixture(scope="module")
def checked_module():
    return _host_cuda.module("host_cuda_checked")


@pytest.fixture
def checked(checked_module, monkeypatch):
    """The checked build, and a function that makes a call on it: it returns the result, and how many elements of it
    were never written."""
    module = checked_module
    module.clear()

    def run(function, *args, **kwargs):
        module.clear()
        watch = Watch(module)
        for i, t in enumerate(leaves([args, kwargs])):
            watch.register(t, True, f"argument {i}")
        with monkeypatch.context() as patch, backend("cuda"), watch:
            patch.setattr(backends, "cuda_module", lambda: watch.enter_op() or module)
            result = function(*args, **kwargs)
        missing = {}  # by storage, which may have gaps between the elements of its tensors
        for t in tensors(result):
            storage = t.untyped_storage()
            gaps = missing.get(storage.data_ptr(), storage.nbytes() // t.element_size())
            missing[storage.data_ptr()] = gaps - t.numel()
        return result, sum(max(0, module.unwritten(p) - gaps) for p, gaps in missing.items())

    with _host_cuda.in_place(module):
        yield module, run
    module.async_lazy(True)
    module.clear()


@over_samples(LARGEST_CHECKED)
def test_checked(op, sample, checked):
    module, run = checked
    for lazy in (True, False) if uses_cp_async(op) else (True,):
        module.async_lazy(lazy)
        result, missing = run(getattr(fk, op), *sample.args, **sample.kwargs)
        assert missing == 0
        error, bound = SAMPLES[op].error_and_bound(sample, result)
        assert error <= bound


@pytest.mark.parametrize(
    ("K", "M", "dtype"), [(140, 200, torch.float32), (160, 133, torch.bfloat16), (300, 70, torch.float32)]
)
def test_checked_velocity_gram_of_more_rows_than_a_panel(K, M, dtype, checked):
    """Samples have fewer. The columns grow: scales are lowered as they come."""
    _, run = checked
    v = (torch.randn(K, 1, M, generator=generator()) * 2.0 ** (torch.arange(M) * (30 / M))).to(dtype)
    gram, missing = run(fk.velocity_gram, v)
    assert missing == 0
    a = v.double().flatten(1).diff(dim=0)
    norms = a.norm(dim=1)
    assert ((gram - a @ a.T).abs() <= 1e-6 * norms[:, None] * norms).all()


# ---- orders of threads ----


@pytest.fixture
def plain():
    module = _host_cuda.module()
    yield module
    module.schedule(0, 1)
    module.async_lazy(True)


def bits(result):
    return [t.contiguous().view(-1).view(torch.uint8) for t in tensors(result)]


@over_samples(LARGEST_ORDERED)
def test_same_bits_in_any_order(op, sample, plain):
    def run(order, seed=1, lazy=True):
        plain.schedule(order, seed)
        plain.async_lazy(lazy)
        with backend("cuda"):
            return bits(getattr(fk, op)(*sample.args, **sample.kwargs))

    others = [run(1), run(2), run(2, seed=7, lazy=False)]
    if uses_cp_async(op):
        others.append(run(0, lazy=False))
    expected = run(0)
    for other in others:
        assert all(map(torch.equal, expected, other))


def test_threads_that_need_different_amounts_of_shared_memory(plain):
    """After a setter of a kernel's limit there is a pause, in which the other thread comes to its own."""

    def run(op, sample):
        with backend("cuda"):
            return bits(getattr(fk, op)(*sample.args, **sample.kwargs))

    calls, plain_results = {}, {}
    plain.large_launches()
    for op, sample in up_to(LARGEST_ORDERED):
        if "allow_shared(" in (ROOT / f"csrc/{op}/cuda.cu").read_text():
            result = run(op, sample)
            for kernel, size in plain.large_launches():
                calls.setdefault(kernel, {})[size] = op, sample
                plain_results[op, sample.id] = result
    pairs = [pair for by_size in calls.values() for pair in itertools.combinations(by_size.values(), 2)]
    assert len(pairs) > 5
    both = threading.Barrier(2)

    def thread(number):
        for pair in pairs:
            op, sample = pair[number]
            both.wait()
            try:
                assert all(map(torch.equal, run(op, sample), plain_results[op, sample.id]))
            except BaseException:
                both.abort()
                raise

    plain.pause(2)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(thread, (0, 1)))
    finally:
        plain.pause(0)


# ---- sectors and banks ----


def source(where):
    # gcc counts a few instructions of a cuda.cu as those of the file that includes it
    path, line = re.sub(r"^host_cuda/(\w+)\.cpp:", r"\1/cuda.cu:", where).rsplit(":", 1)
    return (ROOT / "csrc" / path).read_text().splitlines()[int(line) - 1].strip()


@pytest.mark.parametrize("op", OPS)
def test_accesses_are_coalesced_and_without_bank_conflicts(op, checked):
    module, run = checked
    for function, args, kwargs, exceptions in ops_cases.of(op).accesses():
        run(function, *args, **kwargs)
        lines = [line for line in module.lines() if line[2] != "atomic"]
        assert lines
        excess = []
        for where, space, kind, size, requests, _, parts, least in lines:
            times = max((m for text, m in exceptions.items() if text in source(where)), default=1)
            if parts > least * times:
                excess.append(f"{where}: {space} {kind} of {size} bytes: {parts} for {least} in {requests} requests")
        assert not excess, "\n".join(excess)


# ---- the matrix unit ----


def product(module, a, b):
    d = torch.empty(16, 8)
    for name, t in dict(a=a, b=b, d=d).items():
        module.buffer(t.data_ptr(), t.nbytes, t.element_size(), t is not d, name)
    module.product(DTYPE_CODES[a.dtype], a.data_ptr(), b.data_ptr(), d.data_ptr(), a.shape[1])
    assert module.unwritten(d.data_ptr()) == 0
    return d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_unit(dtype, checked):
    module, _ = checked
    small = torch.arange(-64, 64).view(8, 16)
    a, b = torch.cat([small, 3 - small]).to(dtype), (small % 11).to(dtype)
    assert torch.equal(product(module, a, b), (a.double() @ b.double().T).float())  # whole numbers are exact

    g = generator(0)
    a, b = (torch.rand(rows, 4096, generator=g).to(dtype) for rows in (16, 8))
    truth = a.double() @ b.double().T
    error = (product(module, a, b) - truth) / truth
    # cut off towards zero at each of 512 sums of nine terms, by up to 9 halves of an ulp and by one
    assert (error < 0).all()
    assert (error > -512 * 5.5 * 2**-23).all()

    b[:, 5] = torch.inf
    a[3, 5] = 0
    d = product(module, a, b)
    assert d[3].isnan().all()
    assert d[4].isinf().all()


# ---- seeded bugs ----

BUGS = {  # in the order of tests/csrc/host_cuda.cu: what the report says
    "none": None,
    "missing_barrier": r"race in shared memory: store .* after a load",
    "missing_wait": r"uninitialised shared memory",
    "missing_atomic": r"race in large: load by block (\d) thread \d+, after a store by block \1 thread \d+",
    "missing_fence": r"race in scratch: load by block (\d) thread 0, after a store by block (?!\1)\d thread 0",
    "overrun": r"store of 4 bytes out of bounds: at byte \d+ of sums, which has 400",
    "shared_overrun": r"load of 4 bytes outside of every shared array",
    "divergent_shuffle": r"deadlock(.|\n)*waits in a warp collective",
    "shuffle_from_outside": r"shuffle from lane 0, which is not in the mask 0xffff0000",
    "divergent_barrier": r"divergent barrier",
    "early_exit": r"divergent barrier",
    "uninitialised_shared": r"uninitialised shared memory",
    "uninitialised_global": r"uninitialised scratch: element 1 read by block \d thread 0",
    "unwritten_output": None,
    "misaligned": r"misaligned store of 8 bytes",
    "shared_store": r"store_vector to shared memory",
}
SEEDED = ROOT / "tests/csrc/host_cuda.cu"


def test_every_seeded_bug_is_listed():
    (names,) = re.findall(r"enum Bug \{(.*?)kBugs", SEEDED.read_text(), re.S)
    assert re.findall(r"\w+", names) == list(BUGS)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bug(bug, order, checked):
    module, _ = checked
    module.schedule(order, 3)
    n = 100  # a block, and one with lanes that have no row
    arrays = dict(
        x=torch.randn(n, 4),
        sums=torch.empty(n + 64)[:n],  # what follows is nobody's
        scratch=torch.empty(2),
        total=torch.empty(1),
        done=torch.zeros(1, dtype=torch.int32),
        large=torch.zeros(1, dtype=torch.int32),
    )
    for name, t in arrays.items():
        module.buffer(t.data_ptr(), t.nbytes, 4, name in ("x", "done", "large"), name)
    try:
        module.seeded_bug(list(BUGS).index(bug), *(t.data_ptr() for t in arrays.values()), n)
        text = None
    except RuntimeError as e:
        text = str(e)
    finally:
        module.schedule(0, 1)
    if BUGS[bug] is None:
        assert text is None
        assert module.unwritten(arrays["sums"].data_ptr()) == (bug == "unwritten_output")
        rows = arrays["x"].sum(1)
        if bug == "none":
            assert torch.allclose(arrays["sums"], rows, atol=1e-5)
            assert torch.allclose(arrays["total"], rows.sum(), atol=1e-4)
            assert arrays["large"] == (arrays["sums"] > 0).sum()
        return
    assert text is not None
    assert re.search(BUGS[bug], text), text
    lines = [i for i, line in enumerate(SEEDED.read_text().splitlines(), 1) if re.search(rf"// .*\b{bug}\b", line)]
    assert any(f"host_cuda.cu:{i}" in text for i in lines), text
