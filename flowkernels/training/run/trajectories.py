"""What a run is trained on: the bank, or the pairs, that its settings ask for."""

import torch

from flowkernels._checks import expect
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.pairs import RunPairs, are_pairs
from flowkernels.training.run.settings import Settings


def trajectories_of(settings: Settings, device: torch.device, progress: bool) -> RunBank | RunPairs:
    """Of which nothing is rolled out yet; ValueError, naming the argument, unless there are as many trajectories, or
    pairs, as are measured and polished on."""
    objective = settings.objective
    if are_pairs(settings.bank):
        found = RunPairs(settings.bank, objective, settings.batch, device, settings.held_out, settings.seed)
    else:
        found = RunBank.of(
            settings.bank,
            settings.velocity,
            objective,
            noise=settings.noise,
            grid=settings.grid,
            batch=settings.batch,
            fraction=settings.refresh_fraction,
            held_out=settings.held_out,
            seed=settings.seed,
            device=device,
            progress=progress,
            ranks=settings.group,
        )
        if objective.refits:
            expect(found.size >= 2, "bank", "at least 2 samples, to polish the solver on", found.size)
    if settings.evaluate_every is not None:
        expected = "at least 2 trajectories or pairs, with evaluate_every"
        expect(found.held_out >= 2, "held_out", expected, f"{found.held_out}")
    return found
