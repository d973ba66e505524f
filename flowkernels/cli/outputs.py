"""The files of samples that the command line writes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import _weights
from flowkernels._files import whole_file

SAMPLE_FORMATS = (".safetensors", ".npy", ".pt", ".png")


def save_samples(path: Path, samples: Tensor) -> None:
    """Samples `[n, *shape]` on the CPU, in the format of the suffix; as a .png, of shape `[1 or 3, H, W]`."""
    if path.suffix == ".safetensors":
        return _weights.write(path, {"samples": samples})
    if path.suffix == ".png":
        return fk.save_images(samples, path)
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.save(file, samples.numpy()) if path.suffix == ".npy" else torch.save(samples, file)
