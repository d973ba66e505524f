"""Every stage under the states of torch that its caller may have set: the result is what it is without them."""

import contextlib
import functools
import inspect
import os
import shutil
import signal
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from _flows import normal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flowkernels as fk
from flowkernels import solver
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.models.networks import ResidualMLP
from flowkernels.ops import recorded_calls

QUIET = dict(progress=False)
GRID, N = 8, 2


class Conditional(nn.Module):
    """A small network with a label."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.label = nn.Linear(5, 16), nn.Linear(16, 4), nn.Embedding(3, 16)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, t, label):
        h = self.first(torch.cat([x, t[:, None].to(x.dtype)], 1))
        return self.last(self.drop(torch.tanh(h + self.label(label))))


def network(seed=0):
    torch.manual_seed(seed)
    net = ResidualMLP(4, width=16, blocks=1, time_width=8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@functools.cache
def world():
    """What stages start from, made without any state."""
    net = network()
    torch.manual_seed(1)
    guided = fk.VelocityField(
        Conditional().eval(),
        **dict(conditioning={"label": torch.arange(6) % 2}, unconditional={"label": torch.tensor([2])}, guidance=2.0),
    )
    noise = normal(6, 4)
    cal = fk.calibrate(net, noise, GRID, [N, 3], **QUIET)
    more = dict(other=normal(6, 4, seed=5), v=normal(6, 4, seed=7), states=normal(3, 6, 4, seed=8))
    more |= dict(z=normal(6, 8), weight=normal(4, 8), bias=normal(4))
    return dict(net=net, guided=guided, noise=noise, cal=cal, **more)


def tensors(result) -> list:
    """The numbers of a stage's result, as a flat list."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, nn.Module):
        return [v for _, v in sorted(result.state_dict().items())]
    if isinstance(result, fk.Straightened):
        return [*tensors(result.student), *tensors(result.history)]
    if isinstance(result, dict):
        return [t for _, v in sorted(result.items()) for t in tensors(v)]
    if isinstance(result, (list, tuple)):
        return [t for v in result for t in tensors(v)]
    if isinstance(result, fk.Calibration):
        return tensors([result.cost, result.gram, result.schedules, result.solvers, result.verified, result.norm_cost])
    if isinstance(result, fk.Schedule):
        return tensors([result.times, result.cost])
    if isinstance(result, fk.Solver):
        return tensors([result.times, result.model_times, result.coefficients])
    if isinstance(result, fk.Trajectory):
        return tensors([result.x, result.v])
    if isinstance(result, fk.Inversion):
        return tensors([result.noise, result.error])
    if isinstance(result, fk.Pairs):
        return tensors([result.states, result.weight, result.index, result.error])
    return [] if result is None else [result]


STAGES = {}


def stage(make):
    STAGES[make.__name__] = make
    return make


@stage
def rollout(w, tmp_path):
    return [fk.rollout(w["net"], w["noise"], GRID), fk.rollout(w["guided"], w["noise"], GRID)]


@stage
def sample(w, tmp_path):
    schedules = (3, w["cal"][N], fk.Solver.adams_bashforth(w["cal"][N]))
    return [fk.sample(v, w["noise"], s) for v in (w["net"], w["guided"]) for s in schedules]


@stage
def invert(w, tmp_path):
    return fk.invert(w["net"], w["noise"], 3)


@stage
def couple(w, tmp_path):
    kinds = ("independent", "ot", "sinkhorn", "gibbs")
    of = lambda kind: fk.couple(None, w["noise"], kind, reg=0.5, generator=torch.Generator().manual_seed(0))  # noqa: E731
    return [*map(of, kinds), fk.couple(w["other"], w["noise"], batch=4, generator=torch.Generator().manual_seed(0))]


@stage
def forward_pairs(w, tmp_path):
    return fk.forward_pairs(w["net"], w["noise"], 3, chunk=4)


@stage
def evaluate_sampler(w, tmp_path):
    options = dict(data=w["other"], columns=("endpoint", "straightness", "energy", "frechet", "rk45"), tolerances=[0.1])
    found = fk.evaluate_sampler(w["net"], [w["cal"], 3], w["noise"], chunk=4, keep_samples=True, **options)
    figures = [(row.rms, row.straightness, row.energy, row.frechet) for row in found.rows[:3]]
    numbers = torch.tensor(figures, dtype=torch.float32, device="cpu")
    return [found.teacher_samples, *(row.samples for row in found.rows), numbers]


@stage
def log_likelihood(w, tmp_path):
    found = [fk.log_likelihood(v, w["other"], 2, chunk=4) for v in (w["net"], w["guided"])]
    found.append(fk.log_likelihood(w["net"], w["other"], 2, probes=2, distribution="gaussian"))
    return [t for of in found for t in (of.nats, of.noise)]


@stage
def calibrate(w, tmp_path):
    cal = fk.calibrate(w["net"], w["noise"], GRID, [N], verify_noise=w["other"], effort="fit", max_regret=0.5, **QUIET)
    return [cal, fk.calibrate(w["guided"], w["noise"], GRID, [N], chunk=4, **QUIET)]


EVALUATING = [name for name, make in OBJECTIVES.items() if "velocity" in inspect.signature(make).parameters]


def planned(objective):
    def make(w, tmp_path):
        field = dict(velocity=w["net"], samples=4) if objective in EVALUATING else {}
        return w["cal"].find([N, 3], objective=objective, **field)

    STAGES[f"plan {objective}"] = make


for name in OBJECTIVES:
    planned(name)


@stage
def fit_solver(w, tmp_path):
    return [fk.fit_solver(w["net"], w["cal"], N), fk.fit_solver(w["net"], w["cal"], N, noise=w["other"], inverse=True)]


@stage
def polish(w, tmp_path):
    """Of the solver its ends: its coefficients are free where these hardly move."""
    solver = fk.polish(w["net"], w["cal"], fk.Solver.adams_bashforth(w["cal"][3]), iterations=1)
    return [fk.sample(w["net"], w["noise"], solver), fk.polish(w["net"], w["cal"], w["cal"][3], iterations=1)]


def straightened(w, student=None, velocity=None, **settings):
    settings = dict(noise=(4,), iterations=6, bank=8, batch=4, lr=1e-2, warmup=1, log_every=1, refresh=4) | settings
    schedule = settings.pop("schedule", w["cal"][N])
    return fk.straighten(student, velocity or w["net"], schedule, **settings, **QUIET)


@stage
def training_cost(w, tmp_path):
    cost = fk.training_cost(None, w["net"], fk.Schedule.uniform(2), noise=w["noise"], grid=4, iterations=3, batch=4)
    counts = cost.counts
    return [torch.tensor([*counts.with_graph, *counts.bank, cost.memory["optimizer"]], device="cpu")]


@stage
def straighten(w, tmp_path):
    watched = dict(held_out=3, evaluate_every=2)
    fields = dict(velocity=w["guided"], noise=w["noise"], refresh=None, **watched)
    uniform = dict(
        t_sampling="uniform", weighting=[1, 2], loss="huber", ema=None, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    solver = dict(schedule=fk.Solver.adams_bashforth(w["cal"][N]), target="solver", grid=GRID, loss="cauchy")
    followed = [fields | dict(target=name) for name in ("next_knot", "velocity_matching", "on_policy")]
    coupled = [
        fk.Pairs(torch.stack([w["noise"], w["other"]])),
        lambda n, g: fk.couple(None, w["other"][:n], generator=g),
    ]
    whole = dict(target="reflow", schedule=fk.Schedule([0, 1]), noise=None, refresh=None)
    pairs = [whole | dict(bank=bank, **watched) for bank in coupled]
    endpoint = solver | dict(target="endpoint", **watched)
    return [straightened(w, **more) for more in ({}, fields, uniform, solver, endpoint, *followed, *pairs)]


@stage
def bank(w, tmp_path):
    found, plans, data = [], [w["cal"][N], w["cal"][3]], dict(noise=None, data=w["noise"])
    folder = tmp_path / f"{threading.get_ident()}"
    own = dict(velocity=w["guided"], noise=w["noise"])
    for i, more in enumerate(({}, dict(storage="shared", dtype=torch.bfloat16), dict(storage=folder), data, own)):
        settings = dict(velocity=w["net"], noise=(4,), size=6, chunk=4) | more
        made = fk.TrajectoryBank(schedules=plans, **settings, **QUIET).fill()
        if settings["noise"] == (4,):
            made.refresh(0.5)
        batch = made.sample(5, torch.Generator(device="cpu").manual_seed(i), 3)
        found += [made.times, made.states(N), batch.states, batch.interval, batch.sample]
    opened = fk.TrajectoryBank.open(folder)
    found.append(opened.states(N))
    shutil.rmtree(folder)
    return found


class Stopped(Exception):
    pass


@stage
def resume(w, tmp_path):
    def stop(*_):
        calls_left[0] -= 1
        if calls_left[0] < 0:
            raise Stopped

    path, calls_left = tmp_path / f"{threading.get_ident()}.pt", [5]
    student, other = w["students"]
    student.register_forward_pre_hook(stop)
    with contextlib.suppress(Stopped):
        straightened(w, student, checkpoint=path, checkpoint_every=2)
    assert calls_left[0] < 0
    result = straightened(w, other, checkpoint=path)
    path.unlink()
    return result


@stage
def fuse(w, tmp_path):
    sampler, labelled = fk.fuse(w["net"], w["cal"][N]), fk.fuse(w["guided"], N, shape=(4,))
    again = fk.calibrate(sampler, w["noise"], GRID, [N], **QUIET)
    return [sampler(w["noise"]), labelled(w["noise"]), fk.rollout(sampler, w["noise"], 3), again.cost]


@stage
def fuse_head(w, tmp_path):
    head = fk.fuse_head(w["net"])
    return [fk.sample(head, w["noise"], 3), fk.rollout(head, w["noise"], 3)]


@stage
def step_cost(w, tmp_path):
    v = w["cal"].kept.v
    costs = fk.StepCost(GRID).update(v[:, :3]).merge(fk.StepCost(GRID).update(v[:, 3:]))
    return [
        fk.step_costs(v, GRID),
        fk.step_costs(v, GRID, w["cal"].kept.x),
        costs.cost(),
        fk.least_cost_schedules(costs.cost(), GRID, 3),
    ]


@stage
def files(w, tmp_path):
    path = tmp_path / f"{threading.get_ident()}.boss.json"
    cal = fk.calibrate(w["net"], w["noise"], GRID, [N], effort="fit", **QUIET)
    cal.save(path)
    return [fk.Calibration.load(path, w["net"]), BUNDLED["digits"].load()]


@stage
def objects(w, tmp_path):
    mixture = GaussianMixtureVelocity(w["z"][:, :4], 0.5)
    schedules = [fk.Schedule([0, 0.3, 1]), fk.Schedule.uniform(3), fk.Schedule([0, 0.5, 1], GRID, (0, 4, 8))]
    solvers = [make(s) for make in (fk.Solver.euler, fk.Solver.adams_bashforth) for s in schedules]
    solvers += [*fk.stock_solvers(3, shift=3).values(), *fk.stock_solvers(schedules[0]).values()]
    return [
        *(schedules, solvers, [fk.Solver.from_dict(s.to_dict()) for s in solvers]),
        *(mixture, mixture(w["noise"], w["noise"][:, 0].abs()), mixture.sample(5, torch.Generator().manual_seed(3))),
        w["guided"].rows(slice(2), 6)(w["noise"][:2], w["noise"][:2, 0]),
    ]


@stage
def from_denoiser(w, tmp_path):
    net, noise, found = w["net"], w["noise"], []
    paths = [
        ("data", "variance_exploding", (0.01, 20.0)),
        ("noise", torch.linspace(0.999, 0.01, 50, dtype=torch.float64, device="cpu"), None),
    ]
    paths += [("v", "cosine", None), ("data", lambda s: (1 - s * s, s), (0.01, 0.9))]
    for predicts, path, ends in paths:
        v = fk.from_denoiser(net, predicts, path, time_range=ends)
        found += [v.grid(3), fk.sample(v, v.initial(noise), v.grid(3)), v.own_times(v.grid(3))]
    v = fk.from_denoiser(w["guided"], "noise", [0.99, 0.5, 0.1])
    return [*found, fk.rollout(v, v.state(noise), v.grid(3))]


@stage
def stored_calls(w, tmp_path):
    path = tmp_path / f"{threading.get_ident()}.safetensors"
    with fk.record_calls("euler_step", path, calls=1):
        x = fk.sample(w["net"], w["noise"], 2)
    return [x, len(recorded_calls.open_calls(path).calls)]


@stage
def scheduler(w, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler

    from flowkernels.integrations.diffusers import sigmas_for, solver_scheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = solver_scheduler(fk.Solver.adams_bashforth(w["cal"][3]), like=stock)
    made.set_timesteps()
    x = w["noise"]
    for t in made.timesteps:
        x = made.step(w["net"](x, 1 - t.expand(len(x)) / 1000), t, x).prev_sample
    noisy = made.scale_noise(x, [made.timesteps[1]], w["noise"])
    return [x, made.sigmas, made.timesteps, noisy, sigmas_for(w["cal"][3], stock)]


@stage
def every_op(w, tmp_path):
    noise, v, states = w["noise"], w["v"], w["states"]
    i, s = torch.arange(6, device="cpu") % 2, torch.arange(6, device="cpu")
    h = torch.full((2,), 0.5, dtype=torch.float32, device="cpu")
    gram = fk.velocity_gram(states)
    x = v.clone()
    return [
        *(
            fk.euler_step(noise, v, 0.3),
            fk.euler_step(noise, v, 0.3, v_uncond=x, guidance=2.0, low=torch.bfloat16),
        ),
        *(fk.linear_update(noise, [v, states[0]], [0.1, 0.7]), fk.segment_points(states, i, s)),
        *fk.straighten_loss(v, states, h, i, s),
        *(gram, fk.cost_from_gram(gram, [0, 0.2, 0.5, 1])),
        *fk.bellman(w["cal"].cost, 3),
        fk.linear_euler(noise, w["z"], w["weight"], 0.1, bias=w["bias"]),
    ]


class Passive(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(now, get, set_to, *args):
    before = get()
    set_to(now, *args)
    try:
        yield
    finally:
        set_to(before)


@contextlib.contextmanager
def autocast_off():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        yield


@contextlib.contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def all_warnings_raise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def default_dtype(dtype):
    return setting(dtype, torch.get_default_dtype, torch.set_default_dtype)


STATES = {
    "autocast off inside autocast": autocast_off,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled(False)": lambda: torch.set_grad_enabled(False),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "with cpu": lambda: torch.device("cpu"),
    "deterministic": lambda: setting(
        True, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "flush denormal": flush_denormal,
    "matmul precision": lambda: setting("high", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "one thread": lambda: setting(1, torch.get_num_threads, torch.set_num_threads),
    "function mode": Passive,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from torch 2.9; torch then refuses the question about all
    STATES["matmul precision of one backend"] = lambda: setting(
        "tf32",
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
    )
ROUNDING = ("one thread",)  # where sums are in another order


def run(name, tmp_path, state=contextlib.nullcontext):
    w = world() | dict(students=[network(3), network(4)])
    torch.manual_seed(11)
    with warnings.catch_warnings(), state():
        warnings.simplefilter("ignore")
        return tensors(STAGES[name](w, tmp_path))


@functools.cache
def usual(name):
    with tempfile.TemporaryDirectory() as folder:
        return run(name, Path(folder))


def differences(found, expected, tolerance=0.0) -> list[str]:
    """What is not the same, dtype and device included."""
    assert len(found) == len(expected)
    return [
        f"{i}: {a} for {b}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
        if not (_alike(a, b, tolerance) if isinstance(b, Tensor) else a == pytest.approx(b, tolerance, nan_ok=True))
    ]


def _alike(a, b, tolerance):
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    return torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", STAGES)
def test_state(name, state, tmp_path):
    expected = usual(name)
    tolerance = 1e-3 if state in ROUNDING else 0.0
    assert not differences(run(name, tmp_path, STATES[state]), expected, tolerance)


@pytest.mark.parametrize("capture", [None, "compile"])
def test_times_that_a_velocity_writes_to_are_its_own(capture, monkeypatch):
    net, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(5, 3)
    made = [fk.VelocityField(net, time_column=True) for _ in range(2)]

    def model_times(times, x):
        return times.mul_(0.5)

    monkeypatch.setattr(made[0], "model_times", model_times)
    expected = fk.sample(made[1], x, 7)
    for _ in range(2):
        fk.sample(made[0], x, 7, capture=capture)
        assert torch.equal(fk.sample(made[1], x, 7), expected)


class OfMode(Tensor):
    pass


def as_narrow(t):
    return t.float() if t.dtype == torch.float64 else t


RESULTS = {"subclass": lambda t: t.as_subclass(OfMode), "narrow": as_narrow, "copy": torch.clone}


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_function_mode_hands_on_stays_with_its_calls(name):
    made = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if type(out) is Tensor:
                made.append(out := RESULTS[name](out))
            return out

    net, x = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).requires_grad_(False), torch.randn(5, 3)
    field = fk.VelocityField(net, time_column=True)

    def all_of(velocity):
        trajectory, inversion = fk.rollout(velocity, x, 7), fk.invert(velocity, x, 7)
        return fk.sample(velocity, x, 7), trajectory.times, trajectory.x, inversion.noise, inversion.error

    expected = [all_of(field), all_of(fk.fuse(field, 7))]
    solver._uniform.cache_clear()
    with Mode():
        for call in (fk.sample, fk.rollout, fk.invert, lambda velocity, x, steps: fk.fuse(velocity, steps)):
            # copies leave unset what was to be written, and no network that returns a subclass is fused
            with contextlib.suppress(ValueError, fk.NotFusable):
                call(field, x, 7)
    for t in made:
        t.zero_() if t.dtype == torch.float64 else None
    for found, usual_ones in zip([all_of(field), all_of(fk.fuse(field, 7))], expected, strict=True):
        assert not differences(found, usual_ones)
        assert {type(t) for t in found} == {Tensor}


NETWORKLESS = {"step_cost", "every_op", "fuse", *(f"plan {name}" for name in OBJECTIVES if name not in EVALUATING)}


@pytest.mark.parametrize("name", STAGES)
def test_autocast(name, tmp_path):
    """Networks compute under it, and nothing else does."""
    found, expected = run(name, tmp_path, lambda: torch.autocast("cpu", torch.bfloat16)), usual(name)
    if name in NETWORKLESS:
        assert not differences(found, expected)
        return
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            a, b = (t.double().nan_to_num(posinf=0.0) for t in (a, b))
            assert (a - b).norm() <= 0.2 * b.norm()
        else:
            assert a == pytest.approx(b, 0.5, nan_ok=True)


CALLING = ["rollout", "sample", "invert", "calibrate", "plan endpoint", "fit_solver", "polish", "fuse", "fuse_head"]


@pytest.mark.parametrize("name", [*CALLING, "straighten", "resume"])
def test_casts_of_autocast(name, tmp_path):
    """A stage uses no cast of a weight that has changed since, and leaves none behind, of those without a graph too."""
    net, call = world()["net"], (world()["noise"], torch.zeros(6))
    weights = [p for p in net.parameters() if p.dim() > 1]
    folders = [tmp_path / part for part in ("usual", "before", "behind", "graph")]
    for folder in folders:
        folder.mkdir()

    @contextlib.contextmanager
    def doubled():
        with torch.no_grad():
            torch._foreach_mul_(weights, 2)
            yield
            torch._foreach_mul_(weights, 0.5)

    expected = run(name, folders[0], lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        with doubled():
            net(*call)
        assert not differences(run(name, folders[1]), expected)
        run(name, folders[2])
        with doubled():
            found = net(*call)
            torch.clear_autocast_cache()
            assert torch.equal(found, net(*call))
        torch.clear_autocast_cache()
        run(name, folders[3])
        grads = torch.autograd.grad(net(*call).float().sum(), weights, allow_unused=True)
        assert None not in grads


@pytest.mark.parametrize("before", [False, True], ids=["", "after the student was called without gradients"])
def test_straighten_in_autocast_learns(before):
    """Autocast keeps weights cast as they were at their first use, and without a graph if that had none."""
    student, settings = network(3), dict(iterations=60, batch=8, refresh=None, init="keep", log_every=59, ema=None)
    losses = straightened(world(), network(3), **settings).history["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        if before:
            with torch.no_grad():
                student(torch.zeros(1, 4), torch.zeros(1))
        found = straightened(world(), student, **settings)
        again = student(world()["noise"], torch.zeros(6))
    assert found.history["loss"] == pytest.approx(losses, 0.1)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again, student(world()["noise"], torch.zeros(6)))


@pytest.mark.parametrize("name", STAGES)
def test_eight_threads(name, tmp_path):
    expected, found, errors = usual(name), {}, []
    before = list(warnings.filters), warnings.showwarning

    def work(i):
        try:
            found[i] = tensors(STAGES[name](world() | dict(students=students[i]), tmp_path))
        except BaseException as e:
            errors.append(e)

    students = [[network(3), network(4)] for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = list(warnings.filters), warnings.showwarning
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        assert (list(warnings.filters), warnings.showwarning) == inside
    assert not errors, errors[0]
    assert (list(warnings.filters), warnings.showwarning) == before
    for i in range(8):
        assert not differences(found[i], expected)


def test_a_forked_child(tmp_path):
    """OpenMP's threads stay behind in the parent: what runs there in parallel would wait for them."""
    for name in STAGES:
        usual(name)
    big, v = torch.randn(600, 600), normal(20, 64, 300)

    def in_parallel():
        return [big @ big, big.repeat(50, 1).sin(), fk.velocity_gram(v)]

    expected, (read, write) = in_parallel(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(100)
            assert not differences(in_parallel(), expected, 1e-3)
            for name in STAGES:
                os.write(write, f"{name}: ".encode())
                os.write(write, f"{differences(run(name, tmp_path), usual(name), 1e-3)}\n".encode())
            os.write(write, b"done\n")
        except BaseException as e:
            os.write(write, f"{type(e).__name__}: {e}\n".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        assert lines.read() == "".join(f"{name}: []\n" for name in STAGES) + "done\n"
    assert os.waitpid(child, 0)[1] == 0
