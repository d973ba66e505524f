"""`training_plan`: what a straightening takes on paper, of a model that is known by its sizes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from flowkernels._checks import (
    expect,
    expect_bool,
    expect_choice,
    expect_dtype,
    expect_int,
    expect_positive_int,
    expect_real,
    expect_shape,
)
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run.apart import own_held_out
from flowkernels.training.run.cost import in_bytes, in_time
from flowkernels.training.run.counts import Counts, Guided, of_batch, of_own_states, of_samples
from flowkernels.training.targets.table import TARGETS

MOMENTS = 2  # of Adam, of float32
GATHERED = 2  # blocks whose weights are there whole at a time, of sharded ones
ROLLOUT_EVERY = 50
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TrainingPlan:
    """What a straightening takes on paper: a model, not a measurement.

    counts: calls of networks and evaluations of single samples, of all GPUs together, as of `TrainingCost`.
    bank_nbytes: of the whole bank, on hosts or disks. memory: bytes of a GPU by part; limit: what it has.
    hours: of the bank and of the iterations, on all GPUs. trained: parameters that are trained.
    assumptions: all that it follows from, in sentences.

    Examples:
        >>> sizes = dict(shape=(16, 128, 128), tokens=4608, width=3072, layers=57)
        >>> plan = fk.training_plan(12e9, **sizes, iterations=2000, batch=64, bank=10_000)
        >>> plan.gpus, plan.trained
        (8, 12000000000)
    """

    counts: Counts
    bank_nbytes: int
    memory: dict[str, int]
    limit: int
    hours: dict[str, float]
    trained: int
    iterations: int
    gpus: int
    assumptions: tuple[str, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of a GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.limit

    def __str__(self) -> str:
        counts, rows = self.counts, []
        for name, count in (
            ("teacher, for the bank", counts.bank),
            ("teacher, in iterations", counts.teacher),
            ("student, with a gradient", counts.with_graph),
            ("student, without", counts.without_graph),
        ):
            rows.append(f"  {name:<34}{count.calls:>14,}{count.evaluations:>18,}")
        fits = "fits" if self.fits else "DOES NOT FIT"
        lines = [f"a model, not a measurement: {self.iterations:,} iterations on {self.gpus} GPUs"]
        lines += [f"  {'evaluations':<34}{'calls':>14}{'of samples':>18}", *rows]
        lines.append(f"  {'bank, on hosts or disks':<34}{in_bytes(self.bank_nbytes):>14}")
        lines.append(f"  {'memory a GPU':<34}{in_bytes(self.nbytes):>14}  of {in_bytes(self.limit)}: {fits}")
        lines += [f"    {name:<32}{in_bytes(n):>14}" for name, n in self.memory.items()]
        lines.append(f"  {'time on all GPUs':<34}{in_time(3600 * sum(self.hours.values())):>14}")
        lines += [f"    {name:<32}{in_time(3600 * hours):>14}" for name, hours in self.hours.items()]
        return "\n".join([*lines, "assuming", *(f"  - {each}" for each in self.assumptions)])


def training_plan(
    parameters: float,
    *,
    shape: Sequence[int],
    tokens: int,
    width: int,
    layers: int,
    iterations: int,
    batch: int,
    bank: int,
    steps: int = 4,
    grid: int = 50,
    target: str = "boss",
    guided: bool = False,
    conditioning: int = 0,
    bank_dtype: torch.dtype = torch.float32,
    trained: float | None = None,
    lora_rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ema: bool = True,
    gradient_checkpointing: bool = True,
    kept: float = 57.0,
    accumulate: int = 1,
    gpus: int = 8,
    sharded: bool = True,
    memory: float = 80e9,
    tflops: float = 989.0,
    utilisation: float = 0.4,
) -> TrainingPlan:
    """What the straightening of a transformer takes, on paper: evaluations, the bank's bytes, memory of a GPU by part,
    and hours. It prints all that it assumes. A model, not a measurement: of a network that is at hand
    `fk.training_cost` counts and measures.

    Args:
        parameters: of the network, such as 12e9.
        shape: of a state, such as (16, 128, 128) for images of 1,024 x 1,024 in latents of 8 x 8 pixels.
        tokens: of a sample, those of its prompt too. width, layers: of the transformer, and its blocks.
        iterations, batch, bank: as for `straighten`, of all GPUs together. The batch is divided among them, and on each
            into `accumulate` parts.
        steps, target: N, and what is learned, as for `straighten`. grid: fine Euler steps of the teacher.
        guided: whether the teacher is evaluated twice a step, in one call.
        conditioning: bytes beside the states that the bank keeps of each trajectory, such as a prompt's embeddings.
        bank_dtype: of the states that it keeps, torch.float32 or torch.bfloat16.
        trained: parameters that are trained; None is all, or those of adapters. lora_rank: of adapters on the four
            projections of attention in each block, `8 width rank` parameters a block.
        dtype: in which the network is evaluated, and frozen weights are kept. Those that are trained, their gradients,
            Adam's moments and the average (`ema`) are float32.
        gradient_checkpointing: of each block what goes into it is kept. kept: bytes of activations, in 16 bits, that a
            block else keeps for a token and feature: 57 and 50 were counted of diffusers' two kinds of Flux blocks, 40
            of this library's DiT, and 34 follow for a plain transformer's, attention's products aside, which fused
            kernels do not keep.
        gpus, memory, tflops: their number, bytes and dense TFLOP/s in dtype of each; utilisation: the share of these
            that is reached, communication included. sharded: weights, gradients, moments and averages are divided among
            them, as FSDP2 does.

    Returns:
        TrainingPlan(counts, bank_nbytes, memory, limit, hours, trained, iterations, gpus, assumptions).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: activations of a plain block, Korthikanti et al. (arXiv 2205.05198); 2 operations a parameter and token,
    Kaplan et al. (arXiv 2001.08361).

    Examples:
        >>> sizes = dict(shape=(16, 128, 128), tokens=4608, width=3072, layers=57)  # a 12-billion-parameter pipeline
        >>> plan = fk.training_plan(12e9, **sizes, lora_rank=16, iterations=2000, batch=64, bank=10_000)
        >>> plan.bank_nbytes, plan.fits  # 10,000 trajectories, 5 knots, 262,144 features of 4 bytes
        (52428800000, True)
    """
    count = "a number of parameters, from 1 to 1e18"
    P = round(expect_real(parameters, "parameters", count, lambda n: 1 <= n <= 1e18))
    shape = expect_shape(shape, "shape", "sizes of a state, such as (16, 128, 128)")
    named = dict(tokens=tokens, width=width, layers=layers, iterations=iterations, batch=batch, bank=bank, steps=steps)
    named |= dict(grid=grid, accumulate=accumulate, gpus=gpus)
    for name, value in named.items():
        expect_positive_int(value, name)
    expect_choice(target, "target", tuple(TARGETS))
    flags = dict(guided=guided, ema=ema, gradient_checkpointing=gradient_checkpointing, sharded=sharded)
    for name, value in flags.items():
        expect_bool(value, name)
    expect_int(conditioning, "conditioning", "a number of bytes", 0)
    expect_dtype(bank_dtype, "bank_dtype", (torch.float32, torch.bfloat16)), expect_dtype(dtype, "dtype", DTYPES)
    limit = round(expect_real(memory, "memory", "a number of bytes, from 1 to 1e18", lambda n: 1 <= n <= 1e18))
    tflops = expect_real(tflops, "tflops", "a number from 1e-6 to 1e9", lambda n: 1e-6 <= n <= 1e9)
    kept = expect_real(kept, "kept", "a number of bytes, from 0 to 1e6", lambda n: 0 <= n <= 1e6)
    utilisation = expect_real(utilisation, "utilisation", "a number in [1e-6, 1]", lambda n: 1e-6 <= n <= 1)
    expect(grid >= steps, "grid", f"at least {steps} steps, those of the student", grid)
    parts = gpus * accumulate
    expect(batch % parts == 0, "batch", f"a multiple of {parts}, gpus times accumulate", batch)
    expect(trained is None or lora_rank is None, "trained", "None with lora_rank", trained)
    adapters = 0
    if lora_rank is not None:
        adapters = trained = 8 * width * expect_positive_int(lora_rank, "lora_rank") * layers
    of = round(P if trained is None else expect_real(trained, "trained", count, lambda n: 1 <= n <= P))

    solver, objective = _objective(target, steps)
    in_autocast, each = dtype != torch.float32, batch // gpus
    twice = Guided(1, 2) if guided else Guided()
    of_iterations = of_batch(objective, batch, parts, twice, in_autocast).times(iterations)
    own = of_own_states(objective, bank, batch).times(math.ceil(iterations / ROLLOUT_EVERY))
    if held_out := own_held_out(objective, bank):
        own += of_samples(objective, solver, held_out, batch).times(2)
    chunks = gpus * math.ceil(bank / (gpus * each))
    rolled = Counts(bank=twice.of(grid * chunks, grid * bank))
    counts = of_iterations + Counts(without_graph=own) + rolled

    W, item = (gpus if sharded else 1), dtype.itemsize
    frozen = P - of if not adapters else P
    copies = {"weights that are trained": 4 * of / W, "weights that are not": item * frozen / W}
    copies["teacher"] = 0 if adapters else item * P / W
    copies |= {"gradients": 4 * of / W, "Adam": 4 * MOMENTS * of / W, "average": 4 * of / W * ema}
    if W > 1:
        copies["blocks that are whole"] = GATHERED * item * P / layers
    elif item != 4:
        copies["weights cast"] = item * of
    examples, deep = each // accumulate, of_batch(objective, 1, 1, twice, in_autocast).with_graph.evaluations
    a_block, given = kept * item / 2 * tokens * width, item * tokens * width
    of_example = layers * given * deep + a_block if gradient_checkpointing else layers * a_block * deep
    copies["activations"] = examples * of_example

    forward = 2 * P * tokens + 4 * tokens**2 * width * layers
    back = 1 + of / P + gradient_checkpointing
    work = tflops * 1e12 * utilisation * gpus * 3600
    found = of_iterations + Counts(without_graph=own)
    plain = found.without_graph.evaluations + found.teacher.evaluations
    hours = {
        "bank": rolled.bank.evaluations * forward / work,
        "iterations": ((1 + back) * found.with_graph.evaluations + plain) * forward / work,
    }
    size = math.prod(shape) * bank_dtype.itemsize * len(objective.times) + conditioning
    told = _assumed(P, of, adapters, dtype, tokens, width, layers, examples, deep, kept, forward, back, W)
    told += (
        f"the teacher makes {grid} Euler steps{', each of two evaluations in a call' if guided else ''}; "
        f"the bank keeps {len(objective.times)} states of {'x'.join(map(str, shape))} in {bank_dtype} "
        f"and {conditioning:,} bytes of conditioning of each of {bank:,} trajectories",
        f"{utilisation:.0%} of {tflops:g} TFLOP/s are reached on each GPU, communication and loading included",
        "no calibration, encoding of prompts, decoding of samples or writing of files; no fragments of memory",
    )
    memory_of = {name: round(n) for name, n in copies.items() if n}
    return TrainingPlan(counts, bank * size, memory_of, limit, hours, of, iterations, gpus, told)


def _objective(target: str, steps: int) -> tuple[Solver, StraightenLoss]:
    solver, row = Solver.euler(Schedule.uniform(steps)), TARGETS[target]
    plan = solver if row.solver else Schedule.uniform(steps)
    objective = StraightenLoss(plan, target=target, teacher=_same)
    return (objective.solver if objective.is_one_step else solver), objective


def _same(x, t):
    return x


def _assumed(P, of, adapters, dtype, tokens, width, layers, examples, deep, kept, forward, back, W) -> tuple[str, ...]:
    share = f"{of:,} of {P:,} parameters are trained, beside a teacher of as many"
    own = f"adapters of {adapters:,} parameters are trained, on a teacher that is the same network without them"
    lines = [
        own if adapters else share,
        f"networks are evaluated in {dtype}; trained weights, gradients, Adam's two moments and averages are float32",
        f"a forward of a sample is 2 operations for each of {P:,} parameters and {tokens:,} tokens, and for attention "
        f"4 tokens^2 width in each of {layers} blocks of width {width:,}: {forward:.3g}",
        f"a pass back takes {back:.3g} forwards, what is computed again included",
        f"examples at a time on a GPU: {examples}; evaluations that go back at once: {deep}; a block keeps "
        f"{kept * dtype.itemsize / 2:g} bytes of activations a token and feature, if they are not computed again",
    ]
    if W > 1:
        lines.append(f"weights and what goes with them are divided by {W}; {GATHERED} blocks are whole at a time")
    return tuple(lines)
