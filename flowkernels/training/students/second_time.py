"""A network of one time that is told a second one as well: by what is added to its time embedding."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import describe, expect, expect_positive_int, expect_text, one_of
from flowkernels.models.networks import sinusoidal_embedding
from flowkernels.velocity.hashes import unwrapped

# what networks call the module that embeds the time: those here, of diffusers, of guided-diffusion, of DiT and SiT
KNOWN = ("time", "time_text_embed", "time_embedding", "time_embed", "t_embedder", "time_guidance_embed")
FREQUENCIES, FASTEST = 32, 16.0  # cosines and sines of step sizes, and the angle of the fastest at a step of all


class StepEmbedding(nn.Module):
    """Sizes of steps `[n]`, 0..1 -> features `[n, width]`: sinusoids and a two-layer MLP, whose last layer is zero at
    first. Its frequencies are low: the network is differentiated in the time, and steps are compared with their parts.
    """

    def __init__(self, width: int, like: Tensor | None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same for all, and the caller's generator as it was
            torch.default_generator.manual_seed(0)
            where = dict(device="cpu", dtype=torch.float32)
            first, last = nn.Linear(2 * FREQUENCIES, width, **where), nn.Linear(width, width, **where)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        if like is not None:  # the weights beside it
            self.mlp.to(like.device, like.dtype)

    def forward(self, step: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(step, 2 * FREQUENCIES, FASTEST).to(self.mlp[0].weight.dtype))


class TwoTimes(nn.Module):
    """`net(..., step=)`: a network of one time with what `StepEmbedding` makes of the step's size added to its time
    embedding. At first that is zero: for any step it answers as the network that it is made of.

    time_embedding: the name of the submodule, such as "time_text_embed", that returns features of the time
    `[n, ..., width]`. width: of these features; None takes that of its last linear layer. scale: what a step of the
    whole interval is.
    """

    def __init__(self, net: nn.Module, time_embedding: str | None = None, width: int | None = None, scale: float = 1.0):
        super().__init__()
        name, place = _place(net, time_embedding)
        layers = [part for part in place.modules() if isinstance(part, nn.Linear)]
        if width is None:
            expected = f"the features of {name!r}, which has no linear layer to tell"
            expect(bool(layers), "width", expected, "None")
            width = layers[-1].out_features
        like = next((p for p in (*place.parameters(), *net.parameters()) if p.is_floating_point()), None)
        self.net, self.time_embedding, self.scale = net, name, scale
        self.embedding = StepEmbedding(expect_positive_int(width, "width"), like)
        self._added: dict[int, list[Any]] = {}  # by thread: of the call that it is in, and whether it was taken
        place.register_forward_hook(self._add)

    def forward(self, *args, step: Tensor, **kwargs):
        key = _thread()
        self._added[key] = added = [self.embedding(step / self.scale), False]
        try:
            out = self.net(*args, **kwargs)
        finally:
            del self._added[key]
        expected = "a submodule that the network calls for the time"
        expect(added[1], "time_embedding", expected, f"{self.time_embedding!r}, which was not called")
        return out

    def is_of(self, state: Mapping[str, Any]) -> bool:
        """Whether a state dict has its own weights, beside those of the network that it is made of."""
        return any(str(key).endswith("embedding.mlp.2.bias") for key in state)

    def _add(self, place: nn.Module, args: tuple, features: Any) -> Tensor:
        added = self._added.get(_thread())
        if added is None:
            text = "a call of the two-time network, in which"
            expect(False, self.time_embedding, f"{text} the step is known", "one from elsewhere (checkpointed?)")
        extra, added[1] = added[0], True
        fits = isinstance(features, Tensor) and features.dim() > 1
        fits = fits and features.shape[:: features.dim() - 1] == extra.shape
        if not fits:
            got = f"{self.time_embedding!r}, which returns {describe(features)}"
            expected = f"a submodule that returns features of shape {list(extra.shape)}"
            expect(False, "time_embedding", expected, got)
        return features + extra.view(len(extra), *[1] * (features.dim() - 2), -1).to(features.dtype)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _place(net: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The submodule that embeds the time, and its name in the network, wrappers aside."""
    expect(isinstance(net, nn.Module), "velocity", "a network that is a module", net, TypeError)
    inner = unwrapped(net)
    known = dict(inner.named_modules())
    if name is None:
        found = [each for each in KNOWN if each in known]
        own = "or AverageVelocity around a net(x, t, s) of your own"
        expected = f"the name of the submodule that embeds the time (none of {one_of(KNOWN)} is there; {own})"
        expect(len(found) > 0, "time_embedding", expected, f"None for a {type(inner).__name__}")
        name = found[0]
    expect_text(name, "time_embedding", "the name of a submodule, or None")
    expect(name in known and name != "", "time_embedding", f"a submodule of {type(inner).__name__}", repr(name))
    return name, known[name]
