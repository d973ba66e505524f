"""Samples as pictures: a grid of them in one file, or each in a file of its own."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_list,
    expect_noise,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_shown,
    expect_values,
)
from flowkernels._files import expect_target, whole_file, whole_folder

if TYPE_CHECKING:
    from PIL.Image import Image

RANGE = (-1.0, 1.0)  # of the values of images that a flow is trained on
ENLARGED = 64  # pixels that the longer side of a small image has in a grid, at least
GAP = 2  # pixels between the images of a grid
OWN = re.compile(r"\d{5,}\.png")  # of a folder of images


def save_images(
    samples: Tensor,
    path: str | Path,
    *,
    value_range: Sequence[float] = RANGE,
    grid: bool = True,
    columns: int | None = None,
) -> None:
    """Write samples as PNG files, grey or RGB, with 8 bits a channel.

    Args:
        samples: `[n, 1 or 3, H, W]`, floating point, finite, on any device. Latents have to be decoded first.
        path: with `grid` the file, whatever its suffix; else a folder, made where there is none, in which
            `00000.png` and so on replace those of an earlier call. The file or the folder is whole or as it was.
        value_range: the values (low, high) that are black and white; what is beyond is cut off, and what is between
            rounded to the nearest of 256 levels.
        grid: one picture of all, in rows, with small images enlarged by a whole number; False: one file each, pixel
            for pixel, as tools that compare folders of images read them.
        columns: of the grid; None makes it nearly square.

    Raises:
        TypeError, ValueError, OSError: naming the argument, before anything is written; of NaN or Inf the sample.

    Examples:
        >>> fk.save_images(torch.rand(6, 3, 8, 8), "samples.png", value_range=(0, 1))
        >>> fk.save_images(torch.rand(6, 3, 8, 8), "samples", value_range=(0, 1), grid=False)
        >>> from pathlib import Path
        >>> sorted(p.name for p in Path("samples").iterdir())[-1]
        '00005.png'
    """
    expect_images(samples)
    low, high = expect_range(value_range)
    columns = None if columns is None else expect_positive_int(columns, "columns")
    if expect_bool(grid, "grid"):
        expect_target(path)
        picture = grid_of(samples, (low, high), columns)
        with whole_file(path) as partial, open(partial, "wb") as file:
            picture.save(file, "png")
        return
    expect(columns is None, "columns", "None without grid", columns)
    folder = expect_image_folder(path)
    with whole_folder(folder) as partial:
        for i, image in enumerate(levels(samples, low, high)):
            _picture(image).save(partial / f"{i:05d}.png", "png")


def expect_images(samples, name: str = "samples") -> None:
    """Raise unless it is a finite tensor `[n, 1 or 3, H, W]`."""
    shape = expect_values(samples, name, FLOATS).shape
    expected = "images of shape [n, 1 or 3, H, W] (latents decoded)"
    expect(len(shape) == 4 and shape[1] in (1, 3), name, expected, samples)
    expect_noise(samples, name)


def expect_image_folder(path: str | Path, name: str = "path", own: re.Pattern[str] = OWN) -> Path:
    """`path` as an absolute path, if a folder of images can go there: nothing, an empty folder, or one of images alone
    that were written there before, as their names say."""
    folder = Path(os.path.realpath(expect_path(path, name)))
    there = folder.parent.is_dir()
    expect(there, name, "a place in a folder that exists and can be written to", f"{path}", FileNotFoundError)
    writable = os.access(folder.parent, os.W_OK | os.X_OK)
    expect(writable, name, "a place in a folder that can be written to", f"{path}", PermissionError)
    if folder.exists():
        expect(folder.is_dir(), name, "a folder", f"the file {path}", NotADirectoryError)
        foreign = sorted(p.name for p in folder.iterdir() if not own.fullmatch(p.name))
        expect(
            not foreign, name, "a new folder, or one of images written there before", f"{path} with {foreign[:1]} in it"
        )
    return folder


def grid_of(samples: Tensor, value_range: Sequence[float] = RANGE, columns: int | None = None) -> "Image":
    """A picture of images `[n, 1 or 3, H, W]` in rows; see `save_images`."""
    images = levels(samples, *value_range)
    scale = max(1, ENLARGED // max(images.shape[2:]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = nn.functional.pad(images, (0, GAP, 0, GAP), value=255)
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else min(columns, n)
    canvas = images.new_full((math.ceil(n / columns) * columns, channels, height, width), 255)
    canvas[:n] = images
    rows = canvas.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return _picture(rows[:, :-GAP, :-GAP])


def levels(samples: Tensor, low: float, high: float) -> Tensor:
    """The nearest of 256 levels of values from low to high: uint8 `[n, *shape]`, on the CPU."""
    values = samples.detach().double().cpu().clamp(low, high)
    return ((values - low) * (255 / (high - low))).round().byte()


def _picture(image: Tensor) -> "Image":
    """Of uint8 `[1 or 3, H, W]`."""
    from PIL import Image  # comes with matplotlib

    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy())


def expect_range(value) -> tuple[float, float]:
    expected = "two finite numbers (low, high), the first less than the second"
    ends = expect_list(value, "value_range", expected)
    expect_shown(len(ends) == 2, "value_range", expected, value)
    low, high = (expect_real(end, "value_range", expected) for end in ends)
    expect_shown(0 < high - low < math.inf, "value_range", expected, value)
    return low, high
