"""The files of samples that the command line writes."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowkernels import _weights
from flowkernels._files import whole_file

SAMPLE_FORMATS = (".safetensors", ".npy", ".pt", ".png")


def save_samples(path: Path, samples: Tensor) -> None:
    """Samples `[n, *shape]` on the CPU, in the format of the suffix; as a .png, of shape `[1 or 3, H, W]`."""
    if path.suffix == ".safetensors":
        return _weights.write(path, {"samples": samples})
    with whole_file(path) as partial, open(partial, "wb") as file:
        if path.suffix == ".npy":
            np.save(file, samples.numpy())
        elif path.suffix == ".pt":
            torch.save(samples, file)
        else:
            _image_grid(samples).save(file, "png")


def _image_grid(samples: Tensor):
    """A nearly square grid of images `[n, 1 or 3, H, W]` with values in [-1, 1], small ones enlarged."""
    from PIL import Image  # comes with matplotlib

    scale, gap = max(1, 64 // max(samples.shape[2:])), 2
    images = ((samples.clamp(-1, 1) + 1) * 127.5).round().byte()
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = nn.functional.pad(images, (0, gap, 0, gap), value=255)
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    blank = images.new_full((-n % columns, channels, height, width), 255)
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns))
    canvas = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-gap, :-gap]
    return Image.fromarray(canvas.expand(-1, -1, 3).contiguous().numpy())
