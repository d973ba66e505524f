"""The public surface as a caller's type checker sees it: pyright, strict, runs over this file in .ci/run, and no name
of it may be of a type that is not known. tests/test_types.py sees that every public name is here; nothing runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.integrations import k_diffusion
from flowkernels.integrations.comfy import SolverSampler, list_cards, solver_sampler, solver_sigmas
from flowkernels.integrations.diffusers import pipeline_velocity, sigmas_for, solver_scheduler
from flowkernels.integrations.host_loops import host_loop, host_velocity


def pipeline(net: nn.Module, noise: Tensor, pipe: DiffusionPipeline) -> Tensor:
    velocity = fk.VelocityField(net, reverse_time=True, time_scale=1000, guidance=2.0, unconditional={"label": None})
    by_time = fk.VelocityField(net, time_offset=0.5, guidance=lambda c, u, t: u + t.view(-1, 1) * (c - u), shared=["a"])
    assert_type(by_time, fk.VelocityField)
    loaded = fk.load_weights(net, "model.safetensors", prefer="raw")
    assert_type(loaded, fk.LoadedWeights)
    assert_type(loaded.others, tuple[str, ...])
    assert_type(by_time.check(velocity, noise, times=(0.2, 0.7)), float)
    cal = fk.calibrate(velocity, noise, grid=100, steps=range(1, 11), effort="best", minutes=5.0, verify_noise=noise)
    assert_type(cal, fk.Calibration)
    assert_type(cal.report(), str)
    schedule = cal[4]
    assert_type(schedule, fk.Schedule)
    each = fk.SampleSchedules(torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.8, 1.0]]), ("a", "b"))
    assert_type(fk.sample(velocity, noise, each.of(["b", "a", "b"])), Tensor)
    cal.save("model.boss.json")
    assert_type(fk.Calibration.load("model.boss.json", velocity), fk.Calibration)
    solver = fk.polish(velocity, cal, fk.fit_solver(velocity, cal, 4))
    assert_type(solver, fk.Solver)
    assert_type(fk.stock_solvers(4, shift=(1, 3)), dict[str, fk.Solver])
    best = cal.best(6)
    assert_type(fk.sample(velocity, noise, best), Tensor)
    fk.save_images(noise, "samples.png", value_range=(0, 1), grid=True, columns=4)
    evaluation = fk.evaluate_sampler(velocity, cal, noise, data=noise, features="clean-fid", tolerances=[0.1])
    assert_type(evaluation, fk.Evaluation)
    assert_type(evaluation.rows[0].rms, float | None)
    fk.evaluate_sampler(velocity, [2, best, schedule], noise, features=lambda x: x.flatten(1), teacher=noise)
    fk.evaluate_sampler(velocity, {"a": (net, [2, 4]), "b": cal, "c": cal.schedules, "d": best}, noise)
    likelihood = fk.log_likelihood(velocity, noise, 20, probes=2, levels=256)
    assert_type(likelihood, fk.Likelihood)
    assert_type(likelihood.bits_per_dim, float)
    trained = fk.straighten(None, velocity, schedule, noise=(3, 32, 32), iterations=10)
    assert_type(trained, fk.Straightened)
    told: list[fk.TrainingEvent] = []
    fk.straighten(None, velocity, schedule, noise=(3,), iterations=9, callbacks=[told.append], checkpoint="run.pt")
    fk.straighten(None, velocity, schedule, noise=(3,), iterations=9, held_out=256, evaluate_every=100, patience=3)
    swept = fk.evaluate_checkpoints("run.pt", trained.student, velocity, schedule, torch.zeros(9, 3))
    assert_type(swept, fk.Evaluation)
    assert_type(told[0].samples(4), Tensor)
    assert_type(told[0].scalars, dict[str, float])
    assert_type(fk.training_cost(None, velocity, schedule, noise=(3,), iterations=10), fk.TrainingCost)
    sizes: dict[str, Any] = dict(tokens=4608, width=3072, layers=57, iterations=9, batch=64, bank=512)
    assert_type(fk.training_plan(12e9, shape=(16, 128, 128), **sizes), fk.TrainingPlan)
    assert_type(trained.student, nn.Module)
    assert_type(trained.solver, fk.Solver | None)
    two = fk.AverageVelocity.from_velocity(velocity, time_embedding="time_text_embed")
    assert_type(two, fk.AverageVelocity)
    fk.straighten(two, velocity, schedule, noise=(3,), iterations=9, target="average_velocity", consistency="split")
    assert_type(fk.sample(two.on(8), two(noise, noise, noise), 8), Tensor)
    student = fk.add_lora(velocity, {"r": 8, "use_dora": True}, name="straight")
    assert_type(fk.without_adapters(student), fk.VelocityField)
    assert_type(fk.merge_lora(student), nn.Module)
    fk.straighten(None, velocity, cal[4], noise=(3, 32, 32), iterations=10, lora=8, init="folder")
    assert_type(fk.save_lora(student, "folder", layout="peft"), Path)
    objective = fk.StraightenLoss(solver, target="solver", loss=lambda v, target: (v - target).abs().flatten(1).mean(1))
    objective.roll_out(trained.student, noise)
    batch = fk.BankBatch(noise, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    objective(trained.student, batch).loss.backward()
    assert_type(fk.Acceleration(trained.student, nn.Linear(6, 3), v0_name="v0"), fk.Acceleration)
    denoiser = fk.from_denoiser(net, "noise", torch.linspace(0.99, 0.01, 1000), time="sigma")
    assert_type(denoiser, fk.Denoiser)
    assert_type(fk.sample(denoiser, denoiser.initial(noise), denoiser.grid(4)), Tensor)
    assert_type(fk.from_denoiser(net, time_range=(0.002, 80)).own_state(denoiser.state(noise), 0.5), Tensor)
    assert_type(denoiser.own_times(denoiser.times([0.0, 999.0])), Tensor)
    assert_type(fk.NoisePrediction(trained.student, "straight"), fk.NoisePrediction)
    assert_type(fk.Blockwise([trained.student], fk.Schedule.uniform(1)), fk.Blockwise)
    pairs = fk.couple(None, noise, lambda x, y: torch.arange(len(y)), groups=torch.zeros(8, dtype=torch.int64))
    pairs = fk.Pairs.cat(
        [fk.Pairs(pairs.states, weight=pairs.weight), fk.forward_pairs(velocity, noise, 100, chunk=16)]
    )
    assert_type(pairs.batch(64), fk.BankBatch)
    fk.straighten(net, None, fk.Schedule.uniform(1), bank=pairs, target="reflow", iterations=10)
    fk.straighten(net, None, schedule, bank=lambda n, g: fk.couple(None, noise[:n], generator=g), iterations=10)
    assert_type(pairs.effective_size, float)

    def drawn(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"y": torch.zeros(n)}

    bank = fk.TrajectoryBank(
        velocity, [cal[2], cal[4], objective], noise=(3, 32, 32), storage="bank", conditioning=drawn
    )
    assert_type(bank.fill().refresh(0.25), int)
    assert_type(bank.sample(64, torch.Generator(), schedule=cal[4]), fk.BankBatch)
    fk.straighten(None, velocity, cal[4], bank=fk.TrajectoryBank.open("bank"), iterations=10)
    fk.TrajectoryBank(velocity, cal[4], noise=(3,), group=torch.distributed.group.WORLD, held_out=32)
    inversion = fk.invert(velocity, noise, fk.Solver.heun(8, inverse=True))
    assert_type(fk.sample(velocity, noise, fk.Solver.midpoint([0.4, 0.7]), differentiable=True), Tensor)
    assert_type(inversion, fk.Inversion)
    assert_type(fk.export(cal, "comfy", steps=4, path="sigmas.txt"), str)
    assert_type(fk.export(cal, "comfy-nodes", path="ComfyUI/custom_nodes/flowkernels/model.boss.json"), str)
    assert_type(solver_sampler(cal.best(4)), SolverSampler)
    assert_type(solver_sampler("heun")(net, noise, solver_sigmas(cal.best_schedule(4))), Tensor)
    assert_type(list_cards(), list[str])
    print(fk.plot(cal, "plot.png", steps=4).axes[0].get_title())
    assert_type(fk.export(solver, "timegrid", knots_only=True), Tensor)
    assert_type(fk.export(solver, "numpy")["coefficients"].ndim, int)
    print(fk.export(cal, "json", steps=8)["sigmas"], fk.export(solver, "diffusers"))
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = solver_scheduler(cal, like=stock)
    solver_scheduler(solver, like=scheduler)
    assert_type(sigmas_for(schedule, stock, mu=0.5), list[float])
    teacher = pipeline_velocity(pipe, prompt=["a fox"], height=512, batch_size=4)
    fk.calibrate(teacher, teacher.noise(64), grid=teacher.grid(50), steps=[4, 8])
    return fk.sample(trained.student, inversion.noise, [0, 0.25, 1], capture="auto")


def pieces(velocity: fk.Velocity, noise: Tensor) -> fk.Schedule:
    trajectory = fk.rollout(velocity, noise, 50)
    of_heun = fk.calibrate(velocity, noise, 50, teacher_solver="heun", teacher_error=64)
    assert_type(of_heun.measure_teacher(velocity, samples=8), fk.TeacherError)
    assert_type(trajectory, fk.Trajectory)
    costs = fk.StepCost(trajectory.times, device="cuda:0")
    costs.update(trajectory.v)
    assert_type(costs.cost(), Tensor)
    assert_type(fk.step_costs(trajectory.v, trajectory.times), Tensor)
    everywhere, drawn = torch.distributed.group.WORLD, fk.noise(64, (3, 32, 32), seed=0, rows=slice(0, 8))
    of_all = fk.calibrate(velocity, drawn, 50, [4], group=everywhere)
    assert_type(fk.fit_solver(velocity, of_all, 4, group=everywhere), fk.Solver)
    return fk.least_cost_schedules(costs.cost(), trajectory.times, [4])[4]


def k_samplers(its: Callable[..., Tensor], model: nn.Module, noise: Tensor, cal: fk.Calibration) -> Tensor:
    found = k_diffusion.solver(its, [80.0, 1.0, 0.0], flow=False, order=2)
    assert_type(found, fk.Solver)
    sample = k_diffusion.sampler(cal, steps=4)
    assert_type(sample.sigmas, Tensor | None)
    assert_type(k_diffusion.sampler(fk.Solver.heun, flow=True)(model, noise, noise, {"cond": noise}), Tensor)
    return sample(model, noise, sample.sigmas, callback=lambda told: print(told["i"]), disable=True)


def host(policy: nn.Module, act: Callable[[], Tensor], cal: fk.Calibration) -> Tensor:
    velocity = host_velocity(policy, "denoise_step", act, ends=(1, 0), check=False)
    assert_type(velocity.noise, Tensor)
    fk.calibrate(velocity, velocity.noise, grid=50, steps=[4])
    with host_loop(policy, "denoise_step", cal[4], state="x_t", time="timestep", ends=(1, 0), sign=1) as loop:
        act()
    with velocity.loop(cal.best(4)):
        act()
    assert_type(loop.state, Tensor | None)
    return act()


class Mine(fk.VelocityBase):
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return -x * t.reshape(-1, 1)


def fusion(net: nn.Module, noise: Tensor) -> Tensor:
    try:
        sampler = fk.fuse(net, 8, weights=torch.bfloat16)
        assert_type(sampler, fk.FusedSampler)
    except fk.NotFusable:
        head = fk.fuse_head(net)
        assert_type(head, fk.FusedHead)
        return fk.sample(head, noise, 4)
    return sampler(noise)


def own_loop(x: Tensor, v: Tensor) -> Tensor:
    with fk.backend("reference"), fk.profile_ranges(), fk.record_calls("euler_step", "calls.safetensors"):
        fk.euler_step(x, v, 0.1, out=x)
    try:
        why: object = fk.explain("euler_step", "cuda")
    except fk.BackendError as e:
        why = e
    print(fk.__version__, why, isinstance(x, fk.HasTimeEmbedding), Mine()(x, x))
    return x


OPS: list[Callable[..., object]] = [
    fk.velocity_gram,
    fk.cost_from_gram,
    fk.bellman,
    fk.bellman_pairs,
    fk.euler_step,
    fk.linear_euler,
    fk.linear_update,
    fk.segment_points,
    fk.straighten_loss,
    fk.mlp_sample,
]
