"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import STATES, Accesses, Call

import flowkernels as fk
from flowkernels.ops.linear_euler import samples

CALLS = {
    "linear_euler": Call(
        lambda x, z, w, b, s, v: fk.linear_euler(
            x,
            z,
            w,
            0.25,
            bias=b,
            norm=1e-3,
            scale=s,
            guidance=2.0,
            history=[v],
            b=[0.5],
            x_scale=-2.0,
            low=torch.bfloat16,
        ),
        ((3, 5), (6, 4), (5, 4), (5,), (6, 4), (3, 5)),
    ),
    "linear_euler_out": Call(
        lambda x, z, w, out, v: fk.linear_euler(x, z, w, 0.25, out=out, velocity_out=v, low=torch.bfloat16),
        ((3, 5), (3, 4), (5, 4), (3, 5), (3, 5)),
        written=(3, 4),
    ),
}


def accesses():
    make, bf16 = samples.make, torch.bfloat16
    # the sums go to the state in its order, which is not theirs, once an output
    exceptions = {"total[o * row": 2.0}
    # two rows of 16 outputs, or two outputs of 16 rows, at once, once a block
    exceptions |= {"sum += partial[(i * M + r) * S::sum_row + o]": 2.0, "total[o * (M + 1) + r] = sum;": 2.0}
    exceptions["total[(o + j) * (M + 1) + r]"] = 2.0
    patches = dict(shape=(1, 4, 8, 16), d=256, patch=2)
    modulated = dict(extra=4, guidance=2.0, options="bias norm scale shift")
    for sample in (
        make(**patches, dtype=bf16, options="bias"),
        make(**patches, dtype=bf16, low=bf16, **modulated),
        make(**patches, dtype=bf16, parameters=torch.float32, options="norm affine", order="cpq"),
        make(**patches, **modulated),
        make((2, 16, 16), 256, (16,), guidance=2.0, options="bias scale shift", terms=1),
        make((1, 32, 64), 256, (32,), dtype=bf16),
        make((1, 32, 64), 256, (32,), options="bias norm"),
        make((1, 64, 64), 512, (64,), dtype=bf16, options="bias norm scale shift"),
        make((1, 64, 32), 256, (64,), options="bias norm scale shift"),
        make((1, 4, 16, 16), 256, patch=2, **modulated),
    ):
        yield Accesses(fk.linear_euler, sample.args, sample.kwargs, exceptions)


def guarded(page) -> None:
    for x_dtype, v_dtype in STATES:
        for n in range(1, 36):
            for norm in (None, 1.0):
                z, weight, rows = (page(torch.ones(2, n, dtype=v_dtype)) for _ in range(3))
                state, low, bias = (page(torch.ones(s, dtype=x_dtype)) for s in ((1, 2), (1, 2), 2))
                head = dict(bias=bias, norm=norm, scale=rows, shift=rows, norm_bias=None if norm is None else rows[1])
                fk.linear_euler(state, z[:1], weight[:, :n], 0.5, bias=bias, out=low)
                assert low.eq(1 + (n + 1) / 2).all()
                z[:, 0] += n  # not constant
                fk.linear_euler(state, z, weight, 0.5, guidance=1.0, out=low, velocity_out=low.clone(), **head)
                assert low.isfinite().all()
