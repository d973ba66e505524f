"""Solvers: exact where they are meant to be, of their order elsewhere, and clear about what they cannot be."""

import copy
import itertools
import json
import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from _flows import even_grid, normal, uneven_grid
from torch import nn

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.solver import Update, adams_bashforth, euler_sizes, polynomial_weights

F64 = torch.float64


def run(solver, velocity, x, states=None):
    """The definition: every state from the first one, in the dtype of x."""
    start, seen = x, []
    t_a = zip(solver.model_times.tolist(), solver.start_coefficients.tolist(), strict=True)
    for (t, a), row in zip(t_a, solver.coefficients, strict=True):
        seen.append(velocity(x, t))
        x = a * start + sum(b * v for b, v in zip(row.tolist(), seen, strict=False))
        if states is not None:
            states.append(x)
    return x


def by_updates(solver, velocity, x, updates=None):
    """The same by the updates of few terms."""
    start, seen = x, []
    for t, update in zip(solver.model_times.tolist(), updates or solver.updates(), strict=True):
        first, which, factors, scale = update
        seen.append(velocity(x, t))
        x = scale * (start if first else x) + sum(b * seen[j] for j, b in zip(which, factors, strict=True))
    return x


def curved(x, t):
    """A smooth flow that is not linear: x(t) = tan(t^2 / 2 + t / 4 + atan x(0))."""
    return (t + 0.25) * (1 + x * x)


def exact(x, t=1.0):
    return torch.tan(t * t / 2 + t / 4 + torch.atan(x))


START = torch.linspace(-1.0, 0.1, 7, dtype=F64)


# ---- constructors ----


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("times", [even_grid(7), uneven_grid(7)], ids=["even", "uneven"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_is_exact_on_polynomials(order, times, inverse):
    """Of a degree below the order, from the step on that has as many velocities."""
    solver = Solver.adams_bashforth(times, order, inverse=inverse)
    knots = times.flip(0) if inverse else times
    assert torch.equal(solver.times, knots)
    assert torch.equal(solver.model_times, knots[:-1])
    for degree in range(order):
        states = [START]
        run(solver, lambda x, t, d=degree: (d + 1) * t**d * torch.ones_like(x), START, states)
        for k in range(order - 1, 7):
            gained = knots[k + 1] ** (degree + 1) - knots[k] ** (degree + 1)
            torch.testing.assert_close(states[k + 1] - states[k], gained.expand(7), rtol=0, atol=1e-13)
    if order > 1:  # one degree more is not integrated exactly, nor are steps with too few velocities
        states = [START]
        run(solver, lambda x, t: t**order * torch.ones_like(x), START, states)
        gained = (knots[-1] ** (order + 1) - knots[-2] ** (order + 1)) / (order + 1)
        assert (states[-1] - states[-2] - gained).abs().max() > 1e-6


def at_rest(x, t):
    """One that begins at rest: x(t) = tan(t^3 / 4 + atan x(0))."""
    return 3 * t**2 * (1 + x * x) / 4


def exact_at_rest(x, t=1.0):
    return torch.tan(t**3 / 4 + torch.atan(x))


ORDERS = {
    "euler": (Solver.euler, 1),
    "ab1": (lambda s, **kw: Solver.adams_bashforth(s, 1, **kw), 1),
    "ab2": (lambda s, **kw: Solver.adams_bashforth(s, 2, **kw), 2),
    "ab3": (lambda s, **kw: Solver.adams_bashforth(s, 3, **kw), 3),
    "heun": (Solver.heun, 2),
    "midpoint": (Solver.midpoint, 2),
}


@pytest.mark.parametrize("spread", [1.0, 1.3], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("name", "inverse"), [(name, False) for name in ORDERS] + [(name, True) for name in ORDERS if name != "ab3"]
)
def test_order_of_convergence(name, inverse, spread):
    """On knots that are a smooth function of even ones. Adams-Bashforth 3 begins with steps of lower order, which would
    be of second order together: it is held on a flow that begins at rest."""
    make, order = ORDERS[name]
    velocity, solution = (at_rest, exact_at_rest) if name == "ab3" else (curved, exact)
    begin, end = (solution(START), START) if inverse else (START, solution(START))
    errors = []
    for N in (40, 80, 160):
        solver = make(even_grid(N) ** spread, inverse=inverse)
        errors.append((run(solver, velocity, begin) - end).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.15 < math.log2(coarse / fine) < order + 0.35


def test_evaluations():
    assert [Solver.euler(6).evaluations, Solver.adams_bashforth(6, 3).evaluations] == [6, 6]
    assert [Solver.heun(n).evaluations for n in (1, 2, 6)] == [1, 3, 11]
    assert [Solver.midpoint(n).evaluations for n in (1, 2, 6)] == [2, 4, 12]
    assert all(s.steps == 6 for s in (Solver.euler(6), Solver.adams_bashforth(6), Solver.heun(6), Solver.midpoint(6)))


def test_what_is_nothing_but_euler():
    times = uneven_grid(5)
    assert all(s.is_euler for s in (Solver.euler(times), Solver.adams_bashforth(times, 1), Solver.heun(1)))
    assert Solver.euler(times, inverse=True).is_euler
    assert Solver.euler(times, model_times=times[:-1]).is_euler
    others = Solver.euler(times, model_times=times[1:]), Solver.adams_bashforth(times, 2), Solver.heun(times)
    assert not any(s.is_euler for s in others)


def test_first_steps_are_of_lower_order():
    ab1, ab2, ab3 = (Solver.adams_bashforth(uneven_grid(6), order).coefficients for order in (1, 2, 3))
    assert torch.equal(ab1[:1], ab3[:1])
    assert torch.equal(ab2[:2], ab3[:2])
    assert not torch.equal(ab2[2], ab3[2])


@pytest.mark.parametrize(
    "times", [even_grid(5), uneven_grid(6), torch.tensor([0.2, 0.21, 0.6, 0.7, 1.0], dtype=F64)], ids=len
)
@pytest.mark.parametrize("name", ["euler", "adams", "heun", "inverse"])
def test_how_errors_of_velocities_add_up(name, times):
    """The sample is a sum of the velocities, so signs of an error of 1 that follow the weights', which unit velocities
    one at a time tell, make the most of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver = {
            "euler": lambda: fk.Solver.euler(times),
            "adams": lambda: fk.Solver.adams_bashforth(times, 3),
            "heun": lambda: fk.Solver.heun(times),
            "inverse": lambda: fk.Solver.adams_bashforth(times, 2, inverse=True),
        }[name]()

    def moved(errors):
        calls = iter(errors)
        return fk.sample(lambda x, t: torch.full_like(x, next(calls)), torch.zeros(1, 1, dtype=torch.float64), solver)

    if name == "inverse":  # which `sample` refuses
        ends = solver.coefficients[-1]
    else:
        ends = torch.stack([moved(unit.tolist()) for unit in torch.eye(solver.evaluations)]).flatten()
        assert moved(ends.sign().tolist()).item() == pytest.approx(
            solver.amplification * (1 - times[0]).item(), rel=1e-9
        )
    assert solver.amplification == pytest.approx((ends.abs().sum() / (1 - times[0])).item(), rel=1e-9)
    assert solver.amplification >= 1 - 1e-12


def test_adams_bashforth_says_where_it_amplifies_errors():
    quiet = [fk.Schedule([0, 0.1, 0.3, 0.6, 1.0]), fk.Schedule([0, 0.2, 0.5, 1.0]), 2, 3, 5, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for knots in quiet:
            fk.Solver.adams_bashforth(knots, inverse=True), fk.Solver.adams_bashforth(knots)
        loud = adams_bashforth([0, 0.01, 0.5, 1])  # of which nothing is said
    with pytest.warns(
        UserWarning, match=r"^schedule: expected knots on which .*, got 25 .* a step of 49 times"
    ) as seen:
        again = fk.Solver.adams_bashforth([0, 0.01, 0.5, 1])
    assert seen[0].filename == __file__
    assert torch.equal(again.coefficients, loud.coefficients)


def test_the_known_numbers_of_even_knots():
    h = 1 / 6
    b = Solver.adams_bashforth(6, 2).coefficients.diff(dim=0)
    torch.testing.assert_close(b[3][2:5] / h, torch.tensor([0, -1 / 2, 3 / 2], dtype=F64), atol=1e-13, rtol=0)
    b = Solver.adams_bashforth(6, 3).coefficients.diff(dim=0)
    torch.testing.assert_close(b[3][2:5] / h, torch.tensor([5, -16, 23], dtype=F64) / 12, atol=1e-13, rtol=0)


def test_schedules_of_every_kind():
    for schedule in (4, Schedule.uniform(4), [0, 0.25, 0.5, 0.75, 1], even_grid(4)):
        assert torch.equal(Solver.adams_bashforth(schedule).coefficients, Solver.adams_bashforth(4).coefficients)
    solver = Solver.adams_bashforth(4)
    assert Solver.of(solver) is solver
    assert Solver.of(4).is_euler


def test_weights_of_a_polynomial():
    """Through nodes outside of the interval as well, forward and backward."""
    nodes = torch.tensor([0.1, 0.3, 0.35], dtype=F64)
    for begin, end in ((0.35, 0.6), (0.6, 0.35), (0.0, 1.0)):
        w = polynomial_weights(nodes, torch.tensor(begin, dtype=F64), torch.tensor(end, dtype=F64))
        for degree in range(3):
            integral = (end ** (degree + 1) - begin ** (degree + 1)) / (degree + 1)
            assert math.isclose((w * nodes**degree).sum().item(), integral, abs_tol=1e-14)


# ---- updates ----


def dense(M=6, seed=0):
    """As a fit makes it: every coefficient is there."""
    b = normal(M, M, seed=seed, dtype=F64).tril() / M
    return Solver(uneven_grid(M), uneven_grid(M)[:-1], b, "dense")


SOLVERS = {
    "euler": Solver.euler(uneven_grid(6)),
    "other times": Solver.euler(6, model_times=[0.1, 0.2, 0.4, 0.4, 0.7, 0.9]),
    "ab2": Solver.adams_bashforth(uneven_grid(6), 2),
    "ab3": Solver.adams_bashforth(uneven_grid(6), 3),
    "heun": Solver.heun(uneven_grid(5)),
    "midpoint": Solver.midpoint(uneven_grid(5)),
    "dense": dense(),
    "inverse": Solver.adams_bashforth(uneven_grid(6), 2, inverse=True),
    "free start": replace(dense(), start_coefficients=[0.9, 1.2, 0.8, 0.1, 0.6, -0.3]),  # one of which grows sixfold
    "far start": replace(dense(), start_coefficients=[-5.0, 9.0, 0.8, 0.1, 0.6, 7.0]),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_updates_are_the_same_steps(name):
    solver = SOLVERS[name]
    torch.testing.assert_close(by_updates(solver, curved, START), run(solver, curved, START), rtol=1e-13, atol=1e-13)


def test_updates_have_as_few_terms_as_can_be():
    terms = {name: [len(u.which) for u in s.updates()] for name, s in SOLVERS.items()}
    assert terms["euler"] == terms["other times"] == [1] * 6
    assert terms["ab2"] == terms["inverse"] == [1] + [2] * 5
    assert terms["ab3"] == [1, 2] + [3] * 4
    assert terms["dense"] == [1, 2, 3, 4, 5, 6]
    assert [u.from_start for u in SOLVERS["dense"].updates()] == [False] + [True] * 5
    assert max(terms["heun"]) <= 2


def test_a_solver_that_goes_nowhere():
    solver = Solver([0, 1], [0.0], [[0.0]])
    assert solver.updates() == (Update(False, (0,), (0.0,)),)
    assert torch.equal(run(solver, curved, START), START)


@pytest.mark.parametrize("name", SOLVERS)
def test_chained_updates_are_the_same_steps(name):
    solver = SOLVERS[name]
    updates = solver.updates(chained=True)
    assert not any(u.from_start for u in updates)
    got = by_updates(solver, curved, START, updates)
    torch.testing.assert_close(got, run(solver, curved, START), rtol=1e-13, atol=1e-13)


def test_start_coefficients_of_one_change_nothing():
    solver = dense()
    ones = replace(solver, start_coefficients=[1.0] * 6)
    assert ones.keeps_start
    assert not SOLVERS["free start"].keeps_start
    assert ones.updates() == solver.updates()
    assert ones.updates(chained=True) == solver.updates(chained=True)
    assert ones.to_dict() == solver.to_dict()
    back = Solver.from_dict(SOLVERS["free start"].to_dict())
    assert back.start_coefficients.tolist() == [0.9, 1.2, 0.8, 0.1, 0.6, -0.3]


def test_steps_from_state_to_state_need_a_start_in_the_state():
    solver = replace(dense(), start_coefficients=[1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(by_updates(solver, curved, START), run(solver, curved, START), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match=r"^start_coefficients: expected no 0 before the last"):
        solver.updates(chained=True)


def test_a_fine_grid_has_no_table_until_it_is_asked_for():
    solver = Solver.euler(1_000_000)
    assert euler_sizes(solver.updates()) == solver.times.diff().tolist()
    with pytest.raises(ValueError, match=r"^coefficients: expected what fits"):
        solver.coefficients  # noqa: B018


@pytest.mark.parametrize("inverse", [False, True])
def test_the_table_of_euler_steps(inverse):
    solver = Solver.euler(uneven_grid(4), inverse=inverse)
    known = Solver(solver.times, solver.model_times, solver.times.diff().expand(4, -1).tril())
    assert torch.equal(solver.coefficients, known.coefficients)
    assert solver.updates() == known.updates()
    assert torch.equal(copy.deepcopy(Solver.euler(uneven_grid(4), inverse=inverse)).coefficients, known.coefficients)
    assert not hasattr(solver, "coefficient")


# ---- files, errors ----


@pytest.mark.parametrize("name", SOLVERS)
def test_through_json(name):
    solver = SOLVERS[name]
    solver = Solver(solver.times, solver.model_times, solver.coefficients, name, {"held out": [0.5, {"ab2": 1.5}]})
    again = Solver.from_dict(json.loads(json.dumps(solver.to_dict())))
    for key in ("times", "model_times", "coefficients"):
        assert torch.equal(getattr(again, key), getattr(solver, key))
    assert (again.name, again.notes) == (solver.name, solver.notes)
    assert again.updates() == solver.updates()
    assert again.is_inverse == (name == "inverse")


def test_directions():
    forward, inverse = Solver.heun(4), Solver.heun(4, inverse=True)
    assert (forward.is_inverse, inverse.is_inverse) == (False, True)
    assert torch.equal(inverse.times, forward.times.flip(0))


BAD = {
    "times": (([0, 0.5, 0.5, 1], [0.0], [[1.0]]), r"^times: expected strictly increasing"),
    "times of no flow": (([0, 1.1], [0.0], [[1.0]]), r"^times: expected times from 0"),
    "times of an inversion": (([1, 0.5, 0.5, 0], [0.0], [[1.0]]), r"^times: expected strictly"),
    "no evaluations": (([0, 1], [], torch.zeros(0, 0)), r"^model_times: expected shape \[M\]"),
    "model times of NaN": (([0, 1], [math.nan], [[1.0]]), r"^model_times: expected finite"),
    "shape": (([0, 1], [0.0, 0.5], [[1.0]]), r"^coefficients: expected shape \[2, 2\], a row for each"),
    "NaN": (([0, 1], [0.0], [[math.nan]]), r"^coefficients: expected finite"),
    "future": (([0, 1], [0.0, 0.5], [[1.0, 0.1], [0.0, 1.0]]), r"^coefficients: expected zeros above the diagonal"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_solvers(what):
    args, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        Solver(*args)


def test_bad_arguments_of_constructors():
    with pytest.raises(ValueError, match=r"^order: expected at least 1, got 0"):
        Solver.adams_bashforth(4, 0)
    with pytest.raises(TypeError, match=r"^order: expected an integer"):
        Solver.adams_bashforth(4, 1.5)
    with pytest.raises(TypeError, match=r"^schedule: expected a Schedule, a number of steps or times, got Solver"):
        Solver.heun(Solver.heun(3))
    with pytest.raises(ValueError, match=r"^model_times: expected 3 times, one for each step"):
        Solver.euler(3, model_times=[0.0, 0.5])


class Derived(Solver):
    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "further", self.steps + 1)

    @property
    def broken(self):
        return self.nothing


def test_a_derived_class_is_made_by_its_own_init():
    for solver in (Derived.euler(3), Derived.adams_bashforth(3), Derived.heun(3), Derived.midpoint(3)):
        assert (type(solver), solver.further) == (Derived, 4)
    assert Derived.euler(3).to_dict() == Solver.euler(3).to_dict()
    assert Derived.euler(3).updates() == Solver.euler(3).updates()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):  # not of the property that asks for it
        Derived.euler(3).broken  # noqa: B018


@pytest.mark.parametrize("make", [Solver.euler, Solver.adams_bashforth, Solver.heun, Solver.midpoint])
def test_pickles(make):
    """Those of earlier versions had a list of tuples for the updates."""
    solver = make(4)
    again = pickle.loads(pickle.dumps(solver))
    assert again.to_dict() == solver.to_dict()
    assert again.updates() == solver.updates()
    old, state = Solver.__new__(Solver), dict(vars(solver), coefficients=solver.coefficients)
    old.__setstate__(state | {"_updates": [tuple(u) for u in solver.updates()]})
    assert old.updates() == solver.updates()
    assert old.is_euler == solver.is_euler
    assert torch.equal(fk.sample(lambda x, t: -x, normal(2, 3), old), fk.sample(lambda x, t: -x, normal(2, 3), solver))


OF_TENSORS = {
    "Schedule": lambda times: fk.Schedule(times, grid=times, indices=range(len(times))),
    "Solver": lambda times: fk.Solver(times, times[1:], [[0.1, 0, 0], [0.1, 0.2, 0], [0, 0, 1]]),
    "Solver.euler": lambda times: fk.Solver.euler(times),
    "Solver.euler, model_times": lambda times: fk.Solver.euler(times, model_times=times[:-1]),
    "Solver.heun": lambda times: fk.Solver.heun(times),
    "Solver.midpoint": lambda times: fk.Solver.midpoint(times),
    "Solver.adams_bashforth": lambda times: fk.Solver.adams_bashforth(times),
    "Solver.of": lambda times: fk.Solver.of(times),
    "Solver.of a Schedule": lambda times: fk.Solver.of(fk.Schedule(times)),
    "SampleSchedules": lambda times: fk.SampleSchedules(times[None], cost=times[1:2]),
    "StepCost": lambda times: fk.StepCost(times),
    "Calibration": lambda times: fk.calibrate(lambda x, t: -x, normal(8, 2), grid=times, steps=[2], progress=False),
    "FusedSampler": lambda times: fk.fuse(nn.Linear(3, 2), times)._solver,
    "FusedSampler.on": lambda times: fk.fuse(nn.Linear(3, 2), 3).on(times)._solver,
}


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("name", OF_TENSORS)
def test_what_is_given_may_be_written_to_later(name, kind):
    times = np.array([0, 0.25, 0.5, 1])
    given = torch.from_numpy(times) if kind == "tensor" else times
    made = OF_TENSORS[name](given)
    before = {key: value.clone() for key, value in vars(made).items() if isinstance(value, torch.Tensor)}
    times[:] = 7
    assert "times" in before
    assert all(torch.equal(vars(made)[key], value) for key, value in before.items())
