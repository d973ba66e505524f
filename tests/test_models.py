"""The networks that ship with the package, and the closed-form velocities."""

import json
from pathlib import Path

import pytest
import torch
from _flows import digits, normal
from safetensors.torch import save_file

import flowkernels as fk
from flowkernels import _weights
from flowkernels.cli import inputs
from flowkernels.models.bundled import BUNDLED, Bundled, load_network, save_network
from flowkernels.models.closed_form import EmpiricalVelocity, GaussianMixtureVelocity
from flowkernels.models.networks import DiT, ResidualMLP, UNet, sinusoidal_embedding


def scrambled(net):
    """Weights away from their zero initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


NETWORKS = {
    "mlp": (lambda: ResidualMLP(12, width=16, blocks=2, time_width=8), (3, 4)),
    "unet": (lambda: UNet(channels=2, widths=(8, 16, 24), time_width=8), (2, 8, 12)),
    "dit": (lambda: DiT(channels=2, size=6, patch=2, width=16, blocks=2, heads=2, time_width=8), (2, 6, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, shape = NETWORKS[name]
    net = scrambled(make())
    x, t = normal(3, *shape), torch.tensor([0.0, 0.4, 1.0])
    v = net(x, t)
    assert v.shape == x.shape
    assert torch.isfinite(v).all()
    assert not torch.equal(v, net(x, t.flip(0)))  # time matters
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert torch.allclose(v, alone, rtol=1e-4, atol=1e-5)  # samples do not mix
    v.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_bfloat16(name):
    make, shape = NETWORKS[name]
    net = scrambled(make())
    x, t = normal(3, *shape), torch.tensor([0.0, 0.4, 1.0])
    expected = net(x, t)
    narrow = net.bfloat16()(x.bfloat16(), t)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - expected).square().mean() < 0.01 * expected.square().mean()


def test_sinusoidal_embedding():
    t = torch.rand(5, generator=torch.Generator().manual_seed(0))
    emb = sinusoidal_embedding(t, 8)
    freqs = torch.tensor([1e4 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    angles = 1000 * t.double()[:, None] * freqs
    assert emb.shape == (5, 8)
    assert torch.allclose(emb.double(), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-4)


def test_closed_form_velocity():
    """Against the posterior mean of the data, written out in float64."""
    data, x = normal(9, 2, 3, seed=1, dtype=torch.float64), normal(5, 2, 3, dtype=torch.float64)
    field = EmpiricalVelocity(data)
    for t in (0.0, 0.3, 0.9, 0.99):
        distance = (x[:, None] - t * data[None]).flatten(2).square().sum(2)
        weights = (-distance / (2 * (1 - t) ** 2)).softmax(1)
        expected = ((weights @ data.flatten(1)).view_as(x) - x) / (1 - t)
        assert torch.allclose(field(x, torch.full((5,), t, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9)
    at_noise = field(x, torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(at_noise, data.mean(0) - x)


def test_closed_form_samples_are_the_data():
    data = digits(50)
    x1 = fk.sample(EmpiricalVelocity(data), normal(8, 1, 8, 8), 100)
    nearest = torch.cdist(x1.flatten(1), data.flatten(1)).min(1).values
    assert nearest.max() < 1e-3


EACH = [[0.2, 1.0], [0.5, 0.3], [0.7, 0.9]]  # widths of each mode and coordinate


def mixture(dtype=torch.float64, stds=(0.1, 0.4, 0.8)) -> GaussianMixtureVelocity:
    """Three modes of different widths and weights in the plane."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=dtype)
    return GaussianMixtureVelocity(means, stds, [1, 3, 2])


@pytest.mark.parametrize(("t", "stds"), [(0.3, [0.1, 0.4, 0.8]), (0.7, EACH), (0.95, [0.1, 0.4, 0.8])])
def test_mixture_velocity_against_monte_carlo(t, stds):
    """E[x_1 - x_0 | x_t = x] by samples of x_1, each weighed by the density of the x_0 that leads to x."""
    field = mixture(stds=stds)
    x1 = field.sample(400_000, torch.Generator().manual_seed(0)).double()
    x = torch.tensor([[0.5, 0.3], [-0.6, 0.9], [0.1, -1.2]], dtype=torch.float64)
    for point, found in zip(x, field(x, torch.full((3,), t, dtype=torch.float64)), strict=True):
        x0 = (point - t * x1) / (1 - t)
        weights = (-x0.square().sum(1) / 2).softmax(0)
        expected = weights @ (x1 - x0)
        spread = ((weights**2) @ (x1 - x0 - expected).square()).sqrt()
        assert ((found - expected).abs() < 5 * spread + 1e-3).all()


@pytest.mark.parametrize("stds", [[0.1, 0.4, 0.8], EACH])
def test_mixture_velocity_carries_its_density(stds):
    """d p / d t + div(p v) = 0, by differences, with p the density of x_t."""
    field, h = mixture(stds=stds), 1e-4

    def density(x, t):
        variance = (1 - t) ** 2 + (t * field.stds.view(3, -1)) ** 2  # of both coordinates, or of each
        off = (x[:, None] - t * field.means).square() / (2 * variance)
        return ((-off.sum(2)).exp() / variance.expand(3, 2).prod(1).sqrt()) @ field.weights  # without the factor 2 pi

    def flux(x, t):
        return density(x, t)[:, None] * field(x, torch.full((len(x),), t, dtype=torch.float64))

    x = normal(64, 2, seed=4, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        change = (density(x, t + h) - density(x, t - h)) / (2 * h)
        step = h * torch.eye(2, dtype=torch.float64)
        divergence = sum((flux(x + e, t) - flux(x - e, t))[:, i] / (2 * h) for i, e in enumerate(step))
        assert (change + divergence).abs().max() < 1e-5 * density(x, t).max()


def test_mixture_of_equal_widths_in_each_coordinate():
    x, t = normal(64, 2, dtype=torch.float64), torch.linspace(0, 1, 64, dtype=torch.float64)
    each = mixture(stds=torch.tensor([[0.1], [0.4], [0.8]], dtype=torch.float64).expand(3, 2))
    assert torch.allclose(each(x, t), mixture()(x, t), rtol=1e-10, atol=1e-12)
    samples = [field.sample(9, torch.Generator().manual_seed(0)) for field in (each, mixture())]
    assert torch.equal(*samples)


def test_mixture_velocity_at_both_ends():
    field, x = mixture(), normal(5, 2, dtype=torch.float64)
    at_noise, at_data = (field(x, torch.full((5,), t, dtype=torch.float64)) for t in (0.0, 1.0))
    assert torch.allclose(at_noise, field.weights @ field.means - x)
    assert torch.allclose(at_data, x)  # x_1 is known, and x_0 is not
    far = mixture(torch.float32)(torch.full((1, 2), 1e3), torch.ones(1))
    assert torch.allclose(far, torch.full((1, 2), 1e3))


def test_mixture_velocity_carries_noise_to_the_mixture():
    field = mixture(torch.float32)
    x = fk.sample(field, normal(16384, 2), 100)
    mode = torch.cdist(x, field.means).argmin(1)
    data = field.sample(20_000, torch.Generator().manual_seed(1))
    share = torch.cdist(data, field.means).argmin(1)
    for m in range(3):
        assert (mode == m).float().mean() == pytest.approx((share == m).float().mean().item(), abs=0.02)
        for moment in (torch.mean, torch.std):
            assert torch.allclose(moment(x[mode == m], 0), moment(data[share == m], 0), atol=0.06)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 1.0), r"means: expected finite means of shape \[m, \*shape\]"),
        ((torch.full((2, 2), torch.nan), 1.0), "means: expected finite means"),
        ((torch.zeros(2, 2), 0.0), "stds: expected 2 positive numbers"),
        ((torch.zeros(2, 2), [1.0, 1.0, 1.0]), "stds: expected 2 positive numbers"),
        ((torch.zeros(2, 3), torch.ones(3, 2)), r"stds: expected 2 positive numbers, .* or \[2, 3\] of them"),
        ((torch.zeros(2, 2), 1.0, [1.0, -1.0]), "weights: expected 2 positive numbers"),
    ],
)
def test_bad_mixtures(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureVelocity(*arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoint_round_trip(tmp_path, name):
    make, shape = NETWORKS[name]
    net, path = scrambled(make()), tmp_path / "net.safetensors"
    save_network(net, path, steps=3)
    again = load_network(path)
    assert type(again) is type(net)
    assert not again.training
    x, t = normal(3, *shape), torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(x, t), again(x, t))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_bundled_digits():
    digits_model = BUNDLED["digits"]
    assert digits_model.shape == (1, 8, 8)
    assert digits_model.path.stat().st_size <= 3_000_000
    net = digits_model.load()
    assert not net.training
    assert all(torch.isfinite(p).all() for p in net.parameters())
    # it has learned what the closed form knows of the same data: where the flow goes
    data, x0 = digits(1797), normal(64, 1, 8, 8)
    for t in (0.1, 0.4, 0.7):
        x = (1 - t) * x0 + t * data[:64]
        times = torch.full((64,), t)
        exact = EmpiricalVelocity(data)(x, times)
        error = (net(x, times) - exact).square().mean() / exact.square().mean()
        assert error < 0.2


def test_missing_checkpoint_is_named():
    with pytest.raises(FileNotFoundError, match=r"model 'none': no checkpoint at .*none\.safetensors"):
        Bundled("none", Path("nowhere/none.safetensors"), (1,)).load()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not one"),
        (lambda path: path.write_bytes(b"not a checkpoint at all"), "is not one"),
        (lambda path: path.write_text(json.dumps({"format": "other"})), "is not one"),
        (lambda path: save_file({"w": torch.ones(2)}, path), "with architecture None"),
        (
            lambda path: save_file({"w": torch.ones(2)}, path, metadata={"architecture": "Linear"}),
            "with architecture 'Linear'",
        ),
        (
            lambda path: save_file({"w": torch.ones(2)}, path, metadata={"architecture": "ResidualMLP"}),
            "does not fit it",
        ),
        (
            lambda path: save_file(
                {"w": torch.ones(2)}, path, metadata={"architecture": "ResidualMLP", "config": json.dumps({"dim": 4})}
            ),
            "does not fit it",
        ),
    ],
    ids=["empty", "text", "json", "no architecture", "another architecture", "no config", "other tensors"],
)
def test_foreign_checkpoint(tmp_path, write, message):
    path = tmp_path / "net.safetensors"
    write(path)
    with pytest.raises(ValueError, match=f"(?s)^path: expected .*{message}"):
        load_network(path)


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(ResidualMLP(4, 8, 1, 8), path)
    whole = path.read_bytes()
    for kept in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"^path: expected a safetensors checkpoint"):
            load_network(path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "net.safetensors"
    net = ResidualMLP(4, 8, 1, 8)
    save_network(net, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_network(net, path, notes_that_json_cannot_hold=object())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


OTHER_NUMBERS = {
    "int64": lambda w: w.long(),
    "bool": lambda w: w.bool(),
    "complex": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "uint8": lambda w: w.to(torch.uint8),
}


def from_file(loader, state, path):
    """What a loader makes of weights in a file, and the weights that it had before."""
    net = ResidualMLP(4, 8, 1, 8)
    if loader == "load_network":
        _weights.write(path, state, architecture="ResidualMLP", config=net.config, notes={})
        return load_network(path)
    path = path.with_suffix(loader)
    if loader == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    inputs.load_checkpoint(net, path)
    return net


LOADERS = ["load_network", ".safetensors", ".pt"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("numbers", OTHER_NUMBERS)
def test_weights_of_other_numbers_are_not_cast(loader, numbers, tmp_path):
    state = ResidualMLP(4, 8, 1, 8).state_dict()
    state["input.weight"] = OTHER_NUMBERS[numbers](state["input.weight"])
    with pytest.raises(
        (ValueError, inputs.InputError), match=r"1 of other numbers \(input.weight torch\..* for torch.float32"
    ):
        from_file(loader, state, tmp_path / "a")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floating_point_weights_are_rounded(loader, dtype, tmp_path):
    state = {k: v.to(dtype) for k, v in ResidualMLP(4, 8, 1, 8).state_dict().items()}
    found = from_file(loader, state, tmp_path / "a").state_dict()
    assert all(torch.equal(found[k], v.float()) for k, v in state.items())


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("input.weight"), r"1 missing \(input.weight\)"),
        (lambda s: s.update(more=torch.ones(2)), r"1 unexpected \(more\)"),
        (
            lambda s: s.update({"input.weight": torch.ones(4, 8)}),
            r"1 mis-shaped \(input.weight \[4, 8\] for \[8, 4\]\)",
        ),
        (lambda s: s.update({"input.weight": torch.ones(32)}), r"1 mis-shaped \(input.weight \[32\] for \[8, 4\]\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(loader, change, message, tmp_path):
    state = ResidualMLP(4, 8, 1, 8).state_dict()
    change(state)
    with pytest.raises((ValueError, inputs.InputError), match=message):
        from_file(loader, state, tmp_path / "a")


def test_a_configuration_of_another_network_is_refused_before_it_is_made(tmp_path):
    net = ResidualMLP(4, 8, 1, 8)
    for config in ({"blocks": 10**9}, {"width": 10**9}, {"width": 2**62}, {"blocks": -1}, {"depth": 2}, {"width": "8"}):
        _weights.write(
            tmp_path / "a", net.state_dict(), architecture="ResidualMLP", config=net.config | config, notes={}
        )
        with pytest.raises(ValueError, match=r"^path: expected a whole checkpoint of ResidualMLP, .* does not fit it"):
            load_network(tmp_path / "a")


def test_bundled_files_have_a_checksum_and_older_ones_a_warning(tmp_path):
    for bundled in BUNDLED.values():
        bundled.load()  # a warning would be an error
    save_file(ResidualMLP(4, 8, 1, 8).state_dict(), tmp_path / "a", {
        "architecture": "ResidualMLP", "config": json.dumps(ResidualMLP(4, 8, 1, 8).config), "notes": "{}"
    })  # fmt: skip
    with pytest.warns(UserWarning, match="a has no sha256") as warned:
        load_network(tmp_path / "a")
    assert [w.filename for w in warned] == [__file__]


def test_no_bit_of_a_checkpoint_can_change(tmp_path):
    path = tmp_path / "a"
    save_network(ResidualMLP(4, 8, 1, 8), path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"^path: expected a"):
            load_network(path)


def test_what_torch_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        found = from_file(".pt", ResidualMLP(4, 8, 1, 8).state_dict(), tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(found, ResidualMLP)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [torch.ones(2)], {1: torch.ones(2)}, {"a": {"b": torch.ones(2)}}, None, 3]
)
def test_a_torch_file_of_something_else_is_named(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(inputs.InputError, match=r"^--checkpoint: expected names and tensors.*a\.pt"):
        inputs.load_checkpoint(ResidualMLP(4, 8, 1, 8), tmp_path / "a.pt")
