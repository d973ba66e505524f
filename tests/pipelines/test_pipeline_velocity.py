"""pipeline_velocity: the pipeline's own velocity, bit for bit, and nothing left in the pipeline."""

import concurrent.futures
import copy
import re
import warnings
from pathlib import Path

import accelerate
import diffusers
import pytest
import tiny
import torch

import flowkernels as fk
from flowkernels.integrations.diffusers import pipeline_velocity, solver_scheduler

EULER = "FlowMatchEulerDiscreteScheduler"


def made(name: str, **config):
    """A pipeline whose stock scheduler makes Euler steps."""
    family = tiny.FAMILIES[name]
    if family.scheduler[0] != EULER:
        config = dict(scheduler=EULER, shift=3.0) | config
    return family.make(**config)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock_steps(pipe, steps: int, **call) -> list[tuple]:
    """(state, output, state after) of each step of the pipeline as it is."""
    found = []

    class Recorded(type(pipe.scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            result = super().step(model_output, timestep, sample, *args, **kwargs)
            found.append((sample, model_output, result[0]))
            return result

    pipe = copy.copy(pipe)
    scheduler = copy.copy(pipe.scheduler)
    scheduler.__class__ = Recorded
    pipe.scheduler = scheduler
    pipe(**call, num_inference_steps=steps, output_type="latent")
    return found


def image(seed: int = 0, size: int = 16):
    import PIL.Image

    return PIL.Image.fromarray(torch.randint(256, (size, size, 3), generator=seeded(seed), dtype=torch.uint8).numpy())


def control(**arguments):
    pipe = made("sd3")
    settings = {k: v for k, v in pipe.transformer.config.items() if k in ("sample_size", "qk_norm")}
    net = diffusers.SD3ControlNetModel(
        **settings,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    made_of = dict(pipe.components, controlnet=tiny.randomise(net))
    made_of = {k: v for k, v in made_of.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**made_of)
    call = dict(tiny.FAMILIES["sd3"].call(), control_image=image(), controlnet_conditioning_scale=0.7)
    return pipe, call | arguments


def image_to_video():
    pipe = made("wan21")
    wide = diffusers.WanTransformer3DModel.from_config(pipe.transformer.config, in_channels=12)
    parts = dict(pipe.components, transformer=tiny.randomise(wide))
    pipe = diffusers.WanImageToVideoPipeline(**{k: v for k, v in parts.items() if k != "transformer_2"})
    return pipe, dict(tiny.FAMILIES["wan21"].call(), image=image())


def ltx_image_to_video():
    call = {k: v for k, v in tiny.FAMILIES["ltx"].call().items() if k != "guidance_rescale"}
    return diffusers.LTXImageToVideoPipeline(**made("ltx").components), call | dict(image=[image(size=32)] * 2)


def kontext():
    pipe = diffusers.FluxKontextPipeline(**made("flux").components)
    return pipe, dict(tiny.FAMILIES["flux"].call(), image=image(), max_area=256, _auto_resize=False)


def offloaded():
    """As enable_model_cpu_offload has it, on the one device that is there."""
    pipe, hook = made("sd3"), None
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"):
        _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
    return pipe, tiny.FAMILIES["sd3"].call()


def variants():
    for name in tiny.FAMILIES:
        yield name, lambda name=name: (made(name), tiny.FAMILIES[name].call())
    for name in ("sd3", "flux", "wan22", "mochi", "hunyuanvideo"):
        yield f"{name}-bf16", lambda name=name: (made(name).to(torch.bfloat16), tiny.FAMILIES[name].call())
    true_cfg = dict(negative_prompt=["grey", "no"], true_cfg_scale=3.0)
    yield "flux-true-cfg", lambda: (made("flux"), tiny.FAMILIES["flux"].call() | true_cfg)
    yield "sd3-control", control
    yield "sd3-offloaded", offloaded
    yield "flux-kontext", kontext
    yield "wan-image-to-video", image_to_video
    yield "ltx-image-to-video", ltx_image_to_video


VARIANTS = dict(variants())


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_pipelines_own_velocity_bit_for_bit(name, monkeypatch):
    pipe, call = VARIANTS[name]()
    drawn = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(drawn, "sample", lambda self, generator=None: self.mode())  # by the generator of all
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    hooks = [len(part._forward_hooks) for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    v = pipeline_velocity(pipe, **call)
    noise, times = v.noise(2, seeded()), v.grid(4)
    mine = fk.sample(v, noise, times)
    later = {k: t for k, t in vars(pipe).items() if k not in before or t is not before[k]}
    assert (later, dict(vars(pipe.scheduler))) == ({}, scheduler)
    assert hooks == [len(m._forward_hooks) for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    steps = stock_steps(pipe, 4, **call, generator=seeded())
    near = {"cogview4": 1e-5}.get(name, 0.0)  # its network's time is made of sigma in float32
    sign = 1 if name.startswith("mochi") else -1
    assert (len(steps), noise.dtype) == (len(times) - 1, torch.float32)
    if name == "ltx-image-to-video":  # whose noise is drawn sample by sample
        mine = fk.sample(v, steps[0][0], times)
    else:
        assert torch.equal(noise, steps[0][0].float())
    for (x, output, _), t in zip(steps, times, strict=False):
        got = v(x.float(), t.expand(2))
        assert got.dtype == output.dtype
        assert (got - sign * output).float().norm() <= near * output.float().norm()
    last = steps[-1][2].float()
    rounding = 3e-2 if name.endswith("bf16") else 1e-5
    assert (mine.float() - last).norm() <= max(near, rounding) * last.norm()


@pytest.mark.parametrize("name", ["sd3", "qwenimage", "wan22", "zimage", "hunyuanvideo"])
def test_sample_i_has_prompt_i_mod_p_in_any_batch(name):
    pipe, family = made(name), tiny.FAMILIES[name]
    prompts = ["a fox", "two whales in the sea", "x"]
    call = copy.deepcopy(family.call(prompts))
    v = pipeline_velocity(pipe, **call, check=False)
    for value in call.values():
        if isinstance(value, list):
            value[:] = ["another"] * len(value)
    x, t = v.noise(7), torch.full((7,), 0.4)
    whole = v(x, t)
    alone = [pipeline_velocity(pipe, **family.call([p]), check=False) for p in prompts]
    one_by_one = torch.cat([alone[i % 3](x[i : i + 1], t[:1]) for i in range(7)])
    order = torch.tensor([5, 0, 4])
    parts = {
        "batches": (pipeline_velocity(pipe, **family.call(prompts), check=False, batch_size=2)(x, t), whole),
        "rows": (v.rows(slice(2, 6), 7)(x[2:6], t[2:6]), whole[2:6]),
        "rows of rows": (v.rows(slice(2, 6), 7).rows(torch.tensor([3, 1]), 4)(x[[5, 3]], t[:2]), whole[[5, 3]]),
        "past the end": (v.rows(slice(6, 9), 7)(x[[6, 1, 2]], t[:3]), whole[[6, 1, 2]]),
        "order": (v.rows(order, 7)(x[order], t[:3]), whole[order]),
        "prompts alone": (one_by_one, whole),
        "two times": (v(x, torch.cat([t[:3], t[3:] / 2])), torch.cat([whole[:3], v(x, t / 2)[3:]])),
    }
    for what, (got, expected) in parts.items():
        assert (got - expected).norm() <= 1e-5 * expected.norm(), what
    assert (whole[0] - whole[1]).norm() > 1e-3 * whole[0].norm()


@pytest.mark.parametrize("images", [1, 2])
def test_what_is_drawn_of_images_is_drawn_once(images):
    given = [image(seed) for seed in range(images)]  # one for both prompts, or one for each
    pipe, call = control(control_image=given if images > 1 else given[0])
    v, again = (pipeline_velocity(pipe, **call, generator=seeded(7)) for _ in range(2))
    x, t, state = v.noise(5, seeded()), torch.full((5,), 0.4), torch.get_rng_state()
    whole = v(x, t)
    got = torch.cat([again.rows(slice(i, j), 5)(x[i:j], t[i:j]) for i, j in ((0, 2), (2, 5))])
    assert (got - whole).norm() <= 1e-5 * whole.norm()
    assert torch.equal(torch.get_rng_state(), state)
    other = pipeline_velocity(pipe, **call, generator=seeded(8))
    assert (other(x, t) - whole).norm() > 1e-3 * whole.norm()


def test_prompts_and_images_are_encoded_once(monkeypatch):
    pipe, call = image_to_video()
    counts = dict.fromkeys(("encode", "preprocess", "encode_prompt", "decode"), 0)

    def count(name, own):
        def counted(*args, **kwargs):
            counts[name] += 1
            return own(*args, **kwargs)

        return counted

    monkeypatch.setattr(pipe.vae, "encode", count("encode", pipe.vae.encode))
    monkeypatch.setattr(pipe.vae, "decode", count("decode", pipe.vae.decode))
    monkeypatch.setattr(pipe.video_processor, "preprocess", count("preprocess", pipe.video_processor.preprocess))
    monkeypatch.setattr(type(pipe), "encode_prompt", count("encode_prompt", type(pipe).encode_prompt))
    v = pipeline_velocity(pipe, **call)
    x = v.noise(4)
    v(x, torch.full((4,), 0.5))
    before = dict(counts)
    fk.sample(v, x, v.grid(6))
    assert counts == before
    assert [name for name, times in counts.items() if not times] == ["decode"]


@pytest.mark.parametrize("name", ["autocast", "inference_mode", "grad", "float64 default"])
def test_modes_around_it_are_the_pipelines(name):
    def mode():
        kinds = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference_mode": torch.inference_mode}
        return kinds.get(name, torch.enable_grad)()

    pipe, call = made("sd3"), tiny.FAMILIES["sd3"].call()
    v = pipeline_velocity(pipe, **call)
    plain = v(v.noise(2, seeded()), torch.tensor(0.0))
    with mode():
        state, output, _ = stock_steps(pipe, 1, **call, generator=seeded())[0]
        assert torch.equal(v(state, torch.tensor(0.0)), -output)
    again = v(v.noise(2, seeded()), torch.tensor(0.0))
    assert torch.equal(again, plain)


def test_two_velocities_of_one_pipeline_in_threads():
    pipe, call = made("sd3"), tiny.FAMILIES["sd3"].call()
    both = [pipeline_velocity(pipe, **call | dict(guidance_scale=w), check=False) for w in (2.0, 6.0)]
    x, times = both[0].noise(2), both[0].grid(6)
    alone = [fk.sample(v, x, times) for v in both]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda v: fk.sample(v, x, times), both * 3))
    assert all(torch.equal(got, alone[i % 2]) for i, got in enumerate(together))
    assert not torch.equal(*alone)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return -self.w * x * (1 + t / 1000)

    device = property(lambda self: self.w.device)
    dtype = property(lambda self: self.w.dtype)


class Loop(diffusers.DiffusionPipeline):
    """A loop that does what no function of state and time says."""

    def __init__(self, transformer, scheduler, kind=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(kind=kind)

    def prepare_latents(self, batch_size, generator=None, latents=None):
        return torch.randn(batch_size, 2, 4, generator=generator) if latents is None else latents

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=4, latents=None, generator=None, cfg_trunc_ratio=1.0):
        kind, past = self.config.kind, 0
        if kind == "own":
            latents = torch.randn(len(prompt), 2, 4, generator=generator)
        else:
            latents = self.prepare_latents(len(prompt), generator, latents)
        self.scheduler.set_timesteps(num_inference_steps)
        if kind == "two schedulers":
            copy.deepcopy(self.scheduler)
        with self.progress_bar(total=num_inference_steps):
            for i, t in enumerate(self.scheduler.timesteps):
                out = self.transformer(latents, t)
                if kind == "history":
                    out = past = out + 0.5 * past
                if kind == "step" and (i + 1) / num_inference_steps > cfg_trunc_ratio:
                    out = 2 * out
                if kind == "random":
                    out = out + torch.randn_like(out)
                if kind == "part":
                    after = self.scheduler.step(out[:, :1], t, latents[:, :1])[0]
                    latents = torch.cat([after, latents[:, 1:]], 1)
                elif kind == "tokens":
                    tokens = t.expand(len(latents), 2)
                    latents = self.scheduler.step(out, t, latents, per_token_timesteps=tokens)[0]
                elif kind != "no steps":
                    latents = self.scheduler.step(out, t, latents, return_dict=False)[0]
                if kind == "edits":
                    latents = 0.9 * latents
        return (latents,)


def loop(kind: str | None = None, scheduler=None):
    return Loop(Net(), scheduler or diffusers.FlowMatchEulerDiscreteScheduler(), kind)


def cached():
    pipe = made("flux")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    return pipe


REFUSED = {
    "history": (
        lambda: loop("history"),
        {},
        "Loop, velocities of step .* of 4 that are others by 0.*than by themselves",
    ),
    "step": (lambda: loop("step"), dict(cfg_trunc_ratio=0.6), "cfg_trunc_ratio may be why"),
    "random": (lambda: loop("random"), {}, "velocities of state and time alone"),
    "edits": (lambda: loop("edits"), {}, "goes on from the state that a step has made.*Loop, which edits it"),
    "tokens": (lambda: loop("tokens"), {}, "one with times of tokens"),
    "two schedulers": (lambda: loop("two schedulers"), {}, "copies its scheduler"),
    "no steps": (lambda: loop("no steps"), {}, "makes steps by scheduler.step"),
    "epsilon": (lambda: loop(scheduler=diffusers.DDIMScheduler()), {}, "pipe.scheduler: expected.*got DDIMScheduler"),
    "edm": (lambda: loop(scheduler=diffusers.EDMEulerScheduler()), {}, "EDMEulerScheduler"),
    "image": (
        lambda: diffusers.StableDiffusion3Img2ImgPipeline(**made("sd3").components),
        {},
        "Img2ImgPipeline, which begins at an image",
    ),
    "cache": (cached, {}, "pipe.transformer: expected a network without a cache"),
    "early steps": (
        lambda: made("sd3"),
        dict(tiny.FAMILIES["sd3"].call(), skip_guidance_layers=[0]),
        "step 4 of 28 .*skip_guidance_layers may be why",
    ),
    "control": (control, dict(control_guidance_end=0.5), "control_guidance_end may be why"),
    "unknown": (loop, dict(guidance=3), r"arguments: expected those of Loop: .*prompt.*got \['guidance'\]"),
    "ours": (loop, dict(num_inference_steps=3), r"got \['num_inference_steps'\]"),
    "generators": (loop, dict(generator=[torch.Generator()]), "generator: expected one torch.Generator"),
    "no prompts": (loop, dict(prompt=[]), "prompt: expected at least one prompt"),
    "unlike": (
        lambda: made("sd3"),
        dict(prompt=["a", "b"], negative_prompt=["c", "d", "e"]),
        "negative_prompt: expected one for each of 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_be_is_refused_by_name(name):
    make, arguments, message = REFUSED[name]
    pipe = make()
    if isinstance(pipe, tuple):
        pipe, arguments = pipe[0], pipe[1] | arguments
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        pipeline_velocity(pipe, **dict(prompt=["a", "b"]) | arguments)


@pytest.mark.parametrize("kind", ["part", "own"])
def test_the_state_is_what_the_scheduler_sees_first(kind):
    pipe, calls = loop(kind), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    v = pipeline_velocity(pipe, prompt=["a", "b"])
    x, t = v.noise(3, seeded()), torch.tensor(0.25)
    assert x.shape == (3, 1 if kind == "part" else 2, 4)
    assert torch.equal(x, v.noise(3, seeded()))
    v(x, t)
    calls.clear()
    assert torch.allclose(v(x, t), 0.3 * x * 1.75)
    assert len(calls) == 1  # the step before it is without the network


def test_arguments_of_a_velocity_are_checked():
    v = pipeline_velocity(loop(), prompt=["a", "b"])
    assert v(v.noise(3), torch.tensor(0.25)).shape == (3, 2, 4)
    with pytest.raises(ValueError, match=r"x: expected a state of shape \[n, 2, 4\]"):
        v(torch.zeros(3, 2, 5), torch.tensor(0.25))
    with pytest.raises(ValueError, match="t: expected times from 0 to 1"):
        v(torch.zeros(3, 2, 4), torch.tensor(1.25))


FLOW_MODE = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),  # has each time twice
        diffusers.DEISMultistepScheduler(**FLOW_MODE),  # ends at its last time but one
        diffusers.SASolverScheduler(**FLOW_MODE),
    ],
    ids=lambda stock: type(stock).__name__,
)
def test_stock_schedulers_that_are_not_euler(stock):
    pipe, call = made("sd3"), tiny.FAMILIES["sd3"].call()
    pipe.scheduler = stock
    v = pipeline_velocity(pipe, **call)
    times, x, t = v.grid(5), v.noise(2), torch.tensor(0.3)
    stock.set_timesteps(5)
    levels = sorted({*stock.sigmas.tolist(), 0.0}, reverse=True)
    assert (1 - times).tolist() == pytest.approx(levels, abs=1e-12)
    assert torch.equal(v(x, t), pipeline_velocity(made("sd3"), **call)(x, t))


def test_schedulers_that_round_their_times_have_a_grid_that_is_not_rounded():
    pipe = tiny.FAMILIES["wan21"].make()
    v = pipeline_velocity(pipe, **tiny.FAMILIES["wan21"].call())
    pipe.scheduler.set_timesteps(5)
    assert torch.equal(v.grid(5), 1 - pipe.scheduler.sigmas.double())
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep"]), with_kwargs=True)
    v(v.noise(1), torch.tensor(0.12345, dtype=torch.float64))
    assert abs(seen[0].item() - 876.55) < 1e-3


def test_the_page_runs():
    text = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
    code = "\n".join(line.strip() for line in re.findall(r"^    .*", text[: text.index("What that evaluates")], re.M))
    for large, small in {"1024": "16", "(64)": "(4)", "(50)": "(9)", "[4, 8]": "[2, 3]"}.items():
        code = code.replace(large, small)
    names = dict(fk=fk, pipe=made("sd3"), prompts=["a fox", "two whales"])
    exec(compile(code, "docs/diffusers.md", "exec"), names)
    assert set(names["cal"].solvers) == {2, 3}


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_scheduler_of_a_calibration_knows_it_too(name):
    pipe, call = made(name), tiny.FAMILIES[name].call()
    v = pipeline_velocity(pipe, **call)
    cal = fk.calibrate(v, v.noise(4), grid=v.grid(8), steps=[2, 4], progress=False)
    pipe.scheduler = solver_scheduler(cal, like=pipe.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in cal:
            got = pipe(**call, num_inference_steps=n, output_type="latent", generator=seeded()).images
            expected = fk.sample(v, v.noise(2, seeded()), cal.best(n))
            assert (got - expected).norm() <= 1e-5 * expected.norm()
    with pytest.warns(UserWarning, match=r"latent_shape \[16, 16\], now \[32, 16\]"):
        pipe(**call | dict(height=32), num_inference_steps=4, output_type="latent")


def test_a_calibration_knows_the_pipeline_that_it_is_for(tmp_path):
    pipe, family = made("wan22"), tiny.FAMILIES["wan22"]
    v = pipeline_velocity(pipe, **family.call())
    cal = fk.calibrate(v, v.noise(6), grid=v.grid(8), steps=[2, 4], effort="fit", progress=False)
    sigmas = [s for s in (1 - v.grid(8)).tolist() if s * 1000 < 875]
    assert cal.forced_knots == pytest.approx((1 - sigmas[0],))
    assert all(cal.forced_knots[0] in cal[n].times for n in cal)
    cal.save(tmp_path / "wan.boss.json")
    kept = cal.provenance["pipeline"]
    expected = dict(pipeline="WanPipeline", latent_shape=[4, 2, 2, 2], height=16, num_frames=5, boundary_ratio=0.875)
    assert kept.items() >= expected.items()
    assert kept["guidance"] == dict(guidance_scale=4.0, guidance_scale_2=3.0)
    compiled = copy.copy(pipe)
    compiled.transformer = torch.compile(pipe.transformer, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cal = fk.Calibration.load(tmp_path / "wan.boss.json", v)
        fk.sample(v, v.noise(1), cal.best(4))
        other = pipeline_velocity(pipe, **family.call(["a", "b", "c"]))  # other prompts are what it is for
        fk.sample(other, v.noise(3), cal.best(4))
        fk.Calibration.load(tmp_path / "wan.boss.json", other)
        with torch.compiler.set_stance("force_eager"):
            fk.Calibration.load(tmp_path / "wan.boss.json", pipeline_velocity(compiled, **family.call()))
        other_part = fk.calibrate(other, other.noise(4), grid=v.grid(8), steps=[2, 4], progress=False)
    merged = fk.Calibration.merge([cal, other_part]).provenance["pipeline"]
    assert merged.items() >= expected.items()
    assert {"prompts", "prompts_sha256"} <= kept.keys() - merged.keys()
    folder = dict(grid=v.grid(4), steps=[2], progress=False, checkpoint=tmp_path / "progress")
    fk.calibrate(v, noise := v.noise(2), **folder)
    with pytest.raises(ValueError, match="checkpoint"):  # of other prompts
        fk.calibrate(pipeline_velocity(pipe, **family.call(["a", "b"])), noise, **folder)
    other = pipeline_velocity(pipe, **family.call() | dict(height=32, guidance_scale=2.0))
    for plan in (cal[2], cal.best(4), *cal.find(3).values(), *cal.find(3, objective="pairs").values()):
        with pytest.warns(UserWarning, match=r"latent_shape .* now \[4, 2, 4, 2\].*height 16, now 32.*guidance"):
            fk.sample(other, other.noise(1), plan)
    with pytest.warns(UserWarning, match="wan.boss.json was made for.*boundary|wan.boss.json was made for.*height 16"):
        fk.Calibration.load(tmp_path / "wan.boss.json", other)
    pipe.scheduler.set_shift(5.0)
    shifted = pipeline_velocity(pipe, **family.call(), check=False)
    with pytest.warns(UserWarning, match="wan.boss.json was made for.*shift 3.0, now 5.0"):
        fk.Calibration.load(tmp_path / "wan.boss.json", shifted)
