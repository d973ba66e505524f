"""Every operation that fuses, in the forms that torch has of it, and what is refused, with its reason: one table each.

Random networks of all that fuses are drawn as well; FLOWKERNELS_FUSED says how many, for hours by hand.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from test_fuse import ACTIVATIONS, noise
from test_fuse_solver import fitted, loop
from torch import nn
from torch.nn.utils import parametrizations

import flowkernels as fk
from flowkernels.ops.mlp_sample.samples import error_and_bound
from flowkernels.ops.samples import Sample, generator

DIM, W, COND = 4, 6, 3


class Hand(nn.Module):
    """An operation of features between two linear layers; conditioning `c`, with parameters and constants that it may
    take."""

    def __init__(self, function, modules=None, out=W):
        super().__init__()
        self.function, self.inp, self.out = function, nn.Linear(DIM, W), nn.Linear(out, DIM)
        self.p, self.q, self.one = nn.Parameter(torch.ones(W)), nn.Parameter(torch.ones(W)), nn.Parameter(torch.ones(1))
        self.m, self.wide = nn.Parameter(torch.ones(W, W)), nn.Parameter(torch.ones(W, W // 2))
        self.embed, self.encode = nn.Linear(W, W), nn.Linear(COND, W)
        self.more = nn.ModuleDict(modules or {})
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, False]))
        self.register_buffer("order", torch.tensor([3, 1, 0, 5, 5, 2]))
        self.register_buffer("large", torch.tensor([2**24 + 1, -(2**31) - 1, 3, 97, 2**40 + 1, 0]))

    def forward(self, x, t, c):
        h = self.function(self, self.inp(x), t[:, None].to(x.dtype), c)
        return self.out(h.reshape(len(x), -1))


def statistics(norm):
    g = generator(3)
    norm.running_mean.copy_(torch.randn(norm.num_features, generator=g))
    norm.running_var.copy_(torch.rand(norm.num_features, generator=g) + 0.3)
    return norm


class Root(nn.Module):
    """RMSNorm by hand."""

    def __init__(self, form, w=W):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.ones(w))

    def forward(self, h):
        return self.form(h) * self.weight


def with_slices(self, t):
    """A time embedding by slice assignment."""
    e = torch.zeros(len(t), W, dtype=t.dtype)
    angles = t * torch.arange(1, W // 2 + 1)
    e[:, ::2] = torch.sin(angles)
    e[:, 1::2] = torch.cos(angles)
    return self.embed(e)


def assigned(h, value):
    h = h.clone()
    h[:, 1:4] = value
    return h


def added_in_a_slice(h):
    h = h.clone()
    h[:, :2] += 1.5
    left, right = h.chunk(2, 1)
    left.mul_(2.0)
    right[:, 0].zero_()
    return torch.tanh(h) + h.flip(1)


def in_place(h, name, *args, **kwargs):
    return getattr(h.clone(), name)(*args, **kwargs)


def through_a_view(self, h):
    rows = h.clone().view(-1, 2, 3)
    rows[:, 1].copy_(self.p[:3])
    rows.transpose(1, 2)[:, 0].add_(1.0)
    first, second = rows.unbind(1)
    second.clamp_(-0.5, 0.5)
    return rows + 0 * first[:, None]


PLAIN = {
    # activations, functional, as methods and in place
    **{f"module {name}": (lambda s, h, t, c: s.more["act"](h), dict(act=f)) for name, f in ACTIVATIONS.items()},
    "module of relu6": (lambda s, h, t, c: s.more["act"](10 * h), dict(act=nn.ReLU6)),
    "module of hardtanh": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.Hardtanh(-0.3, 0.4))),
    "module of hardswish": (lambda s, h, t, c: s.more["act"](3 * h), dict(act=nn.Hardswish)),
    "module of hardsigmoid": (lambda s, h, t, c: s.more["act"](3 * h), dict(act=nn.Hardsigmoid)),
    "module of softplus": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.Softplus(1.7, 30.0))),
    "module of log sigmoid": (lambda s, h, t, c: s.more["act"](h), dict(act=nn.LogSigmoid)),
    "module of celu": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.CELU(1.4))),
    "module of prelu": (lambda s, h, t, c: s.more["act"](h), dict(act=nn.PReLU)),
    "module of prelu, slopes": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.PReLU(W))),
    "module of threshold": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.Threshold(0.2, 0.2))),
    "module of tanhshrink": (lambda s, h, t, c: s.more["act"](h), dict(act=nn.Tanhshrink)),
    "module of softshrink": (lambda s, h, t, c: s.more["act"](h), dict(act=lambda: nn.Softshrink(0.2))),
    "functions": (lambda s, h, t, c: F.softplus(F.relu6(F.prelu(h, s.p.abs()))) + F.celu_(h + 0, 0.7)),
    "elu with all scales": (lambda s, h, t, c: torch.ops.aten.elu(h, 1.3, 0.8, 1.7)),
    "methods in place": (
        lambda s, h, t, c: in_place(h, "clamp_", min=-0.2).mul_(2.0).sigmoid_().neg_().add_(h, alpha=3)
    ),
    "swish by hand": (lambda s, h, t, c: h * torch.sigmoid(1.702 * h)),
    "abs": (lambda s, h, t, c: h.abs() + torch.abs(-h - 1)),
    "powers": (lambda s, h, t, c: h**2 + h.square() * torch.pow(h, 3) - h.pow(4) + h**1 + h * h),
    # bounds
    "clamp": (lambda s, h, t, c: h.clamp(-0.3, 0.4)),
    "clamp by keyword": (lambda s, h, t, c: torch.clamp(h, max=0.4, min=-0.3) + torch.clip(h, max=0.1)),
    "clamp below zero": (lambda s, h, t, c: h.clamp(min=0) + h.clamp_min(0.2) - torch.clamp_max(h, -0.1)),
    "clamp, bounds crossed": (lambda s, h, t, c: h.clamp(0.4, -0.3)),
    "clamp by parameters": (lambda s, h, t, c: torch.clamp(h, -s.p.abs(), s.q.abs()) + h.clamp(max=s.p)),
    "clamp by large numbers": (lambda s, h, t, c: h.clamp(-1e30, 1e30) + h.clamp(-math.inf, math.inf)),
    "clamp by time and conditioning": (lambda s, h, t, c: h.clamp(-t, s.encode(c).abs())),
    "maximum": (lambda s, h, t, c: torch.maximum(h, s.p) + torch.minimum(s.m[0] * t, h) + torch.max(h, -h * s.q)),
    "maxout": (lambda s, h, t, c: torch.maximum(*(h @ s.m).chunk(2, -1)), None, W // 2),
    # sums, products
    "add": (lambda s, h, t, c: torch.add(h, s.p, alpha=2) + torch.add(s.q, h, alpha=-0.5)),
    "add of two": (lambda s, h, t, c: torch.add(h, torch.relu(h), alpha=2.5)),
    "add of two, earlier times": (lambda s, h, t, c: torch.add(input=torch.relu(h), other=h, alpha=2)),
    "add a product": (lambda s, h, t, c: h.add(h * s.p, alpha=-3).sub(torch.tanh(h), alpha=0.5)),
    "sub": (
        lambda s, h, t, c: torch.sub(h, s.p, alpha=2) - torch.subtract(s.q, h, alpha=3) + torch.rsub(h, 2, alpha=3)
    ),
    "number first": (lambda s, h, t, c: 2 - (3 + 4 * h) / 5),
    "div": (lambda s, h, t, c: torch.div(h, s.p + 3) + torch.true_divide(h, 7) + h / (2 + t)),
    "lerp": (lambda s, h, t, c: torch.lerp(h, s.p, 0.3) + torch.lerp(s.p, h, 0.8)),
    "lerp of two": (lambda s, h, t, c: h.lerp(torch.tanh(h), 0.9) + torch.lerp(h, h.relu(), s.p)),
    "lerp by time": (lambda s, h, t, c: torch.lerp(input=h, end=s.encode(c), weight=t)),
    "lerp by a gate": (lambda s, h, t, c: torch.lerp(h, torch.tanh(h), torch.sigmoid(h @ s.m))),
    "lerp of one": (lambda s, h, t, c: torch.lerp(h, h, 0.3)),
    "addcmul": (lambda s, h, t, c: torch.addcmul(s.p, h, s.q, value=2) + torch.addcmul(h, h, torch.relu(h), value=0.5)),
    "addcdiv": (lambda s, h, t, c: torch.addcdiv(h, h.relu(), s.p + 3, value=2)),
    "where": (lambda s, h, t, c: torch.where(s.mask, h, s.p) + torch.where(s.mask, torch.tanh(h), h.relu())),
    "where by conditioning": (lambda s, h, t, c: torch.where(c[:, :1] > 0, h, torch.tanh(h))),
    "where around a division by time": (lambda s, h, t, c: torch.where(t > 0, (h - 1) / t, h)),
    "where around a logarithm": (lambda s, h, t, c: torch.where(s.p > 0, h * s.p.log(), h + 1)),
    "masked fill around a logarithm": (lambda s, h, t, c: (h + s.p.log()).masked_fill(~(s.p > 0), 0.5)),
    "masked fill": (lambda s, h, t, c: h.masked_fill(~s.mask, 2.0) + in_place(h, "masked_fill_", s.mask, s.one[0])),
    "one feature for all": (lambda s, h, t, c: h * torch.sigmoid(h[:, :1]) + h[:, -1:]),
    "integers": (lambda s, h, t, c: 1e-9 * (h + s.large) + h * 97 - 101 * 9409 * h / (2**24 + 1) + 1e-20 * (h * 2**63)),
    # norms
    "batch norm": (lambda s, h, t, c: s.more["norm"](h), dict(norm=lambda: statistics(nn.BatchNorm1d(W)))),
    "batch norm, plain": (
        lambda s, h, t, c: s.more["norm"](h),
        dict(norm=lambda: statistics(nn.BatchNorm1d(W, affine=False))),
    ),
    "batch norm of channels": (
        lambda s, h, t, c: s.more["norm"](torch.relu(h).view(-1, 2, 3)),
        dict(norm=lambda: statistics(nn.BatchNorm1d(2))),
    ),
    "batch norm by function": (
        lambda s, h, t, c: F.batch_norm(torch.tanh(h), s.p.detach(), s.q.detach().abs(), s.p, s.q, False, 0.1, 1e-3)
    ),
    "rms norm": (lambda s, h, t, c: s.more["norm"](h), dict(norm=lambda: nn.RMSNorm(W))),
    "rms norm by function": (lambda s, h, t, c: F.rms_norm(torch.tanh(h), [W], eps=1e-3) + F.rms_norm(h, (W,), s.p)),
    "rms norm of groups": (lambda s, h, t, c: F.rms_norm(h.view(-1, 2, 3), (3,), eps=1e-2)),
    "rms norm, fused in torch": (lambda s, h, t, c: torch.ops.aten._fused_rms_norm(h, [W], s.p, 1e-3)[0]),
    "rms norm by rsqrt": (
        lambda s, h, t, c: s.more["norm"](h),
        dict(norm=lambda: Root(lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3))),
    ),
    "rms norm by sqrt": (
        lambda s, h, t, c: s.more["norm"](h),
        dict(norm=lambda: Root(lambda h: h / torch.sqrt(1e-3 + torch.mean(h * h, dim=-1, keepdim=True)))),
    ),
    "rms norm by a power": (
        lambda s, h, t, c: s.more["norm"](h),
        dict(norm=lambda: Root(lambda h: (h.square().mean(1)[:, None] + 1e-3) ** -0.5 * h)),
    ),
    "rms norm by a reciprocal": (
        lambda s, h, t, c: s.more["norm"](h),
        dict(norm=lambda: Root(lambda h: h * (1 / (h.float() ** 2).mean([-1], True).add(1e-3).sqrt()).to(h.dtype))),
    ),
    "layer norm over (1, W)": (lambda s, h, t, c: F.layer_norm(h[:, None], (1, W), s.p[None], s.q[None], 1e-3)),
    "layer norm of groups": (lambda s, h, t, c: F.layer_norm(h.view(-1, 2, 3), (3,), s.p[:3], s.q[:3], 1e-2)),
    "group norm": (lambda s, h, t, c: s.more["norm"](h), dict(norm=lambda: nn.GroupNorm(2, W, eps=1e-2))),
    # places
    "select": (lambda s, h, t, c: h.view(-1, 2, 3)[:, 1] - torch.select(h.view(-1, 3, 2), 2, 0), None, 3),
    "unbind": (lambda s, h, t, c: torch.cat(h.view(-1, 3, 2).unbind(1)[::-1], -1)),
    "stack": (lambda s, h, t, c: torch.stack([torch.tanh(h), h, s.p.expand_as(h)], 1), None, 3 * W),
    "stack, features last": (lambda s, h, t, c: torch.stack(tensors=[h, torch.tanh(h)], dim=-1), None, 2 * W),
    "split": (
        lambda s, h, t, c: torch.cat([a.tanh() for a in h.split([1, 2, 3], dim=1)] + [*h.tensor_split(3, 1)], 1),
        None,
        2 * W,
    ),
    "narrow": (lambda s, h, t, c: torch.narrow(h, 1, 2, 3) * h.narrow(dim=-1, start=0, length=3), None, 3),
    "every other": (lambda s, h, t, c: h[:, ::2] * h[:, 1::2] + h[..., -3:], None, 3),
    "by numbers": (lambda s, h, t, c: h[:, [2, 0, 0]] + h[:, s.order[:3]] + h.index_select(1, s.order[3:]), None, 3),
    "by a mask": (lambda s, h, t, c: h[:, s.mask], None, 3),
    "gather": (lambda s, h, t, c: h.gather(1, s.order.expand(len(h), -1)) + torch.take_along_dim(h, s.order[None], 1)),
    "turned around": (lambda s, h, t, c: h.flip(-1) + torch.roll(h, 2, 1) + torch.fliplr(h)),
    "transposed": (lambda s, h, t, c: h.view(-1, 2, 3).transpose(1, 2) * h.view(-1, 3, 2) + h.unflatten(1, (2, 3)).mT),
    "repeated": (
        lambda s, h, t, c: torch.cat([h.repeat(1, 2), h.tile(2)], 1) + h.repeat_interleave(4, -1),
        None,
        4 * W,
    ),
    "padded": (lambda s, h, t, c: F.pad(h, (1, 2)) + F.pad(h, (2, 1), value=0.5), None, W + 3),
    "squeezed": (lambda s, h, t, c: h[:, None].squeeze(1).unsqueeze(-1).flatten(1) + nn.Flatten()(h[:, :, None])),
    "assigned": (lambda s, h, t, c: assigned(h, 0.5) + assigned(h, s.p[:3]) - assigned(h, t) + assigned(h, h[:, :3])),
    "added in a slice": (lambda s, h, t, c: added_in_a_slice(h)),
    "through views": (lambda s, h, t, c: through_a_view(s, h)),
    "conditioning in a slice": (lambda s, h, t, c: torch.relu(assigned(h, c))),
    # linear layers
    "matrix product": (lambda s, h, t, c: h @ s.m + torch.mm(h, s.m) - torch.matmul(h, s.m.T) + F.linear(h, s.m)),
    "matrix first": (lambda s, h, t, c: (s.m @ h.T).T + (s.wide.T @ h.unsqueeze(-1)).flatten(1).repeat(1, 2)),
    "addmm": (lambda s, h, t, c: torch.addmm(s.p, h, s.m, beta=0.5, alpha=2) + in_place(h, "addmm_", h, s.m)),
    "einsum": (
        lambda s, h, t, c: torch.einsum("bi,oi->bo", h, s.m) + torch.einsum("bti,io->bto", h[:, None], s.m)[:, 0]
    ),
    "batches of one": (
        lambda s, h, t, c: (
            torch.bmm(h[:, None], s.m.expand(len(h), -1, -1))
            + torch.baddbmm(s.p.expand(len(h), 1, W), h[:, None], s.m.expand(len(h), W, W))
        )
    ),
    "one output": (lambda s, h, t, c: h * (h @ s.p)[:, None]),
    "a row of one token": (lambda s, h, t, c: s.embed(h[:, None])[:, 0] + F.linear(h[:, None], s.m, None).squeeze(1)),
    "weight norm": (lambda s, h, t, c: s.more["a"](h), dict(a=lambda: parametrizations.weight_norm(nn.Linear(W, W)))),
    "spectral norm": (
        lambda s, h, t, c: s.more["a"](h),
        dict(a=lambda: parametrizations.spectral_norm(nn.Linear(W, W))),
    ),
    "orthogonal": (lambda s, h, t, c: s.more["a"](h), dict(a=lambda: parametrizations.orthogonal(nn.Linear(W, W)))),
    "no layers": (
        lambda s, h, t, c: s.more["a"](h),
        dict(a=lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.AlphaDropout(0.5))),
    ),
    "linear of a square": (lambda s, h, t, c: (h * h) @ s.m + h.pow(2)),
    # gates
    "geglu": (lambda s, h, t, c: (lambda a, b: F.gelu(a) * b)(*(h @ s.m).chunk(2, -1)), None, W // 2),
    "swiglu": (lambda s, h, t, c: F.silu(h @ s.m) * (h @ s.m.T)),
    "glu": (lambda s, h, t, c: F.glu(h) + nn.GLU(1)(h), None, W // 2),
    "glu of rows": (lambda s, h, t, c: F.glu(h.view(-1, 2, 3), dim=1), None, W // 2),
    "adaptive norm": (lambda s, h, t, c: F.layer_norm(h, (W,), eps=1e-3) * (1 + s.encode(c)) + t * s.embed(s.p)),
    "residual": (lambda s, h, t, c: h + torch.tanh(h + F.relu(s.embed(h))) * s.encode(c)),
    # time and conditioning
    "sines": (lambda s, h, t, c: h + s.embed(torch.cat([(t * s.p[:3]).sin(), (t * s.q[:3]).cos()], -1))),
    "slices of an embedding": (lambda s, h, t, c: h + with_slices(s, t)),
    "log of time": (lambda s, h, t, c: h * torch.log(t * 1000 + 1) + torch.cos(0.5 * math.pi * t)),
    "one row": (lambda s, h, t, c: torch.cat([h, s.encode(s.p[None, :3]).expand(len(h), -1)], 1), None, 2 * W),
    "a token": (lambda s, h, t, c: torch.cat([s.p[None].repeat(len(h), 1), h, c], 1), None, 2 * W + COND),
    "one row, in a stack": (
        lambda s, h, t, c: torch.stack([h, s.p.expand(len(h), W)]).transpose(0, 1).flatten(1),
        None,
        2 * W,
    ),
}


def row(entry):
    function, modules, out = (*(entry if isinstance(entry, tuple) else (entry,)), None, None)[:3]
    torch.manual_seed(0)
    net = Hand(function, {k: f() for k, f in (modules or {}).items()}, out or W)
    parameters = {k: v for k, v in net.named_parameters() if "original" not in k}
    g = generator(1)
    for p in parameters.values():
        p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2)
    return net.eval()


def exact(field, x, solver):
    """(samples, states, velocities) in float64."""
    kept = {k: v.clone() for k, v in field.net.state_dict().items()}

    def wide(kwargs):
        return {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}

    other = dict(guidance=field.guidance, unconditional=wide(field.unconditional) or None)
    try:
        doubled = fk.VelocityField(field.net.double(), conditioning=wide(field.conditioning), **other)
        with torch.no_grad():
            return loop(doubled, x.double(), solver)
    finally:
        field.net.float().load_state_dict(kept)


def assert_exact(field, x, solver, weights=None):
    """States, velocities and samples are those of the network in float64, within the op's bound on the layers that it
    became; how many layers."""
    sampler = fk.fuse(field, solver, shape=x.shape[1:], weights=weights)
    got = sampler.run(x, states=True, velocities=True)
    batch = sampler._batch
    steps = sampler._steps.tolist() if isinstance(sampler._steps, torch.Tensor) else sampler._steps
    kwargs = {} if batch.unconditional is None else dict(unconditional=batch.unconditional, guidance=field.guidance)
    kwargs |= dict(trajectory=True, weights=batch.network.low)
    error, bound = error_and_bound(Sample("", (x, steps, batch.layers), kwargs), got)
    assert error <= bound
    for found, truth in zip(got, exact(field, x, solver), strict=True):  # tables are of float32 here
        assert (found - truth).abs().max() <= bound * truth.abs().max()
    return len(batch.layers)


def field_of(net, rows=1, guided=False):
    other = dict(guidance=1.7, unconditional={"c": torch.zeros(1, COND)}) if guided else {}
    return fk.VelocityField(net, conditioning={"c": noise(rows, COND, seed=4)}, **other)


@pytest.mark.parametrize("name", PLAIN)
def test_what_fuses(name):
    net = row(PLAIN[name])
    x = noise(5, DIM, seed=2)
    assert_exact(field_of(net, 5), x, fk.Solver.euler(3))


# ---- what is refused: each with the module, the operation and the reason ----


class Scripted(nn.Module):
    def forward(self, h):
        return torch.relu(h)


def softmax_of(s, h, t, c):
    return s.more["head"](F.softmax(s.more["head"](h), -1))


REFUSED = {
    "exp": (lambda s, h, t, c: h.exp(), r"Hand \(Hand\): exp on values that depend on x is nothing"),
    "sines of the state": (lambda s, h, t, c: torch.sin(s.embed(h)), r"Hand \(Hand\): sin on values that depend on x"),
    "softmax": (lambda s, h, t, c: h.softmax(-1), r"Hand \(Hand\): _softmax on values"),
    "softsign": (lambda s, h, t, c: F.softsign(h), r"div divides by values that depend on x"),
    "norm": (lambda s, h, t, c: F.normalize(h, dim=-1), r"linalg_vector_norm on values that depend on x"),
    "reciprocal": (lambda s, h, t, c: 1 / h, r"reciprocal divides by values that depend on x"),
    "mean of features": (
        lambda s, h, t, c: h - h.mean(1, keepdim=True),
        r"mean is a mean over features, which nothing",
    ),
    "rms of another": (
        lambda s, h, t, c: h.tanh() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3),
        r"mul reads what is a mean over features",
    ),
    "sum of features": (lambda s, h, t, c: h.sum(1, keepdim=True) * h, r"sum on values that depend on x"),
    "hardshrink": (lambda s, h, t, c: F.hardshrink(h), r"hardshrink on values that depend on x"),
    "threshold": (lambda s, h, t, c: F.threshold(h, 0.1, 20.0), r"with another value than its threshold has a jump"),
    "softplus": (lambda s, h, t, c: F.softplus(h, 1.0, 5.0), r"softplus with a threshold of 5 has a jump"),
    "power": (lambda s, h, t, c: h.abs() ** 1.5, r"pow to the power of 1.5 is nothing"),
    "rounding": (lambda s, h, t, c: torch.div(h, 2, rounding_mode="floor"), r"div rounds"),
    "comparison": (lambda s, h, t, c: h * (h > 0), r"gt makes torch.bool of values that depend on x"),
    "where by the state": (lambda s, h, t, c: torch.where(h > 0, h, 0 * h), r"where reads|gt makes torch.bool"),
    "integers of the state": (lambda s, h, t, c: h.int().to(h.dtype), r"_to_copy makes torch.int32"),
    "products of two": (lambda s, h, t, c: (h[:, None] @ h[:, :, None])[:, 0] * h, r"bmm multiplies two matrices"),
    "several tokens": (
        lambda s, h, t, c: F.linear(h.view(-1, 2, 3), s.m[:3, :3]),
        r"view leaves no row for each sample",
    ),
    "convolution": (lambda s, h, t, c: F.conv1d(h[:, None], s.m[:1, None, :1]), r"convolution on values"),
    "across samples": (lambda s, h, t, c: h - h.mean(0), r"mean leaves no row for each sample"),
    "neighbours": (lambda s, h, t, c: h.roll(1, 0), r"roll mixes samples"),
    "places of conditioning": (
        lambda s, h, t, c: h.gather(1, c.abs().long().clamp(0, 5)).repeat(1, 2),
        r"gather takes places that are not the same in every call",
    ),
    "one row of conditioning": (lambda s, h, t, c: h + s.encode(c[:1]), r"reads what was made of several samples"),
    "random": (lambda s, h, t, c: h + torch.rand_like(h), r"Hand \(Hand\): rand_like draws random numbers"),
    "a value read": (lambda s, h, t, c: h * float(t.max()), r"reads a value, and what follows may depend on it"),
    "a size that depends on values": (lambda s, h, t, c: h[c[:, 0] > 0].sum() + h, r"index reads a value"),
    "nested": (softmax_of, r"Hand \(Hand\): _softmax on values", lambda: dict(head=nn.Sequential(nn.Linear(W, W)))),
    "dropout in training": (
        lambda s, h, t, c: s.more["drop"](h),
        r"more\.drop \(Dropout\): (bernoulli|native_dropout) draws random numbers",
        lambda: dict(drop=nn.Dropout(0.5).train()),
    ),
    "batch norm in training": (
        lambda s, h, t, c: s.more["norm"](h),
        r"more\.norm \(BatchNorm1d\): native_batch_norm takes the mean and the variance of the batch: expected",
        lambda: dict(norm=nn.BatchNorm1d(W).train()),
    ),
    "batch norm without statistics": (
        lambda s, h, t, c: s.more["norm"](h),
        r"more\.norm \(BatchNorm1d\): native_batch_norm takes the mean and the variance of the batch",
        lambda: dict(norm=nn.BatchNorm1d(W, track_running_stats=False)),
    ),
    "instance norm": (
        lambda s, h, t, c: s.more["norm"](h.view(-1, 2, 3)),
        r"more\.norm \(InstanceNorm1d\): ",
        lambda: dict(norm=nn.InstanceNorm1d(2)),
    ),
    "attention": (
        lambda s, h, t, c: s.more["a"](*[h.view(-1, 2, 3)] * 3, need_weights=False)[0],
        r"more\.a \(MultiheadAttention\): ",
        lambda: dict(a=nn.MultiheadAttention(3, 1, batch_first=True)),
    ),
    "recurrence": (
        lambda s, h, t, c: s.more["a"](h[:, None])[0],
        r"more\.a \((GRU|RNN)\): ",
        lambda: dict(a=nn.GRU(W, W, batch_first=True)),
    ),
    "script": (
        lambda s, h, t, c: s.more["a"](h),
        r"expected a network whose changes can be noticed, but .*Script",
        lambda: dict(a=torch.jit.script(Scripted())),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_is_refused(name):
    function, pattern, modules = (*REFUSED[name], None)[:3]
    net = Hand(function, modules() if modules else None).requires_grad_(False)
    for module in net.modules():
        module.training &= module in net.more.values() and "training" in name
    with pytest.raises(fk.NotFusable, match=pattern):
        fk.fuse(field_of(net, 5), 2, shape=(DIM,))


def test_all_that_stops_a_network_is_said_at_once():
    net = nn.Sequential(
        nn.Linear(5, 6), nn.Softmax(-1), nn.Linear(6, 6), nn.Hardshrink(), nn.Softmax(1), nn.Linear(6, 4)
    )
    with pytest.raises(fk.NotFusable) as e:
        fk.fuse(net.eval(), 2)
    nothing = "on values that depend on x is nothing that mlp_sample computes"
    assert f"1 (Softmax): _softmax {nothing} (so in 4 (Softmax)); 3 (Hardshrink): hardshrink {nothing}; " in str(
        e.value
    )

    def function(s, h, t, c):
        return torch.exp(h * t.max().item()) + torch.rand(len(h), W) + s.embed(h).sin()

    with pytest.raises(fk.NotFusable) as e:
        fk.fuse(field_of(Hand(function)), 2, shape=(DIM,))
    for said in ("_local_scalar_dense reads a value", "rand draws random", "exp on values", "sin on values"):
        assert said in str(e.value)


# ---- what changes after fusing ----


class Bounds(nn.Module):
    """Numbers and tensors that are read where they are needed."""

    def __init__(self):
        super().__init__()
        self.inp, self.out, self.low, self.alpha, self.exponent = nn.Linear(DIM, W), nn.Linear(W, DIM), -0.4, 0.5, 2
        self.norm, self.rms, self.slope, self.places = (
            statistics(nn.BatchNorm1d(W)),
            nn.RMSNorm(W),
            nn.PReLU(W),
            [2, 0, 1, 5, 4, 3],
        )
        self.register_buffer("high", torch.full((W,), 0.5))
        self.register_buffer("order", torch.arange(W).flip(0))
        self.register_buffer("mask", torch.arange(W) % 2 == 0)

    def forward(self, x, t):
        h = self.slope(self.rms(self.norm(self.inp(x))))
        h = torch.add(h, h[:, self.order].clamp(self.low).clamp(max=self.high), alpha=self.alpha) ** self.exponent
        return self.out(torch.where(self.mask, h[:, self.places], F.softplus(h)) + t[:, None])


def set_places(net):
    net.places[0] = 1


CHANGES = {
    "running mean": lambda net: net.norm.running_mean.add_(0.3),
    "running variance": lambda net: net.norm.running_var.mul_(2),
    "statistics of a batch": lambda net: [net.norm.train()(torch.randn(9, W)), net.norm.eval()],
    "statistics reset": lambda net: net.norm.reset_running_stats(),
    "eps": lambda net: setattr(net.norm, "eps", 0.5),
    "eps of the rms": lambda net: setattr(net.rms, "eps", 0.5),
    "weight of the rms": lambda net: net.rms.weight.copy_(torch.linspace(0, 1, W)),
    "slopes": lambda net: net.slope.weight.mul_(-2),
    "bound, a number": lambda net: setattr(net, "low", 0.1),
    "bound, a buffer": lambda net: net.high.sub_(0.6),
    "another bound": lambda net: setattr(net, "high", torch.zeros(W)),
    "alpha": lambda net: setattr(net, "alpha", -1.5),
    "exponent": lambda net: setattr(net, "exponent", 3),
    "order": lambda net: net.order.copy_(torch.arange(W).roll(1)),
    "mask": lambda net: net.mask.logical_not_(),
    "places": set_places,
    "state dict": lambda net: net.load_state_dict(
        {k: v if v.dtype == torch.bool else v * 0 for k, v in net.state_dict().items()}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_fusing(name):
    torch.manual_seed(0)
    net, x = Bounds().eval().requires_grad_(False), noise(4, DIM, seed=6)
    sampler = fk.fuse(net, 3, shape=(DIM,))
    torch.testing.assert_close(sampler(x), before := fk.sample(net, x, 3), rtol=1e-5, atol=1e-6)
    CHANGES[name](net)
    torch.testing.assert_close(sampler(x), now := fk.sample(net, x, 3), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(now, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_mode_after_fusing_is_refused():
    net = Bounds().eval().requires_grad_(False)
    sampler, x = fk.fuse(net, 3, shape=(DIM,)), noise(4, DIM)
    net.norm.train()
    with pytest.raises(fk.NotFusable, match=r"norm \(BatchNorm1d\): native_batch_norm takes the mean"):
        sampler(x)
    net.norm.eval()
    torch.testing.assert_close(sampler(x), fk.sample(net, x, 3), rtol=1e-5, atol=1e-6)


# ---- random networks of all that fuses ----

FUSED = int(os.environ.get("FLOWKERNELS_FUSED", "40"))
FIRST = int(os.environ.get("FLOWKERNELS_FUSED_FIRST", "0"))
MODULES = {
    **{name: lambda w, f=f: f() for name, f in ACTIVATIONS.items()},
    **{f.__name__: lambda w, f=f: f() for f in (nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)},
    **{f.__name__: lambda w, f=f: f() for f in (nn.Tanhshrink, nn.Softshrink, nn.Identity, nn.Dropout, nn.CELU)},
    "prelu": nn.PReLU,
    "hardtanh": lambda w: nn.Hardtanh(-0.4, 0.7),
    "layer norm": lambda w: nn.LayerNorm(w, eps=1e-2),
    "rms norm": lambda w: nn.RMSNorm(w, eps=1e-2),
    "rms norm by hand": lambda w: Root(lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2), w),
    "batch norm": lambda w: statistics(nn.BatchNorm1d(w)),
    "group norm": lambda w: nn.GroupNorm(w // 3, w - w % (w // 3), eps=1e-2),
    "linear": lambda w: nn.Linear(w, w),
    "weight norm": lambda w: parametrizations.weight_norm(nn.Linear(w, w, bias=False)),
}
ALONE = {  # of h `[n, w]`, a parameter p `[w]`, a matrix m `[w, w]`, t and c as long as h, a number k and a mask
    "clamp": lambda h, p, m, t, c, k, mask: h.clamp(-k, k),
    "clamp by a parameter": lambda h, p, m, t, c, k, mask: torch.clamp(h, max=p),
    "maximum": lambda h, p, m, t, c, k, mask: torch.maximum(p, h),
    "add": lambda h, p, m, t, c, k, mask: torch.add(h, p, alpha=k),
    "rsub": lambda h, p, m, t, c, k, mask: torch.rsub(h, p, alpha=k),
    "in place": lambda h, p, m, t, c, k, mask: h.clone().mul_(k).add_(p).sub_(1.0),
    "mul": lambda h, p, m, t, c, k, mask: p * h,
    "div": lambda h, p, m, t, c, k, mask: h / (p.abs() + 1),
    "lerp": lambda h, p, m, t, c, k, mask: torch.lerp(h, p, k),
    "lerp by time": lambda h, p, m, t, c, k, mask: torch.lerp(p.expand_as(h), h, t),
    "where": lambda h, p, m, t, c, k, mask: torch.where(mask, h, p),
    "where by conditioning": lambda h, p, m, t, c, k, mask: torch.where(c > 0, h, t),
    "addcmul": lambda h, p, m, t, c, k, mask: torch.addcmul(t, h, p, value=k),
    "square": lambda h, p, m, t, c, k, mask: torch.tanh(h).square(),
    "cube": lambda h, p, m, t, c, k, mask: torch.tanh(h) ** 3,
    "abs": lambda h, p, m, t, c, k, mask: h.abs(),
    "film": lambda h, p, m, t, c, k, mask: h * (1 + t) + c,
    "gate": lambda h, p, m, t, c, k, mask: h * torch.sigmoid(h[:, :1]),
    "matmul": lambda h, p, m, t, c, k, mask: h @ m,
    "matrix first": lambda h, p, m, t, c, k, mask: (m @ h.T).T,
    "addmm": lambda h, p, m, t, c, k, mask: torch.addmm(p, h, m, beta=k, alpha=0.5),
    "einsum": lambda h, p, m, t, c, k, mask: torch.einsum("bi,oi->bo", h, m),
    "flip": lambda h, p, m, t, c, k, mask: h.flip(1),
    "roll": lambda h, p, m, t, c, k, mask: h.roll(2, -1),
    "half": lambda h, p, m, t, c, k, mask: h[:, ::2],
    "last": lambda h, p, m, t, c, k, mask: h[:, 1:],
    "numbers": lambda h, p, m, t, c, k, mask: h[:, [2, 0, 1, 1]],
    "mask": lambda h, p, m, t, c, k, mask: h[:, mask],
    "pad": lambda h, p, m, t, c, k, mask: F.pad(h, (1, 2), value=k),
    "repeat": lambda h, p, m, t, c, k, mask: h.repeat(1, 2),
    "halves": lambda h, p, m, t, c, k, mask: torch.cat(h.tensor_split(2, 1)[::-1], 1),
    "rows": lambda h, p, m, t, c, k, mask: h.repeat(1, 3).view(-1, 3, h.shape[1]).transpose(1, 2).select(2, 1),
    "assigned": lambda h, p, m, t, c, k, mask: assigned(h, t[:, 1:4] if h.shape[1] > 3 else k),
    "assigned itself": lambda h, p, m, t, c, k, mask: assigned(h, k),
    "glu": lambda h, p, m, t, c, k, mask: F.glu(torch.cat([h, c], 1)),
    "with time": lambda h, p, m, t, c, k, mask: torch.cat([t[:, :1], h, c[:, :2], p.expand_as(h)], 1),
}
TOGETHER = {  # of two values as long, a number and a parameter
    "add": lambda a, b, k, p: torch.add(a, b, alpha=k),
    "sub": lambda a, b, k, p: a - b,
    "mul": lambda a, b, k, p: torch.tanh(a) * b,
    "maximum": lambda a, b, k, p: torch.maximum(a, b),
    "minimum": lambda a, b, k, p: torch.min(a, b),
    "lerp": lambda a, b, k, p: torch.lerp(a, b, p.abs()),
    "lerp by a gate": lambda a, b, k, p: torch.lerp(a, b, torch.sigmoid(a)),
    "addcmul": lambda a, b, k, p: torch.addcmul(a, torch.tanh(a), b, value=k),
    "stack": lambda a, b, k, p: torch.stack([a, b], 2).flatten(1)[:, 1:],
    "cat": lambda a, b, k, p: torch.cat([b, a], -1),
    "where": lambda a, b, k, p: torch.where(p > 0, a, b),
}


class Drawn(nn.Module):
    """A network drawn from all of that: each operation on any of the values so far."""

    def __init__(self, seed):
        super().__init__()
        self.random = generator(seed)
        self.dim, self.steps, widths = self.draw(1, 2, 3, 5, 16, 17), [], []
        self.time, self.encode = nn.ModuleList(), nn.ModuleList()
        self.parts, self.numbers = nn.ModuleList(), []
        self.inp = nn.Linear(self.dim, self.draw(4, 7, 16, 33))
        widths.append(self.inp.out_features)
        for _ in range(self.draw(1, 3, 5, 8)):
            table = self.draw("module", "module", "alone", "alone", "together")
            name = self.draw(*{"module": MODULES, "alone": ALONE, "together": TOGETHER}[table])
            i, j = self.draw(*range(len(widths))), self.draw(*range(len(widths)))
            i = len(widths) - 1 if self.draw(True, True, False) else i
            w, part = widths[i], nn.Module()
            part.p, part.m = nn.Parameter(torch.empty(w)), nn.Parameter(torch.empty(w, w))
            part.time, part.encode = nn.Linear(1, w), nn.Linear(COND, w)
            part.fit = nn.Linear(widths[j], w) if table == "together" and widths[j] != w else nn.Identity()
            part.module = MODULES[name](w) if table == "module" else nn.Identity()
            part.register_buffer("mask", torch.arange(w) % self.draw(2, 3) == 0)
            self.parts.append(part)
            self.steps.append((table, name, i, j, self.draw(-0.5, 0.3, 1.0, 2)))
            with torch.no_grad():
                widths.append(
                    self.step(len(self.steps) - 1, [torch.zeros(2, v) for v in widths], *[torch.zeros(2, 1)] * 2).shape[
                        1
                    ]
                )
            if widths[-1] > 80 or widths[-1] < 4:  # as wide as values are
                part.shrink = nn.Linear(widths[-1], 11)
                widths[-1] = 11
        self.out = nn.Linear(widths[-1], self.dim)
        parameters = [p for k, p in self.named_parameters() if "original" not in k and "norm" not in k]
        for p in parameters:
            p.data = torch.randn(p.shape, generator=self.random) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2)
        self.eval().requires_grad_(False)

    def draw(self, *options):
        return options[int(torch.randint(len(options), (), generator=self.random))]

    def step(self, s, values, t, c):
        (table, name, i, j, k), part = self.steps[s], self.parts[s]
        h = values[i]
        if table == "together":
            h = TOGETHER[name](h, part.fit(values[j]), k, part.p)
        elif table == "alone":
            c = part.encode(c.expand(-1, COND)) if c.shape[1] in (1, COND) else c
            h = ALONE[name](h, part.p, part.m, torch.sin(part.time(t)), c, k, part.mask)
        elif name == "group norm":
            whole = part.module.num_channels
            h = torch.cat([part.module(h[:, :whole]), h[:, whole:]], 1)
        else:
            h = part.module(h)
        return part.shrink(h) if hasattr(part, "shrink") else h

    def forward(self, x, t, c):
        values = [self.inp(x)]
        for s in range(len(self.steps)):
            values.append(self.step(s, values, t[:, None].to(x.dtype), c.expand(len(x), -1)))
        return self.out(values[-1])


@pytest.mark.parametrize("seed", range(FIRST, FIRST + FUSED))
def test_random_networks(seed):
    net = Drawn(seed)
    n, steps, rows = net.draw(1, 2, 3, 7, 16, 33, 70), net.draw(1, 2, 5), net.draw(True, False)
    solver = net.draw(fk.Solver.euler(steps), fk.Solver.adams_bashforth(fk.Schedule.uniform(steps).times, 2), fitted(3))
    weights = net.draw(None, None, torch.bfloat16)
    assert_exact(
        field_of(net, n if rows else 1, net.draw(True, False, False)), noise(n, net.dim, seed=seed), solver, weights
    )
