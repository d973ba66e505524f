"""The constants that the library gives for diffusers' transformers, against what the pipelines themselves do."""

import inspect
import re
from pathlib import Path

import pytest
import tiny
import torch

import flowkernels as fk
from flowkernels.integrations.diffusers import pipeline_velocity
from flowkernels.velocity.check import STOCK, stock_settings

OFF = dict(guidance_scale=1.0, true_cfg_scale=1.0)
# that of Z-Image takes lists, that of CogView4 a time that is not shifted with sigma
KNOWN = [name for name in tiny.FAMILIES if name not in ("zimage", "cogview4")]


class Seen:
    """The second step of a pipeline without guidance of two evaluations: what the network is called with, sigma, and
    what the scheduler is handed."""

    def __init__(self, family):
        self.pipe, self.calls = family.make(), []
        scheduler, stop = self.pipe.scheduler, StopIteration()
        for net in family.networks(self.pipe):
            net.register_forward_pre_hook(self.see, with_kwargs=True)
        step, steps = scheduler.step, []

        def watched(v, *args, **kwargs):
            steps.append(v)
            if len(steps) == 2:
                self.v, self.sigma = v, scheduler.sigmas[1].item()
                raise stop
            return step(v, *args, **kwargs)

        scheduler.step = watched
        call = family.call()
        with pytest.raises(StopIteration):
            self.pipe(
                **call | {k: v for k, v in OFF.items() if k in call and "cfg" in family.has}, num_inference_steps=3
            )
        self.net, kwargs = self.calls[-1]
        self.x, self.rest = kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def see(self, net, args, kwargs):
        self.calls.append((net, inspect.signature(net.forward).bind(*args, **kwargs).arguments))


@pytest.fixture(scope="module", params=KNOWN)
def seen(request):
    return tiny.FAMILIES[request.param], Seen(tiny.FAMILIES[request.param])


def test_stock_conventions(seen):
    family, seen = seen
    settings = stock_settings(seen.net)
    rest = dict(seen.rest)
    told = rest.pop(settings["time_name"]).double().flatten()[0].item()
    t = (told - settings["time_offset"]) / settings["time_scale"]
    t = 1 - t if settings["reverse_time"] else t
    inverted = "inverted_sigmas" in family.has
    assert t == pytest.approx(seen.sigma if inverted else 1 - seen.sigma, abs=1e-3)  # some schedulers round
    field = fk.VelocityField(seen.net, conditioning=rest, shared=tuple(rest), **settings)
    v = field(seen.x, torch.full((len(seen.x),), t, dtype=torch.float64))
    assert v.shape == seen.v.shape
    torch.testing.assert_close(v, seen.v if inverted else -seen.v, rtol=1e-4, atol=1e-4)


def test_a_pipeline_is_a_reference(seen):
    _, seen = seen
    right = stock_settings(seen.net)
    rest = {k: v for k, v in seen.rest.items() if k != right["time_name"]}
    made = dict(conditioning=rest, shared=tuple(rest))
    assert fk.VelocityField(seen.net, **made, **right).check(seen.pipe, seen.x) <= 1e-5
    wrong = right | dict(sign=-right["sign"])
    with pytest.raises(ValueError, match=r"agrees with the reference if sign is reversed"):
        fk.VelocityField(seen.net, **made, **wrong).check(seen.pipe, seen.x)
    other = 1000.0 if right["time_scale"] == 1 else 1.0
    with pytest.raises(ValueError, match=rf"agrees with the reference if time_scale={right['time_scale']:.9g}$"):
        fk.VelocityField(seen.net, **made, **right | dict(time_scale=other)).check(seen.pipe, seen.x)


def test_the_page_says_the_same():
    page = (Path(__file__).parents[2] / "docs/diffusers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    written = {name: (reverse == "yes", float(scale), int(sign)) for name, reverse, scale, sign in rows}
    assert written == {name: (c.reverse_time, c.time_scale, c.sign) for name, c in STOCK.items()}


def test_another_pipeline_is_refused_by_name():
    pipe = tiny.FAMILIES["zimage"].make()
    with pytest.raises(ValueError, match=r"^reference: expected a pipeline with one of .*ZImageTransformer2DModel"):
        fk.VelocityField(pipe.transformer).check(pipe, torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2"])
def test_pipeline_velocity_is_a_reference(name):
    """With noise of its own, and the pipeline's own casts."""
    family = tiny.FAMILIES[name]
    seen, call = Seen(family), family.call()
    call |= {k: v for k, v in OFF.items() if k in call and "cfg" in family.has}
    reference, right = pipeline_velocity(family.make(), **call), stock_settings(seen.net)
    rest = {k: v for k, v in seen.rest.items() if k != right["time_name"]}
    ids = tuple(k for k in rest if "ids" in k)
    assert fk.VelocityField(seen.net, conditioning=rest, shared=ids, **right).check(reference) <= 1e-4
    wrong = right | dict(sign=-right["sign"])
    with pytest.raises(ValueError, match=r"agrees with the reference if sign is reversed"):
        fk.VelocityField(seen.net, conditioning=rest, shared=ids, **wrong).check(reference)
