"""Calls on a GPU that go past torch's dispatcher, and what they leave in its queue: nothing waits."""

import contextlib
import warnings

import pytest
import torch

import flowkernels as fk
from flowkernels.ops import library
from flowkernels.ops.samples import generator
from flowkernels.runtime.backends import backend
from flowkernels.training.run.state import State


@contextlib.contextmanager
def no_wait():
    """Torch raises for what waits for the GPU, where there is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_of(device):
    g = generator(0)
    bank, v = torch.randn(4, 3, 600, generator=g).to(device), torch.randn(5, 600, generator=g).to(device)
    interval, sample = torch.tensor([0, 1, 2, 2, 0]).to(device), torch.tensor([0, 1, 2, 0, 1]).to(device)
    h = torch.tensor([0.5, 0.25, 0.25]).to(device)
    return v.requires_grad_(), lambda: fk.straighten_loss(v, bank, h, interval, sample).loss


def test_they_go_past_the_dispatcher(gpu):
    x = torch.zeros(3, device=gpu)
    module, (device, stream) = library.direct("euler_step", x)
    assert hasattr(module, "euler_step")
    assert (device, stream) == (x.get_device(), torch.cuda.current_stream(x.device).cuda_stream)
    side = torch.cuda.Stream(gpu)
    with torch.cuda.stream(side):
        assert library.direct("euler_step", x)[1] == (device, side.cuda_stream)
    assert library.direct("euler_step", x, torch.zeros(3)) is None


def test_the_gradient_of_the_loss_waits_for_nothing(gpu):
    """Nor does a factor on it; a graph that is kept gives the same again."""
    with backend("cuda"):
        v, loss = loss_of(gpu)
        (once,) = torch.autograd.grad(loss(), v)
        for scale in (1.0, 3.0):
            factor = torch.full((), scale, device=gpu)
            with no_wait():
                found = loss() * factor
                kept = [torch.autograd.grad(found, v, retain_graph=True)[0] for _ in range(2)]
                (last,) = torch.autograd.grad(found, v)
            for gradient in (*kept, last):
                torch.testing.assert_close(gradient, scale * once, rtol=1e-6, atol=0)


def test_costs_of_times_on_the_cpu_wait_for_nothing(gpu):
    for K in (4, 7, 300):  # odd and even numbers of knots, and more than one launch holds
        v, times = torch.randn(K, 2, 8, device=gpu), torch.linspace(0, 1, K + 1, dtype=torch.float64)
        with backend("cuda"):
            gram = fk.velocity_gram(v)
            fk.cost_from_gram(gram, times)
            with no_wait():
                got = fk.cost_from_gram(gram, times)
        with backend("cpu"):
            torch.testing.assert_close(got.cpu(), fk.cost_from_gram(gram.cpu(), times), rtol=1e-9, atol=1e-12)


def test_tensors_that_are_elsewhere_are_refused(gpu):
    """The host would read the GPU's memory, and the kernels that of the host."""
    v, x, times = torch.randn(3, 2, 4), torch.randn(4, 2, 4), torch.linspace(0, 1, 4, dtype=torch.float64)
    op = torch.ops.flowkernels
    with backend("cuda"), pytest.raises(ValueError, match=r"^times: expected a tensor on the CPU"):
        op.velocity_gram(v.to(gpu), x.to(gpu), times.to(gpu))
    with pytest.raises(ValueError, match=r"^times: expected a tensor on cpu"):
        op.cost_from_gram(torch.zeros(2, 2, dtype=torch.float64), times.to(gpu), False)
    with pytest.raises(ValueError, match=r"^v: expected a tensor on cuda"):
        op.euler_step(v.to(gpu), v, 0.5, None, 1.0, None)


@pytest.mark.parametrize("t_sampling", ["start", "uniform"])
def test_a_resumed_run_draws_the_same(t_sampling, gpu, tmp_path, monkeypatch):
    """Batches are drawn on the GPU, from seeds of the generator whose state a checkpoint has."""

    class Stopped(Exception):
        pass

    def net():
        torch.manual_seed(1)
        return fk.VelocityField(torch.nn.Linear(5, 4).to(gpu), time_column=True)

    def run(path):
        more = dict(noise=(4,), grid=6, bank=24, batch=8, log_every=1, progress=False, decay="none")
        more |= dict(iterations=6, checkpoint=path, checkpoint_every=3)
        return fk.straighten(net(), net(), fk.Schedule.uniform(3), t_sampling=t_sampling, **more)

    def save_and_stop(*args, save=State.save, **kwargs):
        save(*args, **kwargs)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(State, "save", save_and_stop)
        with pytest.raises(Stopped):
            run(tmp_path / "parts.pt")
    assert run(tmp_path / "parts.pt").history["loss"] == run(tmp_path / "whole.pt").history["loss"]
