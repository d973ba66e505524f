"""Velocity networks that ship with the package: real, small flow models to calibrate and to test on.

`digits` (a residual MLP on 8x8 images) and `fashion` (a UNet on 28x28 images) have checkpoints; `DiT` is there to be
trained. All three expose their time embedding (`fk.HasTimeEmbedding`).
All follow the library's convention: `net(x, t)` with x `[n, *shape]`, t `[n]`, t = 0 noise, t = 1 data.
"""

import math

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowkernels._checks import expect, expect_int, expect_number, expect_room, expect_shape, expect_tensor
from flowkernels.velocity.time_embedding import HasTimeEmbedding


def _expect_sizes(least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        expect_int(size, name, f"an integer of at least {least}", least, MOST)


def sinusoidal_embedding(t: Tensor, dim: int, scale: float = 1000.0) -> Tensor:
    """cos and sin of t at `dim // 2` frequencies from 1 to 1e-4, `[n] -> [n, dim]`."""
    expect_tensor(t, "t")
    expect(t.dim() == 1, "t", "times of shape [n]", t)
    _expect_sizes(2, dim=dim)
    scale = expect_number(scale, "scale")
    freqs = torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, device=t.device, dtype=torch.float32))
    angles = (scale * t.float())[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t `[n]` -> features `[n, width]`: sinusoids and a two-layer MLP."""

    def __init__(self, frequencies: int, width: int):
        super().__init__()
        _expect_sizes(2, frequencies=frequencies), _expect_sizes(width=width)
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(t, self.frequencies).to(self.mlp[0].weight.dtype))


def _scale_and_shift(layer: nn.Linear, emb: Tensor) -> tuple[Tensor, Tensor]:
    """1 + scale and shift `[n, width]` that a block's layer makes of the time's features."""
    scale, shift = layer(emb).chunk(2, dim=-1)
    return 1 + scale, shift


class ResidualMLP(nn.Module, HasTimeEmbedding):
    """Residual MLP velocity; every block is scaled and shifted by the time embedding.

    x `[n, *shape]` with prod(shape) = dim; returns the velocity in x's shape.
    """

    def __init__(self, dim: int = 64, width: int = 256, blocks: int = 3, time_width: int = 128):
        super().__init__()
        _expect_sizes(dim=dim, width=width, time_width=time_width), _expect_sizes(0, blocks=blocks)
        self.config = dict(dim=dim, width=width, blocks=blocks, time_width=time_width)
        self.time = TimeEmbedding(64, time_width)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            block = nn.Module()
            block.norm = nn.LayerNorm(width, elementwise_affine=False)
            block.film = nn.Linear(time_width, 2 * width)
            block.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for last in (block.film, block.mlp[-1]):
                nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            self.blocks.append(block)
        self.output = nn.Linear(width, dim)

    def time_embedding(self, t: Tensor) -> tuple:
        """(1 + scale, shift) of every block, `[n, width]` each."""
        emb = self.time(t)
        return tuple(_scale_and_shift(block.film, emb) for block in self.blocks)

    def forward(self, x: Tensor, t: Tensor, embedding: tuple | None = None) -> Tensor:
        films = self.time_embedding(t) if embedding is None else embedding
        h = self.input(x.flatten(1))
        for block, (scale, shift) in zip(self.blocks, films, strict=True):
            h = h + block.mlp(block.norm(h) * scale + shift)
        return self.output(h).view(x.shape)


class _ConvBlock(nn.Module):
    def __init__(self, cin: int, cout: int, time_width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.film = nn.Linear(time_width, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        for last in (self.film, self.conv2):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = film
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h) * scale + shift))
        return self.skip(x) + h


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight), nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(-1, -2).reshape(n, c, h, w))


class UNet(nn.Module, HasTimeEmbedding):
    """Small UNet velocity for `[n, channels, H, W]` images, H and W multiples of 4."""

    def __init__(self, channels: int = 1, widths: tuple = (32, 64, 96), time_width: int = 128):
        super().__init__()
        _expect_sizes(channels=channels, time_width=time_width)
        expected = "three multiples of 8, the channels of each resolution"
        a, b, c = widths = expect_shape(widths, "widths", expected, 3)
        expect(not any(width % 8 or width > MOST for width in widths), "widths", expected, widths)
        self.config = dict(channels=channels, widths=list(widths), time_width=time_width)
        self.time = TimeEmbedding(64, time_width)
        self.stem = nn.Conv2d(channels, a, 3, padding=1)
        self.down1, self.pool1 = _ConvBlock(a, a, time_width), nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.down2, self.pool2 = _ConvBlock(b, b, time_width), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.mid1, self.attention, self.mid2 = _ConvBlock(c, c, time_width), _Attention(c), _ConvBlock(c, c, time_width)
        self.unpool2, self.up2 = nn.Conv2d(c, b, 3, padding=1), _ConvBlock(2 * b, b, time_width)
        self.unpool1, self.up1 = nn.Conv2d(b, a, 3, padding=1), _ConvBlock(2 * a, a, time_width)
        self.norm, self.head = nn.GroupNorm(8, a), nn.Conv2d(a, channels, 3, padding=1)

    def time_embedding(self, t: Tensor) -> dict:
        """(1 + scale, shift) of every block by its name, `[n, channels, 1, 1]` each."""
        emb, films = self.time(t), {}
        for name in ("down1", "down2", "mid1", "mid2", "up2", "up1"):
            scale, shift = _scale_and_shift(getattr(self, name).film, emb)
            films[name] = scale[:, :, None, None], shift[:, :, None, None]
        return films

    def forward(self, x: Tensor, t: Tensor, embedding: dict | None = None) -> Tensor:
        film = self.time_embedding(t) if embedding is None else embedding
        h1 = self.down1(self.stem(x), film["down1"])
        h2 = self.down2(self.pool1(h1), film["down2"])
        h = self.mid2(self.attention(self.mid1(self.pool2(h2), film["mid1"])), film["mid2"])
        h = self.unpool2(nn.functional.interpolate(h, scale_factor=2.0))
        h = self.unpool1(nn.functional.interpolate(self.up2(torch.cat([h, h2], 1), film["up2"]), scale_factor=2.0))
        h = self.up1(torch.cat([h, h1], 1), film["up1"])
        return self.head(nn.functional.silu(self.norm(h)))


class _DiTBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the time (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, time_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(time_width, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, z: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        h = self.qkv(self.norm1(z) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = z + gate1 * self.proj(y)
        return z + gate2 * self.mlp(self.norm2(z) * (1 + scale2) + shift2)


class DiT(nn.Module, HasTimeEmbedding):
    """Diffusion transformer velocity for `[n, channels, size, size]` images (Peebles and Xie 2023).

    Tokens are patches of `patch` x `patch` pixels. The final layer is laid out as in diffusers: LayerNorm, scale and
    shift by the time, a projection to `[n, tokens, patch * patch * channels]`, and the patches put back in place.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 8,
        patch: int = 2,
        width: int = 96,
        blocks: int = 4,
        heads: int = 4,
        time_width: int = 128,
    ):
        super().__init__()
        sizes = dict(channels=channels, size=size, patch=patch, width=width, heads=heads, time_width=time_width)
        _expect_sizes(**sizes), _expect_sizes(0, blocks=blocks)
        expect_room(4 * (size // patch) ** 2 * width, "size", "positions of patches", f"{size}")
        expect(size % patch == 0, "size", f"a multiple of patch = {patch}", size)
        expect(width % heads == 0, "width", f"a multiple of heads = {heads}", width)
        self.config = dict(channels=channels, size=size, patch=patch, width=width, blocks=blocks, heads=heads)
        self.config |= dict(time_width=time_width)
        self.time = TimeEmbedding(64, time_width)
        self.patchify = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(_DiTBlock(width, heads, time_width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(time_width, 2 * width)
        self.head = nn.Linear(width, patch * patch * channels)
        for last in (self.modulation, self.head):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def time_embedding(self, t: Tensor) -> tuple[Tensor, ...]:
        """The adaLN modulations of every block `[n, 6 * width]`, then those of the final layer `[n, 2 * width]`."""
        emb = self.time(t)
        return *(block.modulation(emb) for block in self.blocks), self.modulation(emb)

    def forward(self, x: Tensor, t: Tensor, embedding: tuple[Tensor, ...] | None = None) -> Tensor:
        *modulations, last = self.time_embedding(t) if embedding is None else embedding
        z = self.patchify(x)
        h, w = z.shape[2:]
        z = z.flatten(2).transpose(1, 2) + self.position
        for block, modulation in zip(self.blocks, modulations, strict=True):
            z = block(z, modulation)
        shift, scale = last[:, None].chunk(2, dim=-1)
        z = self.head(self.norm(z) * (1 + scale) + shift)
        p = self.config["patch"]
        return z.view(len(x), h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)  # nhwpqc -> nchpwq


MOST = 1 << 24  # of any one of a network's sizes


class PartsLimit(TorchFunctionMode):
    """Ends the making of a network that has far more parts than there are weights for it."""

    def __init__(self, weights: int):
        super().__init__()
        self.left = 64 * (1 + weights)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        expect(self.left >= 0, "config", "a network of so many weights", "one of more")
        return func(*args, **(kwargs or {}))
