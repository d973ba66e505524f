"""What a call costs beside its work, by layer: every op on one 8x8 image, by the public function, by the dispatcher of
torch, by the call of our own stages, which has checked its arguments before, and by the bare binding of the C++ kernel;
the choice of a backend, and the look of a fused sampler at its network, beside one at the weights' versions alone."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels as fk
from flowkernels import ops
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.bundled import BUNDLED
from flowkernels.ops.euler_step import stepper
from flowkernels.ops.library import KERNELS
from flowkernels.ops.mlp_sample import samples as mlp_samples
from flowkernels.ops.straighten_loss import samples as loss_samples
from flowkernels.runtime import backends

from . import (
    bellman,
    bellman_pairs,
    cost_from_gram,
    euler_step,
    linear_euler,
    linear_update,
    segment_points,
    straighten_loss,
    velocity_gram,
)


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
    spy, kept = _Spy(backends.extension()), _Kept()
    with kept:
        kept.tensors.append(KERNELS[op](spy, *args))
    binding, addresses = spy.call

    def bare():
        bare.kept = kept
        binding(*addresses)
        return expected

    return calls | {"flowkernels bare binding": bare}


def kernel(op: str, *args):
    """The op's kernel past the checks and the dispatcher."""
    C = backends.extension()
    return lambda: KERNELS[op](C, *args)


def cases(device) -> Iterator[Case]:
    shape = (1, 1, 8, 8)
    on_cpu = device.type == "cpu" and backends.extension() is not None

    def case(op, build):
        def make():
            call, inner, peer, check = build()
            calls = ours(call, device)
            if on_cpu:
                calls |= {"flowkernels inner call": inner} | layers(op, call)
            return Work(calls | {"torch eager": peer}, check)

        return Case(f"{op}, one 8x8 image", 64, make, quick=True)

    def gram():
        v = torch.randn(10, *shape, device=device)
        check = velocity_gram.error_and_bound
        return (
            lambda: ops.velocity_gram(v),
            kernel("velocity_gram", v, None, None),
            lambda: velocity_gram.gram(v),
            lambda got: check(velocity_gram.Sample("", (v,), {}), got),
        )

    def costs():
        matrix, times = cost_from_gram.inputs(10, device)
        on_device = times.to(device)
        sample = cost_from_gram.Sample("", (matrix.cpu(), times), dict(states=False))
        return (
            lambda: ops.cost_from_gram(matrix, times),
            kernel("cost_from_gram", matrix, times, False),
            lambda: cost_from_gram.reference.cost_from_gram(matrix, on_device),
            lambda got: cost_from_gram.error_and_bound(sample, got.cpu()),
        )

    def recursion():
        cost = torch.rand(11, 11, dtype=torch.float64, device=device)
        sample = bellman.Sample("", (cost.cpu(), 4), {})
        return (
            lambda: ops.bellman(cost, 4),
            kernel("bellman", cost, 4, 1.0),
            lambda: bellman.reference.bellman(cost, 4),
            lambda got: bellman.error_and_bound(sample, [t.cpu() for t in got]),
        )

    def of_pairs():
        args = *(torch.rand(shape, dtype=torch.float64, device=device) for shape in ((11,), (11, 11, 11))), 4
        sample = bellman_pairs.Sample("", tuple(t.cpu() for t in args[:2]) + args[2:], {})
        return (
            lambda: ops.bellman_pairs(*args),
            kernel("bellman_pairs", *args),
            lambda: bellman_pairs.reference.bellman_pairs(*args),
            lambda got: bellman_pairs.error_and_bound(sample, [t.cpu() for t in got]),
        )

    def step():
        x, v, out = (torch.randn(shape, device=device) for _ in range(3))
        sample, inner = euler_step.Sample("", (x, v, euler_step.H), {}), stepper(x)
        return (
            lambda: ops.euler_step(x, v, euler_step.H),
            lambda: inner(x, v, euler_step.H, None, 1.0, out),
            lambda: euler_step.plain(x, v),
            lambda got: euler_step.error_and_bound(sample, got),
        )

    def head():
        x, z, weight = (torch.randn(size, device=device) for size in ((1, 64), (1, 16), (64, 16)))
        sample = linear_euler.Sample("", (x, z, weight, linear_euler.H), {})
        inner = kernel("linear_euler", x, z, weight, *[None] * 7, "pqc", None, linear_euler.H, [], [], None)
        return (
            lambda: ops.linear_euler(x, z, weight, linear_euler.H),
            lambda: inner()[0],
            lambda: linear_euler.head(x, z, weight, *[None] * 5),
            lambda got: linear_euler.error_and_bound(sample, got),
        )

    def update():
        x, *v = (torch.randn(shape, device=device) for _ in range(5))
        b = [0.1, -0.2, 0.3, 0.4]
        sample = linear_update.Sample("", (x, v, b), {})
        inner = kernel("linear_update", x, v, b, None)
        return (
            lambda: ops.linear_update(x, v, b),
            lambda: inner()[0],
            lambda: linear_update.in_place(x, v, b),
            lambda got: linear_update.error_and_bound(sample, got),
        )

    def bank():
        states, place = torch.randn(5, 4, *shape[1:], device=device), torch.tensor([2], device=device)
        return states, place, place

    def points():
        args = (*bank(), torch.tensor([0.3], device=device))
        sample = segment_points.Sample("", args, {})
        return (
            lambda: ops.segment_points(*args),
            kernel("segment_points", *args, torch.float32),
            lambda: segment_points.by_lerp(args[0].flatten(2), *args[1:]).view(shape),
            lambda got: segment_points.error_and_bound(sample, got),
        )

    def loss():
        (states, interval, sample), v = bank(), torch.randn(shape, device=device)
        h = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, device=device)
        args = (v, states, h, interval, sample)
        module, C = sys.modules["flowkernels.ops.straighten_loss"], backends.extension()
        truth = loss_samples.reference.straighten_loss(*args)[0].item()
        return (
            lambda: ops.straighten_loss(*args).loss,
            lambda: module._directly(C, *args, None, 0.0, False)[0][0],
            lambda: straighten_loss.by_autograd(v.flatten(1), states.flatten(2), h.float(), interval, sample, 0.0),
            lambda got: (abs(got.item() / truth - 1), 1e-5),
        )

    def network():
        net = mlp_samples.Network(64, 1, 1).add(64, activation="silu").head().sample("")
        x, h, layers = net.args
        x, layers = x.to(device), [replace(a, weight=a.weight.to(device), shift=a.shift.to(device)) for a in layers]
        first, last = layers
        module, C = sys.modules["flowkernels.ops.mlp_sample"], backends.extension() if on_cpu else None
        out, step_sizes = torch.empty_like(x), torch.tensor(h, dtype=torch.float64)
        plan = C and module.Plan(C, 64, layers, None)
        prepared = C and module.Prepared(plan, step_sizes, module.Tables(layers), None, 1.0)

        def inner():
            prepared.run(x, out)
            return out

        def eager():
            hidden = F.silu(F.linear(x, first.weight, first.shift[0, 0]))
            return x + h[0] * F.linear(hidden, last.weight, last.shift[0, 0])

        return (
            lambda: ops.mlp_sample(x, h, layers),
            inner,
            eager,
            lambda got: mlp_samples.error_and_bound(net, got.cpu()),
        )

    builds = (gram, costs, recursion, of_pairs, step, head, update, points, loss, network)
    for op, build in zip(ops.OPS, builds, strict=True):
        yield case(op, build)

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
