"""What a velocity is: its hash through wrappers and of weights of any kind, and what is made of it knows it again."""

import copy
import warnings

import numpy as np
import pytest
import torch
from _flows import linear_field, normal
from torch import nn

import flowkernels as fk
from flowkernels.velocity.identity import identity, parameter_hash

QUIET = dict(progress=False)
NOISE = normal(16, 4)


class Net(nn.Module):
    """A network with all that a velocity may depend on."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.gain, self.act = scale, torch.sin
        self.register_buffer("shift", torch.zeros(4), persistent=False)
        self.state = {"power": 1.0}
        self.options = {"offsets": [0.0, torch.zeros(4)]}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x, t, y=0.0):
        power, offset = self.state["power"], sum(self.options["offsets"])
        return self.gain * self.act(self.layers(x) + self.shift + offset) * power + y + t[:, None]


def net(**changes):
    torch.manual_seed(0)
    made = Net()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def with_layer(change):
    made = net()
    change(made.layers)
    return made


def calibrated(velocity, **options):
    return fk.calibrate(velocity, NOISE, 8, [2, 3], **QUIET, **options)


def in_place(t):
    with torch.no_grad():
        t.reshape(-1)[0] += 1e-3


def field(**settings):
    given = dict(guidance=2.0, conditioning={"y": torch.ones(1, 1)}, unconditional={"y": torch.zeros(1, 1)})
    return fk.VelocityField(net(), **given | settings)


class Half(fk.VelocityField):
    def forward(self, x, t):
        return super().forward(x, t) / 2


OTHERS = {
    "weights": with_layer(lambda layers: in_place(layers[0].weight)),
    "a module of another class": with_layer(lambda layers: layers.__setitem__(1, nn.ReLU())),
    "a buffer in no state dict": net(shift=torch.ones(4)),
    "extra state": net(state={"power": 2.0}),
    "a number": net(gain=0.6),
    "a function": net(act=torch.cos),
    "a tensor in a container": net(options={"offsets": [0.0, torch.ones(4)]}),
    "dtype": net().double(),
    "sign": fk.VelocityField(net(), sign=-1),
    "an offset of the time": fk.VelocityField(net(), time_offset=1e-3),
    "a subclass": Half(net()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_velocity_is_told_apart(what, tmp_path):
    calibrated(net()).save(tmp_path / "a.json")
    same, other = identity(net()), identity(OTHERS[what])
    assert same == identity(copy.deepcopy(net()))
    assert (same.parameters, same.attributes) != (other.parameters, other.attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cal = fk.Calibration.load(tmp_path / "a.json", net())
    for compare in (lambda: fk.Calibration.load(tmp_path / "a.json", OTHERS[what]), lambda: fits(OTHERS[what], cal)):
        with pytest.warns(UserWarning, match=r"^velocity: expected the model .*(parameters|attributes)"):
            compare()


def fits(velocity, cal):
    return fk.fit_solver(velocity, cal, 2, noise=NOISE.to(next(velocity.parameters()).dtype))


def holding(weight):
    return lambda cond, uncond, t: uncond + weight * (cond - uncond)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(conditioning={"y": torch.full((1, 1), 2.0)}), r"another.*\(conditioning 'y'\)"),
        (dict(unconditional={"y": torch.full((1, 1), 2.0)}), r"another.*\(unconditional 'y'\)"),
        (dict(guidance=3.0), r"another.*\(parameters "),
        (dict(shared=("y",)), r"another.*\(shared \[\], now \['y'\]\)"),
        (dict(conditioning={"y": torch.ones(1, 1), "z": 1}), r"another.*\(conditioning 'z'"),
        (dict(conditioning={"y": object()}), r"another.*\(conditioning 'y' \(unknown\)"),
        (dict(guidance=holding(3.0)), r"another.*guidance \(unknown\)"),
    ],
    ids=["conditioning", "unconditional", "guidance", "shared", "another name", "unknown", "unknown guidance"],
)
def test_conditioning_and_guidance_are_compared(settings, message, tmp_path):
    cal = calibrated(field())
    cal.save(tmp_path / "a.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.Calibration.load(tmp_path / "a.json", field())
    with pytest.warns(UserWarning, match=message):
        fk.Calibration.load(tmp_path / "a.json", field(**settings))
    if callable(settings.get("guidance")):  # of either side
        calibrated(field(**settings)).save(tmp_path / "a.json")
        with pytest.warns(UserWarning, match=message):
            fk.Calibration.load(tmp_path / "a.json", field(**settings))


def wrapped_inside():
    made = net()
    made.layers = torch.compile(made.layers)
    return made


WRAPPED = {
    "compiled": lambda: torch.compile(net()),
    "compiled inside": wrapped_inside,
    "compiled in place": lambda: (made := net()).compile() or made,
    "DataParallel": lambda: nn.DataParallel(net()),
    "average": lambda: torch.optim.swa_utils.AveragedModel(net()),
    "twice": lambda: nn.DataParallel(torch.compile(net())),
    "field": lambda: fk.VelocityField(net()),
    "field of a compiled one": lambda: fk.VelocityField(torch.compile(net())),
    "compiled field": lambda: torch.compile(fk.VelocityField(net())),
    "fused head": lambda: fk.fuse_head(net(act=nn.functional.silu), "layers.2"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_through_wrappers(how):
    expected = identity(net(act=nn.functional.silu) if how == "fused head" else net())
    assert identity(WRAPPED[how]()) == expected


def test_a_sampler_is_its_network():
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 4))
    assert identity(fk.fuse(stack, 3)) == identity(stack)


def quantised(seed, scheme):
    torch.manual_seed(seed)
    weight = torch.randn(4, 4)
    if scheme == "tensor":
        return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    return torch.quantize_per_channel(weight, 0.1 + torch.arange(4.0), torch.zeros(4), 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: {"q": quantised(seed, "tensor")},
        lambda seed: {"q": quantised(seed, "channel")},
        lambda seed: {"q": normal(3, 3, seed=seed).to_sparse()},
        lambda seed: {"q": normal(3, 3, seed=seed).to_sparse_csr()},
        lambda seed: {"q": torch.complex(normal(3, seed=seed), normal(3)).conj()},
        lambda seed: {"q": normal(3, seed=seed).bfloat16()},
    ],
    ids=["per tensor", "per channel", "sparse", "csr", "conjugate", "bfloat16"],
)
def test_weights_of_any_kind(make):
    def of(seed):
        made = nn.Module()
        for name, t in make(seed).items():
            made.register_buffer(name, t)
        return parameter_hash(made)

    assert of(0) == of(0) != of(1)


@pytest.mark.filterwarnings("ignore")
def test_packed_weights():
    def packed(seed):
        torch.manual_seed(seed)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)

    assert parameter_hash(packed(0)) == parameter_hash(packed(0)) != parameter_hash(packed(1))


class NoState(Net):
    def state_dict(self, *args, **kwargs):
        raise RuntimeError("elsewhere")


class Odd(Net):
    def get_extra_state(self):
        return object()


UNREADABLE = {
    "meta": lambda: linear_field().to("meta"),
    "state dict": NoState,
    "extra state": Odd,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_unknown_and_said(what):
    found = identity(UNREADABLE[what]())
    assert found.parameters is None
    assert len(found.unknown["parameters"]) > 10
    assert found.differences(found.provenance()) == [f"parameters unknown: {found.unknown['parameters']}"]
    assert not found.is_proven(found.provenance())


def test_a_calibration_of_weights_that_cannot_be_read(tmp_path):
    cal = calibrated(NoState())
    assert cal.provenance["parameters_sha256"] is None
    assert "elsewhere" in cal.provenance["unknown"]["parameters"]
    cal.save(tmp_path / "a.json")
    with pytest.warns(UserWarning, match="parameters unknown: the state dict could not be read"):
        fk.Calibration.load(tmp_path / "a.json", NoState())


def test_hashes_of_before():
    """Digests that earlier versions have written, of networks of plain tensors."""
    made = nn.Linear(2, 2)
    with torch.no_grad():
        made.weight.copy_(torch.arange(4.0).view(2, 2))
        made.bias.zero_()
    assert parameter_hash(made) == "2bf4c46c9c013598c4481d1a11c677f6c83732ddd024d4445fa9b0c451e42310"
    assert identity(net()).differences({"parameters_sha256": identity(net()).of_state}) == []


def test_what_counts_its_calls_has_no_attributes_to_compare():
    class Counting(Net):
        calls = 0

        def forward(self, x, t):
            self.calls += 1
            return super().forward(x, t)

    made = Counting()
    cal = calibrated(made)
    assert cal.provenance["attributes_sha256"] is None
    assert identity(made).differences(cal.provenance) == []
    assert not identity(made).is_proven(cal.provenance)


def test_provenance_is_json_before_any_evaluation(tmp_path):
    cal = calibrated(net(), seed=np.int64(3))
    cal.save(tmp_path / "a.json")
    assert fk.Calibration.load(tmp_path / "a.json").provenance["seed"] == 3

    def velocity(x, t):
        raise AssertionError("called")

    with pytest.raises(TypeError, match=r"^seed: "):
        fk.calibrate(velocity, NOISE, 8, 2, seed=torch.Generator(), **QUIET)


# ---- facts that are kept ----


def test_the_first_velocity_is_the_students_own():
    """A student starts elsewhere than its teacher does, whatever the calibration keeps."""
    cal = calibrated(net())
    student = net(gain=-0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solvers = [fk.fit_solver(v, cal, 2) for v in (student, lambda x, t: student(x, t))]
    x0, x1 = cal.kept.x[0], cal.kept.x[-1]
    for solver in solvers:
        rest = (fk.sample(student, x0, solver) - x1).square().sum(1)
        assert solver.notes["error"] == pytest.approx(rest.mean().item(), rel=0.1)  # a little more: cross-validated


@pytest.mark.filterwarnings("ignore:verify_noise", "ignore:fit_solver")
@pytest.mark.parametrize("where", ["solvers", "schedules", "both"])
@pytest.mark.parametrize("saved", [False, True])
def test_best_is_what_was_verified(where, saved, tmp_path):
    cal = calibrated(net(), effort="fit", verify_noise=normal(16, 4, seed=1))
    if where != "schedules":
        cal.solvers[2] = fk.Solver.euler(2, model_times=[0.9, 0.1])
    if where != "solvers":
        cal.schedules[2] = fk.Schedule(cal.times[[0, 7, 8]], cal.times, (0, 7, 8))
    if saved:
        cal.save(tmp_path / "a.json")
        cal = fk.Calibration.load(tmp_path / "a.json")
    replaced = {"solvers": {"fitted"}, "schedules": {"bellman"}, "both": {"fitted", "bellman"}}[where]
    choices, errors = cal.choices(2), cal.errors(2)
    assert set(errors) == set(choices) - replaced
    expected = choices[min(errors, key=errors.get)]
    assert type(cal.best(2)) is type(expected)
    assert torch.equal(cal.best(2).times, expected.times)


def test_tables_are_of_the_samples_kept():
    cal = calibrated(net())
    first = cal.norm_cost
    assert cal.norm_cost is first
    cal.kept.v.mul_(2)
    assert torch.allclose(cal.norm_cost[0, 2:], 2 * first[0, 2:])


def test_a_diffusers_model_is_itself_once_it_has_been_saved_and_loaded(tmp_path):
    """Whose lists are tuples then, and whose configuration says where it came from."""
    from diffusers import FluxTransformer2DModel

    sizes = dict(in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=8, num_attention_heads=2)
    sizes |= dict(joint_attention_dim=8, pooled_projection_dim=8)
    net = FluxTransformer2DModel(**sizes, axes_dims_rope=[2, 2, 4]).eval()
    before = identity(net)
    net.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert identity(net) == before == identity(loaded)
    other = FluxTransformer2DModel(**sizes, axes_dims_rope=[4, 2, 2]).eval()
    other.load_state_dict(net.state_dict())
    assert identity(other).attributes != before.attributes
