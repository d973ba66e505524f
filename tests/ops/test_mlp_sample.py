import contextlib
import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _pairs import exhaustive
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkernels.ops.mlp_sample import (
    COMBINES,
    PLACE,
    Layer,
    Plan,
    Prepared,
    Source,
    Tables,
    Updates,
    _flat_steps,
    _places,
    _steps,
    mlp_sample,
    reference,
)
from flowkernels.ops.mlp_sample.samples import Network, dense, error_and_bound, last_few, sample_inputs, scattered
from flowkernels.ops.samples import Sample, generator
from flowkernels.runtime import backends
from flowkernels.runtime.backends import BACKENDS, backend
from flowkernels.solver import Update

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAN, INF = math.nan, math.inf
ACTIVATIONS = tuple(reference.ACTIVATIONS)
EACH = pytest.mark.parametrize("name", BACKENDS)
WIDTHS = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 64, 65, 100])
ROWS = st.sampled_from([None, None, "one", "step", "sample", "both"])


@st.composite
def networks(draw, n=(1, 2, 3, 5, 6, 7, 13, 17, 33, 49)):
    """Any program that the op takes: layers that read parts of any earlier values, combined and put together."""
    net = Network(draw(WIDTHS), draw(st.sampled_from(n)), draw(st.integers(1, 3)), draw(st.integers(0, 999)))
    for _ in range(draw(st.integers(0, 6))):
        append = len(net.widths) > 1 and draw(st.integers(0, 3)) == 0
        readable = len(net.widths) - append

        def part(width, readable=readable):
            """A place of that width in any value, if there is one."""
            values = [i for i in range(readable) if net.widths[i] >= width]
            if not values:
                return None
            value = draw(st.sampled_from(values))
            return value, draw(st.integers(0, net.widths[value] - width)), width

        value = draw(st.integers(0, readable - 1))
        source = part(draw(st.integers(1, net.widths[value])))
        map_ = draw(st.sampled_from(["linear", "linear", "identity", "layer_norm", "rms_norm"]))
        width = draw(WIDTHS) if map_ == "linear" else source[2]
        kwargs = dict(map=map_, source=source, shift=draw(ROWS), scale=draw(ROWS), shift_each=draw(ROWS))
        if draw(st.booleans()) and (other := part(width)):
            kwargs |= dict(combine=draw(st.sampled_from(COMBINES[1:])), other=other)
        numbers = dict(alpha=draw(st.sampled_from([0.1, 1.0, 1.6])), gain=draw(st.sampled_from([1.0, 0.5, 1.05])))
        net.add(width, activation=draw(st.sampled_from(ACTIVATIONS)), append=append, **numbers, **kwargs)
    return net.head()


def call(sample: Sample):
    return mlp_sample(*sample.args, **sample.kwargs)


def rows_of(layers, rows):
    """The layers for some of the samples."""

    def chosen(t):
        return t if t is None or t.shape[1] == 1 else t[:, rows]

    return [replace(a, **{k: chosen(getattr(a, k)) for k in ("scale", "shift", "shift_each")}) for a in layers]


# ---- random programs ----


@settings(max_examples=150)
@given(networks(), st.sampled_from([None, None, 0.0, 2.5]), st.booleans(), st.sampled_from([None, None, BF16]))
def test_random_networks_against_float64(net, guidance, trajectory, low):
    sample = net.sample("", guidance=guidance, trajectory=trajectory, weights=low)
    error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@settings(max_examples=40)
@given(networks(), st.sampled_from([None, None, 0.0, 2.5]), st.booleans(), st.sampled_from([None, BF16]))
def test_random_networks_on_cuda_against_float64(net, guidance, trajectory, low):
    sample = net.sample("", guidance=guidance, trajectory=trajectory, weights=low)
    with backend("cuda"):
        error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@settings(max_examples=10)
@given(networks(n=(1, 3, 17, 33)), st.sampled_from([None, 2.5]), st.booleans(), st.sampled_from([None, BF16]))
def test_random_networks_on_triton_against_float64(net, guidance, trajectory, low):
    """Whatever memory held before."""
    sample = net.sample("", guidance=guidance, trajectory=trajectory, weights=low)
    with backend("triton"), nan_in_new_memory():
        error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@contextlib.contextmanager
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=150)
@given(networks())
def test_values_that_are_alive_have_rooms_of_their_own(net):
    layers = net.layers
    places, row = _places(net.dim, layers)
    written, read, value = {0: -1}, {0: len(layers)}, 0
    for i, a in enumerate(layers):
        value += not a.first
        written.setdefault(value, i)
        read[value] = len(layers) if value == len(places) - 1 else max(i, read.get(value, i))
        for source in filter(None, (a.source, a.other)):
            read[source.value] = max(read[source.value], i)
    rooms = {v: [0] for v in written}  # the floats from its place that each value touches
    value = 0
    for a in layers:
        value += not a.first
        rooms[value].append(a.first + -(-a.width // PLACE) * PLACE)
        for source in filter(None, (a.source, a.other)):
            rooms[source.value].append(source.first + -(-source.width // PLACE) * PLACE)
    assert len(places) == len(written)
    assert places[0] == 0
    for v, at in enumerate(places):
        assert at % PLACE == 0
        assert at + max(rooms[v]) <= row
        for w in range(v):
            together = written[v] <= read[w] and written[w] <= read[v]
            apart = at + max(rooms[v]) <= places[w] or places[w] + max(rooms[w]) <= at
            assert apart or not together, (v, w, places)


def test_rooms_are_used_again():
    net = Network(16, 1, 1)
    for _ in range(20):
        net.add(64, activation="relu")
    assert _places(16, net.head().layers)[1] <= 16 + 3 * 64


@settings(max_examples=60)
@given(networks(n=(5, 7, 13, 33, 49)), st.sampled_from([None, 1.5]), st.data())
def test_a_sample_does_not_depend_on_the_batch_in_float32(net, guidance, data):
    """Bit for bit, whatever its place, the number of the others, and what they are; and the threads."""
    sample = net.sample("", guidance=guidance)
    x, h, layers = sample.args
    others = sample.kwargs.get("unconditional")
    whole = call(sample)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(call(sample), whole)
    torch.set_num_threads(2)
    rows = data.draw(st.lists(st.integers(0, net.n - 1), min_size=1, max_size=2 * net.n))
    kwargs = {} if others is None else dict(unconditional=rows_of(others, rows), guidance=guidance)
    assert torch.equal(mlp_sample(x[rows], h, rows_of(layers, rows), **kwargs), whole[rows])


@pytest.mark.parametrize("low", [None, BF16])
def test_batches_threads_and_places(low):
    """Tiles of any size, on any thread, and with bfloat16 too: a product's sum has one order."""
    net = (
        Network(33, 97, 3)
        .add(260, activation="silu")
        .add(100, activation="silu")
        .add(map="layer_norm", shift=None)
        .head()
    )
    x, h, layers = net.sample("").args
    whole = mlp_sample(x, h, layers, weights=low)
    for n in (1, 2, 3, 4, 6, 7, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 96):
        for first in (0, 97 - n):
            assert torch.equal(mlp_sample(x[first : first + n], h, layers, weights=low), whole[first : first + n])
    for threads in (1, 2, 3, 7, 100):
        torch.set_num_threads(threads)
        assert torch.equal(mlp_sample(x, h, layers, weights=low), whole)


@pytest.mark.parametrize("low", [None, BF16])
def test_large_weights_that_threads_share(low):
    """1 MiB and more a layer: few samples share it out, many do not; outputs appended to columns of any number."""
    net = Network(19, 49, 8).add(523, activation="silu").add(505, activation="tanh", shift="both")
    net.add(130, map="linear", source=(1, 3, 517), append=True).add(600, activation="mish")
    net.add(600, source=(2, 31, 600), combine="add", other=(3, 0, 600), shift="sample", activation="gelu").head()
    x, h, layers = net.sample("").args
    assert sum(a.weight.nbytes >= 1 << 20 for a in layers) >= 3
    whole = mlp_sample(x, h, layers, weights=low)
    for n in (1, 2, 5, 6, 7, 16, 17):
        part = x[:n], h, rows_of(layers, slice(n))
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(mlp_sample(*part, weights=low), whole[:n])
    error, bound = error_and_bound(Sample("", (x, h, layers), dict(weights=low)), whole)
    assert error <= bound


def two_layers(n, widths, low, steps=2):
    net = Network(5, n, steps)
    for width in widths:
        net.add(width, activation="silu")
    return net.head().sample("", weights=low, guidance=1.5)


@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize(
    ("n", "widths"),
    [
        (2, [300, 280]),  # weights that stream, more outputs than a panel has
        (97, [150, 130]),  # tiles of 32 samples
        (70, [800, 24]),  # rows that leave room for fewer
        (3, [17000, 9]),  # rows that do not fit in shared memory
    ],
)
def test_tiles_and_rows_on_cuda(n, widths, low):
    sample = two_layers(n, widths, low)
    with backend("cuda"):
        error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@pytest.mark.parametrize(("name", "sizes"), [("cuda", (1, 2, 7, 13, 33, 48)), ("triton", (1, 17))])
@pytest.mark.parametrize("low", [None, BF16])
def test_a_sample_does_not_depend_on_the_batch_on_gpus(low, name, sizes):
    """Not in bfloat16 either: sums run over the inputs in one order, whatever the tile."""
    net = Network(33, 97, 3).add(260, activation="silu").add(100, activation="mish")
    x, h, layers = net.add(map="layer_norm", shift="both").head().sample("").args
    with backend(name):
        whole = mlp_sample(x, h, layers, weights=low)
        for n in sizes:
            for first in (0, 97 - n):
                rows = slice(first, first + n)
                assert torch.equal(mlp_sample(x[rows], h, rows_of(layers, rows), weights=low), whole[rows])


# ---- updates with velocities of earlier evaluations ----

SOLVERS = pytest.mark.parametrize("solver", [last_few(2), last_few(3), dense, scattered])


@settings(max_examples=60)
@given(networks(), st.sampled_from([None, 2.5]), st.booleans(), st.sampled_from([None, BF16]), st.integers(1, 9))
def test_random_updates_against_float64(net, guidance, trajectory, low, steps):
    assert_updates_within_the_bound("cpu", net, guidance, trajectory, low, steps)


@settings(max_examples=25)
@given(networks(), st.sampled_from([None, 2.5]), st.booleans(), st.sampled_from([None, BF16]), st.integers(1, 9))
def test_random_updates_on_cuda_against_float64(net, guidance, trajectory, low, steps):
    assert_updates_within_the_bound("cuda", net, guidance, trajectory, low, steps)


@settings(max_examples=6)
@given(networks(n=(1, 3, 17, 33)), st.sampled_from([None, 2.5]), st.booleans(), st.sampled_from([None, BF16]))
def test_random_updates_on_triton_against_float64(net, guidance, trajectory, low):
    assert_updates_within_the_bound("triton", net, guidance, trajectory, low, 4)


def assert_updates_within_the_bound(name, net, guidance, trajectory, low, steps):
    """Tables of one row for each step fit its number of steps alone: they are repeated."""
    times = [k % net.steps for k in range(steps)]
    of_steps = (
        {k: t[times] for k in ("scale", "shift", "shift_each") if (t := getattr(a, k)) is not None and len(t) > 1}
        for a in net.layers
    )
    net.layers = [replace(a, **tables) for a, tables in zip(net.layers, of_steps, strict=True)]
    net.steps = steps
    sample = net.sample("", guidance=guidance, trajectory=trajectory, weights=low, solver=scattered)
    with backend(name), nan_in_new_memory():
        error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@EACH
def test_updates_of_whole_numbers(name):
    """v = x + t, from either state, scaled or not, without the last velocity, and with the first one long after it."""
    x = torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -1.0]])
    shift = torch.arange(5.0).expand(3, 5).T.reshape(5, 1, 3)
    layers = [Layer("linear", Source(0, 0, 3), 3, torch.eye(3), shift=shift)]
    updates = [
        (True, [0], [2.0]),
        (False, [0], [3.0], -2.0),
        (True, [0, 1, 2], [1.0, -1.0, 2.0], 0.0),
        (False, [0, 3], [-4.0, 1.0], 0.5),
        (True, [4], [1.0], 3),
    ]
    states, velocities = [x], []
    for t, (first, which, factors, *scale) in enumerate(updates):
        velocities.append(states[-1] + t)
        added = sum(b * velocities[k] for b, k in zip(factors, which, strict=True))
        begin = x if first else states[-1]
        states.append((scale[0] * begin if scale else begin) + added)
    with backend(name):
        got = mlp_sample(x, updates, layers, trajectory=True)
        alone = mlp_sample(x, updates, layers)
    assert torch.equal(got[0], states[-1])
    assert torch.equal(got[1], torch.stack(states))
    assert torch.equal(got[2], torch.stack(velocities))
    assert torch.equal(alone, states[-1])


@EACH
@pytest.mark.parametrize("low", [None, BF16])
def test_updates_that_are_euler_steps(name, low):
    """The same path, bit for bit; and the path of updates, which adds in the same order."""
    net = Network(17, 33, 4).add(40, activation="silu").head()
    x, h, layers = net.sample("").args
    updates = [Update(i == 0, [i], [size]) for i, size in enumerate(h)]
    with backend(name):
        expected = mlp_sample(x, h, layers, weights=low)
        assert torch.equal(mlp_sample(x, updates, layers, weights=low), expected)
        for scale in (1.0, 1.0 + 1e-12):  # which in float32 is the same
            updates[-1] = Update(False, [0, 3], [0.0, h[3]], scale)
            assert torch.equal(mlp_sample(x, updates, layers, weights=low), expected)


@SOLVERS
@pytest.mark.parametrize(("name", "sizes"), [("cpu", (1, 6, 13, 48)), ("cuda", (1, 7, 33)), ("triton", (1, 17))])
def test_a_sample_does_not_depend_on_the_batch_with_updates(solver, name, sizes):
    net = Network(33, 97, 4).add(70, activation="silu").head()
    x, updates, layers = net.sample("", solver=solver).args
    with backend(name):
        whole = mlp_sample(x, updates, layers)
        for n in sizes:
            for first in (0, 97 - n):
                rows = slice(first, first + n)
                assert torch.equal(mlp_sample(x[rows], updates, rows_of(layers, rows)), whole[rows])
    if name == "cpu":
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(mlp_sample(x, updates, layers), whole)
        torch.set_num_threads(2)


@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize(("n", "widths"), [(97, [150, 130]), (40, [17000, 9])])  # rows in shared memory, and not
def test_updates_of_several_tiles_on_cuda(n, widths, low):
    net = Network(5, n, 3)
    for width in widths:
        net.add(width, activation="silu")
    sample = net.head().sample("", weights=low, guidance=1.5, solver=dense)
    with backend("cuda"), nan_in_new_memory():
        error, bound = error_and_bound(sample, call(sample))
    assert error <= bound


@given(st.integers(1, 30), st.integers(0, 99))
def test_velocities_that_are_needed_later_have_places_of_their_own(steps, seed):
    updates = scattered(steps, generator(seed))
    given, memory, terms = Updates(updates), {}, []
    for i, (from_start, count, kept) in enumerate(given.listed):
        mine = given.places[len(terms) : len(terms) + count]
        assert (bool(from_start), count) == (updates[i].from_start, len(updates[i].which))
        assert [i if place < 0 else memory[place] for place in mine] == list(updates[i].which)
        terms += mine
        assert kept < given.count
        if kept >= 0:
            memory[kept] = i
    assert len(memory) == given.count
    assert given.factors == [b for u in updates for b in u.factors]
    assert given.scales == [u.scale for u in updates]


def test_places_are_used_again():
    g = generator(0)
    assert [Updates(solver(12, g)).count for solver in (last_few(1), last_few(2), last_few(4), dense)] == [0, 1, 3, 11]


@given(st.integers(0, 12), st.integers(0, 99))
def test_updates_as_the_registered_op_takes_them(steps, seed):
    updates = scattered(steps, generator(seed))
    assert _steps(*_flat_steps(updates)) == updates
    h = [0.5 * i for i in range(steps)]
    assert _steps(*_flat_steps(h)) == h
    kept = [Update(u.from_start, u.which, u.factors) for u in updates]
    code = [int(number) for u in kept for number in (u.from_start, len(u.which), *u.which)]
    assert _flat_steps(kept) == ([b for u in kept for b in u.factors], code)  # as recordings before scales have it


@pytest.mark.parametrize("low", [None, BF16])
def test_updates_that_are_not_finite_or_in_place(low):
    net = Network(17, 49, 3).add(65, activation="silu").head()
    x, updates, layers = net.sample("", solver=dense).args
    expected, (plan, tables) = mlp_sample(x, updates, layers, weights=low), plan_of(x, layers, low)
    prepared, y, broken = Prepared(plan, updates, tables, None, 1.0), x.clone(), x.clone()
    assert prepared.run(y, y) == -1
    assert torch.equal(y, expected)
    broken[31, 3] = broken[40, 0] = NAN
    assert prepared.run(broken, y) == 31
    assert (~y.isfinite().all(1)).nonzero().flatten().tolist() == [31, 40]


# ---- exact results: whole numbers ----


@EACH
def test_one_step_of_whole_numbers(name):
    x = torch.tensor([[1.0, 2.0, -3.0], [0.0, -1.0, 4.0]])
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]])
    shift = torch.tensor([[[10.0, 20.0]]])
    each = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    scale = torch.tensor([[[2.0, -1.0]]])
    layers = [
        Layer("linear", Source(0, 0, 3), 2, weight, scale=scale, shift=shift, shift_each=each),
        Layer("identity", Source(0, 2, 1), 1, activation="relu", first=2),
        Layer("identity", Source(1, 0, 3), 3, combine="multiply", other=Source(0, 0, 3), gain=2.0),
    ]
    hidden = torch.tensor([[1.0, 27.0, 0.0], [29.0, 19.0, 4.0]])
    with backend(name):
        state, states, velocities = mlp_sample(x, [0.5], layers, trajectory=True)
    assert torch.equal(velocities, (2 * hidden * x)[None])
    assert torch.equal(state, x + hidden * x)
    assert torch.equal(states, torch.stack([x, state]))


@EACH
def test_tables_in_every_layout(name):
    """Steps, samples and columns in any order in memory, expanded, sliced, and with columns that a vector divides."""
    x = torch.zeros(3, 16)
    weight = torch.zeros(16, 16)
    table = torch.randint(-8, 9, (4, 3, 16), generator=generator(0)).float()
    forms = {
        "contiguous": table,
        "samples first": table.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": table.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "columns before samples": table.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.full((4, 3, 21), NAN).index_copy(2, torch.arange(2, 18), table)[..., 2:18],
        "every other": table.repeat_interleave(2, 2)[..., ::2],
        "one step": table[:1],
        "one sample": table[:, :1],
        "expanded columns": table[..., :1].expand(4, 3, 16),
        "expanded steps": table[:1].expand(4, 3, 16),
        "expanded samples": table[:, :1].expand(4, 3, 16),
        "expanded all": table[:1, :1, :1].expand(4, 3, 16),
    }
    for form, t in forms.items():
        layers = [Layer("linear", Source(0, 0, 16), 16, weight, shift=t)]
        with backend(name):
            _, _, v = mlp_sample(x, [1.0] * 4, layers, trajectory=True)
        assert torch.equal(v, t.expand(4, 3, 16)), form


@EACH
def test_weights_in_every_layout(name):
    x = torch.randint(-4, 5, (5, 17)).float()
    weight = torch.randint(-4, 5, (17, 17)).float()
    expected = x + x @ weight.T
    for w in (weight, weight.T.contiguous().T, weight.repeat(2, 2)[3:20, 2:19].roll((3, 2), (0, 1))):
        with backend(name):
            assert torch.equal(mlp_sample(x, [1.0], [Layer("linear", Source(0, 0, 17), 17, w)]), x + x @ w.T)
    assert torch.equal(expected, x + x @ weight.T)
    x, weight = torch.randint(-4, 5, (5, 32)).float(), torch.randint(-4, 5, (32, 32)).float()
    layer = Layer("linear", Source(0, 0, 32), 32, weight.T.contiguous().T)  # nothing is padded
    for low in (None, BF16):
        with backend(name):
            assert torch.equal(mlp_sample(x, [1.0], [layer], weights=low), x + x @ weight.T)


@EACH
def test_guidance_of_one_and_zero(name):
    net = Network(5, 7, 3).add(17, activation="silu", shift="both").head()
    x, h, layers = net.sample("").args
    others = net.sample("", guidance=2.0).kwargs["unconditional"]
    with backend(name):
        zero = mlp_sample(x, h, layers, unconditional=others, guidance=0.0)
        one = mlp_sample(x, h, layers, unconditional=others, guidance=1)
        assert torch.equal(zero, mlp_sample(x, h, others))
        torch.testing.assert_close(one, mlp_sample(x, h, layers))
        tensor = mlp_sample(x, h, layers, unconditional=others, guidance=torch.tensor(0.0))
    assert torch.equal(tensor, zero)


def test_inputs_are_left_alone():
    for sample in list(sample_inputs())[::5]:
        x, _, layers = sample.args
        tensors = [x, *(t for a in layers for t in (a.weight, *a.tables) if t is not None)]
        before = [t.clone() for t in tensors]
        call(sample)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# ---- bfloat16 ----


def test_low_is_the_network_of_rounded_weights_and_inputs():
    """No bias: what is left against the same rounding in float64 is rare, small beside the rounding, and of no sign."""
    net = Network(64, 97, 2).add(130, activation="silu").add(130, activation="gelu").head()
    x, h, layers = net.sample("").args
    got = mlp_sample(x, h, layers, weights=BF16).double()
    rounded = reference.mlp_sample(x.double(), h, layers, None, 1.0, BF16)[0]
    exact = reference.mlp_sample(x.double(), h, layers, None, 1.0, None)[0]

    def rms(t):
        return t.square().mean().sqrt().item()

    assert rms(got - rounded) < rms(exact - rounded) / 8
    assert abs((got - rounded).mean().item()) < 4 * rms(got - rounded) / got.numel() ** 0.5


# ---- activations ----


def grid():
    """Every exponent with 128 fractions and both signs, of `--exhaustive` 32,768 and 2^24 numbers in all; and the range
    in which things happen more densely."""
    bits = torch.arange(0, 0x7F800000, 1 << (8 if exhaustive() else 16), dtype=torch.int32).view(F32)
    return torch.cat([bits, -bits, torch.linspace(-100, 100, 1 << 17)])


def activate(x, activation, alpha):
    layer = Layer("identity", Source(0, 0, x.shape[1]), x.shape[1], activation=activation, alpha=alpha)
    return mlp_sample(x, [0.0], [layer], trajectory=True)[2][0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, alpha = grid(), {"leaky_relu": 0.01, "elu": 1.3}.get(activation, 0.0)
    x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(-1, 64)
    truth = exact_activation(activation, x.double(), alpha)
    got = activate(x, activation, alpha)
    allowed = 5 * torch.finfo(F32).eps * truth.abs()
    tail = torch.finfo(F32).eps / 4 * x.double().abs().clamp(max=100)  # of results that vanish beside x
    assert not got.isnan().any()
    assert ((got - truth).abs() <= torch.where(x > -2, allowed, allowed.max(tail)) + 2e-36).all()


def exact_activation(activation, x, alpha):
    """In float64, and for the largest numbers that float32 has."""
    if activation == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    if activation == "gelu_tanh":
        return x * (2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).sigmoid()
    return reference.ACTIVATIONS[activation](x, alpha)


@EACH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_nan_and_infinity(activation, name):
    """NaN stays; infinity gives the limit, or NaN where torch's formula has no limit."""
    x = torch.tensor([[NAN, INF, -INF, 0.0, -0.0, 1e38, -1e38, 1e-45, -1e-45]] * 3)
    alpha = {"leaky_relu": 0.01, "elu": 1.3}.get(activation, 0.0)
    with backend(name):
        got = activate(x, activation, alpha)
    expected = reference.ACTIVATIONS[activation](x.double(), alpha)
    assert got[:, 0].isnan().all()
    known = expected.isfinite()
    torch.testing.assert_close(got[known], expected[known].float(), rtol=1e-6, atol=2e-36)
    bound = {"tanh": 1.0, "sigmoid": 1.0, "at_most": alpha}.get(activation, INF)
    assert got[:, 1].eq(bound).logical_or(got[:, 1].isnan()).all()
    zero_below = activation in ("relu", "silu", "gelu", "gelu_tanh", "sigmoid", "mish", "softplus")
    assert not zero_below or got[:, 2].abs().nan_to_num().le(2e-36).all()


# ---- values that are not finite ----


def plan_of(x, layers, low=None):
    C = backends.extension()
    return Plan(C, x.shape[1], layers, low), Tables(layers)


@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize("where", ["x", "shift", "scale"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_first_sample_that_is_not_finite(value, where, low):
    net = Network(5, 97, 3).add(33, shift="both", scale="both", activation="silu").head()
    x, h, layers = net.sample("").args
    steps, good, out = torch.tensor(h, dtype=F64), mlp_sample(x, h, layers, weights=low), torch.empty(97, 5)
    for bad in ((0,), (96,), (13, 50), (96, 47, 48), (5, 6)):
        y = x.clone()
        tables = dict(shift=layers[0].shift.clone(), scale=layers[0].scale.clone())
        for i in bad:
            (y if where == "x" else tables[where][1])[i, i % 5] = value
        broken = [replace(layers[0], **tables), *layers[1:]]
        plan, given = plan_of(y, broken, low)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = Prepared(plan, steps, given, None, 1.0).run(y, out)
            finite = out.isfinite().all(1)
            lost = set((~finite).nonzero().flatten().tolist())
            assert lost <= set(bad)
            # silu of -Inf is 0: the only way out
            assert lost == set(bad) or (where != "x" and value != NAN)
            assert found == min(lost, default=-1)
            rest = torch.ones(97, dtype=torch.bool).index_fill(0, torch.tensor(bad), False)
            assert torch.equal(out[rest], good[rest])
    plan, given = plan_of(x, layers, low)
    assert Prepared(plan, steps, given, None, 1.0).run(x, out) == -1
    assert torch.equal(out, good)


def test_in_place_as_the_kernel_allows():
    net = Network(17, 49, 2).add(65, activation="silu").head()
    x, h, layers = net.sample("").args
    expected, (plan, tables) = mlp_sample(x, h, layers), plan_of(x, layers)
    assert Prepared(plan, torch.tensor(h, dtype=F64), tables, None, 1.0).run(x, x) == -1
    assert torch.equal(x, expected)


# ---- gradients, devices, errors ----


def small(n=3, steps=2):
    net = Network(4, n, steps).add(6, shift="both", scale="step", shift_each="sample", activation="silu").head()
    return net.sample("").args


@pytest.mark.parametrize(
    "which", ["x", "layers[0].weight", "layers[0].scale", "layers[1].shift", "unconditional[0].shift"]
)
def test_there_is_no_gradient(which):
    x, h, layers = small()
    others = [replace(a, shift=a.shift.clone()) for a in layers]
    where = {"x": x, **{f"layers[{i}].{k}": t for i, a in enumerate(layers) for k, t in vars(a).items()}}
    where["unconditional[0].shift"] = others[0].shift
    where[which].requires_grad_()
    with pytest.raises(ValueError, match="expected no gradient: mlp_sample has none, got requires_grad") as e:
        mlp_sample(x, h, layers, unconditional=others)
    assert str(e.value).startswith(f"{which}: ")
    with torch.no_grad():
        got = mlp_sample(x, h, layers, unconditional=others)
    assert not got.requires_grad
    with torch.inference_mode():
        assert torch.equal(mlp_sample(x, h, layers, unconditional=others), got)


def test_on_the_meta_device():
    def meta(t):
        return t if t is None else t.to("meta")

    x, h, layers = small()
    layers = [
        replace(a, **{k: meta(getattr(a, k)) for k in ("weight", "scale", "shift", "shift_each")}) for a in layers
    ]
    state, states, velocities = mlp_sample(meta(x), h, layers, trajectory=True)
    assert [t.shape for t in (state, states, velocities)] == [(3, 4), (3, 3, 4), (2, 3, 4)]
    assert state.device.type == "meta"


def test_step_sizes_in_every_form():
    x, h, layers = small()
    expected = mlp_sample(x, h, layers)
    for steps in (tuple(h), torch.tensor(h, dtype=F64), iter(h)):
        assert torch.equal(mlp_sample(x, steps, layers), expected)


X = torch.zeros(3, 4)
A = Layer("linear", Source(0, 0, 4), 6, torch.zeros(6, 4), shift=torch.zeros(2, 3, 6))
B = Layer("linear", Source(1, 0, 6), 4, torch.zeros(4, 6))
OTHER = [replace(A, shift=torch.ones(2, 3, 6)), B]


def first(**changes):
    return X, [0.1, 0.2], [replace(A, **changes), B]


def second(**changes):
    return X, [0.1, 0.2], [A, replace(B, **changes)]


def whole(x=X, h=(0.1, 0.2), layers=(A, B)):
    return x, h, layers


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"x: expected a torch.Tensor, got int 3", whole(3), {}),
        (TypeError, r"x: expected torch.float32, got a torch.float64", whole(X.double()), {}),
        (ValueError, r"x: expected shape \[n, D\] with D > 0, got .*\[4\]", whole(X[0]), {}),
        (ValueError, r"x: expected shape \[n, D\] with D > 0, got .*\[3, 0\]", whole(X[:, :0]), {}),
        (TypeError, r"step_sizes: expected a sequence of numbers, got 0.1", whole(h=0.1), {}),
        (TypeError, r"step_sizes\[1\]: expected a number, got 'a'", whole(h=[0.1, "a"]), {}),
        (TypeError, r"step_sizes\[1\]: expected \(whether from x, ", whole(h=[(True, [0], [1.0]), 0.1]), {}),
        (TypeError, r"step_sizes\[0\]: expected True or False first, got 1", whole(h=[(1, [0], [1.0])]), {}),
        (
            ValueError,
            r"step_sizes\[1\]: expected increasing numbers of evaluations from 0 to 1, got \[0, 2\]",
            whole(h=[(True, [0], [1.0]), (True, [0, 2], [1.0, 1.0])]),
            {},
        ),
        (ValueError, r"step_sizes\[0\]: expected increasing numbers", whole(h=[(True, [0, 0], [1.0, 1.0])]), {}),
        (ValueError, r"step_sizes\[0\]: expected 1 factors, got \[\]", whole(h=[(True, [0], [])]), {}),
        (TypeError, r"step_sizes\[0\], factor of 0: expected a number, got 'a'", whole(h=[(True, [0], ["a"])]), {}),
        (TypeError, r"step_sizes\[0\], scale: expected a number, got 'a'", whole(h=[(True, [0], [1.0], "a")]), {}),
        (TypeError, r"step_sizes\[0\]: expected \(whether .*, a scale\)", whole(h=[(True, [0], [1.0], 1, 1)]), {}),
        (
            TypeError,
            r"weights: expected torch.bfloat16 or None, got torch.float16",
            whole(),
            dict(weights=torch.float16),
        ),
        (TypeError, r"guidance: expected a number, got 'x'", whole(), dict(guidance="x")),
        (ValueError, r"guidance: expected 1 without unconditional, got 2.0", whole(), dict(guidance=2.0)),
        (TypeError, r"layers: expected a sequence of layers, got None", whole(layers=None), {}),
        (ValueError, r"layers: expected at least one layer, got none", whole(layers=[]), {}),
        (TypeError, r"layers\[1\]: expected a Layer, got B", whole(layers=[A, "B"]), {}),
        (
            ValueError,
            r"layers\[0\].map: expected one of identity, linear, layer_norm, rms_norm, got conv",
            first(map="conv"),
            {},
        ),
        (
            ValueError,
            r"layers\[1\].combine: expected one of none, add, multiply, maximum, minimum, got x",
            second(combine="x"),
            {},
        ),
        (ValueError, r"layers\[0\].activation: expected one of none, relu.*, got x", first(activation="x"), {}),
        (ValueError, r"layers\[1\].other: expected a source with combine, .*, got None", second(combine="add"), {}),
        (ValueError, r"layers\[1\].other: expected a source .*None without", second(other=Source(0, 0, 4)), {}),
        (ValueError, r"layers\[0\].source: expected columns of .* of \[4\] columns", first(source=Source(1, 0, 4)), {}),
        (ValueError, r"layers\[0\].source: expected columns", first(source=Source(-1, 0, 4)), {}),
        (ValueError, r"layers\[0\].source: expected columns", first(source=Source(0, -1, 4)), {}),
        (ValueError, r"layers\[0\].source: expected columns", first(source=Source(0, 1, 4)), {}),
        (ValueError, r"layers\[0\].source: expected columns", first(source=Source(0, 0, 0)), {}),
        (ValueError, r"layers\[1\].source: expected columns of .* \[4\] columns", second(first=6), {}),
        (
            ValueError,
            r"layers\[1\].other: expected columns of .* \[4, 6\] columns",
            second(combine="add", other=Source(1, 3, 4)),
            {},
        ),
        (ValueError, r"layers\[1\].other: expected width 4, got", second(combine="add", other=Source(1, 0, 3)), {}),
        (ValueError, r"layers\[0\].width: expected at least 1, got 0", first(width=0), {}),
        (TypeError, r"layers\[0\].weight: expected a torch.Tensor, got NoneType", first(weight=None), {}),
        (TypeError, r"layers\[0\].weight: expected torch.float32", first(weight=torch.zeros(6, 4).bfloat16()), {}),
        (ValueError, r"layers\[0\].weight: expected shape \[6, 4\] on cpu", first(weight=torch.zeros(4, 6)), {}),
        (ValueError, r"layers\[0\].weight: expected shape .* on cpu", first(weight=torch.zeros(6, 4).to("meta")), {}),
        (ValueError, r"layers\[0\].weight: expected None with identity", first(map="identity"), {}),
        (ValueError, r"layers\[0\].width: expected 4, got 6", first(map="layer_norm", weight=None), {}),
        (TypeError, r"layers\[0\].scale: expected torch.float32", first(scale=torch.zeros(1, 1, 6).double()), {}),
        (
            ValueError,
            r"layers\[0\].shift: expected shape \[2 or 1, 3 or 1, 6\] on cpu",
            first(shift=torch.zeros(3, 3, 6)),
            {},
        ),
        (ValueError, r"layers\[0\].shift_each: expected shape", first(shift_each=torch.zeros(2, 2, 6)), {}),
        (ValueError, r"layers\[0\].scale: expected shape", first(scale=torch.zeros(2, 3, 4)), {}),
        (ValueError, r"layers\[0\].scale: expected shape", first(scale=torch.zeros(6)), {}),
        (ValueError, r"layers\[0\].shift: expected shape .* on cpu", first(shift=A.shift.to("meta")), {}),
        (
            ValueError,
            r"layers\[0\].source: expected columns of an earlier value of \[\] columns",
            first(first=3, source=Source(0, 0, 4)),
            {},
        ),
        (
            ValueError,
            r"layers\[1\].first: expected the width of the value so far, got 5",
            second(first=5, source=Source(0, 0, 4), weight=torch.zeros(4, 4)),
            {},
        ),
        (ValueError, r"layers: expected a last value of 4 columns, as x has, got 6", whole(layers=[A]), {}),
        (ValueError, r"unconditional: expected at least one layer", whole(), dict(unconditional=[])),
        (
            ValueError,
            r"unconditional\[0\].shift: expected shape",
            whole(),
            dict(unconditional=[replace(A, shift=torch.zeros(6)), B]),
        ),
        (
            ValueError,
            r"unconditional: expected the layers with other tables, got other layers",
            whole(),
            dict(unconditional=[replace(A, weight=A.weight.clone()), B]),
        ),
        (
            ValueError,
            r"unconditional: expected the layers with other tables",
            whole(),
            dict(unconditional=[replace(A, gain=2.0), B]),
        ),
        (
            ValueError,
            r"unconditional: expected the layers with other tables",
            whole(),
            dict(unconditional=[replace(A, shift=None), B]),
        ),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match="^" + message):
        mlp_sample(*args, **kwargs)
    assert mlp_sample(X, [0.1, 0.2], [A, B], unconditional=OTHER, guidance=2.0).shape == X.shape


def test_the_kernel_is_as_the_library_says():
    """The order of the names is that of the enumerations in csrc/mlp_sample/mlp_sample.h."""
    module = importlib.import_module("flowkernels.ops.mlp_sample")
    text = (Path(__file__).parents[2] / "csrc/mlp_sample/mlp_sample.h").read_text()
    for enum, names in (("MlpMap", module.MAPS), ("MlpCombine", module.COMBINES), ("Activation", ACTIVATIONS)):
        listed = text.split(f"enum class {enum} : int64_t {{")[1].split("}")[0]
        assert [name.strip() for name in listed.split(",")] == list(names)
