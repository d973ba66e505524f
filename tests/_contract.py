"""What every op's tests share, on the CPU and on a GPU."""

import torch

from flowkernels.ops.mlp_sample import _flat


def op_args(op, sample):
    """The sample's arguments as the registered op takes them."""
    k = sample.kwargs
    if op == "velocity_gram":
        return (*sample.args, k.get("x"), k.get("times"))
    if op == "cost_from_gram":
        return (*sample.args, k["states"])
    if op == "bellman":
        return sample.args
    if op == "euler_step":
        return (*sample.args, k.get("v_uncond"), k.get("guidance", 1.0), k.get("low"))
    if op == "linear_euler":
        x, z, weight, h = sample.args
        names = ("bias", "norm", "norm_weight", "norm_bias", "scale", "shift", "patch")
        step = (k.get("order", "pqc"), k.get("guidance"), h, k.get("history", []), k.get("b", []), k.get("low"))
        return (x, z, weight, *map(k.get, names), *step)
    if op == "linear_update":
        return (*sample.args, k.get("low"))
    if op == "segment_points":
        return (*sample.args, k.get("dtype") or sample.args[0].dtype)
    if op == "mlp_sample":
        x, h, layers = sample.args
        return (
            x,
            h,
            *_flat(layers, k.get("unconditional")),
            k.get("guidance", 1.0),
            k.get("low"),
            k.get("trajectory", False),
        )
    return (*sample.args, k.get("weight"), 0.0 if k["loss"] == "l2" else 0.03, True)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def identical(a, b):
    """Equal bit for bit, NaN included."""
    return all(
        p.dtype == q.dtype
        and p.shape == q.shape
        and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (p, q)))
        for p, q in zip(tensors(a), tensors(b), strict=True)
    )
