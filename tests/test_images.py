"""Samples as PNG files: values, places in the grid, one by one, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.models.bundled import BUNDLED
from flowkernels.ops.samples import generator


def levels(samples, low, high):
    """uint8 `[n, H, W, c]`, one by one."""
    scaled = (np.clip(samples.double().numpy(), low, high) - low) / (high - low) * 255
    return np.floor(scaled + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def pixels(path):
    found = np.asarray(Image.open(path))
    return found[..., None] if found.ndim == 2 else found


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("value_range", [(-1, 1), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_by_one(channels, mode, value_range, dtype, tmp_path):
    samples = torch.randn(3, channels, 5, 4, generator=generator(0)).to(dtype)
    fk.save_images(samples.requires_grad_(), tmp_path / "a", value_range=value_range, grid=False)
    paths = sorted((tmp_path / "a").iterdir())
    assert [p.name for p in paths] == ["00000.png", "00001.png", "00002.png"]
    assert Image.open(paths[0]).mode == mode
    np.testing.assert_array_equal(np.stack([pixels(p) for p in paths]), levels(samples.detach(), *value_range))
    fk.save_images(samples[:1], tmp_path / "a", grid=False)  # in the place of those
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["00000.png"]


@pytest.mark.parametrize(
    ("n", "columns", "places"), [(5, None, (2, 3)), (5, 2, (3, 2)), (2, 7, (1, 2)), (1, None, (1, 1))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid(n, columns, places, channels, tmp_path):
    samples = torch.randn(n, channels, 30, 20, generator=generator(0))
    fk.save_images(samples, tmp_path / "a.png", columns=columns)
    found, (rows, across) = pixels(tmp_path / "a.png"), places
    assert found.shape == (62 * rows - 2, 42 * across - 2, channels)  # twice as large, with gaps
    expected = levels(samples, -1, 1).repeat(2, 1).repeat(2, 2)
    blank = found.copy()
    for i, image in enumerate(expected):
        here = (slice(62 * (i // across), 62 * (i // across) + 60), slice(42 * (i % across), 42 * (i % across) + 40))
        np.testing.assert_array_equal(found[here], image)
        blank[here] = 255
    assert (blank == 255).all()


IMAGES = torch.zeros(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (dict(samples=torch.zeros(2, 4, 3, 3)), ValueError, "samples: expected images of shape .n, 1 or 3, H, W"),
        (dict(samples=torch.zeros(3, 3, 3)), ValueError, "samples: expected images"),
        (dict(samples=[IMAGES]), TypeError, "samples: expected a torch.Tensor"),
        (dict(samples=IMAGES.byte()), TypeError, "samples: expected torch.float32 or"),
        (dict(samples=IMAGES[:0]), ValueError, "samples: expected at least one sample"),
        (dict(samples=IMAGES / torch.tensor([1.0, 0]).view(2, 1, 1, 1)), ValueError, "samples: .*Inf in sample 1"),
        (dict(value_range=(1, 1)), ValueError, "value_range: expected two finite numbers"),
        (dict(value_range=(0, torch.inf)), ValueError, "value_range: expected two finite numbers"),
        (dict(value_range=3), TypeError, "value_range: expected two finite numbers"),
        (dict(columns=0), ValueError, "columns: expected at least 1"),
        (dict(columns=2, grid=False), ValueError, "columns: expected None without grid"),
        (dict(path="none/a"), FileNotFoundError, "path: expected a "),
        (dict(path="none/a", grid=False), FileNotFoundError, "path: expected a place in a folder that exists"),
        (dict(path="mine", grid=False), ValueError, "path: expected a new folder, or one .*notes"),
        (dict(path="mine/notes", grid=False), NotADirectoryError, "path: expected a folder, got the file"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(changes, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/notes").write_text("x")
    with pytest.raises(error, match=f"^{said}"):
        fk.save_images(**(dict(samples=IMAGES, path="a") | changes))
    assert sorted(str(p) for p in Path().rglob("*")) == ["mine", "mine/notes"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "sample --model digits --steps 2 -n 3 --seed 1 --out x.png --png"
    assert main([*line.split(), "images"]) == 0
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = fk.sample(BUNDLED["digits"].load(), noise, 2)
    for image, path in zip(levels(samples, -1, 1), sorted(Path("images").iterdir()), strict=True):
        assert np.abs(pixels(path).astype(int) - image).max() <= 1  # samples of a run of their own, to rounding
    Path("mine").mkdir()
    Path("mine/notes").touch()
    before = {p: p.read_bytes() for p in Path().rglob("*.png")}
    capsys.readouterr()
    assert main([*line.split(), "mine"]) == 2
    assert "--png: expected a new folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path().rglob("*.png")} == before
