"""The data behind the bundled models: scikit-learn's digits and the original Fashion-MNIST idx files."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_DIR = "/usr/share/datasets/fashion-mnist"  # Debian: apt install dataset-fashion-mnist


def digits() -> tuple[Tensor, Tensor]:
    """Images `[1797, 1, 8, 8]` float32 in [-1, 1], labels `[1797]`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 8.0 - 1.0, dtype=torch.float32)[:, None], torch.tensor(data.target)


def _idx(folder: Path, name: str) -> np.ndarray:
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():
            with opener(path, "rb") as f:
                raw = f.read()
            rank = raw[3]
            dims = np.frombuffer(raw, ">u4", rank, 4)
            body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
            if raw[:3] != b"\0\0\x08" or body.size != dims.prod():
                raise ValueError(f"{path}: not a whole idx file of bytes")
            return body.reshape(dims)
    raise FileNotFoundError(
        f"{folder / name}[.gz]: not found; install the Debian package dataset-fashion-mnist, "
        "or name a folder of the original idx files with --data-dir or FASHION_MNIST_DIR"
    )


def fashion(split: str = "train", folder: str | None = None) -> tuple[Tensor, Tensor]:
    """Images `[60000 | 10000, 1, 28, 28]` float32 in [-1, 1], labels; split is 'train' or 't10k'."""
    root = Path(folder or os.environ.get("FASHION_MNIST_DIR", FASHION_DIR))
    images, labels = _idx(root, f"{split}-images-idx3-ubyte"), _idx(root, f"{split}-labels-idx1-ubyte")
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0)[:, None], torch.from_numpy(labels.astype(np.int64))
