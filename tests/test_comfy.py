"""flowkernels/integrations/comfy.py, beside a stand-in for ComfyUI's interface or ComfyUI itself (_comfy.py)."""

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path

import _comfy
import pytest
import torch
from _flows import linear_field, normal
from torch import nn

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.integrations import comfy
from flowkernels.integrations.comfy import SOLVERS, solver_sampler, solver_sigmas

ROOT = Path(__file__).parents[1]
KNOTS = [0, 0.1, 0.3, 0.62, 1]
PLANS = {
    "schedule": fk.Schedule(KNOTS),
    "steps": 3,
    "almost": fk.Schedule([1e-6, 0.3, 1]),  # as UniPC's
    "heun": fk.Solver.heun(KNOTS),
    "adams-bashforth": fk.Solver.adams_bashforth(KNOTS, 3),
    "fitted": fk.Solver(KNOTS, KNOTS[:-1], (torch.eye(4) + 0.1).cumsum(0).tril() / 4.3, "fitted"),
    "free start": fk.Solver([0, 0.5, 1], [0, 0.5], [[0.5, 0], [0.5, 0.5]], start_coefficients=[1.0, 0.8]),
    "model times": fk.Solver.euler(KNOTS, model_times=[0.01, 0.1, 0.3, 0.62]),
}


class Network(nn.Module):
    """Predicts noise - data of images [n, 2, 4, 4] at times of 1000 sigma, with a condition."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer, self.dtype, self.calls = nn.Conv2d(2, 2, 3, padding=1, dtype=dtype), dtype, []
        with torch.no_grad():
            self.layer.weight.copy_(normal(*self.layer.weight.shape, seed=7) / 3)

    def forward(self, x, t, context=None, **kwargs):
        self.calls.append(t[0].item() / 1000)
        given = 0 if context is None else context.to(x.dtype).sum((1, 2)).view(-1, 1, 1, 1)
        return torch.tanh(self.layer(x)) + given - (t / 1000).to(x.dtype).view(-1, 1, 1, 1) * x


@pytest.fixture
def guider(monkeypatch, tmp_path):
    return _comfy.install(monkeypatch, tmp_path)


def ksampler(plan):
    from comfy.samplers import KSAMPLER

    return KSAMPLER(solver_sampler(plan))


def velocity(network, conditions=(None, None), cfg=1.0):
    """The same network as `fk.sample` takes it."""

    def v(x, t):
        positive, negative = [network(x.to(network.dtype), 1000 * (1 - t), c).to(x.dtype) for c in conditions]
        return -(negative + (positive - negative) * cfg)

    return v


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_every_solver_as_fk_sample(guider, name, inference):
    """From an empty latent, at its own model times; ComfyUI runs its nodes in inference mode."""
    plan, network, noise = PLANS[name], Network(), normal(3, 2, 4, 4)
    with torch.inference_mode(inference):
        made = guider(network)
        found = made.sample(noise, torch.zeros_like(noise), ksampler(plan), solver_sigmas(plan), disable_pbar=True)
    assert network.calls == pytest.approx((1 - fk.Solver.of(plan).model_times).tolist(), abs=1e-6)
    close(found, fk.sample(velocity(network), noise, plan))


def test_guidance_conditions_and_what_nodes_do_to_the_model(guider):
    conditions, network, noise = (normal(1, 1, 3), normal(1, 1, 3, seed=1)), Network(), normal(2, 2, 4, 4)
    seen = []

    def clipped(args):
        seen.append((args["input"], args["input"].clone()))
        return args["denoised"].clamp(-0.8, 0.8)

    plan = PLANS["adams-bashforth"]
    run = dict(sampler=ksampler(plan), sigmas=solver_sigmas(plan), disable_pbar=True)
    made = guider(network, conditions=conditions, cfg=3.5)
    found = made.sample(noise, torch.zeros_like(noise), **run)
    close(found, fk.sample(velocity(network, conditions, 3.5), noise, plan))
    made = guider(network, conditions=conditions, cfg=3.5, options={"sampler_post_cfg_function": [clipped]})
    v = velocity(network, conditions, 3.5)

    def v_clipped(x, t):
        sigma = (1 - t).view(-1, 1, 1, 1)
        return ((x + sigma * v(x, t)).clamp(-0.8, 0.8) - x) / sigma

    close(made.sample(noise, torch.zeros_like(noise), **run), fk.sample(v_clipped, noise, plan))
    assert len(seen) == 4
    assert all(torch.equal(kept, then) for kept, then in seen)  # a node may keep the states that it was shown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(guider, dtype):
    """Of the network: states stay float32. Of the latent: the samples are of its dtype."""
    plan, network, noise = PLANS["fitted"], Network(dtype), normal(2, 2, 4, 4)
    made = guider(network)
    found = made.sample(noise, torch.zeros_like(noise), ksampler(plan), solver_sigmas(plan), disable_pbar=True)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(found, fk.sample(velocity(network), noise, plan), rtol=4 * ulp, atol=8 * ulp)
    states = []
    model = flow(lambda x, sigma: states.append(x) or x * 0.5)
    assert solver_sampler(plan)(model, noise.to(dtype), solver_sigmas(plan), disable=True).dtype == dtype
    assert {x.dtype for x in states} == {torch.float32}


def flow(function):
    """What KSAMPLER gives its sampler function, of a function (x, sigma)."""
    from comfy.model_sampling import CONST

    class Model:
        def __call__(self, x, sigma, **extra_args):
            return function(x, sigma)

    model = Model()
    model.inner_model = model
    model.model_sampling = type("ModelSampling", (CONST,), {})()
    return model


@pytest.mark.parametrize("name", ["schedule", "heun", "fitted"])
def test_callback(guider, name):
    """For a preview of each step, whatever its evaluations, and to interrupt."""
    plan, network, noise, told = PLANS[name], Network(), normal(2, 2, 4, 4), []
    made = guider(network)

    def callback(step, denoised, x, total_steps):
        told.append((step, total_steps, denoised, denoised.clone(), x, x.clone()))

    run = dict(sampler=ksampler(plan), sigmas=solver_sigmas(plan), disable_pbar=True)
    made.sample(noise, torch.zeros_like(noise), callback=callback, **run)
    assert [(i, n) for i, n, *_ in told] == [(i, 4) for i in range(4)]
    for _, _, denoised, then, x, x_then in told:
        assert torch.equal(denoised, then)
        assert torch.equal(x, x_then)
    rollout = fk.sample(velocity(network), noise, fk.Solver.euler(KNOTS))
    close(told[0][4], noise)
    if name == "schedule":  # the last denoised is where Euler's last step ends
        close(told[-1][2], rollout)

    def spoil(step, denoised, x, total_steps):
        denoised.zero_()

    same = [made.sample(noise, torch.zeros_like(noise), callback=each, **run) for each in (None, spoil)]
    assert torch.equal(*same)

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.sample(noise, torch.zeros_like(noise), callback=interrupt, **run)


def test_progress_bar(guider, capsys):
    plan, noise = PLANS["heun"], normal(2, 2, 4, 4)
    model = flow(lambda x, sigma: x * 0.5)
    solver_sampler(plan)(model, noise, solver_sigmas(plan), disable=True)
    assert capsys.readouterr().err == ""
    solver_sampler(plan)(model, noise, solver_sigmas(plan), disable=False)
    assert re.search(r"heun.* 7/7", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["schedule", "heun", *SOLVERS])
def test_an_image_to_begin_with(guider, name):
    """denoise < 1, as SplitSigmasDenoise has it: the last sigmas, from a mixture of the latent and the noise."""
    plan, network, noise, latent = PLANS.get(name, name), Network(), normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=4)
    sigmas = solver_sigmas(KNOTS)[2:]
    found = guider(network).sample(noise, latent, ksampler(plan), sigmas, disable_pbar=True)
    make = SOLVERS.get(name, fk.Solver.euler)
    close(found, fk.sample(velocity(network), 0.7 * noise + 0.3 * latent, make(KNOTS[2:])))


@pytest.mark.parametrize("name", ["schedule", "heun", "euler"])
def test_sigmas_in_two_parts(guider, name):
    """SplitSigmas, as for two networks: the second sampler goes on without noise."""
    plan, network, noise = PLANS.get(name, name), Network(), normal(3, 2, 4, 4)
    made, sigmas, empty = guider(network), solver_sigmas(KNOTS), torch.zeros_like(noise)
    half = made.sample(noise, empty, ksampler(plan), sigmas[:3], disable_pbar=True)
    found = made.sample(empty, half, ksampler(plan), sigmas[2:], disable_pbar=True)
    whole = made.sample(noise, empty, ksampler(plan), sigmas, disable_pbar=True)
    if name == "heun":  # a step in the middle has its second stage, as ComfyUI's own has
        network.calls.clear()
        made.sample(noise, empty, ksampler(plan), sigmas[:3], disable_pbar=True)
        assert network.calls == pytest.approx([1, 0.9, 0.9, 0.7])
    close(found, whole)


def test_a_mask(guider):
    """Inpainting: what is kept is the latent, as with ComfyUI's own sampler of the same steps."""
    from comfy.samplers import ksampler as stock

    network, noise, latent = Network(), normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=4)
    mask = torch.zeros(3, 1, 4, 4)
    mask[..., :2] = 1
    made, sigmas = guider(network), solver_sigmas(KNOTS)
    found, own = [
        made.sample(noise, latent, sampler, sigmas, denoise_mask=mask, disable_pbar=True)
        for sampler in (ksampler("euler"), stock("euler"))
    ]
    close(found, own)
    close(found[..., 2:], latent[..., 2:])


def test_samples_do_not_depend_on_their_batch(guider):
    plan, network, noise = PLANS["fitted"], Network(), normal(3, 2, 4, 4)
    made, run = guider(network), dict(sampler=ksampler(plan), sigmas=solver_sigmas(plan), disable_pbar=True)
    whole = made.sample(noise, torch.zeros_like(noise), **run)
    for i in range(3):
        close(made.sample(noise[i : i + 1], torch.zeros_like(noise[:1]), **run), whole[i : i + 1])


VIDEO = normal(1, 2, 3, 4, 4).transpose(2, 3)  # in no contiguous memory


def test_shapes_and_no_steps(guider):
    model = flow(lambda x, sigma: x * 0.5)
    found = solver_sampler("heun")(model, VIDEO, solver_sigmas(KNOTS), disable=True)
    flat = solver_sampler("heun")(model, VIDEO.flatten(1), solver_sigmas(KNOTS), disable=True)
    assert torch.equal(found.flatten(1), flat)
    assert solver_sampler("heun")(model, VIDEO, torch.ones(1)) is VIDEO


@pytest.mark.parametrize(
    ("plan", "sigmas", "message"),
    [
        (
            "fitted",
            [1, 0.9, 0.7, 0.3, 0],
            r"sigmas: expected \[1, 0.9, 0.7, 0.38, 0\], the SIGMAS of the same node, got",
        ),
        ("fitted", [0.7, 0.38, 0], "sigmas: expected .*, as 'fitted' runs whole .Euler's and Heun's steps take parts"),
        ("fitted", [1, 0.9, 0.7], "sigmas: expected .*, as 'fitted' runs whole"),
        ("schedule", [1, 0.7, 0.38, 0], "sigmas: expected .*, or some in a row of them, got"),
        ("schedule", [0.7, 0.38, 0.1, 0], "sigmas: expected .*, or some in a row of them, got"),
        ("schedule", [0, 0.38, 0.7, 0.9, 1], r"sigmas: expected falling numbers, none below 0, got \[0, 0.38"),
        ("heun", [1, 0.5, 0.5, 0], "sigmas: expected falling numbers"),
        ("heun", [1, float("nan"), 0], "sigmas: expected falling numbers"),
        ("euler", [14.6, 3.0, 0], "sigmas: expected none above 1: those of a flow"),
    ],
)
def test_sigmas_that_disagree(guider, plan, sigmas, message):
    model = flow(lambda x, sigma: pytest.fail("called"))
    with pytest.raises(ValueError, match=f"^{message}"):
        solver_sampler(PLANS.get(plan, plan))(model, torch.ones(2, 3), torch.tensor(sigmas))


def test_sigmas_of_another_rounding(guider):
    plan, model = PLANS["fitted"], flow(lambda x, sigma: x * 0.5)
    found = [
        solver_sampler(plan)(model, torch.ones(2, 3), sigmas, disable=True)
        for sigmas in (solver_sigmas(plan), solver_sigmas(plan).double() - 4e-6 * torch.tensor([0, 1, 1, 1, 0]))
    ]
    assert torch.equal(*found)  # at its own times


def test_models_and_latents_that_are_refused(guider):
    from comfy.model_sampling import EPS

    noise, late = normal(2, 2, 4, 4), fk.Schedule([0.02, 0.3, 1])
    run = dict(sampler=ksampler("euler"), sigmas=solver_sigmas(KNOTS), disable_pbar=True)
    with pytest.raises(ValueError, match=r"^model: expected one of flow matching, .* CONST, got one with .*EPS"):
        guider(Network(), EPS).sample(noise, torch.zeros_like(noise), **run)
    with pytest.raises(ValueError, match=r"^model: expected .*, got one without inner_model"):
        solver_sampler("euler")(lambda x, sigma: x, noise, solver_sigmas(KNOTS))
    late = dict(sampler=ksampler(late), sigmas=solver_sigmas(late), disable_pbar=True)
    made = guider(Network())
    with pytest.raises(ValueError, match=r"^latent_image: expected a latent to begin with at sigma = 0.98"):
        made.sample(noise, torch.zeros_like(noise), **late)
    made.sample(noise, torch.ones_like(noise), **late)
    with pytest.raises(ValueError, match=r"^model: expected finite samp"):
        solver_sampler("euler")(flow(lambda x, sigma: x / 0), noise, solver_sigmas(KNOTS), disable=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(sigmas=torch.tensor(1.0)), "sigmas: expected falling numbers in one dimension"),
        (dict(sigmas=solver_sigmas(KNOTS)[None]), "sigmas: expected falling numbers in one dimension"),
        (dict(sigmas=[1.0, 0.0]), "sigmas: expected a torch.Tensor"),
        (dict(x=None), "x: expected a torch.Tensor"),
        (dict(x=torch.ones(2, 3, dtype=torch.int64)), "x: expected torch.float32 or"),
        (dict(extra_args=[1]), "extra_args: expected a dict"),
        (dict(callback="preview"), "callback: expected a function of a dict"),
        (dict(denoises=lambda x, sigma: (x,)), "model: expected a torch.Tensor, got tuple"),
        (dict(denoises=lambda x, sigma: x[:1]), r"model: expected denoised states of x's shape \[2, 3\]"),
    ],
)
def test_calls_that_are_refused(guider, changed, message):
    call = dict(x=normal(2, 3), sigmas=solver_sigmas(KNOTS), disable=True, denoises=lambda x, sigma: x / 2) | changed
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        solver_sampler("euler")(flow(call.pop("denoises")), **call)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (fk.Solver.heun(4, inverse=True), ValueError, "plan: expected a solver from noise to data"),
        ([0, 0.5], ValueError, "plan: expected a solver from noise to data"),
        (fk.Solver.adams_bashforth([0, 0.2, 0.5]), ValueError, "plan: expected a solver from noise to data"),
        (fk.Solver.euler(2, model_times=[0, 1]), ValueError, "plan: expected model times before t = 1"),
        ("lms", ValueError, "plan: expected 'euler', 'heun', .*, got lms"),
        ({}, TypeError, "plan: expected"),
    ],
)
def test_plans_that_are_refused(plan, error, message):
    for made in (solver_sampler, solver_sigmas)[: 2 if "noise to data" in message else 1]:
        with pytest.raises(error, match=f"^{message}"):
            made(plan)


def test_refused_sigmas_and_calibrations(tmp_path):
    with pytest.raises(ValueError, match=r"^plan: expected knots whose sigmas differ in float32"):
        solver_sigmas([0, 0.5, 0.5 + 1e-9, 1])
    with pytest.raises(TypeError, match=r"^plan: expected one plan of it: cal.best.N."):
        solver_sampler(calibration())


@pytest.mark.parametrize("named", [solver_sampler, solver_sigmas])
def test_the_docstrings_example(named):
    names, out = dict(fk=fk, torch=torch, solver_sampler=solver_sampler, solver_sigmas=solver_sigmas), []
    (example,) = doctest.DocTestFinder(recurse=False).find(named, globs=names)
    assert example.examples
    assert not doctest.DocTestRunner().run(example, out=out.append).failed, "".join(out)


# ---- nodes ----


def calibration():
    cal = fk.calibrate(linear_field(), normal(32, 4), 12, [2, 4], progress=False)
    cal.solvers[4] = PLANS["fitted"]
    return cal


def test_a_card_in_its_nodes(guider, tmp_path, monkeypatch, capsys):
    """One command; ComfyUI loads the folder, lists the card, and runs its solver."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "models/flowkernels/flux").mkdir(parents=True)
    cal = calibration()
    cal.save(tmp_path / "models/flowkernels/flux/dev.boss.json")
    cal.save(tmp_path / "m.boss.json")
    (tmp_path / "models/flowkernels/other.json").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):  # the second one beside the first
        assert main(["export", "m.boss.json", "--to", "comfy-nodes", "--out", f"custom_nodes/fk/{name}.boss.json"]) == 0
    assert "b.boss.json: 2, 4 steps\n" in capsys.readouterr().out
    path = tmp_path / "custom_nodes/fk"
    assert sorted(p.name for p in path.iterdir()) == ["__init__.py", "a.boss.json", "b.boss.json"]
    spec = importlib.util.spec_from_file_location("fk_nodes", path / "__init__.py")  # as ComfyUI loads it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in module.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node(), node.FUNCTION))
        assert node.DESCRIPTION
        assert node.CATEGORY
    node = module.NODE_CLASS_MAPPINGS["FlowkernelsCardSampler"]
    cards, steps = node.INPUT_TYPES()["required"].values()
    assert cards == (["a.boss.json", "b.boss.json", "flux/dev.boss.json"],)
    assert steps[0] == "INT"
    for card in cards[0]:
        sampler, sigmas = node().sampler(card, 4)
        network, noise = Network(), normal(2, 2, 4, 4)
        found = guider(network).sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)
        close(found, fk.sample(velocity(network), noise, PLANS["fitted"]))
        (sigmas,) = module.NODE_CLASS_MAPPINGS["FlowkernelsCardSigmas"]().sigmas(card, 4)
        assert torch.equal(sigmas, solver_sigmas(cal[4]))
    (sampler,) = module.NODE_CLASS_MAPPINGS["FlowkernelsSolver"]().sampler("heun")
    assert sampler.sampler_function.name == "heun"
    with pytest.raises(KeyError, match=r"steps: expected one of \[2, 4\], got 3"):
        node().sampler("a.boss.json", 3)
    with pytest.raises(FileNotFoundError, match=r"none\.boss\.json"):
        node().sampler("none.boss.json", 4)
    before = node.IS_CHANGED("a.boss.json", 4)
    assert node.IS_CHANGED("b.boss.json", 4) == before
    cal.solvers.clear()
    cal.save(path / "a.boss.json")
    assert node.IS_CHANGED("a.boss.json", 4) != before  # ComfyUI runs the node again


def test_the_workflow_of_the_examples(guider, tmp_path):
    """Its links are to outputs of the types that our node gives and takes, in the format of ComfyUI's API."""
    prompt = json.loads((ROOT / "examples/integrations/comfy_workflow.json").read_text())
    ours = {name: comfy.NODE_CLASS_MAPPINGS.get(node["class_type"]) for name, node in prompt.items()}
    (name,) = [name for name, node in ours.items() if node is not None]
    assert prompt[name]["inputs"].keys() == ours[name].INPUT_TYPES()["required"].keys()
    links = {k: link for node in prompt.values() for k, link in node["inputs"].items() if isinstance(link, list)}
    assert all(link[0] in prompt for link in links.values())
    given = [links["sampler"], links["sigmas"]]
    assert [(to, ours[to].RETURN_TYPES[i]) for to, i in given] == [(name, "SAMPLER"), (name, "SIGMAS")]


def test_where_nodes_are_not_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "custom_nodes/other").mkdir(parents=True)
    (tmp_path / "custom_nodes/other/__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    monkeypatch.chdir(tmp_path)
    calibration().save("m.boss.json")
    for line, message in {
        "--out custom_nodes/m.boss.json": "--out: expected CARD.boss.json in a folder of its own in ComfyUI's",
        "--out custom_nodes/other/m.boss.json": "--out: expected .*, beside which there is another __init__.py",
        "--out custom_nodes/new/m.json": "--out: expected a file name ending in .boss.json",
        "--out none/new/m.boss.json": "--out: expected a folder, or one in a folder that can be written to",
        "--out m.boss.json": "--out: expected another file than FILE",
        "--steps 4": "--steps: expected None for 'comfy-nodes'",
    }.items():
        assert main(["export", "m.boss.json", "--to", "comfy-nodes", *line.split()]) == 2
        assert re.search(f"error: {message}", capsys.readouterr().err), line
    assert sorted(p.name for p in (tmp_path / "custom_nodes").iterdir()) == ["other"]
    with pytest.raises(TypeError, match=r"^plan: expected a Calibration, whose card is written"):
        fk.export(4, "comfy-nodes")


def test_a_solver_that_the_text_cannot_hold_is_sent_to_the_nodes():
    with pytest.raises(ValueError, match=r"^plan: .*the node of 'comfy-nodes' runs it; knots_only=True"):
        fk.export(PLANS["fitted"], "comfy")


@pytest.mark.skipif(bool(_comfy.REAL), reason="with ComfyUI itself")
def test_without_comfyui(monkeypatch):
    """The module is imported, and says what is missing."""
    monkeypatch.setitem(sys.modules, "comfy.samplers", None)
    monkeypatch.setitem(sys.modules, "folder_paths", None)
    with pytest.raises(ImportError):
        comfy.SolverSelect().sampler("euler")
    with pytest.raises(ImportError):
        comfy.CardSampler.INPUT_TYPES()
