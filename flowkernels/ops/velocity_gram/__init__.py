"""Gram matrix of velocity increments, from which every step cost follows."""

import torch
from torch import Tensor

from flowkernels._checks import FLOATS, expect, expect_tensor, expect_times
from flowkernels.ops.library import DTYPE_CODES, direct, plain, register
from flowkernels.ops.velocity_gram import reference


def velocity_gram(v: Tensor, *, x: Tensor | None = None, times: Tensor | None = None) -> Tensor:
    """Gram matrix of the increments of K velocities, summed over samples and features.

    With `a_m = v_m - v_{m-1}`, m = 1..K-1, entry [m-1, m'-1] is `sum <a_m, a_m'>`. One pass over `v`; the increments
    are never materialised. Differences of neighbouring velocities keep what a Gram matrix of raw velocities cancels.

    Args:
        v: velocities `[K, n, *shape]` (any dimensions after the first), float32, float64, bfloat16 or float16, K >= 1.
            A layout whose trailing dimensions are dense in any order is read in place; any other is copied first.
        x: states `[K+1, n, *shape]` where they are not Euler steps of `v` (a Heun teacher, a recorded pipeline).
            float32, or float64 if either is. Then the secants `u_i = (x_{i+1} - x_i) / h_i` take the place of `v` in
            the increments, and rows `e_j = u_j - v_j` follow.
        times: the K+1 knots, needed with `x` only.

    Returns:
        float64 `[K-1, K-1]`, or `[2K-1, 2K-1]` with `x`, on v's device. NaN and Inf in `v` show in the rows they touch.
        Not differentiable: the result needs no gradient whatever `v` does.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    On CUDA, without `x`, increments of float32 and shorter velocities are multiplied on tensor cores, each split into
    two float16 parts with a scale of its row's own; the sums keep to 1e-5 of |a_i| |a_j|. In Triton each is split into
    two of tf32, rows with `x` too; on AMD GPUs none is. The same bits in every run.

    Source: the step cost of BOSS (arXiv 2312.16414, section 3), rewritten in increments; docs/mathematics.md.

    Examples:
        >>> v = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])  # three fine steps of one sample: increments 1 and 2
        >>> fk.velocity_gram(v)
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    if x is times is None and (C := plain("velocity_gram", v)) is not None and v.dim() > 1 and v.shape[0] > 1:
        gram = _fake(v, None, None)
        if C.velocity_gram_plain(v, gram, torch.get_num_threads()):
            return gram
    expect_tensor(v, "v", FLOATS)
    expect(v.dim() >= 2 and v.shape[0] >= 1, "v", "shape [K, n, *shape] with K >= 1", v)
    if x is None:
        expect(times is None, "times", "None without x", times)
        return _dispatch(v.detach(), None, None)
    expect_tensor(x, "x", FLOATS)
    wanted = [v.shape[0] + 1, *v.shape[1:]]
    expect(list(x.shape) == wanted, "x", f"shape {wanted} (one state more than velocities)", x)
    expect(x.device == v.device, "x", f"a tensor on v's device {v.device}", x)
    expect(times is not None, "times", "the K+1 knots, with x", "None")
    t = expect_times(times, "times")
    expect(len(t) == len(x), "times", f"{len(x)} knots, one for each state", f"{len(t)}")
    wide = torch.float64 in (v.dtype, x.dtype)
    x = x.to(torch.float64 if wide else torch.float32)
    return _dispatch((v.double() if wide else v).detach(), x.detach(), t)


def _dispatch(v: Tensor, x: Tensor | None, times: Tensor | None) -> Tensor:
    if (way := direct("velocity_gram", v, x, host=times)) is not None:
        return _kernel(way[0], v, x, times, *way[1])
    return torch.ops.flowkernels.velocity_gram(v, x, times)


def _rows(t: Tensor, order: list[int]) -> Tensor:
    """`[K, *]` as `[K, M]` with unit stride in M, in place where the layout allows it."""
    flat = t.permute(0, *order).reshape(t.shape[0], -1)
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def _as_rows(v: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None, int, int, int, int]:
    """v and x with unit stride in their columns; K, M and the strides of their rows."""
    if v.is_contiguous() and (x is None or x.is_contiguous()):
        K, states = v.shape[0], x
        M = v.numel() // K
        v_stride = x_stride = M
    else:  # columns may come in any order, as long as every row has the same
        order = sorted(range(1, v.dim()), key=lambda d: -v.stride(d))
        v, states = _rows(v, order), None if x is None else _rows(x, order)
        (K, M), v_stride = v.shape, v.stride(0)
        x_stride = 0 if x is None else states.stride(0)
    return v, states, K, M, v_stride, x_stride


def _kernel(C, v: Tensor, x: Tensor | None, times: Tensor | None, *where) -> Tensor:
    if times is not None and not times.is_cpu:
        expect(False, "times", "a tensor on the CPU, which reads it", times)
    v, states, K, M, v_stride, x_stride = _as_rows(v, x)
    gram = _fake(v, x, times)
    if gram.numel() == 0 or M == 0:
        return gram.zero_()
    read = v.data_ptr(), DTYPE_CODES[v.dtype], K, M, v_stride
    read += (0, 0, 0) if x is None else (states.data_ptr(), x_stride, times.data_ptr())
    if not where:
        C.velocity_gram(*read, gram.data_ptr(), torch.get_num_threads())
        return gram
    workspace = v.new_empty(C.velocity_gram_workspace(read, where[0]), dtype=torch.uint8)
    C.velocity_gram(read, gram.data_ptr(), workspace.data_ptr(), *where)
    return gram


def _fake(v: Tensor, x: Tensor | None, times: Tensor | None) -> Tensor:
    size = v.shape[0] - 1 if x is None else 2 * v.shape[0] - 1
    return v.new_empty(size, size, dtype=torch.float64)


register("velocity_gram(Tensor v, Tensor? x, Tensor? times) -> Tensor", _kernel, reference.velocity_gram, _fake,
         host=("times",))  # fmt: skip
