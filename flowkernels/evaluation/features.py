"""What distances between sets of samples are measured in: a callable's features, or an Inception network's of clean-fid
or torch-fidelity."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowkernels._checks import FLOATS, describe, expect, expect_callable, expect_takes, expect_tensor
from flowkernels.evaluation.distances import BATCH, Features
from flowkernels.evaluation.images import expect_images, levels
from flowkernels.velocity.evaluate import warn_if_training

FEATURES = "2048"  # torch-fidelity's name of the last pooling layer's


def features_of(features: Features | str, device: torch.device, value_range: tuple[float, float]) -> Features:
    """A function of samples `[n, *shape]` for what was given: a callable, or one of NETWORKS by its name, which is
    loaded here. ImportError, naming the package, where it cannot be imported."""
    if not isinstance(features, str):
        warn_if_training(expect_callable(features, "features", _expected()), stacklevel=5)
        return features
    expect(features in NETWORKS, "features", _expected(), repr(features))
    try:
        network = NETWORKS[features](device)
    except ImportError as e:
        package = f"{features} for features={features!r} (pip install {features})"
        expect(False, "features", package, f"{type(e).__name__}: {e}", ImportError)
    return lambda samples: network(levels(samples, *value_range).expand(-1, 3, -1, -1))


def expect_features(features, samples: Tensor, name: str) -> None:
    """Raise unless features can be made of such samples, as far as that shows before any is."""
    if not isinstance(features, str):
        expect_takes(features, "features", _expected(), samples)
        return
    expect(features in NETWORKS, "features", _expected(), repr(features))
    expect_images(samples, name)


def _expected() -> str:
    return f"a callable samples -> [n, d], or {' or '.join(map(repr, NETWORKS))}"


def made(features: Features, samples: Tensor) -> Tensor:
    """Features of samples, float64 `[n, d]`, made of copies of some at a time (they may be written into); ValueError of
    what is none, or not finite."""
    parts = []
    with torch.no_grad():
        for part in samples.split(BATCH):
            found = expect_tensor(features(part.detach().clone()), "features", FLOATS)
            rows = found.dim() >= 2 and len(found) == len(part) and found[:1].numel() > 0
            expect(rows, "features", f"features of shape [{len(part)}, d] of {describe(part)}", found)
            parts.append(found.detach().double().flatten(1))
    found = torch.cat(parts)
    bad = (~found.isfinite().all(1)).nonzero()
    expect(len(bad) == 0, "features", "finite features", f"NaN or Inf of sample {bad[0].item() if len(bad) else ''}")
    return found


def _clean_fid(device: torch.device) -> Callable[[Tensor], Tensor]:
    """As `cleanfid.fid.get_model_features` has them: each image resized by PIL, bicubic, without rounding."""
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    network = build_feature_extractor("clean", device, use_dataparallel=False)

    def features(images: Tensor) -> Tensor:
        resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])  # [n, 299, 299, 3]
        return network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device))

    return features


def _torch_fidelity(device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", [FEATURES]).to(device)
    return lambda images: network(images.to(device))[0]


# by the package's name: device -> function of uint8 images [n, 3, H, W] on the CPU
NETWORKS: dict[str, Callable[[torch.device], Callable[[Tensor], Tensor]]] = {
    "clean-fid": _clean_fid,
    "torch-fidelity": _torch_fidelity,
}
