"""What tests/gpu asks of every op. Each check returns what is wrong, one line a sample; none waits for a GPU to exist:
tests/test_gpu_checks.py runs them on the CPU, on kernels compiled for the host.
"""

import contextlib
import warnings

import torch
from _contract import identical
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flowkernels import ops
from flowkernels.ops.samples import Sample, moved, op_args, samples_of
from flowkernels.runtime import environment
from flowkernels.runtime.backends import backend


def samples(op: str) -> list[Sample]:
    return list(samples_of(op).sample_inputs())


def call(op: str, sample: Sample, on: str = "cuda"):
    """The public function, on our kernel in CUDA or in Triton."""
    with backend(on):
        return getattr(ops, op)(*sample.args, **sample.kwargs)


def bare_arguments(op: str, sample: Sample, device) -> tuple:
    """The arguments of the registered op on the device; those that the host reads stay here."""
    args = op_args(op, moved(sample, device))
    return (*args[:2], op_args(op, sample)[2]) if op == "velocity_gram" else args


def bare(op: str, args: tuple, on: str = "cuda"):
    """The registered op: what a graph or a stage's loop holds, without the checks that have to see values."""
    with backend(on):
        return getattr(torch.ops.flowkernels, op)(*args)


def on_cpu(result):
    return tree_map_only(Tensor, lambda t: t.cpu(), result)


def copied(result):
    return tree_map_only(Tensor, lambda t: t.clone(), result)


def memories_of(args) -> list[Tensor]:
    """The floating point memory below the arguments, each once, as flat tensors; expanded ones can be written so."""
    found = {}
    for t in tensors_in(args):
        if t.is_floating_point() and t.numel():
            storage = t.untyped_storage()
            found[storage.data_ptr()] = t.as_strided((storage.nbytes() // t.element_size(),), (1,), 0)
    return list(found.values())


def tensors_in(args) -> list[Tensor]:
    return [t for t in tree_leaves(args) if isinstance(t, Tensor)]


# ---- the checks: (op, device, backend) -> what is wrong ----


def float64(op: str, device, on: str = "cuda") -> list[str]:
    """All samples, with their layouts, within the bounds of the CPU's tests."""
    wrong = []
    for sample in samples(op):
        error, bound = samples_of(op).error_and_bound(sample, on_cpu(call(op, moved(sample, device), on)))
        if not error <= bound:
            wrong.append(f"{sample.id}: {error:.3g} > {bound:.3g}")
        if op == "straighten_loss":
            error, bound = _gradient(sample, device, on)
            if not error <= bound:
                wrong.append(f"{sample.id}, gradient: {error:.3g} > {bound:.3g}")
    return wrong


def _gradient(sample: Sample, device, on: str) -> tuple[float, float]:
    from flowkernels.ops.straighten_loss.samples import gradient_error_and_bound

    there = moved(sample, device)
    v = there.args[0].detach().requires_grad_()
    call("straighten_loss", there._replace(args=(v, *there.args[1:])), on).loss.backward()
    return gradient_error_and_bound(sample, v.grad.cpu())


def same_bits(op: str, device, on: str = "cuda") -> list[str]:
    """Twice, and from memory that holds NaN where nothing has been written."""
    wrong = []
    for sample in samples(op):
        there = moved(sample, device)
        first, second = copied(call(op, there, on)), copied(call(op, there, on))
        with poisoned():
            third = call(op, there, on)
        if not (identical(first, second) and identical(first, third)):
            wrong.append(sample.id)
    return wrong


@contextlib.contextmanager
def poisoned():
    """Every torch.empty holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def graph(op: str, device, on: str = "cuda") -> list[str]:
    """Captured once; replayed on the inputs that it saw, and on others copied to their place."""
    wrong = []
    for sample in samples(op):
        args = bare_arguments(op, sample, device)
        if not sample.args[0].numel():
            continue  # nothing to launch, and CUDA has no empty graphs
        eager = copied(bare(op, args, on))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            bare(op, args, on)
        torch.cuda.current_stream(device).wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
            out = bare(op, args, on)
        recorded.replay()
        if not identical(out, eager):
            wrong.append(f"{sample.id}: the replay differs from the call")
        for memory in memories_of([t for t in tensors_in(args) if t.device.type == torch.device(device).type]):
            memory.mul_(0.5)
        recorded.replay()
        if not identical(out, bare(op, args, on)):
            wrong.append(f"{sample.id}: the replay does not see new values")
    return wrong


WAITS = dict.fromkeys(("bellman", "bellman_pairs"), "it reads one flag")


def no_wait(op: str, device, on: str = "cuda") -> list[str]:
    """No sync, by torch's own watch. It sees what torch does: our launchers have no call that could wait."""
    wrong = []
    for sample in samples(op):
        args = bare_arguments(op, sample, device)
        bare(op, args, on)  # what is made once a process may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            bare(op, args, on)
        except RuntimeError as e:
            wrong.append(f"{sample.id}: {str(e).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return wrong


def other_stream(op: str, device, on: str = "cuda") -> list[str]:
    """On a stream that is busy, behind which the inputs get their values: a kernel on another stream sees zeros."""
    wrong = []
    for sample in samples(op):
        args = bare_arguments(op, sample, device)
        eager = copied(bare(op, args, on))
        places = memories_of([t for t in tensors_in(args) if t.device.type == torch.device(device).type])
        values = copied(places)
        for place in places:
            place.mul_(0.0)  # NaN stays
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # cycles
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            out = bare(op, args, on)
        stream.synchronize()
        if not identical(out, eager):
            wrong.append(sample.id)
    return wrong


# ---- sizes past 2^31 elements: (device, elements, backend) -> the largest error in ulp of float32; a few are allowed


def _apart(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    worst = ((got.double() - expected.double()).abs() / scale.double()).max().item()
    return worst / torch.finfo(torch.float32).eps


def _pieces(n: int, size: int = 1 << 26):
    return (slice(i, min(n, i + size)) for i in range(0, n, size))


def large_euler_step(device, n: int, on: str = "cuda") -> float:
    x, v = torch.rand(n, device=device), torch.rand(n, device=device, dtype=torch.bfloat16)
    with backend(on):
        out = ops.euler_step(x, v, 0.5)
    return max(_apart(out[p], x[p].double() + 0.5 * v[p].double(), x[p] + v[p].float() + 1) for p in _pieces(n))


def large_linear_update(device, n: int, on: str = "cuda") -> float:
    x, v = torch.rand(n, device=device), torch.rand(n, device=device, dtype=torch.bfloat16)
    with backend(on):
        out = ops.linear_update(x, [v, v], [0.5, -0.25])
    return max(_apart(out[p], x[p].double() + 0.25 * v[p].double(), x[p] + v[p].float() + 1) for p in _pieces(n))


def large_segment_points(device, n: int, on: str = "cuda") -> float:
    """A bank of n elements or more, read at its end."""
    D = n // 6 + 1
    bank = torch.rand(3, 2, D, device=device)
    last, u = torch.tensor([1], device=device), torch.tensor([0.25], device=device)
    with backend(on):
        out = ops.segment_points(bank, last, last, u)[0]
    a, b = bank[1, 1], bank[2, 1]
    return max(_apart(out[p], a[p].double() + 0.25 * (b[p].double() - a[p].double()), a[p] + b[p]) for p in _pieces(D))


def large_straighten_loss(device, n: int, on: str = "cuda") -> float:
    D = n // 6 + 1
    bank, v = torch.rand(3, 2, D, device=device), torch.rand(1, D, device=device).requires_grad_()
    last, h = torch.tensor([1], device=device), torch.tensor([0.5, 0.5], device=device)
    with backend(on):
        ops.straighten_loss(v, bank, h, last, last).loss.backward()
    a, b, p = bank[1, 1], bank[2, 1], v.detach()[0]

    def piece(s):
        expected = (p[s].double() - (b[s].double() - a[s].double()) / 0.5) * 2  # the mean over D comes last
        return _apart(v.grad[0, s].double() * D, expected, p[s] + 2 * (a[s] + b[s]) + 1)

    return max(map(piece, _pieces(D)))


def large_velocity_gram(device, n: int, on: str = "cuda") -> float:
    """Three velocities of n elements together, more in all than 2^31."""
    D = n // 3 + 1
    v = torch.rand(3, 1, D, device=device, dtype=torch.bfloat16)
    with backend(on):
        got = ops.velocity_gram(v)
    truth = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for p in _pieces(D):
        rows = v[:, 0, p].double().diff(dim=0)
        truth += rows @ rows.T
    norms = truth.diagonal().sqrt()
    # relative to |a_i| |a_j|; allowed are 1e-5, which is 84 ulp, as much as 4 ulp are here
    return 4 / 84 * _apart(got, truth, norms[:, None] * norms)


LARGE = {  # and the bytes that it takes for each of n elements
    "euler_step": (large_euler_step, 4 + 2 + 4),
    "linear_update": (large_linear_update, 4 + 2 + 4),
    "segment_points": (large_segment_points, 4 + 2),
    "straighten_loss": (large_straighten_loss, 4 + 4),
    "velocity_gram": (large_velocity_gram, 2 + 2),
}


# ---- what is printed last ----


def table(results: list[tuple[str, str]]) -> str:
    """results: (test's id, "passed", "failed" or "skipped"). For each op its checks; other tests below, by name."""
    words = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
    of_ops, others = {}, {}
    for name, outcome in results:
        file, _, test = name.rpartition("/")[2].partition("::")
        check, _, parameter = test.partition("[")
        if file == "test_ops.py" and parameter:
            of_ops.setdefault(parameter.rstrip("]"), {})[check.removeprefix("test_")] = words[outcome]
        else:
            counts = others.setdefault(f"{file.removesuffix('.py')}: {check.removeprefix('test_')}", {})
            counts[outcome] = counts.get(outcome, 0) + 1
    checks = list(dict.fromkeys(c for row in of_ops.values() for c in row))
    lines = []
    if of_ops:
        lines.append(f"{'op':<26}" + "".join(f"{c:>14}" for c in checks))
        lines += [f"{op:<26}" + "".join(f"{row.get(c, '-'):>14}" for c in checks) for op, row in of_ops.items()]
    lines += [f"{name:<60} " + ", ".join(f"{n} {o}" for o, n in counts.items()) for name, counts in others.items()]
    return "\n".join(lines)


def machine() -> str:
    """The GPU, its driver and the versions; and the date."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = environment.provenance(device)
    keys = ("device", "driver", "cuda", "torch", "flowkernels", "commit", "date")
    return " | ".join(f"{k} {found[k]}" for k in keys if found.get(k))
