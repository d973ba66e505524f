"""The classifier whose features the Frechet distance of Fashion-MNIST takes."""

from torch import nn

from flowkernels import _weights
from flowkernels.models.bundled import BUNDLED


class Classifier(nn.Sequential):
    """Small Fashion-MNIST classifier; its penultimate layer (64 features) is the feature space of Frechet distances."""

    def __init__(self):
        def conv(cin, cout):
            return [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(), nn.MaxPool2d(2)]

        features = nn.Sequential(
            *conv(1, 32), *conv(32, 64), *conv(64, 64), nn.Flatten(), nn.Linear(576, 64), nn.ReLU()
        )
        super().__init__(features, nn.Linear(64, 10))
        self.config = {}

    @classmethod
    def load(cls) -> "Classifier":
        """With its trained weights, from beside the fashion model's."""
        path = BUNDLED["fashion"].path.with_name("classifier.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; `python scripts/train_models.py classifier` makes it")
        net = cls()
        state, _ = _weights.read(path, "path", "the classifier's weights")
        net.load_state_dict(state)
        return net.eval()
