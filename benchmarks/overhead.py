"""What a call costs beside its work, by layer: every op on one 8x8 image, by the public function, by the dispatcher of
torch, by the call of our own stages, which has checked its arguments before, and by the bare binding of the C++ kernel;
the loops of `sample`, `rollout`, `invert`, a multistep solver and a fused sampler beside plain loops of torch; the
choice of a backend; the look of a fused sampler at its network, beside one at the weights' versions alone, and that
of a captured loop, beside one at their addresses alone."""

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT, UNet
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


STEPS = 8


class WithTime(nn.Module):
    """A network whose input has the time as its last column."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


def mlp(d: int, width: int, depth: int) -> nn.Sequential:
    sizes = [d + 1, *[width] * depth, d]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def plain_loop(net, x, steps, states: bool = False, backward: bool = False, multistep: bool = False):
    """What anybody writes; of one time for all samples."""
    times = torch.linspace(0, 1, steps + 1, device=x.device)
    times = times.flip(0) if backward else times
    sizes, all_x, all_v = times.diff().tolist(), [x], []
    for i, h in enumerate(sizes):
        v = net(x, times[i].expand(len(x)))
        x = x + 1.5 * h * v - 0.5 * h * all_v[-1] if multistep and i > 0 else x + h * v
        if states:
            all_x.append(x)
        if states or multistep:
            all_v.append(v)
    return (torch.stack(all_x), torch.stack(all_v)) if states else x


def loops(device) -> Iterator[Case]:
    """Stages beside the plain loop on the same network: a callable, a `VelocityField`, and fused where it can be."""

    def of(kind: str, net: nn.Module, x, field: fk.VelocityField, fuses: bool):
        solver = fk.Solver.adams_bashforth(STEPS, 2)
        stage, options = {
            "sample": (lambda v: fk.sample(v, x, STEPS), {}),
            "rollout": (lambda v: fk.rollout(v, x, STEPS).x[-1], dict(states=True)),
            "invert": (lambda v: fk.invert(v, x, STEPS, round_trip=False).noise, dict(backward=True)),
            "two-step solver": (lambda v: fk.sample(v, x, solver), dict(multistep=True)),
        }[kind]

        def peer():
            found = plain_loop(net, x, STEPS, **options)
            return found[0][-1] if kind == "rollout" else found

        truth = peer()

        def check(got):
            return (got - truth).abs().max().item(), 1e-4 * max(1.0, truth.abs().max().item())

        calls = {"flowkernels callable": lambda: stage(net), "flowkernels VelocityField": lambda: stage(field)}
        if fuses and kind == "sample":
            sampler = fk.fuse(field, STEPS, shape=x.shape[1:])
            calls |= {"flowkernels fused": lambda: sampler(x), "flowkernels sample of fused": lambda: stage(sampler)}
        return Work(calls | {"torch eager": peer}, check)

    networks = {
        "3 -> 64 -> 2": (lambda: mlp(2, 64, 1), (2,), True),
        "65 -> 256 x 3 -> 64": (lambda: mlp(64, 256, 3), (64,), True),
        "digits UNet": (UNet, (1, 8, 8), False),
    }
    for name, (build, shape, as_column) in networks.items():
        for kind in ("sample", "rollout", "invert", "two-step solver"):
            for n in (1, 16, 256):

                def make(build=build, shape=shape, as_column=as_column, kind=kind, n=n):
                    torch.manual_seed(0)
                    inner = build().to(device).eval()
                    net = WithTime(inner).eval() if as_column else inner
                    field = fk.VelocityField(inner, time_column=as_column).eval()
                    return of(kind, net, torch.randn(n, *shape, device=device), field, as_column)

                yield Case(f"{kind}, {name}, n={n}, N={STEPS}", n, make, quick=name.startswith("3") and n == 1)


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

    yield from loops(device)

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
