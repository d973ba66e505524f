"""The captured loop as a CUDA graph, on a GPU; tests/test_capture.py has the same logic on the host."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
from _flows import linear_field, normal
from test_capture import Looking
from torch import nn

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT, UNet
from flowkernels.sampling import capture
from flowkernels.sampling.loop import initial_state, steps
from flowkernels.velocity.field import VelocityField


def scrambled(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval().cuda()


def guided(packed):
    net = BUNDLED["digits"].load().cuda()
    embed = nn.Embedding(4, 64).cuda()
    return VelocityField(
        lambda x, t, label: net(x + embed(label).view(x.shape), t),
        conditioning={"label": torch.arange(5, device="cuda") % 3},
        unconditional={"label": torch.full((1,), 3, device="cuda")},
        **dict(guidance=2.5, packed=packed),
    )


VELOCITIES = {
    "digits": (lambda: BUNDLED["digits"].load().cuda(), (5, 1, 8, 8)),
    "unet": (lambda: scrambled(UNet(widths=(8, 16, 24))), (4, 1, 16, 16)),
    "dit": (lambda: scrambled(DiT()), (3, 1, 8, 8)),
    "guided, packed": (lambda: guided(True), (5, 1, 8, 8)),
    "guided, two calls": (lambda: guided(False), (5, 1, 8, 8)),
    "bfloat16": (
        lambda: VelocityField(BUNDLED["digits"].load().bfloat16().cuda(), dtype=torch.bfloat16),
        (5, 1, 8, 8),
    ),
}


@pytest.fixture(autouse=True)
def no_loops():
    capture.LOOPS.clear()
    yield
    capture.LOOPS.clear()


def check(velocity, noise, schedule, mode="graph"):
    expected, got = fk.sample(velocity, noise, schedule), fk.sample(velocity, noise, schedule, capture=mode)
    # the same kernels of the same libraries, which may split sums otherwise inside a graph
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    return got


@pytest.mark.parametrize("mode", ["graph", "auto"])
@pytest.mark.parametrize("name", VELOCITIES)
def test_the_numbers_are_the_same(name, mode):
    make, shape = VELOCITIES[name]
    velocity = make()
    first = check(velocity, normal(*shape).cuda(), 4, mode)
    kept = first.clone()
    check(velocity, normal(*shape, seed=1).cuda(), 4, mode)
    assert torch.equal(first, kept)
    assert torch.equal(check(velocity, normal(*shape).cuda(), 4, mode), first)
    assert len(capture.LOOPS.loops) == 1


@pytest.mark.parametrize("name", VELOCITIES)
def test_no_host_sync(name):
    make, shape = VELOCITIES[name]
    velocity, x = make(), initial_state(normal(*shape).cuda())
    solver = fk.Solver.euler(4)
    with torch.no_grad():
        capture.run("graph", velocity, x, solver)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in steps(velocity, x, solver):
                pass
            capture.run("graph", velocity, x, solver)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capture_mode", ["graph", None])
@pytest.mark.parametrize("name", VELOCITIES)
def test_a_call_waits_once_and_not_at_all_without_checks(name, capture_mode):
    make, shape = VELOCITIES[name]
    velocity, noise = make(), normal(*shape).cuda()
    expected = fk.sample(velocity, noise, 4, capture=capture_mode)
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = fk.sample(velocity, noise, 4, capture=capture_mode, check=False)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            fk.sample(velocity, noise, 4, capture=capture_mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "called a synchronizing" in str(w.message)]) == 1
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_what_changes_is_seen():
    velocity, noise = VELOCITIES["digits"][0](), normal(5, 1, 8, 8).cuda()
    check(velocity, noise, 4)
    with torch.no_grad():
        velocity.input.weight.mul_(1.5)
    check(velocity, noise, 4)
    assert len(capture.LOOPS.loops) == 1
    kept = velocity.input.weight
    velocity.input.weight = nn.Parameter(velocity.input.weight.detach() / 2)
    check(velocity, noise, 4)
    assert len(capture.LOOPS.loops) == 2
    del kept
    field = guided(True)
    check(field, noise, 4)
    field.conditioning["label"] = torch.tensor([2, 2, 1, 0, 0], device="cuda")
    check(field, noise, 4)
    check(field, noise, [0, 0.1, 1])
    for n in (1, 7):
        check(velocity, normal(n, 1, 8, 8).cuda(), 4)
    with torch.autocast("cuda", torch.bfloat16):
        narrow = fk.sample(velocity, noise, 4, capture="graph")
    assert not torch.equal(narrow, check(velocity, noise, 4))


def test_threads_and_streams_share_a_graph():
    velocity = VELOCITIES["digits"][0]()
    noises = [normal(64, 1, 8, 8, seed=i).cuda() for i in range(4)]
    expected, wrong = [check(velocity, x, 4) for x in noises], []
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(fk.sample(velocity, noises[i], 4, capture="graph"), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_sync_is_named_and_leaves_the_gpu_usable():
    with pytest.raises(RuntimeError, match=r"^velocity: expected a network without host syncs .*t\[0\].item\(\)"):
        fk.sample(lambda x, t: x * t[0].item(), normal(3, 4).cuda(), 2, capture="graph")
    check(linear_field().cuda(), normal(3, 4).cuda(), 2)


def test_memory_goes_with_the_velocity():
    velocity = VELOCITIES["unet"][0]()
    gone = weakref.ref(velocity)
    check(velocity, normal(4, 1, 16, 16).cuda(), 4)
    del velocity
    gc.collect()
    assert gone() is None
    assert not capture.LOOPS.loops


def test_memory_is_kept_for_a_graph_where_no_change_of_it_is_seen():
    net, noise = Looking().cuda(), normal(3, 4).cuda()
    net.table.values = net.table.values.cuda()
    first = check(net, noise, 2)
    net.table.values = torch.full((4,), 3.0, device="cuda")
    junk = [torch.full((4,), torch.nan, device="cuda") for _ in range(100)]
    assert torch.equal(fk.sample(net, noise, 2, capture="graph"), first)
    del junk


def test_a_dropped_graph_runs_to_its_end():
    net, noise = linear_field().cuda(), normal(3, 4).cuda()

    def slow(x, t):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        return net(x, t) * t[:, None]

    expected = fk.sample(slow, noise, 4, capture="graph")
    with torch.cuda.stream(torch.cuda.Stream()):
        got = fk.sample(slow, noise, 4, capture="graph", check=False)
    capture.LOOPS.clear()
    assert len(capture.LOOPS.dropped) == 1
    junk = [torch.full((n,), torch.nan, device="cuda") for n in (4, 12) for _ in range(100)]
    torch.cuda.synchronize()
    assert torch.equal(got, expected)
    capture.LOOPS.drop_passed()
    assert not capture.LOOPS.dropped
    del junk


def test_compiled():
    check(VELOCITIES["digits"][0](), normal(5, 1, 8, 8).cuda(), 2, "compile")
