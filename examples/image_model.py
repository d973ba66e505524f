"""An image model, from calibration to a straightened network: which of its 4-step samplers is nearest to the teacher?

    python examples/image_model.py                 # the bundled UNet of Fashion-MNIST, minutes on a few cores
    python examples/image_model.py --data digits   # an MLP of 8x8 digits, seconds

Put your own network in the place of the bundled one: `fk.VelocityField(net, ...)` adapts its convention.
"""

import argparse

import torch

import flowkernels as fk
from flowkernels.evaluation.endpoint import endpoint_error
from flowkernels.models.bundled import BUNDLED


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion"], default="fashion")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of a sampler")
    parser.add_argument("--samples", type=int, default=64, help="noises of the calibration; as many are held out")
    parser.add_argument("--grid", type=int, default=100, help="fine steps of the teacher")
    parser.add_argument("--iterations", type=int, default=300, help="of straightening; 0 leaves it out")
    args = parser.parse_args(argv)

    model, N = BUNDLED[args.data], args.steps
    velocity = model.load()
    generator = torch.Generator().manual_seed(0)
    noise, held_out = torch.randn(2, args.samples, *model.shape, generator=generator)

    cal = fk.calibrate(velocity, noise, grid=args.grid, steps=[N])
    samplers = {
        "uniform": (velocity, N),
        "uniform, Adams-Bashforth 2": (velocity, fk.Solver.adams_bashforth(N, 2)),
        "Bellman": (velocity, cal[N]),
        "fitted solver": (velocity, fk.fit_solver(velocity, cal, N)),
    }
    if args.iterations:
        trained = fk.straighten(None, velocity, cal[N], noise=noise, iterations=args.iterations, batch=32)
        samplers["Bellman, straightened"] = trained.student, cal[N]

    teacher = fk.sample(velocity, held_out, args.grid)
    errors = {name: endpoint_error(fk.sample(v, held_out, s), teacher) for name, (v, s) in samplers.items()}
    print(f"\n{args.data}, {N} evaluations: mean squared distance to the {args.grid}-step teacher")
    for name, error in errors.items():
        print(f"  {name:<28} {error:8.4g}")
    return errors


if __name__ == "__main__":
    main()
