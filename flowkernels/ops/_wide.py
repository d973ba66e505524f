"""Numbers with twice the digits of float64, in which the truth of an op in float64 is computed.

A `Wide` is the sum of two tensors, `hi + lo`, the second at most half an ulp of the first. Its arithmetic is good to
about 2^-80 of the terms on every device and whatever the BLAS: sums and products of two are Dekker's and Knuth's, those
of matrices are made of products that float64 holds exactly. It has what the references ask of a tensor; what moves
elements (indexing, reshaping) is done to both halves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_MOVES = {"expand", "flatten", "flip", "permute", "reshape", "unflatten", "view"}
_SLICES, _BITS, _LENGTH = 4, 20, 4096  # sums of 2^12 products of 20-bit numbers are exact in any order


def _sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    def halves(t):
        big = 134217729.0 * t  # 2^27 + 1
        hi = big - (big - t)
        return hi, t - hi

    p, (a1, a2), (b1, b2) = a * b, halves(a), halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


class Wide:
    dtype, requires_grad = torch.float64, False

    def __init__(self, hi: Tensor, lo: Tensor | None = None):
        self.hi, self.lo = (hi, torch.zeros_like(hi)) if lo is None else _sum(hi, lo)

    @staticmethod
    def of(value: Wide | Tensor | float) -> Wide:
        if isinstance(value, Wide):
            return value
        return Wide(torch.as_tensor(value, dtype=torch.float64))

    def both(self, move: Callable[[Tensor], Tensor]) -> Wide:
        moved = object.__new__(Wide)
        moved.hi, moved.lo = move(self.hi), move(self.lo)
        return moved

    def __getattr__(self, name: str):
        if name in ("shape", "device", "dim", "numel"):
            return getattr(self.hi, name)
        if name in _MOVES:
            return lambda *args: self.both(lambda t: getattr(t, name)(*args))
        raise AttributeError(f"a Wide has no {name}")

    @property
    def T(self) -> Wide:
        return self.both(lambda t: t.T)

    def chunk(self, chunks: int) -> tuple[Wide, ...]:
        return tuple(Wide(*halves) for halves in zip(self.hi.chunk(chunks), self.lo.chunk(chunks), strict=True))

    def to(self, other) -> Wide:
        """To a device. Of dtypes there is this one."""
        return self if isinstance(other, torch.dtype) else self.both(lambda t: t.to(other))

    def double(self) -> Wide:
        return self

    def new_zeros(self, *size: int) -> Wide:
        return Wide(self.hi.new_zeros(*size))

    def new_ones(self, *size: int) -> Wide:
        return Wide(self.hi.new_ones(*size))

    def __len__(self) -> int:
        return len(self.hi)

    def __getitem__(self, index) -> Wide:
        return self.both(lambda t: t[index])

    def __neg__(self) -> Wide:
        return self.both(torch.neg)

    def __add__(self, other) -> Wide:
        other = Wide.of(other).to(self.device)
        (s, e), (t, f) = _sum(self.hi, other.hi), _sum(self.lo, other.lo)
        s, e = _sum(s, e + t)
        return Wide(s, e + f)

    def __sub__(self, other) -> Wide:
        return self + -Wide.of(other)

    def __rsub__(self, other) -> Wide:
        return -self + other

    def __mul__(self, other) -> Wide:
        other = Wide.of(other).to(self.device)
        p, e = _product(self.hi, other.hi)
        return Wide(p, e + (self.hi * other.lo + self.lo * other.hi))

    def __truediv__(self, other) -> Wide:
        other = Wide.of(other).to(self.device)
        q = self.hi / other.hi
        return Wide(q, (self - other * q).hi / other.hi)

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> Wide:
        return self * self

    def sqrt(self) -> Wide:
        root = self.hi.sqrt()
        return Wide(root, torch.where(root > 0, (self - Wide(root) * root).hi / (2 * root), 0.0))

    def abs(self) -> Wide:
        return self.both(lambda t: torch.where(self.hi < 0, -t, t))

    def diff(self, dim: int = -1) -> Wide:
        last, first = (self.both(lambda t, i=i: t.narrow(dim, i, t.shape[dim] - 1)) for i in (1, 0))
        return last - first

    def sum(self, dim: int = -1, keepdim: bool = False) -> Wide:
        terms = self.both(lambda t: t.movedim(dim, 0))
        if not len(terms):
            terms = terms.both(lambda t: t.new_zeros(1, *t.shape[1:]))
        while len(terms) > 1:
            half = len(terms) // 2
            terms = torch.cat([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
        return terms.both(lambda t: t.movedim(0, dim)) if keepdim else terms[0]

    def mean(self, dim: int = -1, keepdim: bool = False) -> Wide:
        return self.sum(dim, keepdim) / self.shape[dim]

    def index_add(self, dim: int, index: Tensor, source: Wide) -> Wide:
        return torch.stack([self[i] + source[index == i].sum(dim) for i in range(len(self))])

    def _slices(self, dim: int) -> list[Tensor]:
        """Numbers of 20 bits that add up to this one, but for 2^-80 of the largest along `dim`."""
        largest = self.hi.abs().amax(dim, keepdim=True)
        unit, rest, found = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent), self, []
        for _ in range(_SLICES):
            unit = unit * 2.0**-_BITS
            found.append((rest.hi / unit).round() * unit)
            rest = Wide(rest.hi - found[-1], rest.lo)
        return found

    def __matmul__(self, other: Wide) -> Wide:
        """Ozaki's scheme."""
        total = Wide(self.hi.new_zeros(()))
        for first in range(0, max(1, self.shape[-1]), _LENGTH):
            columns = slice(first, first + _LENGTH)
            left, right = self[..., columns], other[..., columns, :]
            if not self.numel() or not other.numel():
                return Wide(left.hi @ right.hi)
            left, right = left._slices(-1), right._slices(-2)
            for i in reversed(range(_SLICES)):
                for j in reversed(range(_SLICES - i)):
                    total = total + Wide(left[i] @ right[j])
        return total

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def _joined(join: Callable) -> Callable:
    return lambda tensors, *dim: Wide(*(join([getattr(Wide.of(t), h) for t in tensors], *dim) for h in ("hi", "lo")))


def _linear(f: Wide, weight: Wide, bias: Wide | None = None) -> Wide:
    v = f @ weight.T
    return v if bias is None else v + bias


def _layer_norm(f: Wide, shape, weight: Wide | None = None, bias: Wide | None = None, eps: float = 1e-5) -> Wide:
    f = f - f.mean(keepdim=True)
    f = f / (f.square().mean(keepdim=True) + eps).sqrt()
    f = f if weight is None else f * weight
    return f if bias is None else f + bias


_FUNCTIONS = {
    torch.cat: _joined(torch.cat),
    torch.stack: _joined(torch.stack),
    torch.ones_like: lambda t: Wide(torch.ones_like(t.hi)),
    F.linear: _linear,
    F.layer_norm: _layer_norm,
}
