"""LoRA: adapters on the teacher's own weights, and in files that diffusers' pipelines and peft load."""

import copy
import operator
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.models.bundled import BUNDLED
from flowkernels.velocity.identity import identity


class UNet:
    """Stable Diffusion's pipeline, whose network is a UNet."""

    name = "unet"

    def make(self):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        parts = dict(unet=tiny.randomise(unet), vae=tiny.image_vae(4).eval(), scheduler=diffusers.DDIMScheduler())
        import transformers

        parts |= dict(text_encoder=transformers.CLIPTextModel(tiny.clip(16)).eval(), tokenizer=tiny.tokenizer(16, True))
        rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = diffusers.StableDiffusionPipeline(**parts, **rest)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self):
        return dict(prompt=tiny.PROMPTS, height=16, width=16)


REQUIRES = operator.attrgetter("requires_grad")
FAMILIES = {name: tiny.FAMILIES[name] for name in ("sd3", "flux", "wan21", "sana")} | {"unet": UNet()}
COMPUTED = (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm)


def filled(student: nn.Module, seed: int = 0) -> nn.Module:
    """Adapters as trained ones are, not zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in student.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2, generator=generator)
    return student


def mlp(width: int = 16, **convention) -> fk.VelocityField:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
    return fk.VelocityField(net, time_column=True, **convention).eval()


def states(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_pipelines_load_what_is_saved(name, settings, tmp_path):
    family = FAMILIES[name]
    pipe = family.make()
    part = "unet" if name == "unet" else "transformer"
    net = getattr(pipe, part)
    student = filled(fk.add_lora(net, {"r": 2, "lora_alpha": 3, **settings}))
    path = fk.save_lora(student, tmp_path / "new" / "folder")
    assert path.name == "pytorch_lora_weights.safetensors"

    def samples():
        call = dict(num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
        return pipe(**family.call(), **call)[0]

    before = samples()
    setattr(pipe, part, student)
    ours = samples()
    setattr(pipe, part, net)
    assert torch.equal(samples(), before)  # the teacher's network is as it was
    assert not torch.equal(ours, before)
    pipe.load_lora_weights(path.parent)
    assert torch.equal(samples(), ours)
    config = getattr(pipe, part).peft_config["default_0"]
    assert (config.r, config.lora_alpha, config.use_dora) == (2, 3, "use_dora" in settings)


@pytest.mark.parametrize(
    "lora",
    [
        2,
        {"r": 2, "use_rslora": True},
        LoraConfig(r=3, lora_alpha=1, target_modules="2", use_dora=True, lora_dropout=0.5),
    ],
    ids=["rank", "rslora", "dora"],
)
def test_one_copy_of_the_weights(lora, tmp_path):
    teacher, (x, t) = mlp(), states()
    before, known = teacher(x, t), identity(teacher)
    given = copy.deepcopy(lora)
    student = fk.add_lora(teacher, lora)
    assert given == lora
    assert torch.equal(student(x, t), before)  # zero adapters
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert shared <= {p.data_ptr() for p in student.parameters()}
    assert {p.data_ptr() for p in student.parameters() if p.requires_grad}.isdisjoint(shared)
    assert all(p.requires_grad for p in teacher.parameters())
    filled(student.eval())
    after = student(x, t)
    after.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(after, before)
    assert torch.equal(teacher(x, t), before)
    assert identity(teacher) == known

    off = fk.without_adapters(student.train())
    assert torch.equal(off(x, t), before)
    assert identity(off) == known
    assert all(part.training for part in student.modules())
    assert all(p.requires_grad == ("lora" in name) for name, p in student.named_parameters())

    path = fk.save_lora(student.eval(), tmp_path)
    again = fk.add_lora(teacher, path)
    assert torch.equal(again(x, t), after)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(teacher.net), tmp_path)
    assert torch.equal(fk.VelocityField(by_peft, time_column=True)(x, t), after)


def test_in_place_adapters_of_a_trainer():
    """What strangers' scripts do: adapters in the network itself, wrapped."""
    net, (x, t) = mlp().net, states()
    known, before = identity(mlp()), mlp()(x, t)
    model = peft.get_peft_model(net, LoraConfig(r=2, target_modules=["2"], init_lora_weights=False, lora_dropout=0.5))
    student = fk.VelocityField(model, time_column=True).train()
    teacher = fk.without_adapters(student)
    assert torch.equal(teacher(x, t), before)
    assert identity(teacher) == known
    assert not torch.equal(student.eval()(x, t), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="student: expected adapters that are not merged"):
        fk.without_adapters(student)


def test_what_is_trained_beside_adapters():
    """Copies of whole modules are switched off and merged with the adapters; where the network's own weights are
    trained, the teacher is nowhere."""
    known, (x, t) = identity(mlp()), states()
    before = mlp()(x, t)
    settings = dict(r=2, target_modules=["2"], init_lora_weights=False)
    student = fk.VelocityField(
        peft.get_peft_model(mlp().net, LoraConfig(**settings, modules_to_save=["4"])), time_column=True
    )
    filled(student)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    teacher, merged = fk.without_adapters(student), fk.merge_lora(student)
    assert torch.equal(teacher(x, t), before)
    assert identity(teacher) == known
    assert not torch.equal(student(x, t), before)
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
    torch.testing.assert_close(merged(x, t), student(x, t), rtol=1e-5, atol=1e-6)
    assert {type(part) for part in merged.net} == {nn.Linear, nn.SiLU}
    assert not {id(p) for p in merged.net[4].parameters()} & {id(p) for p in student.parameters()}

    biased = peft.get_peft_model(mlp().net, LoraConfig(**settings, bias="all"))
    with pytest.raises(ValueError, match="student: expected a network whose own weights stay"):
        fk.without_adapters(fk.VelocityField(biased, time_column=True))
    more = peft.get_peft_model(mlp().net, LoraConfig(**settings))
    more.base_model.model[0].bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"student: expected a network of which adapters alone are trained, got .*0\.bias"
    ):
        fk.without_adapters(fk.VelocityField(more, time_column=True))


def test_adapters_on_adapters():
    """A network with an adapter that is on, such as of a style: the new one comes on top of it."""
    teacher, (x, t) = mlp(), states()
    style = filled(fk.add_lora(teacher, 2))
    with_style = style(x, t)
    student = fk.add_lora(style, 1)
    assert list(student.net.peft_config) == ["default", "default_1"]
    assert torch.equal(student(x, t), with_style)
    assert all(p.requires_grad == ("default_1" in name) for name, p in student.named_parameters())
    for layer in style.modules():
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)
    assert torch.equal(fk.add_lora(style, 1)(x, t), teacher(x, t))  # off, and left off


def test_low_precision():
    teacher = mlp().to(torch.bfloat16)
    student = fk.add_lora(teacher, 2)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    x, t = (a.bfloat16() for a in states())
    assert torch.equal(student(x, t), teacher(x, t))
    assert filled(student)(x, t).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (0, "lora: expected at least 1, got 0"),
        (True, "lora: expected a rank, a peft.LoraConfig"),
        (1.5, "lora: expected a rank, a peft.LoraConfig"),
        (64, "lora: expected a network with linear or convolution layers larger than adapters of rank 64"),
        ({"r": "x"}, r"lora\['r'\]: expected an integer, got 'x'"),
        ({"rank": 2}, "lora: expected settings of peft.LoraConfig, got .* 'rank'"),
        ({"target_modules": ["2", "nope"]}, r"lora.target_modules: expected names of layers .* got 'nope'"),
        ({"target_modules": "nope"}, "lora: expected adapters that fit Sequential, got .*nope"),
        ({"target_modules": ["1"]}, "lora: expected adapters that fit Sequential, got .*SiLU"),
        ({"modules_to_save": ["2"]}, "lora.modules_to_save: expected modules_to_save=None"),
        ({"bias": "all"}, "lora.bias: expected bias='none'"),
        ({"init_lora_weights": "pissa"}, "lora.init_lora_weights: expected True, False"),
        (peft.LoHaConfig(), "lora: expected a rank, a peft.LoraConfig"),
        (peft.AdaLoraConfig(total_step=9), "lora: expected a configuration of LoRA, got one of ADALORA"),
    ],
)
def test_refused(lora, message):
    teacher = mlp()
    with pytest.raises((TypeError, ValueError), match=message):
        fk.add_lora(teacher, lora)
    assert identity(teacher) == identity(mlp())


def test_layers_that_are_not_called():
    """torch's own transformer layers read the weights of their layers: adapters there would be left out."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 8))
    assert set(fk.add_lora(net, 1).peft_config["default"].target_modules) == {"0", "2"}
    for target in ("linear1", "out_proj", "self_attn"):
        with pytest.raises(ValueError, match=r"lora\.target_modules: expected"):
            fk.add_lora(net, {"target_modules": [target]})


def test_default_targets():
    """Linear layers, and of a network without them the convolutions; by an expression where names match others."""
    unet = BUNDLED["fashion"].load()
    student = fk.add_lora(unet, 8)
    kinds = {type(part.base_layer) for part in student.modules() if hasattr(part, "base_layer")}
    assert kinds == {nn.Linear}
    trained, whole = (sum(p.numel() for p in ps) for ps in (filter(REQUIRES, student.parameters()), unet.parameters()))
    assert trained < 0.02 * whole
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Sequential(nn.Conv2d(8, 8, 3)))
    assert set(fk.add_lora(net, 2).peft_config["default"].target_modules) == {"0", "2.0"}
    net = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.LayerNorm(16)))
    assert fk.add_lora(net, 2).peft_config["default"].target_modules == "(0)"


def test_files_of_others(tmp_path):
    teacher = mlp()
    path = fk.save_lora(fk.add_lora(teacher, 2), tmp_path / "a")
    other = mlp()
    other.net[0].weight.data += 1
    with pytest.raises(ValueError, match="lora: expected an adapter of this network"):
        fk.add_lora(other, path)
    with pytest.raises(ValueError, match="lora: expected an adapter of this network"):
        fk.add_lora(mlp(8), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="lora: expected an adapter"):
        fk.add_lora(teacher, path)
    with pytest.raises(ValueError, match="lora: expected a folder with"):
        fk.add_lora(teacher, tmp_path)


# ---- fk.straighten(lora=...) ----

PLAN = fk.Schedule([0, 0.25, 0.5, 1])
RUN = dict(noise=(2,), iterations=8, bank=64, batch=16, grid=8, lr=1e-2, warmup=2, log_every=1, progress=False)


class Given(nn.Module):
    """Of a label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.label = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)), nn.Linear(4, 3)

    def forward(self, x, t, y):
        return self.net(torch.cat([x, t[:, None]], 1) + self.label(y))


def guided() -> fk.VelocityField:
    labels = torch.eye(4).repeat(16, 1)
    given = dict(conditioning={"y": labels}, unconditional={"y": torch.zeros(1, 4)}, guidance=2.0)
    return fk.VelocityField(Given(), **given).eval()


@pytest.mark.parametrize(
    ("target", "lora", "more"),
    [
        ("boss", 2, {}),
        ("boss", {"r": 2, "use_dora": True, "lora_dropout": 0.2}, {"ema": None}),
        ("velocity_matching", LoraConfig(r=2, target_modules=["0", "2"]), {"accumulate": 2}),
        ("on_policy", 2, {"rollout_every": 3}),
        ("endpoint", 2, {"schedule": fk.Solver.heun(2)}),
        ("guided", 2, {}),
        ("autocast", 2, {}),
    ],
)
def test_the_teacher_has_no_adapters(target, lora, more):
    """A run whose teacher shares no weights with the student is the same, bit for bit; and it begins as one of all
    weights does."""
    make = guided if target == "guided" else mlp
    settings = RUN | dict(target=target if target not in ("guided", "autocast") else "boss") | more
    if target == "guided":
        settings["noise"] = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    plan = settings.pop("schedule", PLAN)
    teacher, other = make(), make()
    known, stepped = identity(teacher), []

    def optimizer(parameters):
        stepped.extend(parameters)
        return torch.optim.Adam(parameters, lr=1e-2)

    with torch.autocast("cpu", torch.bfloat16, enabled=target == "autocast"):
        ours = fk.straighten(None, teacher, plan, lora=lora, optimizer=optimizer, **settings)
        apart = fk.straighten(make().without_guidance(), other, plan, lora=lora, optimizer=optimizer, **settings)
        full = fk.straighten(None, make(), plan, **settings)
    assert repr(ours.history) == repr(apart.history)
    assert ours.history["loss"][0] == full.history["loss"][0] or "lora_dropout" in str(lora)
    assert ours.history["loss"][-1] != full.history["loss"][-1]
    for p, q in zip(ours.student.parameters(), apart.student.parameters(), strict=True):
        assert torch.equal(p, q)
    assert identity(teacher) == known
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert shared <= {p.data_ptr() for p in ours.student.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in stepped)
    assert not any(part.training for part in ours.student.modules())
    x, t = states(64)
    assert torch.equal(fk.without_adapters(ours.student)(x, t), teacher.without_guidance()(x, t))
    assert not torch.equal(ours.student(x, t), teacher.without_guidance()(x, t))


class Stops(torch.optim.Adam):
    """Adam that is interrupted before a step."""

    before: int | None = None

    def step(self, closure=None):
        if Stops.before is not None:
            Stops.before -= 1
            if Stops.before < 0:
                raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("target", ["boss", "on_policy"])
def test_checkpoints_hold_the_adapters_alone(target, tmp_path, monkeypatch):
    path, teacher = tmp_path / "state.pt", mlp(64)
    settings = RUN | dict(target=target, optimizer=Stops, lora=2, checkpoint_every=3, rollout_every=4, checkpoint=path)
    whole = fk.straighten(None, teacher, PLAN, **settings | dict(checkpoint=None))
    monkeypatch.setattr(Stops, "before", 5)
    with pytest.raises(KeyboardInterrupt):
        fk.straighten(None, teacher, PLAN, **settings)
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 3
    trained = {name for name, p in fk.add_lora(teacher, 2).named_parameters() if p.requires_grad}
    assert set(saved["student"]) == trained
    assert {key.removeprefix("module.") for key in saved["average"]} == trained | {"n_averaged"}
    assert len(saved["optimizer"]["state"]) == len(trained)
    monkeypatch.setattr(Stops, "before", None)
    resumed = fk.straighten(None, teacher, PLAN, **settings)
    assert repr(resumed.history) == repr(whole.history)
    for p, q in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(p, q)
    other = mlp(64)
    other.net[2].weight.data *= 1.5
    for velocity, lora, told in ((other, 2, "teacher = "), (teacher, 3, ""), (teacher, None, "")):
        with pytest.raises(ValueError, match=f"checkpoint: expected .*{told}"):
            fk.straighten(None, velocity, PLAN, **settings | dict(lora=lora))
        assert torch.load(path, weights_only=True)["iteration"] == 8


def test_starts(tmp_path):
    teacher, (x, t) = mlp(), states()
    first = fk.straighten(None, teacher, PLAN, lora=2, **RUN)
    path = fk.save_lora(first.student, tmp_path)
    state = peft.get_peft_model_state_dict(first.student.net)
    none = RUN | dict(iterations=1, lr=1e-30, ema=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    for more in (dict(lora=2, init=path), dict(lora=2, init=str(tmp_path)), dict(lora=2, init=state), dict(lora=path)):
        again = fk.straighten(None, teacher, PLAN, **none | more)
        assert torch.equal(again.student(x, t), first.student(x, t))
    before = first.student(x, t)
    on = fk.straighten(first.student, teacher, PLAN, init="keep", **RUN)  # the adapter that is there, trained on
    assert not torch.equal(on.student(x, t), before)
    assert identity(teacher) == identity(mlp())
    top = fk.straighten(first.student, teacher, PLAN, lora=1, init="keep", **none)  # another one on top of it
    assert list(top.student.net.peft_config) == ["default", "default_1"]
    assert torch.equal(top.student(x, t), first.student(x, t))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize(
    ("student", "velocity", "more", "message"),
    [
        (None, mlp, dict(init="teacher"), "init: expected None, 'keep', an adapter's state dict"),
        (None, mlp, dict(init={"a.lora_A.weight": torch.zeros(2, 2)}), "init: expected the adapter of this network"),
        (None, mlp, dict(init={"a": 1}), "init: expected None, 'keep', an adapter's state dict"),
        (None, mlp, dict(init="nothing/there"), "init: expected a file"),
        (None, mlp, dict(lora=0), "lora: expected at least 1, got 0"),
        (None, mlp, dict(lora={"target_modules": ["nope"]}), r"lora\.target_modules: expected names of layers"),
        (None, mlp, dict(target="average_velocity"), "lora: expected a target whose student is the teacher's network"),
        (None, lambda: lambda x, t: -x, {}, "student: expected a module, where the teacher is not one to put"),
        (
            None,
            lambda: Normed().eval(),
            {},
            "velocity: expected a network whose adapters are all .* BatchNorm1d 'net.1'",
        ),
        (
            lambda: fk.Acceleration(mlp(), mlp()),
            mlp,
            dict(target="acceleration"),
            "student: expected a network, or a V",
        ),
    ],
)
def test_runs_refused(student, velocity, more, message):
    evaluated = []
    teacher = velocity()
    if isinstance(teacher, nn.Module):
        teacher.register_forward_hook(lambda *_: evaluated.append(1))
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        fk.straighten(student and student(), teacher, PLAN, **RUN | dict(lora=2) | more)
    assert not evaluated


def test_a_loop_of_ones_own_under_accelerate():
    """Adapters put into the network in place, and that prepared: the teacher is in the student."""
    from accelerate import Accelerator

    def run(in_place: bool) -> list[float]:
        base = mlp()
        if in_place:
            peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), base.net)
            student = base
        else:
            student = fk.add_lora(base, LoraConfig(r=2, target_modules=["0", "2"]))
        generator = torch.Generator().manual_seed(2)
        for p in student.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.1, generator=generator)
        trained = [p for p in student.parameters() if p.requires_grad]
        accelerator = Accelerator(cpu=True)
        student, opt = accelerator.prepare(student.train(), torch.optim.Adam(trained, lr=1e-2))
        teacher = fk.without_adapters(student) if in_place else base
        objective = fk.StraightenLoss(PLAN, target="velocity_matching", teacher=teacher, substeps=2)
        bank = fk.TrajectoryBank(teacher, objective, noise=(2,), size=32, grid=8, progress=False).fill()
        draws, losses = torch.Generator().manual_seed(0), []
        for _ in range(4):
            loss = objective(student, bank.sample(16, draws), draws).loss
            accelerator.backward(loss)
            opt.step(), opt.zero_grad()
            losses.append(loss.item())
        return losses

    assert run(True) == run(False)


def test_merged():
    teacher, (x, t) = mlp(), states()
    student = filled(fk.add_lora(teacher, {"r": 2, "use_dora": True})).double()
    merged = fk.merge_lora(student)
    assert {type(part) for part in merged.net} == {nn.Linear, nn.SiLU}
    torch.testing.assert_close(merged(x.double(), t.double()), student(x.double(), t.double()), rtol=1e-12, atol=1e-12)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_weights_that_are_computed_are_merged():
    """A sum with what weight_norm and spectral_norm make at each call would be lost at the next."""
    x, t = states()
    for computed in (*COMPUTED, nn.utils.spectral_norm):
        teacher = mlp()
        computed(teacher.net[2])
        teacher.eval()
        before = teacher(x, t)
        student = filled(fk.add_lora(teacher, {"r": 2, "target_modules": ["2"]}))
        want = student(x, t)
        assert not torch.allclose(want, before, atol=1e-3)
        torch.testing.assert_close(fk.merge_lora(student)(x, t), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(student(x, t), want)
        assert torch.equal(teacher(x, t), before)


def test_buffers_that_training_changes_are_refused():
    """Files of adapters have none, so that what was trained could not be made again."""
    teacher = mlp()
    COMPUTED[-1](teacher.net[2])
    with pytest.raises(ValueError, match=r"student: expected a network whose adapters .* its buffers too: .*\._u"):
        fk.straighten(None, teacher.eval(), PLAN, **RUN, lora=2)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/lora.md").read_text()
    code = [textwrap.dedent(block) for block in re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)]
    loaded = []
    pipe = SimpleNamespace(load_lora_weights=lambda folder: loaded.extend(Path(folder).iterdir()))
    teacher = mlp(64)
    names = dict(fk=fk, torch=torch, velocity=teacher, noise=torch.randn(16, 2), pipe=pipe)
    names["cal"] = fk.calibrate(teacher, names["noise"], 100, [4], progress=False)
    assert len(code) == 3
    for block in code:
        exec(compile(block.replace("iterations=1500", "iterations=2, bank=16"), "docs/lora.md", "exec"), names)
    assert names["x1"].isfinite().all()
    assert {path.name for path in loaded} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_command(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "flowkernels")
    calibrate = "calibrate --model digits -n 16 --grid 8 --steps 2 --out a.boss.json"
    short = "--model digits --schedule a.boss.json --steps 2 --iterations 2 --batch 4 --bank 8 --warmup 0 --lr 1e-2"
    for command in (calibrate, f"straighten {short} --ema 0 --lora 4 --adapter adapter --out merged.safetensors"):
        assert main(command.split()) == 0
    assert "lora: rank 4 on 13 Linear: 24,320 parameters, 3.7 % of the network's" in caplog.text
    teacher = BUNDLED["digits"].load()
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    student = fk.add_lora(teacher, "adapter")
    merged = BUNDLED["digits"].load()
    merged.load_state_dict(load_file("merged.safetensors"))
    torch.testing.assert_close(merged(x, t), student(x, t), rtol=1e-4, atol=1e-5)
    assert (merged(x, t) - teacher(x, t)).abs().max() > 1e-3


def test_watched(tmp_path):
    """The averages are put into the adapters and out of them again; of the best only these are kept, and come back."""
    settings = RUN | dict(lora=2, held_out=8, lr=0.05, decay="none", iterations=12)
    plain = fk.straighten(None, mlp(64), PLAN, **settings)
    settings |= dict(evaluate_every=2, checkpoint=tmp_path / "run.pt", patience=99)
    watched = fk.straighten(None, mlp(64), PLAN, **settings, callbacks=[lambda event: event.samples(2) is None])
    assert watched.history == plain.history
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["evaluations"]["best"]["weights"].keys() == saved["student"].keys()
    errors = watched.evaluations["endpoint_error"]
    assert watched.best == 2 * errors.index(min(errors))
    assert watched.errors == (errors[0], min(errors))
    again = fk.straighten(None, mlp(64), PLAN, **settings)
    for p, q in zip(again.student.parameters(), watched.student.parameters(), strict=True):
        assert torch.equal(p, q)
