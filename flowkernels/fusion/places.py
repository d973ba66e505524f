"""Where a state's elements come from among the outputs of a network's tokens, as `linear_euler` has it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowkernels.fusion.stand_in import Refused

Selected = slice | Tensor | None  # None: all, as they are


@dataclass(frozen=True)
class Places:
    """The velocity of a sample is `sign` times the outputs `outputs` of its tokens `tokens`.

    tokens: of each call that makes up an evaluation; a tensor is `[T]`, or `[m, T]` where samples differ.
    patch, order: as for `linear_euler`, of the state seen as `[n, *shape]`, a view.
    at: where in the flat state the outputs lie one after the other, if in no patches.
    """

    sign: int
    tokens: tuple[Selected, ...]
    outputs: Tensor | None = None
    patch: int | None = None
    order: str = "pqc"
    shape: tuple[int, ...] | None = None
    at: Tensor | None = None

    @property
    def text(self) -> str:
        kind = "as they come" if self.patch is None else f"in patches of {self.patch} ({self.order})"
        kind = "gathered, which costs a copy of the state" if self.at is not None else kind
        kind += "" if self.outputs is None else ", rows of the weight reordered"
        return kind + ("" if all(t is None for t in self.tokens) else ", of some tokens")

    def of(self, t: Tensor | None) -> Tensor | None:
        """A tensor of the state's shape as `linear_euler` takes it; a view, but for one with `at`."""
        if t is None:
            return None
        if self.at is not None:
            return t.flatten(1)[:, self.at]
        return t if self.shape is None else t.view(len(t), *self.shape)

    def room_in(self, t: Tensor | None) -> Tensor | None:
        """Where `linear_euler` writes what is to be in t."""
        return torch.empty_like(t).flatten(1) if self.at is not None and t is not None else self.of(t)

    def put(self, written: Tensor | None, t: Tensor | None) -> None:
        """What was written to `room_in(t)` into t."""
        if self.at is not None and t is not None:
            t.flatten(1).index_copy_(1, self.at, written)

    def rows_of(self, t: Tensor | None) -> Tensor | None:
        """Of a weight or a bias."""
        return t if t is None or self.outputs is None else t[self.outputs]


def select(z: Tensor, tokens: Selected) -> Tensor:
    """Of tokens `[m, S, d]`."""
    if tokens is None:
        return z
    if isinstance(tokens, slice) or tokens.dim() == 1:
        return z[:, tokens]
    return z[torch.arange(len(z), device=z.device)[:, None], tokens]


def find(calls: Sequence[tuple[Tensor, int]], outputs: int, device: torch.device) -> Places:
    """Of each call of an evaluation the signed places, counted from 1, in its outputs `[m, tokens, outputs]` of a state
    `[m, *shape]`, and how many tokens a sample has there."""
    found = [_find(places, tokens, outputs, device) for places, tokens in calls]
    first = found[0]
    for other in found[1:]:
        if not all(_same(getattr(first, f.name), getattr(other, f.name)) for f in fields(Places) if f.name != "tokens"):
            raise Refused("puts outputs at other places in its second call")
    return replace(first, tokens=tuple(f.tokens[0] for f in found))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def _find(places: Tensor, tokens: int, outputs: int, device: torch.device) -> Places:
    m, shape = len(places), tuple(places.shape[1:])
    flat = places.flatten(1)
    if not bool((flat != 0).all()):
        raise Refused("puts other values beside those of its linear layer")
    sign = 1 if bool((flat > 0).all()) else -1
    if not bool((sign * flat > 0).all()):
        raise Refused("negates a part of the velocity")
    at = sign * flat - 1
    column, row = at % outputs, at // outputs
    if not torch.equal(row // tokens, torch.arange(m, device="cpu")[:, None].expand_as(row)):
        raise Refused("puts a sample's velocity in another's place")
    token = row % tokens
    if not torch.equal(column, column[:1].expand_as(column)):
        raise Refused("orders outputs otherwise in other samples")
    found = _as_they_come(token, column[0], outputs) or _patches(token, column[0], outputs, shape)
    found = found or _gathered(token, column[0], outputs)
    if found is None:
        raise Refused("takes other outputs of some tokens than of others")
    token, more = found
    for name in ("outputs", "at"):
        if name in more:
            more[name] = more[name].to(device)
    return Places(sign, (_selected(token, tokens, device),), **more)


def _as_they_come(token: Tensor, column: Tensor, outputs: int):
    if column.numel() % outputs:
        return None
    token, column = token.unflatten(1, (-1, outputs)), column.unflatten(0, (-1, outputs))
    if not torch.equal(column, torch.arange(outputs, device="cpu").expand_as(column)):
        return None
    return (token[..., 0], {}) if torch.equal(token, token[..., :1].expand_as(token)) else None


def _patches(token: Tensor, column: Tensor, outputs: int, shape: tuple[int, ...]):
    """Square ones of the last two dimensions, those in the middle counted as rows."""
    if len(shape) < 2:
        return None
    C, H, W = shape[0], torch.Size(shape[1:-1]).numel(), shape[-1]
    first = token[0, :W]
    p = int((first != first[0]).nonzero()[0]) if bool((first != first[0]).any()) else W
    if H % p or W % p:
        return None
    token, column = (t.unflatten(-1, (C, H // p, p, W // p, p)) for t in (token, column))
    grid, one = token[:, :1, :, :1, :, :1], column[:, :1, :, :1, :]
    if not (torch.equal(token, grid.expand_as(token)) and torch.equal(column, one.expand_as(column))):
        return None
    one, of_all = one[:, 0, :, 0, :], outputs // p**2  # [C, p, p], channels of a token
    more = dict(patch=p, shape=None if len(shape) == 3 else (C, H, W))
    c, i, j = torch.meshgrid(*(torch.arange(k, device="cpu") for k in one.shape), indexing="ij")
    known = {"pqc": (i * p + j) * of_all + c, "cpq": (c * p + i) * p + j}
    order = next((o for o, at in known.items() if outputs == of_all * p**2 and torch.equal(at, one)), None)
    more |= dict(outputs=one.permute(1, 2, 0).flatten()) if order is None else dict(order=order)
    return grid.flatten(1), more


def _gathered(token: Tensor, column: Tensor, outputs: int):
    """The same outputs of all tokens, wherever they are."""
    at = (token[0] * outputs + column).argsort(stable=True)
    each = int((token[0] == token[0, 0]).sum())
    token, column = token[:, at].unflatten(1, (-1, each)), column[at].unflatten(0, (-1, each))
    if not (torch.equal(token, token[..., :1].expand_as(token)) and torch.equal(column, column[:1].expand_as(column))):
        return None
    whole = torch.equal(column[0], torch.arange(outputs, device="cpu"))
    return token[..., 0], dict(at=at) | ({} if whole else dict(outputs=column[0]))


def _selected(token: Tensor, tokens: int, device: torch.device) -> Selected:
    first = token[0]
    if not torch.equal(token, first.expand_as(token)):
        return token.to(device)
    start = int(first[0])
    if not torch.equal(first, torch.arange(start, start + len(first), device="cpu")):
        return first.to(device)
    return None if len(first) == tokens else slice(start, start + len(first))
