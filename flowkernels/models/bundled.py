"""The bundled networks, and the files that networks are saved to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flowkernels._checks import expect, expect_path, expect_shown
from flowkernels._files import damaged
from flowkernels.models import weights
from flowkernels.models.networks import DiT, ResidualMLP, UNet, _Parts

_ARCHITECTURES = {"ResidualMLP": ResidualMLP, "UNet": UNet, "DiT": DiT}


@dataclass(frozen=True)
class Bundled:
    """A shipped model: where its checkpoint is and the shape of one sample."""

    name: str
    file: str
    source: str
    shape: tuple[int, ...]

    @property
    def path(self) -> Path:
        """The checkpoint inside the installed package, or in the source tree's benchmarks/ folder."""
        here = Path(__file__).resolve().parents[1]
        candidates = [here / "data" / self.file, here.parent / self.source / self.file]
        for path in candidates:
            if path.is_file():
                return path
        raise FileNotFoundError(f"model {self.name!r}: no checkpoint at {' or '.join(map(str, candidates))}")

    def load(self) -> nn.Module:
        """The network with its trained weights, in eval mode."""
        return load_network(self.path)


BUNDLED = {
    "digits": Bundled("digits", "digits.safetensors", "flowkernels/data", (1, 8, 8)),
    "fashion": Bundled("fashion", "fashion.safetensors", "benchmarks/fashion", (1, 28, 28)),
}


def save_network(net: nn.Module, path: str | Path, **notes) -> None:
    """Write a bundled architecture's weights with its configuration, as one safetensors file with its SHA-256."""
    path = expect_path(path, "path")
    expect_shown(
        type(net).__name__ in _ARCHITECTURES, "net", f"a network of {' or '.join(_ARCHITECTURES)}", net, TypeError
    )
    weights.write(path, net.state_dict(), architecture=type(net).__name__, config=net.config, notes=notes)


def network_notes(path: str | Path) -> dict:
    """What `save_network` was told about the training, such as the iterations. ValueError if the file is damaged."""
    path = expect_path(path, "path")
    _, metadata = weights.read(path, "path", "a safetensors checkpoint")
    with damaged("path", "a safetensors checkpoint", path):
        return weights.parsed(metadata, "notes")


@torch.inference_mode(False)
def load_network(path: str | Path) -> nn.Module:
    """Rebuild a network written by `save_network`, in eval mode.

    Raises:
        FileNotFoundError; ValueError if the file is something else, or was changed since it was written.
    """
    path = expect_path(path, "path")
    state, metadata = weights.read(path, "path", "a safetensors checkpoint", stacklevel=3)
    known = " or ".join(_ARCHITECTURES)
    name = metadata.get("architecture")
    expect(name in _ARCHITECTURES, "path", f"a checkpoint of {known}", f"{path} with architecture {name!r}")
    with damaged("path", f"a whole checkpoint of {name}", path, "does not fit it"):
        config = weights.parsed(metadata, "config")
        with torch.device("meta"), _Parts(len(state)):
            net = _ARCHITECTURES[name](**config)
        weights.expect_fits(state, net.state_dict(), "weights", name)
        state = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
        net.load_state_dict(state, assign=True)
    return net.eval()
