"""What a training takes on paper, beside what small ones take."""

import dataclasses
import math

import pytest
import torch
from _flows import even_grid
from _pairs import pairs
from test_straighten import QUIET, schedule_on
from torch import nn

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.models.networks import DiT
from flowkernels.training.run.state import State
from flowkernels.training.targets.table import TARGETS

SMALL = dict(shape=(1, 8, 8), tokens=16, width=16, layers=2, iterations=60, batch=12, bank=72, steps=3, grid=12)
FLUX = dict(shape=(16, 128, 128), tokens=4608, width=3072, layers=57, iterations=2000, batch=64, bank=10_000)


def student_of(target, net):
    field = fk.VelocityField(net)
    if target == "acceleration":
        return fk.Acceleration(field, DiT(channels=2, width=16, blocks=2))
    if target == "average_velocity":
        return fk.AverageVelocity.from_velocity(field)
    if target == "blockwise":
        return fk.Blockwise(net, fk.Schedule.uniform(3))
    return fk.NoisePrediction(net) if target == "noise" else field


@pytest.mark.parametrize(("target", "guided", "dtype"), pairs(TARGETS, [False, True], [torch.float32, torch.bfloat16]))
def test_it_counts_what_a_run_counts(target, guided, dtype):
    """Which is what a run makes: test_training_cost. On several GPUs and in parts the same samples."""
    teacher = DiT(width=16, blocks=2)
    plan = fk.Solver.euler([0, 1 / 3, 2 / 3, 1]) if TARGETS[target].solver else schedule_on(even_grid(12), 0, 4, 8, 12)
    plan = fk.Schedule.uniform(3) if target == "blockwise" else plan
    settings = dict(noise=(1, 8, 8), bank=72, batch=12, iterations=60, init="keep", target=target, measure=False)
    settings |= dict(autocast=None if dtype is torch.float32 else dtype)
    grid = 12 if getattr(plan, "grid", None) is None else None
    velocity = fk.VelocityField(teacher, guidance=2.0, unconditional={}) if guided else teacher
    cost = fk.training_cost(student_of(target, DiT(width=16, blocks=2)), velocity, plan, grid=grid, **settings)
    on_paper = fk.training_plan(1e4, **SMALL, target=target, guided=guided, dtype=dtype, gpus=1)
    assert on_paper.counts == cost.counts
    assert on_paper.bank_nbytes == cost.memory["bank"]
    divided = fk.training_plan(1e4, **SMALL, target=target, guided=guided, dtype=dtype, gpus=2, accumulate=3)
    for field in dataclasses.fields(on_paper.counts):
        one, two = getattr(on_paper.counts, field.name), getattr(divided.counts, field.name)
        assert one.evaluations == two.evaluations
        assert one.calls <= two.calls <= max(6 * one.calls, two.evaluations)


@pytest.mark.parametrize(("part", "ema"), [(None, True), (None, False), ("head", True)])
def test_its_bytes_are_those_of_the_tensors(monkeypatch, part, ema):
    """Of a run that trains all weights, or a few; but for the steps that Adam counts, of 4 bytes each."""
    kept, made = [], State.__init__

    def init(state, *args, **kwargs):
        made(state, *args, **kwargs)
        kept.append(state)

    monkeypatch.setattr(State, "__init__", init)
    torch.manual_seed(0)
    teacher, student = DiT(width=16, blocks=2).eval(), DiT(width=16, blocks=2)
    for name, p in student.named_parameters():
        p.requires_grad_(part is None or name.startswith(part))
    trained = [p for p in student.parameters() if p.requires_grad]
    bank = fk.TrajectoryBank(teacher, schedule_on(even_grid(12), 0, 4, 8, 12), noise=(1, 8, 8), size=72, **QUIET).fill()
    gradients = {}
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: gradients.update({id(p): p.grad.nbytes}))
    settings = dict(bank=bank, batch=12, iterations=1, ema=0.9 if ema else None, init="keep")
    fk.straighten(student, teacher, bank.schedules[0], **settings, **QUIET)
    sizes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    P, of = (sum(p.numel() for p in some) for some in (student.parameters(), trained))
    found = fk.training_plan(P, **SMALL, trained=of, dtype=torch.float32, gpus=1, ema=ema)
    assert found.bank_nbytes == bank.nbytes
    assert found.trained == of
    assert found.memory["weights that are trained"] == sizes(trained)
    assert found.memory.get("weights that are not", 0) == sizes(p for p in student.parameters() if not p.requires_grad)
    assert found.memory["teacher"] == sizes(teacher.parameters())
    assert found.memory["gradients"] == sum(gradients.values())
    moments = [t for state in kept[0].optimizer.state.values() for key, t in state.items() if key != "step"]
    assert found.memory["Adam"] == sizes(moments)
    assert found.memory.get("average", 0) == (sizes(kept[0].average.weights.values()) if ema else 0)
    shards = fk.training_plan(P, **SMALL, trained=of, dtype=torch.float32, gpus=2, ema=ema).memory
    for name in ("weights that are trained", "gradients", "Adam"):
        assert 2 * shards[name] == found.memory[name]


def test_adapters():
    """Those of a rank, counted in modules; teacher and student are one network."""
    made = [nn.Linear(*sizes, bias=False) for sizes in 2 * 4 * [(16, 3), (3, 16)]]
    found = fk.training_plan(1e4, **SMALL, lora_rank=3, gpus=1)
    assert found.trained == sum(p.numel() for layer in made for p in layer.parameters())
    assert "teacher" not in found.memory
    assert found.memory["weights that are not"] == 2 * 10_000
    assert found.memory["Adam"] == 2 * 4 * found.trained


def test_hours_and_activations_by_hand():
    """Of one forward of each sample, counted as its formula reads."""
    found = fk.training_plan(12e9, **FLUX, gpus=4, tflops=500, utilisation=0.5, grid=20, accumulate=2, kept=40)
    forward = 2 * 12e9 * 4608 + 4 * 4608**2 * 3072 * 57
    speed = 4 * 500e12 * 0.5 * 3600
    assert found.hours["bank"] == pytest.approx(20 * 10_000 * forward / speed, rel=1e-12)
    assert found.hours["iterations"] == pytest.approx(2000 * 64 * (1 + 3) * forward / speed, rel=1e-12)
    examples = 64 // 4 // 2
    assert found.memory["activations"] == examples * 4608 * 3072 * (57 * 2 + 40)
    whole = fk.training_plan(12e9, **FLUX, gpus=4, gradient_checkpointing=False, accumulate=2, kept=40)
    assert whole.memory["activations"] == examples * 4608 * 3072 * 57 * 40
    assert not whole.fits
    deep = fk.training_plan(12e9, **FLUX, gpus=4, accumulate=2, kept=40, target="endpoint", steps=3)
    assert deep.memory["activations"] == examples * 4608 * 3072 * (3 * 57 * 2 + 40)
    assert deep.counts.with_graph.evaluations == 3 * 2000 * 64


def test_it_prints_its_assumptions():
    found = fk.training_plan(12e9, **FLUX, lora_rank=16, guided=True, conditioning=4_000_000)
    text = str(found)
    assert text.startswith("a model, not a measurement: 2,000 iterations on 8 GPUs")
    told = (
        "12,000,000,000 parameters",
        "4,608 tokens",
        "40% of 989 TFLOP/s",
        "16x128x128",
        "two evaluations in a call",
    )
    for each in (*told, "4,000,000 bytes", "divided by 8", "fits", "22,413,312"):
        assert each in text
    for number in found.memory.values():
        assert number >= 0
    assert found.bank_nbytes == 10_000 * (5 * math.prod(FLUX["shape"]) * 4 + 4_000_000)


def test_the_command_says_the_same(capsys):
    line = "plan --parameters 12e9 --shape 16,128,128 --tokens 4608 --width 3072 --layers 57 --bank 10000"
    assert main([*line.split(), "--lora-rank", "16", "--guided", "--replicated", "--memory", "141"]) == 0
    found = fk.training_plan(12e9, **FLUX, lora_rank=16, guided=True, sharded=False, memory=141e9)
    assert capsys.readouterr().out == f"{found}\n"
    assert main([*line.split(), "--batch", "63"]) == 2
    assert capsys.readouterr().err == (
        "flowkernels: error: --batch: expected a multiple of 8, gpus times accumulate, got 63\n"
    )


BAD = {
    "batch": (dict(batch=63), r"^batch: expected a multiple of 8, gpus times accumulate, got 63"),
    "grid": (dict(grid=3), r"^grid: expected at least 4 steps, those of the student, got 3"),
    "both": (dict(lora_rank=4, trained=1e6), r"^trained: expected None with lora_rank"),
    "more than all": (dict(trained=13e9), r"^trained: expected a number of parameters"),
    "utilisation": (dict(utilisation=1.1), r"^utilisation: expected a number in \[1e-6, 1\]"),
    "dtype": (dict(dtype=torch.float64), r"^dtype: expected"),
    "target": (dict(target="lcm"), r"^target: expected"),
    "shape": (dict(shape=(16, 0)), r"^shape: expected a shape of at least one dimension"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    change, message = BAD[bad]
    with pytest.raises((TypeError, ValueError), match=message):
        fk.training_plan(12e9, **FLUX | change)
