"""The bundled networks, and the files that networks are saved to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flowkernels import _weights
from flowkernels._checks import expect, expect_path, expect_shown
from flowkernels._files import damaged
from flowkernels.models.networks import DiT, PartsLimit, ResidualMLP, UNet

_ARCHITECTURES = {"ResidualMLP": ResidualMLP, "UNet": UNet, "DiT": DiT}


PACKAGE = Path(__file__).resolve().parents[1]
# the suite of benchmarks, which a wheel carries inside the package
BENCHMARKS = PACKAGE / "_benchmarks" if (PACKAGE / "_benchmarks").is_dir() else PACKAGE.parent / "benchmarks"


@dataclass(frozen=True)
class Bundled:
    """A shipped model: its checkpoint and the shape of one sample."""

    name: str
    path: Path
    shape: tuple[int, ...]

    def load(self) -> nn.Module:
        """The network with its trained weights, in eval mode."""
        if not self.path.is_file():
            raise FileNotFoundError(f"model {self.name!r}: no checkpoint at {self.path}")
        return load_network(self.path)


BUNDLED = {
    "digits": Bundled("digits", PACKAGE / "data/digits.safetensors", (1, 8, 8)),
    "fashion": Bundled("fashion", BENCHMARKS / "fashion/fashion.safetensors", (1, 28, 28)),
}


def save_network(net: nn.Module, path: str | Path, **notes) -> None:
    """Write a bundled architecture's weights with its configuration, as one safetensors file with its SHA-256."""
    path = expect_path(path, "path")
    expect_shown(
        type(net).__name__ in _ARCHITECTURES, "net", f"a network of {' or '.join(_ARCHITECTURES)}", net, TypeError
    )
    _weights.write(path, net.state_dict(), architecture=type(net).__name__, config=net.config, notes=notes)


def network_notes(path: str | Path) -> dict:
    """What `save_network` was told about the training, such as the iterations. ValueError if the file is damaged."""
    path = expect_path(path, "path")
    _, metadata = _weights.read(path, "path", "a safetensors checkpoint")
    with damaged("path", "a safetensors checkpoint", path):
        return _weights.parsed(metadata, "notes")


@torch.inference_mode(False)
def load_network(path: str | Path) -> nn.Module:
    """Rebuild a network written by `save_network`, in eval mode.

    Raises:
        FileNotFoundError; ValueError if the file is something else, or was changed since it was written.
    """
    path = expect_path(path, "path")
    state, metadata = _weights.read(path, "path", "a safetensors checkpoint", stacklevel=3)
    known = " or ".join(_ARCHITECTURES)
    name = metadata.get("architecture")
    expect(name in _ARCHITECTURES, "path", f"a checkpoint of {known}", f"{path} with architecture {name!r}")
    with damaged("path", f"a whole checkpoint of {name}", path, "does not fit it"):
        config = _weights.parsed(metadata, "config")
        with torch.device("meta"), PartsLimit(len(state)):
            net = _ARCHITECTURES[name](**config)
        _weights.expect_fits(state, net.state_dict(), "weights", name)
        state = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
        net.load_state_dict(state, assign=True)
    return net.eval()
