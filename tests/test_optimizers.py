"""Optimisers of a run: torch's, groups of parameters, and those with weights to train and others to evaluate."""

import functools

import pytest
import torch
from test_straighten import Stopped, same_result, small_net, stop_after, trained

from flowkernels.training.run.optimizers import counted_in_groups, shares_of_rate

OPTIMISERS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
REFUSED = ("LBFGS", "SparseAdam")  # tests/test_straighten.py


class ScheduleFree(torch.optim.Optimizer):
    """SGD of schedulefree, by its interface (arXiv 2405.15682): the parameters are y in training, x in evaluation.

    x: by its own recursion, in float64, which is nothing that the steps need.
    """

    def __init__(self, params, lr=0.01, beta=0.9):
        super().__init__(params, dict(lr=lr, beta=beta, k=0, train_mode=False, weight_sum=0.0))
        self.x = [p.detach().double() for group in self.param_groups for p in group["params"]]

    def train(self):
        self._go(lambda beta: 1 - beta, True)

    def eval(self):
        self._go(lambda beta: 1 - 1 / beta, False)

    @torch.no_grad()
    def _go(self, weight, train_mode):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != train_mode else ():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            beta, lr = group["beta"], group["lr"]
            group["k"] += 1
            group["weight_sum"] += lr**2
            c = lr**2 / group["weight_sum"] if group["weight_sum"] else 0.0
            for i, p in enumerate(group["params"]):
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, c).add_(p.grad, alpha=lr * (beta * (1 - c) - 1))
                z.sub_(p.grad, alpha=lr)
                self.x[i] = torch.lerp(self.x[i], z.double(), c) if lr else self.x[i]


def matrices(kind, parameters):
    return kind([p for p in parameters if p.ndim == 2])


MAKE = {name: getattr(torch.optim, name) for name in OPTIMISERS if name not in REFUSED}
MAKE |= {"Muon": functools.partial(matrices, torch.optim.Muon)} if "Muon" in MAKE else {}
MAKE |= {
    "schedule-free": ScheduleFree,
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:2], "lr": 1e-4, "weight_decay": 0.0}, {"params": p[2:]}], lr=1e-3
    ),
}


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("name", MAKE)
def test_a_run_goes_on_bit_for_bit(name, ema, tmp_path):
    settings = dict(optimizer=MAKE[name], iterations=9, ema=ema)
    student, path = small_net(1), tmp_path / "run.pt"
    student.register_forward_pre_hook(stop_after(6))
    with pytest.raises(Stopped):
        trained(student, checkpoint=path, checkpoint_every=3, **settings)
    whole = trained(small_net(1), **settings)
    assert same_result(trained(small_net(5), checkpoint=path, **settings), whole)
    start = small_net(1).state_dict()
    assert not all(torch.equal(v, start[k]) for k, v in whole.student.state_dict().items())


def test_groups_have_their_shares_of_the_rate():
    seen = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            if not self.param_groups[0]["params"][0].is_meta:  # of what is looked at beforehand
                seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def make(parameters):
        return Seen([{"params": parameters[:1], "lr": 0.01}, {"params": parameters[1:]}], lr=0.04)

    result = trained(small_net(1), optimizer=make, iterations=4, lr=0.1, warmup=2, decay="none", log_every=1)
    assert seen == [[0.05 * 0.25, 0.05], *[[0.1 * 0.25, 0.1]] * 3]
    assert result.history["lr"] == [0.05, 0.1, 0.1, 0.1]
    parameters = list(small_net(1).parameters())
    assert shares_of_rate(torch.optim.Adam(parameters, lr=3e-4)) == [1.0]
    assert shares_of_rate(torch.optim.SGD(parameters, lr=0.0)) == [1.0]


def test_parameters_that_an_optimiser_leaves_out_do_not_count():
    """In the norm, in clipping, and in what moves."""
    seen = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            (group,) = self.param_groups
            if not group["params"][0].is_meta:
                seen.append(sum(p.grad.double().square().sum() for p in group["params"]).sqrt().item())
            return super().step(closure)

    student = small_net(1)
    result = trained(
        student, optimizer=functools.partial(matrices, Seen), iterations=5, log_every=1, clip=1e9, ema=None, init="keep"
    )
    assert result.history["grad_norm"] == pytest.approx(seen, rel=1e-5)
    for (name, p), before in zip(student.named_parameters(), small_net(1).parameters(), strict=True):
        assert torch.equal(p, before) == (p.ndim == 1), name


def test_a_run_with_other_shares_is_refused(tmp_path):
    def make(rate):
        return lambda p: torch.optim.SGD([{"params": p[:1], "lr": rate}, {"params": p[1:]}], lr=1.0)

    settings = dict(iterations=4, checkpoint=tmp_path / "run.pt")
    trained(small_net(1), optimizer=make(0.5), **settings)
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run .*'rates': \[0.25, 1.0\]"):
        trained(small_net(1), optimizer=make(0.25), **settings)


def test_what_an_optimiser_counts_is_told_from_its_settings():
    for name in MAKE:
        opt = MAKE[name](list(small_net(1).parameters()))
        assert counted_in_groups(opt) == ({"k", "train_mode", "weight_sum"} if name == "schedule-free" else set())


def test_the_average_of_a_schedule_free_optimiser_is_its_own(tmp_path):
    """In what comes back, in checkpoints and where samples are taken, and the weights that are trained go on as they
    were."""
    made, path = [], tmp_path / "run.pt"

    def make(parameters):
        optimizer = ScheduleFree(parameters)
        made.extend([optimizer] * (not parameters[0].is_meta))
        return optimizer

    settings = dict(optimizer=make, iterations=30, checkpoint_every=1, lr=0.1, warmup=3, decay="none")
    student = small_net(1)
    kept = trained(student, ema=0.9, checkpoint=path, **settings)
    for p, q, x in zip(kept.student.parameters(), student.parameters(), made[0].x, strict=True):
        torch.testing.assert_close(p.double(), x, rtol=1e-4, atol=1e-6)
        assert not torch.equal(q, p)  # the student's own are those that were trained
    without = small_net(1)
    assert trained(without, ema=0.9, **settings).history == kept.history
    assert all(torch.equal(p, q) for p, q in zip(without.parameters(), student.parameters(), strict=True))
    averaged = {k.removeprefix("module."): v for k, v in torch.load(path, weights_only=True)["average"].items()}
    assert all(torch.equal(averaged[name], p) for name, p in kept.student.named_parameters())

    student = small_net(1)
    last = trained(student, ema=None, held_out=4, evaluate_every=5, **settings)
    assert last.student is student
    for p, x in zip(student.parameters(), made[-1].x, strict=True):
        torch.testing.assert_close(p.double(), x, rtol=1e-4, atol=1e-6)
    assert last.evaluations["endpoint_error"][-1] == pytest.approx(last.errors[1], rel=1e-6)
