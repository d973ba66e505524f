"""Weights as repositories write them: each layout gives the same network, and what does not fit is named."""

import argparse
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flowkernels as fk
from flowkernels.cli import inputs


class Net(nn.Module):
    """With a buffer, a frozen parameter, weights that are tied, and parts of parts."""

    def __init__(self, width=3):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.SiLU())])
        self.position = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.blocks[0].weight

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return self.tied(x + self.position) * self.scale


def state(seed, width=3):
    torch.manual_seed(seed)
    net = Net(width)
    with torch.no_grad():
        for p in (*net.parameters(), *net.buffers()):
            p.normal_()
    return dict(net.state_dict())


RAW, EMA, OTHER = state(1), state(2), state(3)


def under(prefix, weights):
    return {f"{prefix}{k}": v for k, v in weights.items()}


def trained(weights):
    net = Net()
    net.load_state_dict(weights)
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def everything(weights):
    net = Net()
    net.load_state_dict(weights)
    return [p.detach().clone() for p in net.parameters()]


def compiled_blocks(weights):
    return {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in weights.items()}


def without_dots(weights):
    return {f"diffusion_model{k.replace('.', '')}": v for k, v in weights.items() if k != "scale"}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
TORCH_EMA = dict(decay=0.999, num_updates=7, shadow_params=trained(EMA), collected_params=trained(OTHER))
VAE = {"encoder.weight": torch.ones(2), "encoder.bias": torch.ones(2)}
# layout: what the file holds, which weights are taken, the name of them
LAYOUTS = {
    "a state dict": (RAW, RAW, ""),
    "module.": (under("module.", RAW), RAW, ""),
    "_orig_mod.": (under("_orig_mod.", RAW), RAW, ""),
    "module._orig_mod.model.": (under("module._orig_mod.model.", RAW), RAW, "model"),
    "compiled blocks": ({"net": compiled_blocks(RAW)}, RAW, "net"),
    "Lightning": (
        {
            **dict(epoch=3, global_step=100, optimizer_states=[OPTIMIZER], lr_schedulers=[]),
            "state_dict": under("model.", RAW) | under("vae.", VAE) | {"loss.weight": torch.ones(1)},
        },
        *(RAW, "state_dict.model"),
    ),
    "Lightning with an average": (
        {"state_dict": under("net.module.", RAW) | under("net_ema.module.", EMA)},
        *(EMA, "state_dict.net_ema"),
    ),
    "model, ema, opt": ({"model": RAW, "ema": EMA, "opt": OPTIMIZER, "step": 5}, EMA, "ema"),
    "model_ema": ({"model": under("module.", RAW), "model_ema": under("module.", EMA)}, EMA, "model_ema"),
    "params_ema": ({"params": RAW, "params_ema": EMA}, EMA, "params_ema"),
    "ema_state_dict": ({"net": RAW, "ema_state_dict": EMA}, EMA, "ema_state_dict"),
    "torch_ema": ({"model": RAW, "ema": TORCH_EMA, "optimizer": OPTIMIZER}, EMA | {
        "scale": RAW["scale"], "position": RAW["position"]}, "ema.shadow_params"),
    "score_sde": ({"optimizer": OPTIMIZER, "model": under("module.", RAW), "ema": TORCH_EMA, "step": 3}, EMA | {
        "scale": RAW["scale"], "position": RAW["position"]}, "ema.shadow_params"),
    "diffusers' EMAModel": ({"model": RAW, "ema": dict(
        decay=0.9, min_decay=0.0, optimization_step=3, update_after_step=0, use_ema_warmup=False, inv_gamma=1.0,
        power=0.75, shadow_params=everything(EMA))}, EMA | {"scale": RAW["scale"]}, "ema.shadow_params"),
    "ema_pytorch": (
        {"ema": under("online_model.", RAW) | under("ema_model.", EMA) | {"step": torch.tensor(4)}},
        *(EMA, "ema.ema_model"),
    ),
    "AveragedModel": (under("module.", RAW) | {"n_averaged": torch.tensor(3)}, RAW, ""),
    "LitEma": (
        under("model.diffusion_model.", RAW) | under("model_ema.", without_dots(EMA)) | {
            "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)},
        *(EMA | {"scale": RAW["scale"]}, "model_ema"),
    ),
    "a field": (under("net.", RAW), RAW, "net"),
    "an average of something else": (
        {"model": RAW, "ema_critic": {"scale": torch.ones(1), "a": torch.ones(2)}},
        *(RAW, "model"),
    ),
    "twice the same": ({"model": RAW, "state_dict": RAW}, RAW, "model"),
    "a tied weight once": ({k: v for k, v in RAW.items() if k != "tied.weight"}, RAW, ""),
}  # fmt: skip
FLAT = [name for name, (content, _, _) in LAYOUTS.items() if all(torch.is_tensor(v) for v in content.values())]


def write_shards(content, path):
    path.mkdir()
    keys, where = list(content), {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        others = {k: torch.zeros_like(content[k]) for k in keys if k not in part}  # which the index has elsewhere
        save_file(others | {k: content[k].clone() for k in part} | {"unlisted": torch.ones(1)}, path / file)
        where |= dict.fromkeys(part, file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def written(content, how, folder):
    if how == "safetensors":
        save_file({k: v.clone() for k, v in content.items()}, folder / "a.safetensors")
        return folder / "a.safetensors"
    if how in ("index", "folder"):
        index = write_shards(content, folder / "shards")
        return index if how == "index" else index.parent
    torch.save(content, folder / f"a{how}")
    return folder / f"a{how}"


CASES = [(name, how) for name in LAYOUTS for how in (".pt", "safetensors", "index", "folder")
         if how == ".pt" or (name in FLAT and (how == "safetensors" or name == "module."))]  # fmt: skip


def equal(net, expected):
    return all(torch.equal(v, expected[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("name", "how"), CASES)
def test_layouts(name, how, tmp_path):
    content, expected, source = LAYOUTS[name]
    path = written(content, how, tmp_path)
    for make in (Net, nn.DataParallel, lambda net=None: torch.compile(net), lambda net=None: fk.VelocityField(net)):
        net = Net()
        wrapped = net if make is Net else make(net)
        found = fk.load_weights(wrapped, path)
        assert equal(net, expected | {"tied.weight": expected["blocks.0.weight"]})
        assert (found.source, found.averaged) == (source, "ema" in source)
    assert str(found).startswith(str(found.path))


@pytest.mark.parametrize(
    ("prefer", "expected"), [("ema", EMA), ("raw", RAW), ("model", RAW), ("student", OTHER), ("inner", OTHER)]
)
def test_preferred_weights(prefer, expected, tmp_path, capsys):
    content = {"ema": EMA, "model": RAW}
    content |= {"student": {"student": OTHER}, "inner": {"state": {"inner": OTHER}}}.get(prefer, {})
    torch.save(content, tmp_path / "a.pt")
    net = Net()
    found = fk.load_weights(net, tmp_path / "a.pt", prefer=prefer)
    assert equal(net, expected)
    assert {source.split(".")[0] for source in found.others} == {*content} - {found.source.split(".")[0]}
    inputs.load_checkpoint(net, tmp_path / "a.pt", prefer)
    assert capsys.readouterr().out.strip() == str(found)


WIDE = state(4, 4)
UNFIT = {
    "two averages": (
        {"ema_0.9": RAW, "ema_0.99": EMA},
        r"expected one set of weights that fit Net, got 'ema_0.9', 'ema_0.99' in .* \(prefer='ema_0.9' takes one\)",
    ),
    "two raw": ({"student": RAW, "teacher": EMA}, "expected one set of weights.*prefer='student'"),
    "an average of another network": (
        {"model": RAW, "ema": WIDE},
        r".* in .*a.pt 'ema', got 6 mis-shaped.*; prefer='raw' takes 'model'",
    ),
    "a list of another length": (
        {"model": RAW, "ema": dict(shadow_params=trained(EMA)[:-1])},
        r"a list of the parameters of Net in their order, got a list of 3 tensors for 4 parameters, .*prefer='raw'",
    ),
    "a list in another order": (
        {"model": RAW, "ema": dict(shadow_params=trained(EMA)[::-1])},
        r"in another order or of another network, 4 of other shapes \(\[3\] for blocks.0.weight \[3, 3\]\)",
    ),
    "a list without buffers": ({"ema": dict(shadow_params=trained(EMA))}, r"2 missing \(position, scale\)"),
    "names": (
        {"model": {k: v for k, v in RAW.items() if k != "scale"} | {"more": torch.ones(1)}},
        r"got 1 missing \(scale\); 1 unexpected \(more\); build the network as it was",
    ),
    "nothing": ({"optimizer": OPTIMIZER, "step": 3}, "expected names and tensors, weights that fit Net, got none in"),
    "code": (
        {"model": RAW, "args": argparse.Namespace(lr=1)},
        r"argparse.Namespace.*it would run code of its own.*torch.save\(c\['model'\].*torch.save\(c.state_dict\(\)",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(name, tmp_path):
    content, message = UNFIT[name]
    torch.save(content, tmp_path / "a.pt")
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"^path: .*{message}"):
        fk.load_weights(net, tmp_path / "a.pt")
    with pytest.raises(inputs.InputError, match=r"^--checkpoint: "):
        inputs.load_checkpoint(net, tmp_path / "a.pt")
    assert equal(net, before)
    with pytest.raises(ValueError, match=r"^(prefer: expected 'ema', 'raw' or the name of weights in|path: )"):
        fk.load_weights(net, tmp_path / "a.pt", prefer="nothing of the name")


def broken(change):
    def make(folder):
        index = write_shards(RAW, folder)
        change(index)
        return folder

    return make


def edit(index, **changes):
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


FOLDERS = {
    "no files": (lambda folder: folder.mkdir(), "one file of weights .* got none in"),
    "a pipeline": (
        lambda folder: (
            [(folder / part).mkdir(parents=True) for part in ("transformer", "vae")]
            + [save_file({"a": torch.ones(1)}, folder / part / "m.safetensors") for part in ("transformer", "vae")]
        ),
        "name one of its folders: transformer, vae",
    ),
    "two files": (
        lambda folder: (
            [folder.mkdir()] + [save_file({"a": torch.ones(1)}, folder / f"{n}.safetensors") for n in ("a", "a.fp16")]
        ),
        r"got 2 in .* \(a.fp16.safetensors, a.safetensors\); name one",
    ),
    "a shard that is gone": (
        broken(lambda index: (index.parent / "model-00002-of-00002.safetensors").unlink()),
        r"1 that are not there \(model-00002-of-00002.safetensors\)",
    ),
    "a name that no shard has": (
        broken(
            lambda index: edit(
                index,
                weight_map=json.loads(index.read_text())["weight_map"] | {"x": "model-00001-of-00002.safetensors"},
            )
        ),
        r"without 1 of its weights \(x\)",
    ),
    "a path": (broken(lambda index: edit(index, weight_map={"scale": "../a.safetensors"})), "names of files beside it"),
    "no map": (broken(lambda index: edit(index, weight_map=[])), '"weight_map"'),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_none_of_weights_are_named(name, tmp_path):
    make, message = FOLDERS[name]
    make(tmp_path / "folder")
    with pytest.raises(ValueError, match=rf"(?s)^path: .*{message}"):
        fk.load_weights(Net(), tmp_path / "folder")


def test_a_network_with_a_part_of_the_name_of_a_wrapper(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.weight = nn.Linear(3, 3, bias=False), nn.Parameter(torch.zeros(3, 3))

    net, other = Odd(), Odd()
    with torch.no_grad():
        net.weight.normal_()
    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    fk.load_weights(other, tmp_path / "a.pt")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


def test_random_nests_of_prefixes(tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        prefix = "".join(
            f"{rng.choice(['module', '_orig_mod', 'model', 'net', 'flow'])}." for _ in range(rng.randrange(5))
        )
        torch.save(
            under(prefix, RAW) | under("vae.", VAE) if "model." in prefix else under(prefix, RAW), tmp_path / "a.pt"
        )
        net = Net()
        fk.load_weights(net, tmp_path / "a.pt")
        assert equal(net, RAW | {"tied.weight": RAW["blocks.0.weight"]})
