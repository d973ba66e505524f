"""What a fused sampler keeps from call to call, used on several streams: on the host, with stand-ins for streams,
events and a graph's capture. tests/gpu/test_streams.py has the same on a GPU."""

import gc
import weakref

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.ops import library, triton_common
from flowkernels.runtime import backends
from flowkernels.runtime.backends import backend

EACH = pytest.mark.parametrize("on", ["cuda", "triton"])


class Gpu:
    """Logs what is asked of streams: ("record", stream, event), ("wait", stream, event), ("launch", stream)."""

    def __init__(self, monkeypatch):
        self.log, self.stream, self.capturing, self.held = [], Stream(self, 1), False, set()
        gpu = self

        class Event:
            def record(self, stream):
                gpu.log.append(("record", stream.cuda_stream, self))

        monkeypatch.setattr(library, "on_gpu", lambda t: True)
        for name, value in dict(
            current_stream=lambda device=None: self.stream,
            is_current_stream_capturing=lambda: self.capturing,
            Event=Event,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)
        hold = lambda t, stream: self.held.add((t.data_ptr(), stream.cuda_stream))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", hold)
        module, launch = backends.cuda_module(), triton_common.launch
        kernel = module.mlp_sample

        def logged(launch):
            def run(*args, **kwargs):
                self.log.append(("launch", self.stream.cuda_stream))
                return launch(*args, **kwargs)

            return run

        monkeypatch.setattr(module, "mlp_sample", logged(kernel))
        monkeypatch.setattr(triton_common, "launch", logged(launch))


class Stream:
    def __init__(self, gpu, number):
        self.gpu, self.cuda_stream = gpu, number

    def wait_event(self, event):
        self.gpu.log.append(("wait", self.cuda_stream, event))


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 33), nn.SiLU(), nn.Linear(33, 8))

    def forward(self, x, t):
        return self.body(torch.cat([x, t[:, None].to(x.dtype)], 1))


def kept_by(sampler) -> list:
    """The device memory that the kernel is given anew at every call."""
    (prepared,) = sampler._batch._prepared.values()
    if hasattr(prepared, "program"):
        plan, _, tables, _ = prepared.kept
        return [prepared.program, *plan.packed, *tables.padded]
    return [prepared.plan.weights, prepared.tables, *(t for t in prepared.sent if t is not None)]


@EACH
def test_another_stream_waits_for_what_is_kept(on, gpu):
    with backend(on):
        net, x = Net().requires_grad_(False), torch.randn(3, 8)
        sampler = fk.fuse(net, 4).on(5)
        expected = sampler(x)
        last = [entry for entry in gpu.log if entry[0] == "record"][-1]
        assert last[1] == 1
        gpu.log.clear()
        gpu.stream = Stream(gpu, 2)
        assert torch.equal(sampler(x), expected)
        assert ("wait", 2, last[2]) in gpu.log[: gpu.log.index(("launch", 2))]
        assert {(t.data_ptr(), 2) for t in kept_by(sampler)} <= gpu.held
        gpu.log.clear()
        sampler(x)
        assert gpu.log == [("launch", 2)]


@EACH
def test_what_is_made_on_several_streams(on, gpu):
    """The network was recorded on one stream, its tables for a schedule are made on a second, and used on a third."""
    with backend(on):
        net, x = Net().requires_grad_(False), torch.randn(3, 8)
        sampler = fk.fuse(net, 4)
        recorded = [entry[2] for entry in gpu.log if entry[0] == "record"]
        gpu.log.clear()
        gpu.stream = Stream(gpu, 2)
        other = sampler.on(3)
        other(x)
        assert {entry[2] for entry in gpu.log if entry[:2] == ("wait", 2)} & set(recorded)
        last = [entry for entry in gpu.log if entry[0] == "record"][-1]
        gpu.log.clear()
        gpu.stream = Stream(gpu, 3)
        other(x)
        assert ("wait", 3, last[2]) in gpu.log[: gpu.log.index(("launch", 3))]
        assert {(t.data_ptr(), 3) for t in kept_by(other)} <= gpu.held


@EACH
def test_a_capture_makes_nothing_that_others_use(on, gpu):
    with backend("triton" if on == "cuda" else "cuda"):
        net, x = Net().requires_grad_(False), torch.randn(3, 8)
        sampler = fk.fuse(net, 4)
    with backend(on):
        before = dict(sampler._network.recorded.plans)
        gpu.log.clear()
        gpu.stream, gpu.capturing = Stream(gpu, 2), True
        expected = sampler(x)
        assert not [entry for entry in gpu.log if entry[0] == "wait"]  # an event of before would end the capture
        assert sampler._network.recorded.plans == before
        assert len(sampler._batch._prepared) == 1
        gpu.stream, gpu.capturing = Stream(gpu, 1), False
        assert torch.equal(sampler(x), expected)
        assert len(sampler._batch._prepared) == 2


@EACH
def test_what_a_graph_reads_lives_as_long_as_the_sampler(on, gpu):
    with backend(on):
        net, x = Net().requires_grad_(False), torch.randn(3, 8)
        sampler = fk.fuse(net, 4)
        sampler(x)
        gpu.capturing = True
        sampler(x)
        gpu.capturing = False
        (prepared,) = sampler._batch._prepared.values()
        graph = weakref.ref(prepared)
        del prepared
        net.body[0].weight.mul_(1.5)
        sampler(x)
        eager = weakref.ref(*sampler._batch._prepared.values())
        net.body[0].weight.mul_(1.5)
        sampler(x)
        gc.collect()
        assert graph() is not None
        assert eager() is None
        del sampler
        gc.collect()
        assert graph() is None
