"""What a call costs beside its work, by layer: every op on one 8x8 image, by the public function, by the dispatcher of
torch, by the call of our own stages, which has checked its arguments before, and by the bare binding of the C++ kernel;
the choice of a backend; the look of a fused sampler at its network, beside one at the weights' versions alone, and that
of a captured loop, beside one at their addresses alone."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT
from flowkernels.ops.library import KERNELS, stream_of
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends
from flowkernels.sampling.state import State, holds_reference


class _Seen(TorchDispatchMode):
    """The registered op that a call ends in, and its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flowkernels":
            self.call = func, args
        return func(*args, **(kwargs or {}))


class _Kept(TorchFunctionMode):
    """Keeps all tensors alive, of which a binding knows the addresses only."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.tensors.append(func(*args, **(kwargs or {})))
        return self.tensors[-1]


class _Spy:
    """The compiled module, of which the last call is remembered."""

    def __init__(self, C):
        self.C = C

    def __getattr__(self, name):
        method = getattr(self.C, name)

        def call(*args):
            self.call = method, args
            return method(*args)

        return call


def layers(op: str, public):
    """Provider -> the same call one layer and two layers further down; its result is that of the public function.
    `mlp_sample` packs weights, into memory of which its binding has the addresses: its inner call is the last layer."""
    with _Seen() as seen:
        expected = public()
    registered, args = seen.call

    def dispatched():
        registered(*args)
        return expected

    calls = {"flowkernels by the dispatcher": dispatched}
    if op == "mlp_sample":
        return calls
    on_gpu = backends.choose(op, args[0].device) == "cuda"
    spy, where = (_Spy(backends.cuda_module()), stream_of(args[0])) if on_gpu else (_Spy(backends.extension()), ())
    with _Kept() as kept:
        kept.tensors.append(KERNELS[op](spy, *args, *where))
    binding, addresses = spy.call

    def bare():
        bare.kept = kept
        binding(*addresses)
        return expected

    return calls | {"flowkernels bare binding": bare}


def cases(device) -> Iterator[Case]:
    on_cpu = device.type == "cpu" and backends.extension() is not None
    on_gpu = device.type == "cuda" and backends.cuda_module() is not None

    def case(op, build):
        def make():
            call, inner, peer, check = build(device)
            calls = ours(call, device)
            if on_cpu:
                calls |= {"flowkernels inner call": inner}
            if on_cpu or on_gpu:
                calls |= layers(op, call)
            return Work(calls | {"torch eager": peer}, check)

        return Case(f"{op}, one 8x8 image", 64, make, quick=True)

    for op in OPS:
        yield case(op, suite.module(op).small)

    def choice():
        x = torch.ones(1, device=device)
        return Work(
            {"flowkernels choice": lambda: backends.choose("euler_step", x.device), "torch eager": lambda: x.device},
            lambda got: (0.0, 0.0 if got in (*backends.BACKENDS, x.device) else -1.0),
        )

    yield Case("choice of a backend", 1, choice, quick=True)

    def watch(net: nn.Module, shape: tuple[int, ...]):
        sampler, known = fk.fuse(net.to(device), 4, shape=shape), [(p, p._version) for p in net.parameters()]
        return Work(
            {
                "flowkernels stale": lambda: sampler.stale,
                "torch eager": lambda: any(p._version != version for p, version in known),
            },
            lambda got: (0.0, -1.0 if got else 0.0),
        )

    mlp = nn.Sequential(nn.Linear(9, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8)).eval()
    yield Case("look at a fused network of 3 layers, for changes", 1, lambda: watch(mlp, (8,)), quick=True)
    digits = BUNDLED["digits"]
    yield Case("look at the digits' fused network, for changes", 1, lambda: watch(digits.load(), digits.shape))

    def held(net: nn.Module):
        state, known = State(net), [(p, p.data_ptr()) for p in net.parameters()]
        return Work(
            {
                "flowkernels state": lambda: state.holds(net),
                "flowkernels state, in Python": lambda: holds_reference(state.marks, net),
                "torch eager": lambda: all(p.data_ptr() == pointer for p, pointer in known),
            },
            lambda got: (0.0, 0.0 if got else -1.0),
        )

    yield Case("look at a DiT, for a captured loop", 1, lambda: held(DiT().to(device).eval()))
