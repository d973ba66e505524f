"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import Accesses, Call

import flowkernels as fk
from flowkernels.ops.mlp_sample import Layer, Source, samples

CALLS = {
    "mlp_sample": Call(
        lambda x, weight, shift: fk.mlp_sample(
            x, [0.25], [Layer("linear", Source(0, 0, 5), 5, weight, shift=shift[None])], trajectory=True
        ),
        ((3, 5), (5, 5), (3, 5)),
    ),
}


def accesses():
    network, bf16 = samples.Network, torch.bfloat16
    # Neighbouring outputs of a thread are stored one by one, once for all inputs: nvcc splits wider stores, whose
    # alignment it cannot know.
    sums = {"pitch + l.out + c + o + i] = sum[r][i]": 4.0}
    for width, low in ((64, None), (128, None), (64, bf16), (192, bf16)):  # the wider ones are streamed
        for n in (1, 8, 80):
            net = network(64, n, 2).add(width, activation="silu").add(width, activation="silu").add(map="layer_norm")
            sample = net.head().sample("", weights=low)
            yield Accesses(fk.mlp_sample, sample.args, sample.kwargs, sums)
    # a warp takes several rows of fewer than 32 values, which begin 4 or 20 banks after one another
    narrow = dict.fromkeys(("row[a.velocity]", "row[0]", "rows[at.r * a.pitch", "row[k.out + to.c]"), 2.0)
    sample = network(8, 40, 2).add(64).head().sample("")
    yield Accesses(fk.mlp_sample, sample.args, sample.kwargs, sums | narrow)
    for n in (8, 80):
        sample = network(64, n, 3).add(64).head().sample("", solver=samples.dense)
        yield Accesses(fk.mlp_sample, sample.args, sample.kwargs, sums)


def guarded(page) -> None:
    for n in range(1, 36):
        for low in (None, torch.bfloat16):
            x, weight, scale, shift = (page(torch.ones(shape)) for shape in ((n, n), (n, n), (1, 1, n), (2, n, n)))
            layer = Layer("linear", Source(0, 0, n), n, weight, scale=scale, shift=shift, activation="relu")
            assert fk.mlp_sample(x, [1.0, 0.5], [layer], weights=low).eq(2 + n + 0.5 + n * (2 + n) / 2).all()
