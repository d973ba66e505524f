"""LoRA: adapters on the teacher's own weights, and in files that diffusers' pipelines and peft load."""

import copy

import diffusers
import peft
import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn

import flowkernels as fk
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


FAMILIES = {name: tiny.FAMILIES[name] for name in ("sd3", "flux", "wan21", "sana")} | {"unet": UNet()}


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
