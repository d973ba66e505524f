"""What an iteration of `straighten` keeps in memory beside the network's own, and losses that are computed by rows."""

import pytest
import torch
from _flows import even_grid, normal
from _pairs import pairs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowkernels as fk
from flowkernels import _checks
from flowkernels.training.by_rows import losses_by_rows
from flowkernels.training.losses import LOSSES
from flowkernels.training.run.state import State
from flowkernels.training.targets.table import TARGETS

B, D = 64, 4096
BATCH = 4 * B * D  # bytes of its states


class Memory(TorchDispatchMode):
    """most: bytes of all tensors that operations have made and that are still there, at the worst moment."""

    def __init__(self):
        super().__init__()
        self.known, self.most, self.bound = {}, 0, 0  # bound: with what has gone since it was last looked for

    def now(self) -> int:
        self.known = {k: kept for k, kept in self.known.items() if not kept[0].expired()}
        self.bound = sum(size for _, size in self.known.values())
        return self.bound

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                known = self.known.get(storage._cdata)
                if known is None or known[0].expired():
                    self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.bound += storage.nbytes()
        if self.bound > self.most:
            self.most = max(self.most, self.now())
        return out


class Holding(torch.autograd.Function):
    """Activations that are there until the backward."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v.new_empty(8, *v.shape))
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x, t, other=None):
        v = x * self.scale if other is None else x * self.scale + other
        return Holding.apply(v) if torch.is_grad_enabled() else v


class OfTwoTimes(Net):
    def forward(self, x, t, s):
        return super().forward(x, t)


def of_the_network(evaluations: int) -> int:
    """Its forwards and backward alone, beside its weights, its input and the gradient that it is given."""
    with Memory() as memory:
        net, x, gradient = Net(), torch.ones(B, D), torch.ones(B, D)
        for _ in range(2):
            memory.most = begin = memory.now()
            v = x
            for _ in range(evaluations):
                v = net(v, None)
            v.backward(gradient)
            del v
    return memory.most - begin


SOLVER = dict(schedule=fk.Solver.adams_bashforth([0, 0.5, 1]), grid=2, rollout_every=100)
OF_TARGET = {"on_policy": dict(rollout_every=100), "solver": SOLVER, "endpoint": SOLVER}
CASES = {name: dict(target=name) | OF_TARGET.get(name, {}) for name in TARGETS} | {
    "boss, uniform": dict(t_sampling="uniform"),
    "boss, weighted": dict(weighting=[1.0, 2.0]),
    "reflow, normalised": dict(target="reflow", weighting="per_sample_normalised"),
    "noise, by the noise": dict(target="noise", compared="noise"),
}
STUDENTS = {
    "acceleration": lambda: fk.Acceleration(Net(), Net(), v0_name="other"),
    "average_velocity": lambda: fk.AverageVelocity(OfTwoTimes(), second_name="s"),
    "blockwise": lambda: fk.Blockwise(Net(), fk.Schedule.uniform(2)),
    "noise": lambda: fk.NoisePrediction(Net()),
}
TWICE = ("endpoint", "acceleration")  # evaluate with a graph
MORE = {  # batches above the two
    "on_policy": 1,  # what the teacher answers
    "velocity_matching": 2,  # that, and the state to which it leads
    "next_knot": 1,  # the state at the next knot, beside that of the batch
    "acceleration": 4,  # the loss is of two answers and two targets at once
    "blockwise": 0.3,  # networks have parts of a batch, of any size
}


@pytest.mark.parametrize(("case", "loss", "ema"), pairs(CASES, LOSSES, [None, 0.9]))
def test_two_batches_at_most(monkeypatch, case, loss, ema):
    """Above the network's own and the bank: its input and the gradient of its velocities count; and what `MORE` has of
    some targets."""
    most, whole, target = [], State.log, CASES[case].get("target", "boss")

    def log(state, **row):
        whole(state, **row)
        most.append(memory.most - memory.now())
        memory.most = 0

    monkeypatch.setattr(State, "log", log)
    settings = dict(schedule=fk.Schedule(even_grid(2), even_grid(2), (0, 1, 2)), loss=loss, ema=ema) | CASES[case]
    student = STUDENTS.get(target, Net)()
    with Memory() as memory:
        fk.straighten(
            student, lambda x, t: -x, noise=(D,), bank=B, batch=B, iterations=4, log_every=1, progress=False, **settings
        )
    own = of_the_network(1 + (target in TWICE))
    assert max(most[2:]) - own < (2.05 + MORE.get(target, 0)) * BATCH


# ---- losses by rows ----


@pytest.mark.parametrize(
    ("loss", "weighted", "shape", "dtype", "upstream", "kept", "spare"),
    pairs(
        LOSSES,
        [False, True],
        [(50, 4, 300), (7, 3), (1, 2), (3, 5000)],
        [torch.float64, torch.float32, torch.bfloat16],
        [1.0, -3.0],
        [False, True],
        [False, True],
    ),
)
def test_losses_by_rows_are_those_of_the_whole(loss, weighted, shape, dtype, upstream, kept, spare):
    wide = torch.promote_types(dtype, torch.float32)
    v = normal(*shape, dtype=dtype).requires_grad_()
    target, weight = normal(*shape, seed=1, dtype=wide), normal(len(v), seed=2, dtype=wide).abs()

    def losses(part, rows):
        return LOSSES[loss](part.to(wide), target[rows], 0.3)

    own = target.clone() if spare else None
    found, each = losses_by_rows(v, losses, lambda _, rows: weight[rows] if weighted else None, wide, own)
    again = v.detach().double().requires_grad_()
    expected = LOSSES[loss](again, target.double(), 0.3)
    torch.testing.assert_close(each.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    mean = (weight.double() * expected if weighted else expected).mean()
    assert found.item() == pytest.approx(mean.item(), rel=1e-5)
    (upstream * mean).backward()
    for _ in range(1 + kept):
        (gradient,) = torch.autograd.grad(upstream * found, v, retain_graph=kept)
        assert gradient.dtype == dtype
        error = (gradient.double() - again.grad).abs().max() / again.grad.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_losses_by_rows_without_a_gradient_and_twice():
    v, target = normal(9, 4), normal(9, 4, seed=1)

    def loss(v):
        return losses_by_rows(v, lambda part, rows: LOSSES["cauchy"](part, target[rows], 0.3), lambda *_: None, v.dtype)

    found, each = loss(v)
    assert not found.requires_grad
    assert not each.requires_grad
    torch.testing.assert_close(found, LOSSES["cauchy"](v, target, 0.3).mean())
    (gradient,) = torch.autograd.grad(loss(v.requires_grad_())[0], v, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("noise", [(4,), normal(24, 4)], ids=["shape", "tensor"])
@pytest.mark.parametrize(("target", "states"), [("on_policy", 3 + 3), ("solver", 3 + 7)])
def test_the_students_own_samples_need_room_too(monkeypatch, noise, target, states):
    """Before work is done, as much as the bank, and the pairs of a solver's steps."""
    needed, calls = 24 * 4 * 4 * states, []
    student = fk.VelocityField(nn.Linear(5, 4), time_column=True)

    def run(there):
        monkeypatch.setattr(_checks, "_memory", lambda: there)
        settings = dict(noise=noise, bank=24, batch=8, iterations=1, grid=2, progress=False)
        schedule = SOLVER["schedule"] if target == "solver" else fk.Schedule.uniform(2)
        fk.straighten(student, lambda x, t: calls.append(x) or -x, schedule, target=target, **settings)

    with pytest.raises(ValueError, match=r"^bank: expected what fits into .* of memory, got 24: .* the student's"):
        run(needed - 1)
    assert not calls
    run(needed)
