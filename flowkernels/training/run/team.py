"""A run on many devices: of each batch every rank computes its part, gradients are averaged by DistributedDataParallel
or FSDP2, and what is decided is the same everywhere."""

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flowkernels._checks import expect
from flowkernels._version import __version__
from flowkernels._warnings import warn
from flowkernels.runtime.ranks import Ranks
from flowkernels.runtime.sharded import is_sharded
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.objective import StraightenLoss

F = TypeVar("F", bound=Callable)

DIFFERING = ("blockwise", "average_velocity")  # targets whose calls of a network depend on what was drawn


class Found(NamedTuple):
    """Of a part of a batch: its mean loss, with its graph, and the losses `[B]`, without."""

    loss: Tensor
    per_sample: Tensor


class _Losses(nn.Module):
    """The loss as one module around the student: DistributedDataParallel watches its forward, in which a target may
    evaluate the student several times, and as more than a module."""

    def __init__(self, student: nn.Module, objective: StraightenLoss):
        super().__init__()
        self.student, self._objective = student, (objective,)  # whose weights, if any, are not trained

    def forward(self, batch: BankBatch, generator: torch.Generator, progress: float) -> tuple[Tensor, Tensor]:
        found = self._objective[0](self.student, batch, generator, progress)
        return found.loss, found.per_sample.detach()


class Team:
    """The ranks of a run, and how they compute its losses.

    ranks: those of `group`; alone, of a run without one. is_given: whether there is a group: of a group of one too,
    batches and checkpoints are those of many. computes: the module whose forward is the loss of a part of a batch.
    asks_all: whether all that is trained of the student has a gradient, as far as a trial has shown.
    """

    def __init__(self, ranks: Ranks | None, student: nn.Module, objective: StraightenLoss, batch: int):
        self.ranks, self.is_given = Ranks() if ranks is None else ranks, ranks is not None
        self.student, self.objective = student, objective
        self.is_sharded = any(is_sharded(p) for p in student.parameters())
        self.is_parallel = len(_data_parallel(student)) > 0
        self.computes: nn.Module = _Losses(student, objective)
        self.asks_all = False
        size = self.ranks.size
        expect(batch % size == 0, "batch", f"a multiple of the {size} ranks, which compute as many each", f"{batch}")
        if self.is_sharded and objective.target in DIFFERING:
            expected = f"DistributedDataParallel, or a bare module, for target={objective.target!r}"
            expect(False, "student", expected, "weights that are sharded (fully_shard)")

    def begin(self) -> None:
        """What computes losses from now on; with the first rank's weights everywhere."""
        if not (self.ranks.is_alone or self.is_sharded or self.is_parallel):
            settings = dict(process_group=self.ranks.group, gradient_as_bucket_view=True)
            settings["find_unused_parameters"] = not self.asks_all or self.objective.target == "blockwise"
            self.computes = nn.parallel.DistributedDataParallel(self.computes, **settings)

    def expect_asked(self, idle: Collection[int]) -> None:
        """That a caller's DistributedDataParallel waits for no gradient that does not come. idle: by `id`, parameters
        that a pass has not asked."""
        for ddp in _data_parallel(self.student):
            waits = not (ddp.find_unused_parameters or ddp.static_graph)
            names = [name for name, p in ddp.module.named_parameters() if waits and id(p) in idle]
            expected = (
                "one whose parameters all have gradients, or DistributedDataParallel(find_unused_parameters=True)"
            )
            expect(not names, "student", expected, f"none for {', '.join(names):.200}")

    def share_weights(self) -> None:
        """The first rank's weights and buffers on all ranks, but those that are sharded."""
        if self.ranks.is_alone:
            return
        first = dist.get_global_rank(self.ranks.group, 0)
        for t in (*self.student.parameters(), *self.student.buffers()):
            if not is_sharded(t):
                dist.broadcast(t.detach(), src=first, group=self.ranks.group)

    def expect_same(self, setting: dict[str, Any]) -> None:
        """ValueError, naming it, for what is not the same on every rank."""
        versions = {"torch": torch.__version__, "flowkernels": __version__}
        kind = "sharded" if self.is_sharded else "DistributedDataParallel" if self.is_parallel else "a module"
        first = {name: value for name, value in setting.items() if name != "noise"}  # which a bank's teacher is part of
        self.ranks.expect_same(first | versions | {"student is": kind})
        self.ranks.expect_same(setting)

    def part(self, drawn: BankBatch) -> BankBatch:
        """This rank's of a batch."""
        if self.ranks.is_alone or drawn.part is not None:
            return drawn
        rows = self.ranks.part(len(drawn.interval))
        return drawn.split(rows.start, rows.stop)

    def losses(self, batch: BankBatch, generator: torch.Generator, progress: float) -> Found:
        return Found(*self.computes(batch, generator, progress))

    def every_example(self, drawn: BankBatch, ends: Tensor) -> tuple[BankBatch, Tensor]:
        """A batch of which ranks have parts, and the ends of its trajectories `[2, B, *shape]`, whole on every rank."""
        if self.ranks.is_alone or drawn.part is None:
            return drawn, ends
        of, gathered = drawn.part[2], self.ranks.gathered
        given = None if drawn.conditioning is None else {k: gathered(v, of) for k, v in drawn.conditioning.items()}
        sample, ends = gathered(drawn.sample, of), gathered(ends, of, 1)
        return drawn._replace(states=ends, ends=True, sample=sample, conditioning=given, part=None), ends

    def summed(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over the ranks of tensors, in one exchange, float64."""
        flat = torch.cat([t.detach().double().cpu().flatten() for t in tensors])
        parts = self.ranks.total(flat).split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _data_parallel(student: nn.Module) -> list[nn.Module]:
    kind = nn.parallel.DistributedDataParallel
    return [part for part in student.modules() if isinstance(part, kind)]


def group_of(student: nn.Module | None) -> Any:
    """That of a student's DistributedDataParallel, or over which its weights are sharded; None of others."""
    if not isinstance(student, nn.Module):
        return None
    for part in _data_parallel(student):
        return part.process_group
    for p in student.parameters():
        if is_sharded(p):
            expected = "weights sharded over a mesh of one dimension, or group="
            expect(p.device_mesh.ndim == 1, "student", expected, f"a mesh {p.device_mesh.mesh.tolist()}")
            return p.device_mesh.get_group()
    return None


def in_a_team(stage: F) -> F:
    """Of a stage (student, ..., group=): outside of a caller's no_grad and inference_mode; where there is a group, the
    argument's or the student's, its ranks go through it together, and are what it is given."""

    @functools.wraps(stage)
    def run(student=None, *args, **kwargs):
        group = kwargs.get("group")
        if group is None:
            group = group_of(student)
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            if group is not None:
                kwargs["group"] = ranks = Ranks(group)
                stack.enter_context(ranks.together(stage.__name__))
                devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
                stack.enter_context(torch.random.fork_rng(devices))
            elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                told = f"group: {dist.get_world_size()} processes each do all of the work by themselves"
                warn(f"{told}; group=torch.distributed.group.WORLD shares it", stacklevel=2)
            return stage(student, *args, **kwargs)

    return run
