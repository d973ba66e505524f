"""Where the trajectories of a bank begin: noise or data that is given or drawn, and the conditioning of each."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkernels._checks import (
    expect,
    expect_mapping,
    expect_noise,
    expect_positive_int,
    expect_seed,
    expect_shape,
    expect_shown,
    expect_takes,
    expect_values,
)
from flowkernels.sampling.loop import initial_state
from flowkernels.velocity.hashes import tensors_hash

Noise = Tensor | Sequence[int] | Callable[[int, torch.Generator], Tensor]
Source = Callable[[slice, torch.Generator], Tensor]
Conditioning = Mapping[str, Tensor | tuple[Tensor, Tensor]] | Callable[[int, torch.Generator], Mapping[str, Tensor]]
NOISE = "a tensor, a shape or a function (n, generator)"
DATA = "a tensor or a function (n, generator)"
ROWS = "a dict of tensors with a row for each trajectory, or of pairs (table, index)"


class Layout(NamedTuple):
    """Shape and dtype of a state; bytes of a row of conditioning, and its names."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    row: int = 0
    columns: tuple[str, ...] = ()


def source_of(given, name: str, shapes: bool = True) -> Source:
    """What gives the start states `[m, *shape]` of trajectories: (rows, generator on the CPU) -> those of the rows.

    shapes: a shape is taken too, for standard normal noise.
    """
    if isinstance(given, Tensor):
        expect_noise(given, name)
        return lambda rows, generator: given[rows]
    if callable(given):
        expect_takes(given, name, NOISE if shapes else DATA, 1, None)

        def drawn(rows: slice, generator: torch.Generator) -> Tensor:
            n = rows.stop - rows.start
            x = expect_noise(given(n, generator), f"{name}(n, generator)")
            expect(len(x) == n, name, f"a function that returns n = {n} samples", x)
            return x

        return drawn
    expect_shown(shapes, name, DATA, given, TypeError)
    shape = expect_shape(given, name, NOISE)

    def normal(rows: slice, generator: torch.Generator) -> Tensor:
        return torch.randn(rows.stop - rows.start, *shape, generator=generator, dtype=torch.float32, device="cpu")

    return normal


def source_identity(given) -> str:
    """What tells it from others, in a text; a function's output is not known beforehand."""
    if isinstance(given, Tensor):
        return f"{list(given.shape)} {tensors_hash({'noise': given})[:16]}"
    return "function" if callable(given) else str([int(d) for d in given])


def generator_of(seed: int, ticket: int) -> torch.Generator:
    """That of the ticket-th chunk that is drawn from a seed: whatever was drawn before, so that any can be made
    again."""
    digest = hashlib.sha256(f"{seed} {ticket}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Columns:
    """The conditioning of the trajectories: columns with a row for each, by name.

    given: `ROWS`, or a function (n, generator) -> such a dict of tensors with n rows; None is no conditioning. Of a
        pair the table `[P, ...]` is kept once, and its column is the index, int64 `[size]`.

    tables: by the names of their columns.
    """

    def __init__(self, given: Conditioning | None, size: int):
        self.given, self.size, self.is_function = {} if given is None else given, size, callable(given)
        self.tables: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        if self.is_function:
            expect_takes(given, "conditioning", f"{ROWS}, or a function (n, generator)", 1, None)
            return
        for key, value in expect_mapping(self.given, "conditioning", ROWS).items():
            name = f"conditioning[{key!r}]"
            if isinstance(value, (tuple, list)):
                expect(len(value) == 2, name, "a pair (table, index)", value)
                table, index = expect_values(value[0], name), expect_values(value[1], name, (torch.int64,))
                expect(table.dim() > 0 and len(table) > 0, name, "a table of at least one row", table)
                inside = index.dim() == 1 and bool(((index >= 0) & (index < len(table))).all())
                expect(inside, name, f"an index [{size}] of places in a table of {len(table)} rows", index)
                self.tables[key], value = table.detach(), index
            _expect_rows(value, name, size)
            self._columns[key] = value.detach()

    @property
    def is_any(self) -> bool:
        return self.is_function or len(self._columns) > 0

    @property
    def names(self) -> tuple[str, ...] | None:
        """None of a function's, until it is called."""
        return None if self.is_function else tuple(self._columns)

    def rows(self, rows: slice, generator: torch.Generator) -> dict[str, Tensor]:
        """Those of some trajectories; of a table the index."""
        if not self.is_function:
            return {key: column[rows] for key, column in self._columns.items()}
        n, told = rows.stop - rows.start, "conditioning(n, generator)"
        drawn = expect_mapping(self.given(n, generator), told, "a dict of tensors with n rows")
        for key, value in drawn.items():
            _expect_rows(value, f"{told}[{key!r}]", n)
        return {key: value.detach() for key, value in drawn.items()}

    def identity(self) -> str:
        if self.is_function:
            return "function"
        return tensors_hash({"rows": self._columns, "tables": self.tables})[:16] if self._columns else "none"


def _expect_rows(value: Any, name: str, n: int) -> None:
    expect_values(value, name)
    expect(value.dim() > 0 and len(value) == n, name, f"{n} rows, one for each trajectory", value)


def looked_up(columns: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of conditioning, with those of tables in the place of their index."""
    return {
        key: tables[key].index_select(0, c.to(tables[key].device)) if key in tables else c for key, c in columns.items()
    }


class Starts:
    """Where n trajectories begin: noise, or data that they end in, and their conditioning; arguments as of
    `TrajectoryBank`.

    is_data, is_drawn: whether they are data, and whether there are others to be drawn. is_function: whether that of the
    caller's has to be called to know of what shape they are.
    """

    def __init__(self, noise: Noise | None, data: Noise | None, size: int | None, conditioning, seed: int):
        one = (noise is None) != (data is None)
        expect(one, "noise", "noise, or data in its place", "neither" if noise is None else "both")
        self.given, name = (noise, "noise") if data is None else (data, "data")
        self.is_data, self.is_drawn = data is not None, not isinstance(self.given, Tensor)
        self.source, self.seed = source_of(self.given, name, shapes=not self.is_data), expect_seed(seed)
        there = None if self.is_drawn else len(self.given)
        self.size = expect_positive_int(size, "size") if size is not None else there or 1024
        expect(there in (None, self.size), "size", f"None, or the {there} of {name}", size)
        self.columns = Columns(conditioning, self.size)
        self.is_function = callable(self.given) or self.columns.is_function
        self._layout: Layout | None = None
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None  # of the first draw's rows

    def draw(self, rows: slice, ticket: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The ticket-th draw: states `[m, *shape]` that some trajectories begin with, float32 or float64, and the
        columns of their conditioning."""
        generator = generator_of(self.seed, ticket)
        x = initial_state(self.source(rows, generator)).detach()
        columns = self.columns.rows(rows, generator)
        row = sum(c[:1].numel() * c.element_size() for c in columns.values())
        kinds = {key: (tuple(c.shape[1:]), c.dtype) for key, c in columns.items()}
        if self._layout is None:
            self._layout, self._kinds = Layout(tuple(x.shape[1:]), x.dtype, row, tuple(sorted(columns))), kinds
        shape, dtype, _, names = self._layout
        same = x.shape[1:] == shape and x.dtype == dtype
        expect(same, "data" if self.is_data else "noise", f"samples of shape {list(shape)}, {dtype}", x)
        expect(tuple(sorted(columns)) == names, "conditioning", f"{list(names)}, as at first", f"{sorted(columns)}")
        expect(kinds == self._kinds, "conditioning", f"rows of {self._kinds}, as at first", f"{kinds}")
        return x, columns

    def layout(self, rows: slice) -> Layout:
        """Of them all; a function is called for the first `rows`."""
        if self._layout is None:
            self.draw(rows, 0)
        return self._layout

    def hash(self, x: Tensor, columns: Mapping[str, Tensor]) -> str:
        """Of what was drawn."""
        return tensors_hash({"x": x, **{f"conditioning.{key}": c for key, c in columns.items()}})[:16]

    def identity(self) -> dict[str, Any]:
        """In plain values; of functions only that they are some."""
        begins = {"data" if self.is_data else "noise": source_identity(self.given)}
        return begins | {"seed": self.seed, "conditioning": self.columns.identity()}
