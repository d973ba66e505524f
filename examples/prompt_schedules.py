"""A schedule for each condition beside one for all: the exact flow of each of scikit-learn's ten digits.

    python examples/prompt_schedules.py

Needs scikit-learn. A label stands for what is a prompt elsewhere. Schedules are found on some noises of each label and
tried on others.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.models.closed_form import EmpiricalVelocity


class OfLabel(nn.Module):
    """The velocity of the flow to the images of each sample's own label."""

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__()
        self.of = nn.ModuleList(EmpiricalVelocity(images[labels == k]) for k in range(10))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v = torch.empty_like(x)
        for k in y.unique().tolist():
            v[y == k] = self.of[k](x[y == k], t[y == k])
        return v


def main(argv: list[str] | None = None) -> dict[tuple[str, int], tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=100, help="fine steps of the teacher")
    parser.add_argument("--samples", type=int, default=24, help="noises of each label, and as many to try them on")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    digits = load_digits()
    net = OfLabel(torch.from_numpy(digits.images / 8 - 1).float()[:, None], torch.from_numpy(digits.target))
    labels = torch.arange(10).repeat(args.samples)
    velocity = fk.VelocityField(net, conditioning={"y": labels})
    noise, held_out = torch.randn(2, len(labels), 1, 8, 8)

    cal = fk.calibrate(velocity, noise, grid=args.grid, steps=[2, 4, 8])
    teacher, found = fk.sample(velocity, held_out, args.grid), {}
    print(
        "mean squared distance to the teacher on other noises:\n  objective   N   one for all   for each label   change"
    )
    for objective in ("squared", "student", "oss"):
        evaluated = {} if objective == "squared" else {"velocity": velocity, "samples": len(labels)}
        one = cal.find([2, 4, 8], objective=objective, **evaluated)
        each = cal.find([2, 4, 8], objective=objective, each=labels, **evaluated)
        for N in one:
            errors = [endpoint_errors(fk.sample(velocity, held_out, p), teacher) for p in (one[N], each[N].of(labels))]
            shared, own = (e.mean().item() for e in errors)
            low, high = mean_interval(errors[1] - errors[0])
            found[objective, N] = shared, own
            print(f"{objective:>11} {N:3} {shared:13.4g} {own:16.4g}   {low / shared:+.1%} to {high / shared:+.1%}")
    return found


if __name__ == "__main__":
    main()
