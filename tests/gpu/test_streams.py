"""What a fused sampler keeps from call to call, used on other streams than the one that it was made on."""

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.fusion import recorded
from flowkernels.runtime.backends import backend

EACH = pytest.mark.parametrize("on", ["cuda", "triton"])
CYCLES = 100_000_000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 130), nn.SiLU(), nn.Linear(130, 8))

    def forward(self, x, t):
        return self.body(torch.cat([x, t[:, None].to(x.dtype)], 1))


def busy_behind(monkeypatch):
    """Whoever packs weights finds the stream asleep."""
    plan_for = recorded.plan_for

    def later(*args):
        torch.cuda._sleep(CYCLES)
        return plan_for(*args)

    monkeypatch.setattr(recorded, "plan_for", later)


def made(gpu):
    torch.manual_seed(0)
    net, x = Net().to(gpu).requires_grad_(False), torch.randn(33, 8, device=gpu)
    other = Net().to(gpu).requires_grad_(False)
    return net, other.state_dict(), x, fk.fuse(net, 4)


@EACH
def test_made_on_a_busy_stream(on, gpu, monkeypatch):
    """The first call's uploads wait in its stream when the second call comes on another."""
    with backend(on):
        net, other, x, sampler = made(gpu)
        net.load_state_dict(other)
        expected = fk.fuse(net, 4)(x)
        torch.cuda.synchronize()
        busy_behind(monkeypatch)
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            first = sampler(x)
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            second = sampler(x)
        torch.cuda.synchronize()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@EACH
def test_dropped_in_flight(on, gpu):
    """Weights change while a call on another stream has not begun yet; whoever asks for memory overwrites it."""
    with backend(on):
        _, _, x, sampler = made(gpu)
        expected = sampler(x)
        stream = torch.cuda.Stream(gpu)
        stream.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(stream):
            sampler(x)  # what the allocator or Triton has to wait for, it waits for here
            torch.cuda._sleep(CYCLES)
            before = sampler(x)
        sampler.refresh()
        sampler._batch = None
        kept = [torch.full((size,), float("nan"), device=gpu) for size in (128, 512, 2048, 8192) for _ in range(64)]
        torch.cuda.synchronize()
        del kept
    assert torch.equal(before, expected)


@EACH
def test_a_graph_keeps_what_it_reads(on, gpu):
    with backend(on):
        net, other, x, sampler = made(gpu)
        expected = sampler(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = sampler(x)
        net.load_state_dict(other)
        changed = sampler(x)
        kept = [torch.full((size,), float("nan"), device=gpu) for size in (128, 512, 2048, 8192) for _ in range(64)]
        graph.replay()
        torch.cuda.synchronize()
        del kept
    assert torch.equal(out, expected)
    assert not torch.equal(changed, expected)
