"""Values that a network reads otherwise than by operations on tensors are refused with the place, never baked in; and
samplers are copied."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from test_fuse import By, noise, randomised
from torch import nn

import flowkernels as fk

TABLE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def as_index(c):
    return TABLE.numpy()[c.long().view(-1).abs() % 50].sum()


def by_branches(c):
    total = 0.0
    while bool((c.sum() > total).item()):
        total += 1.0
    return total


READS = {
    "tolist": lambda c: c.tolist()[0],
    "tolist of a part": lambda c: c[0].tolist(),
    "numpy": lambda c: float(c.numpy()[0]),
    "numpy, forced": lambda c: float(c.numpy(force=True)[0]),
    "from_numpy": lambda c: torch.from_numpy(c.numpy())[0],
    "detach and numpy": lambda c: float(c.detach().cpu().numpy().max()),
    "np.asarray": lambda c: float(np.asarray(c)[0]),
    "np.array": lambda c: float(np.array(c).sum()),
    "ufunc": lambda c: float(np.sin(c)[0]),
    "item": lambda c: c[0].item(),
    "float": lambda c: float(c[0]),
    "int": lambda c: int(c[0]),
    "complex": lambda c: abs(complex(c[0])),
    "bool": lambda c: 2.0 if c[0] > 0 else 1.0,
    "index": lambda c: TABLE.tolist()[c.long()[0].abs() % 50][0],
    "index of a list": lambda c: [1.0, 2.0][c.long()[0].abs() % 2],
    "range": lambda c: float(len(range(c.long()[0].abs()))),
    "slice": lambda c: TABLE[: c.long()[0].abs() + 1].sum(),
    "numpy's index": as_index,
    "torch.tensor of a list": lambda c: torch.tensor(c.tolist()).sum(),
    "torch.tensor": lambda c: torch.tensor(c)[0],
    "torch.as_tensor of numpy": lambda c: torch.as_tensor(c.numpy())[0],
    "torch.Tensor of a list": lambda c: torch.Tensor([float(v) for v in c]).sum(),
    "iteration": lambda c: sum(float(v) for v in c),
    "pointer": lambda c: float(c.data_ptr() % 7),
    "storage": lambda c: c.untyped_storage()[0],
    "typed storage": lambda c: c.storage()[0],
    "data and storage": lambda c: c.data.untyped_storage()[0],
    "data and numpy": lambda c: float(c.data.numpy()[0]),
    "format": lambda c: float(f"{c[0]:.3f}"),
    "f-string": lambda c: float(len(f"{c}")),
    "str": lambda c: float(len(str(c))),
    "repr": lambda c: float(len(repr(c))),
    "equal": lambda c: 2.0 if torch.equal(c, torch.zeros_like(c)) else 1.0,
    "allclose": lambda c: 2.0 if torch.allclose(c, torch.zeros_like(c)) else 1.0,
    "in": lambda c: 2.0 if 1.0 in c else 1.0,
    "nonzero": lambda c: float(len(c.nonzero())),
    "mask": lambda c: c[c > 0].sum(),
    "unique": lambda c: float(len(c.unique())),
    "while": by_branches,
    "dlpack": lambda c: torch.from_dlpack(c)[0],
    "dlpack of numpy": lambda c: float(np.from_dlpack(c)[0]),
    "pickle": lambda c: float(pickle.dumps(c)[-20]),
    "deepcopy": lambda c: copy.deepcopy(c)[0],
    "save": lambda c: float(_saved(c)),
    "bincount": lambda c: float(len(torch.bincount(c.long().abs()))),
    "apply_": lambda c: c.clone().apply_(lambda v: v + 1)[0],
    "map_": lambda c: c.clone().map_(c, lambda a, b: a + b)[0],
    "max as a number": lambda c: max(c.tolist()),
    "sorted": lambda c: sorted(c)[0],
    "is_nonzero": lambda c: 2.0 if torch.is_nonzero(c[0]) else 1.0,
    "assert": lambda c: _asserted(c),
    "one_hot": lambda c: nn.functional.one_hot(c.long().abs())[0, 0],
    "hash of the bytes": lambda c: float(hash(c.numpy().tobytes()) % 7),
    "view as bytes": lambda c: float(bytes(c.contiguous().view(torch.uint8).numpy())[0]),
    "__array__": lambda c: float(c.__array__()[0]),
    "share_memory": lambda c: float(c.clone().share_memory_().numpy()[0]),
    "random": lambda c: torch.rand(1),
    "randn_like": lambda c: torch.randn_like(c)[0],
    "dropout": lambda c: nn.functional.dropout(c, 0.5)[0],
    "bernoulli": lambda c: torch.bernoulli(c.abs().clamp(0, 1))[0],
    "multinomial": lambda c: torch.multinomial(c.abs() + 1, 1)[0],
    "randperm": lambda c: float(torch.randperm(5)[0]),
    "normal_": lambda c: torch.empty(1).normal_(),
}


def _saved(c):
    file = io.BytesIO()
    torch.save(c, file)
    return len(file.getvalue()) % 7 + file.getvalue().count(b"\x00") % 5


def _asserted(c):
    assert c[0] < 100
    return 1.0


OF = {
    "conditioning": lambda x, t, c: c[:, 0],
    "time": lambda x, t, c: t,
    "state": lambda x, t, c: x[:, 0],
    "a view": lambda x, t, c: c.t()[1],
    "an operation": lambda x, t, c: (c * 2).sum(1),
}


CASES = [(name, of) for i, name in enumerate(READS) for j, of in enumerate(OF) if j < 2 or (i + j) % 3 == 0]


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(("name", "of"), CASES)
def test_read(name, of):
    read, part = READS[name], OF[of]
    net = By(lambda linear, x, t, c: linear(x) * read(part(x, t, c)))
    field = fk.VelocityField(randomised(net), conditioning={"c": noise(5, 3)})
    with pytest.raises(fk.NotFusable, match="By"):
        fk.fuse(field, 2, shape=(6,))


class Holder(nn.Module):
    """A policy that holds its sampler."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.sampler = fk.fuse(fk.VelocityField(net, conditioning={"c": noise(4, 6)}), 3, shape=(6,))

    def forward(self, x):
        return self.sampler(x)


def added(linear, x, t, c):
    return torch.tanh(linear(x)) + c * t[:, None]


def reloaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": reloaded,
    "EMA": lambda thing: torch.optim.swa_utils.AveragedModel(thing).module if isinstance(thing, Holder) else thing,
}


@pytest.mark.parametrize("held", [False, True], ids=["sampler", "module"])
@pytest.mark.parametrize("name", COPIES)
def test_copy(name, held):
    """A copy is of its own network, which it records at its first call."""
    holder, x = Holder(randomised(By(added))), noise(4, 6)
    holder.sampler.on(5)(x)
    expected = holder(x)
    made = COPIES[name](holder if held else holder.sampler)
    sampler = made.sampler if held else made
    assert torch.equal(sampler(x), expected)
    if held and name != "copy":
        assert sampler.velocity.net is made.net
    with torch.no_grad():
        sampler.velocity.net.linear.weight.mul_(2)
    torch.testing.assert_close(sampler(x), fk.sample(sampler.velocity, x, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampler.on(5)(x), fk.sample(sampler.velocity, x, 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(holder(x), fk.sample(holder.sampler.velocity, x, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [97, 101, 194, 211])
def test_numbers_in_the_path_of_time(number):
    """The samples of the recording are told from any number that the network deals with."""
    net = By(lambda linear, x, t: linear(x) * torch.sin(t * number)[:, None] + t[:, None].expand(-1, number)[:, :6])
    net.linear.table = nn.Embedding(number, 6)
    x = noise(3, 6)
    torch.testing.assert_close(fk.fuse(randomised(net), 3, shape=(6,))(x), fk.sample(net, x, 3), rtol=1e-4, atol=1e-5)


def test_recording_leaves_no_hook_for_other_threads():
    """Hooks of all modules would run in every thread, and stand in what another sampler watches."""
    hooks, seen = nn.modules.module, []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, t):
            seen.append((*hooks._global_forward_hooks, *hooks._global_forward_pre_hooks, *self.linear._forward_hooks))
            return self.linear(x)

    fk.fuse(Looks().eval(), 2, shape=(4,))
    assert seen
    assert not any(seen)


def test_rows_of_some_samples_are_not_those_of_all():
    """What one sample gives to the others is not to be had of rows by themselves."""

    def shifted(rows):
        return fk.fuse(randomised(By(lambda linear, x, t: (h := linear(x)) + h[rows])), 2, shape=(6,))

    shifted(slice(None))
    for rows in (slice(1), slice(1, 2), slice(-1, None)):
        with pytest.raises(fk.NotFusable):
            shifted(rows)
