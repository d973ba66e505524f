"""A perceptual distance (LPIPS) as the cost of a schedule's steps, as a loss, and as a measure of samples.

    pip install lpips torchvision
    python examples/lpips_loss.py --net alex               # the lpips package, which loads a network's weights

Cost: `fk.least_cost_schedules` takes any table, here the distance of each step's end from the teacher's state there.
Loss: `fk.StraightenLoss` takes a function of what is compared, mostly velocities, which are no images. A distance of
images needs a target that compares these: "next_knot", on the one interval from noise to data, the data that are
foreseen from two of the teacher's states, one after the other. That is consistency distillation with LPIPS (arXiv
2303.01469). Latents are decoded within the function.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch.nn import functional

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lpips_of(net: str, random: bool) -> Distance:
    """LPIPS of images in [-1, 1], `[n, 1 or 3, height, width]`, at 64 x 64 at least, to `[n]`."""
    import lpips

    found = lpips.LPIPS(net=net, pnet_rand=random, verbose=False).eval().requires_grad_(False)

    def prepared(x: torch.Tensor) -> torch.Tensor:
        size = [max(64, side) for side in x.shape[2:]]
        return functional.interpolate(x.float().clamp(-1, 1).expand(-1, 3, -1, -1), size, mode="bilinear")

    return lambda a, b: found(prepared(a), prepared(b)).flatten()


@torch.no_grad()
def step_costs(along: fk.Trajectory, distance: Distance) -> torch.Tensor:
    """The mean distance of `x_j + (t_k - t_j) v_j` from x_k of a rollout, for each pair of times j < k."""
    t, n = along.times, len(along.times)
    cost = torch.full((n, n), torch.inf, dtype=torch.float64)
    for j in range(n):
        for k in range(j + 1, n):
            jump = along.x[j] + (t[k] - t[j]).item() * along.v[j]
            cost[j, k] = distance(jump, along.x[k]).double().mean()
    return cost


def trained(teacher: torch.nn.Module, plan: fk.Schedule, loss: str | Distance, args) -> torch.nn.Module:
    """A student of the one step of a schedule."""
    objective = fk.StraightenLoss(plan, target="next_knot", substeps=8, loss=loss)
    shape = BUNDLED["digits"].shape
    bank = fk.TrajectoryBank(teacher, objective, noise=shape, size=args.size, seed=1, progress=False).fill()
    student, draws = copy.deepcopy(teacher).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    for _ in range(args.iterations):
        objective(student, bank.sample(args.batch, draws), draws).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


def main(argv: list[str] | None = None, distance: Distance | None = None) -> dict[str, tuple[float, float]]:
    """distance: in the place of LPIPS, any function of images `[n, 1, 8, 8]`, to `[n]`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("alex", "vgg", "squeeze"), default="alex")
    parser.add_argument("--random", action="store_true", help="random weights in that network: nothing is downloaded")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler whose knots are chosen")
    parser.add_argument("--grid", type=int, default=24, help="fine steps of the teacher")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024, help="trajectories to train on")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)
    distance = lpips_of(args.net, args.random) if distance is None else distance

    torch.manual_seed(0)
    teacher = BUNDLED["digits"].load()
    noise, held_out = torch.randn(2, args.samples, *BUNDLED["digits"].shape)
    along = fk.rollout(teacher, noise, args.grid)
    squared, cost = fk.step_costs(along.v, along.times), step_costs(along, distance)

    plans = {}
    for name, table in (("squared error", squared), ("distance", cost)):
        chosen = fk.least_cost_schedules(table, along.times, [1, args.steps])
        plans[f"{args.steps} steps, knots by {name}"] = chosen[args.steps]
    plans["1 step"] = chosen[1]
    for name, loss in (("squared error", "l2"), ("distance", distance)):
        plans[f"1 step, trained by {name}"] = trained(teacher, chosen[1], loss, args), chosen[1]
    found = fk.evaluate_sampler(
        teacher,
        plans,
        held_out,
        columns=["endpoint"],
        distances={"distance": distance},
        teacher_solver=args.grid,
    )
    print(found.report())
    return {row.name: (row.rms, row.paired["distance"][0]) for row in found.rows}


if __name__ == "__main__":
    main()
