"""Ranges for profilers: around every op when asked for, and nothing otherwise."""

import importlib
import runpy
import threading

import pytest
import torch

import flowkernels as fk
from flowkernels.ops import library
from flowkernels.ops.public import OPS
from flowkernels.runtime import observers
from flowkernels.runtime.backends import BACKENDS, backend


def sample_of(op):
    found = importlib.import_module(f"flowkernels.ops.{op}.samples").sample_inputs()
    return next(s for s in found if s.args[0].numel() > 3)


def call(op):
    sample = sample_of(op)
    return getattr(fk, op)(*sample.args, **sample.kwargs)


def ranges_of(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {e.key for e in profile.key_averages() if e.key.startswith("flowkernels::") and "." in e.key}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_a_range(op, name):
    with backend(name):
        assert ranges_of(lambda: call(op)) == set()
        with fk.profile_ranges():
            assert ranges_of(lambda: call(op)) == {f"flowkernels::{op}.{name}"}
        assert ranges_of(lambda: call(op)) == set()


def test_results_are_the_same():
    expected = fk.velocity_gram(*sample_of("velocity_gram").args)
    with fk.profile_ranges():
        assert torch.equal(fk.velocity_gram(*sample_of("velocity_gram").args), expected)


@pytest.fixture
def nvtx(monkeypatch):
    """NVTX as it is where there is a GPU."""
    calls = []
    monkeypatch.setattr(observers, "_has_nvtx", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    return calls


def test_nvtx_ranges_close_also_after_an_error(nvtx):
    call("euler_step")
    assert nvtx == []
    with fk.profile_ranges():
        call("euler_step")
        assert nvtx == ["push flowkernels::euler_step.cpu", "pop"]
        nvtx.clear()
        cost = torch.full((3, 3), torch.nan, dtype=torch.float64)
        with backend("reference"), pytest.raises(ValueError, match="cost"):
            fk.bellman(cost, 2)
        assert nvtx == ["push flowkernels::bellman.reference", "pop"]


def test_blocks_nest_and_hold_for_every_thread(nvtx):
    with fk.profile_ranges():
        with fk.profile_ranges():
            pass
        assert observers.present
        thread = threading.Thread(target=call, args=("euler_step",))
        thread.start()
        thread.join()
    assert nvtx == ["push flowkernels::euler_step.cpu", "pop"]
    assert not observers.present


def test_calls_go_past_the_dispatcher_only_without_ranges():
    x = torch.zeros(3)
    assert library.direct("euler_step", x) is not None
    with fk.profile_ranges():
        assert library.direct("euler_step", x) is None


def test_the_whole_loop_of_a_sampler():
    def run():
        fk.sample(lambda x, t: -x, torch.ones(3, 4), 2)

    with fk.profile_ranges():
        assert "flowkernels::euler_step_out.cpu" in ranges_of(run)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_them(value, expected, monkeypatch):
    monkeypatch.setenv("FLOWKERNELS_PROFILE", value)
    assert runpy.run_path(observers.__file__)["present"] is expected
