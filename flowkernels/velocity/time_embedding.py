"""Time embeddings: networks whose work on the time alone can be done ahead."""

import inspect
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect

Embedding = Any  # a tensor, or a tuple, list or dict of embeddings


class HasTimeEmbedding:
    """A network whose work on the time alone can be done ahead: once a schedule, instead of at every step.

    A network says so by this base class, `class Net(nn.Module, HasTimeEmbedding)`, a method `time_embedding` and a
    forward (of what is no module, a `__call__`) with a parameter `embedding` whose default is None. Of any other
    network a method or an argument of these names means what it likes, and is left alone.

    `net(x, t, embedding=net.time_embedding(t))` is `net(x, t)`. The stages call `time_embedding` with the times of all
    N steps in the network's own convention (behind `time_scale` and `reverse_time` of a `VelocityField`), and pass
    row i of everything that it returns at step i, expanded to the samples of the batch, both halves of a packed call
    included. Expanded rows are views of one: the network must not write to them. Networks whose embedding depends on
    more than the time, such as a label, embed the time here and add the rest in their forward.

    `time_embedding(t)` takes t `[N]` and returns tensors of N rows: one, or a tuple, list or dict of them, nested as it
    likes.
    """


def exposes_time_embedding(velocity) -> bool:
    """Whether a network says that it exposes its time embedding: `HasTimeEmbedding`."""
    method = getattr(velocity, "time_embedding", None) if isinstance(velocity, HasTimeEmbedding) else None
    if not callable(method) or isinstance(method, nn.Module):
        return False
    kind, own = type(velocity), getattr(velocity, "__dict__", ())
    if not isinstance(velocity, nn.Module):
        return takes_embedding(kind.__call__)
    if "forward" in own or "__call__" in own:  # put over the class's
        return False
    passes = kind.__call__ is CALL or takes_embedding(kind.__call__)
    return passes and takes_embedding(kind.forward)


CALL = nn.Module.__call__
_takes = weakref.WeakKeyDictionary()  # function -> whether it takes an embedding


def takes_embedding(function) -> bool:
    """Whether it has a parameter `embedding=None`."""
    if torch.compiler.is_compiling():  # which would compile anew when the answer is there already
        return _looks_for_embedding(function)
    try:
        if function not in _takes:
            _takes[function] = _looks_for_embedding(function)
        return _takes[function]
    except TypeError:  # one that cannot be weakly referenced
        return _looks_for_embedding(function)


def _looks_for_embedding(function) -> bool:
    try:
        call = inspect.signature(function)
        return "embedding" in call.parameters and call.parameters["embedding"].default is None
    except (TypeError, ValueError):  # a callable without a signature
        return False


def rows_of_times(embedding: Embedding, N: int) -> list[Embedding]:
    if isinstance(embedding, Tensor):
        ok = embedding.dim() > 0 and len(embedding) == N
        expect(ok, "time_embedding", f"tensors of {N} rows, one for each time", embedding)
        return embedding.split(1)
    if isinstance(embedding, dict):
        parts = {k: rows_of_times(v, N) for k, v in embedding.items()}
        return [{k: rows[i] for k, rows in parts.items()} for i in range(N)]
    expect(isinstance(embedding, (tuple, list)), "time_embedding", "tensors in tuples or dicts", embedding, TypeError)
    parts = [rows_of_times(v, N) for v in embedding]
    return [tuple(rows[i] for rows in parts) for i in range(N)]


def expand_embedding(embedding: Embedding, n: int) -> Embedding:
    """One row as the rows of n samples, without memory of their own; n rows as they are."""
    if isinstance(embedding, Tensor):
        return embedding if len(embedding) == n else embedding.expand(n, *embedding.shape[1:])
    if isinstance(embedding, dict):
        return {k: expand_embedding(v, n) for k, v in embedding.items()}
    return tuple(expand_embedding(v, n) for v in embedding)


ROWS = 1 << 20  # times that are expanded to the samples at once


def times_of(t: Tensor, n: int, column: bool = False) -> Iterator[Tensor]:
    """The times t `[N]` of a schedule's steps one by one, each `[n]` for n samples, as a column `[n, 1]`, and the
    network's to write to."""
    column_of_times, shape = (t.view(-1, 1, 1), (-1, n, 1)) if column else (t.view(-1, 1), (-1, n))
    if t.shape[0] * n <= ROWS:
        return iter(column_of_times.expand(shape).clone(memory_format=torch.contiguous_format).unbind())
    parts = (p.expand(shape) for p in column_of_times.split(max(1, ROWS // n)))
    return itertools.chain.from_iterable(p.clone(memory_format=torch.contiguous_format).unbind() for p in parts)
