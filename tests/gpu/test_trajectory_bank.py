"""The bank of a teacher on a GPU: the same states wherever they are kept, and batches that nothing waits for."""

import pytest
import torch
from _flows import linear_field

import flowkernels as fk

PLANS = [fk.Schedule.uniform(2), fk.Schedule.uniform(3)]


def bank_of(device, storage="device", schedules=PLANS, **settings):
    settings = dict(noise=(4,), size=22, chunk=5, grid=12, progress=False) | settings
    return fk.TrajectoryBank(linear_field().to(device), schedules, storage=storage, **settings).fill()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("storage", ["device", "pinned", "shared", "folder"])
def test_states_are_those_of_the_cpu(storage, dtype, tmp_path):
    """Noise is drawn on the CPU: the same; indices where they are used."""
    bank = bank_of("cuda", tmp_path / "bank" if storage == "folder" else storage, dtype=dtype)
    tolerance = dict(rtol=2**-8, atol=1e-5) if dtype else dict(rtol=1e-5, atol=1e-5)
    for plan in PLANS:
        states = bank.states(plan)
        assert states.is_cuda
        torch.testing.assert_close(states.cpu(), bank_of("cpu").states(plan), **tolerance)
        batch = bank.sample(64, torch.Generator().manual_seed(0), plan)
        assert all(t.is_cuda for t in batch[:3])
        places = torch.stack([batch.interval, batch.interval + 1])
        assert torch.equal(batch.states, states[places, batch.sample])


@pytest.mark.parametrize(("storage", "schedules"), [("device", PLANS[0]), ("device", PLANS), ("pinned", PLANS)])
def test_a_batch_waits_for_nothing(storage, schedules):
    bank, generator = bank_of("cuda", storage, schedules), torch.Generator().manual_seed(0)
    bank.sample(8, generator, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            bank.sample(8, generator, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
