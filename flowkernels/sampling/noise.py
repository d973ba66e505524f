"""Noise by the global index of a sample: any process draws any of them, and all agree."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_device, expect_int, expect_list, expect_positive_int, expect_seed

BLOCK = 16  # samples that one generator draws


def noise(
    n: int,
    shape: Sequence[int],
    seed: int,
    *,
    rows: slice | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Standard normal noise `[n, *shape]` whose i-th sample depends on the seed, i and the shape alone.

    Args:
        n: the number of samples.
        shape: of a sample.
        seed: an integer from 0 up.
        rows: of the samples those that are wanted, a slice of steps of 1, such as this process's; None is all of them.
            They are these rows of the whole, bit for bit, and of any larger n too; no others are kept in memory.
        dtype: float32 or float64, in which they are drawn: float32 is float64 rounded.
        device: where they are put; None is the CPU, where they are drawn.

    Returns:
        `[n, *shape]`, or as many as `rows` has.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> whole = fk.noise(100, (2,), seed=0)
        >>> fk.noise(100, (2,), seed=0, rows=slice(40, 60)).equal(whole[40:60])
        True
    """
    n, seed = expect_positive_int(n, "n"), expect_seed(seed)
    expected = "the sizes of a sample, such as (3, 32, 32)"
    shape = [expect_int(size, "shape", expected, 1) for size in expect_list(shape, "shape", expected)]
    expect(dtype in (torch.float32, torch.float64), "dtype", "torch.float32 or torch.float64", dtype)
    device = expect_device(device) or torch.device("cpu")
    known = rows is None or (isinstance(rows, slice) and rows.step in (None, 1))
    expect(known, "rows", "a slice of steps of 1, or None", rows, TypeError)
    start, stop, _ = (rows or slice(None)).indices(n)
    found = torch.empty(max(0, stop - start), *shape, dtype=dtype, device="cpu")
    for block in range(start // BLOCK, -(-stop // BLOCK) if len(found) else 0):
        drawn = torch.randn(BLOCK, *shape, generator=_generator(seed, block), dtype=torch.float64, device="cpu")
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        found[first - start : last - start] = drawn[first - block * BLOCK : last - block * BLOCK]
    return found.to(device)


def _generator(seed: int, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"noise {seed} {block}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
