"""What tests/gpu asks of every op. Each check returns what is wrong, one line a sample; none waits for a GPU to exist:
tests/test_gpu_checks.py runs them on the CPU, on kernels compiled for the host.
"""

import contextlib
import warnings

import ops_cases
import torch
from _contract import identical
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import flowkernels as fk
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import Sample, moved, op_args, samples_of
from flowkernels.runtime import environment
from flowkernels.runtime.backends import backend


def samples(op: str) -> list[Sample]:
    return list(samples_of(op).sample_inputs())


def call(op: str, sample: Sample, on: str = "cuda"):
    """The public function, on our kernel in CUDA or in Triton."""
    with backend(on):
        return getattr(fk, op)(*sample.args, **sample.kwargs)


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
        eager = copied(bare(op, args, on))
        if not sample.args[0].numel() or not any(t.numel() for t in tensors_in(eager)):
            continue  # nothing to launch, and CUDA has no empty graphs
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            bare(op, args, on)
        torch.cuda.current_stream(device).wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The CUDA Graph is empty")  # captured on another stream
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


WAITS = {op: why for op in OPS if (why := getattr(ops_cases.of(op), "WAITS", None))}
# past 2^31 elements
LARGE = [op for op in OPS if hasattr(ops_cases.of(op), "large")]


def no_wait(op: str, device, on: str = "cuda") -> list[str]:
    """No sync, by torch's own watch. It sees what torch does: our launchers have no call that could wait."""
    wrong = []
    for sample in samples(op):
        args = bare_arguments(op, sample, device)
        bare(op, args, on)  # what is made once a process may wait
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
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
