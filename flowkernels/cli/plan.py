"""`flowkernels plan`: what a training takes on paper."""

from collections.abc import Callable

import torch

import flowkernels as fk
from flowkernels import _options
from flowkernels.cli.inputs import in_its_words
from flowkernels.training.targets.table import TARGETS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OF_PLAN = ("tokens", "width", "layers", "iterations", "batch", "bank", "steps", "grid", "target", "guided")
OF_PLAN += ("conditioning", "trained", "lora_rank", "accumulate", "gpus", "tflops", "utilisation", "shape")


def add_arguments(add: Callable, shape: Callable) -> None:
    """shape: a type of option."""
    many = _options.number("a whole number of at least 1", lambda a: a >= 1 and a % 1 == 0)
    add("--parameters", type=many, required=True, help="of the network, such as 12e9")
    add("--shape", type=shape, required=True, help="of a sample, such as 16,128,128")
    add("--tokens", type=_options.positive, required=True, help="of a sample, those of its prompt too")
    add("--width", type=_options.positive, required=True, help="of the transformer")
    add("--layers", type=_options.positive, required=True, help="blocks of the transformer")
    add("--iterations", type=_options.positive, default=2000, help="optimiser steps")
    add("--batch", type=_options.positive, default=64, help="samples an iteration, of all GPUs together")
    add("--bank", type=_options.positive, default=8192, help="trajectories")
    add("--steps", type=_options.steps, default=4, help="number of steps N")
    add("--grid", type=_options.steps, default=50, help="fine Euler steps of the teacher")
    add("--target", choices=list(TARGETS), default="boss", help="what is learned; see fk.StraightenLoss")
    add("--guided", action="store_true", help="the teacher is evaluated twice a step")
    add(
        "--conditioning",
        type=_options.integer(0),
        default=0,
        help="bytes a trajectory that the bank keeps beside states",
    )
    add("--trained", type=many, help="parameters that are trained; all if not given")
    add("--lora-rank", type=_options.positive, help="rank of adapters on the projections of attention")
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="in which the network is evaluated")
    add("--keep-activations", action="store_true", help="no gradient checkpointing")
    add("--accumulate", type=_options.positive, default=1, help="parts of a GPU's share of a batch")
    add("--gpus", type=_options.positive, default=8, help="their number")
    add("--replicated", action="store_true", help="each has all weights, gradients and moments (DDP in place of FSDP2)")
    add("--memory", type=_options.above_0, default=80.0, help="GB of each")
    add("--tflops", type=_options.above_0, default=989.0, help="dense TFLOP/s of each")
    share = _options.number("a number in (0, 1]", lambda a: 0 < a <= 1)
    add("--utilisation", type=share, default=0.4, help="share of these that is reached")


def run(args) -> None:
    given = {name: getattr(args, name) for name in OF_PLAN}
    given |= dict(dtype=DTYPES[args.dtype], gradient_checkpointing=not args.keep_activations)
    given |= dict(memory=1e9 * args.memory, sharded=not args.replicated)
    words = {f"{name}: ": f"--{name.replace('_', '-')}: " for name in (*OF_PLAN, "memory")}
    with in_its_words(words):
        print(fk.training_plan(args.parameters, **given))
