"""Straightening in FastGen (NVlabs/FastGen): its trainer, network, configuration and checkpoints, on a bank of ours.

    pip install -e FastGen                                        # a clone of it; docs/trainers.md has the commit
    python examples/fastgen_trainer.py --out folder               # a tiny random DiT of FastGen's: a minute on a CPU
    python examples/fastgen_trainer.py --out folder --method kd   # FastGen's own KDModel on the same bank

What is FastGen's own comes from its configuration of knowledge distillation; the lines with `fk` and the four names of
`flowkernels.integrations.fastgen` are all that is added. A run of its train.py has the same in a file for `--config`.
"""

import argparse
from pathlib import Path

import torch
from fastgen.configs.methods.config_kd import create_config
from fastgen.methods import KDModel
from fastgen.networks.DiT.network import DiT
from fastgen.trainer import Trainer
from fastgen.utils import LazyCall, instantiate

import flowkernels as fk
from flowkernels.integrations.fastgen import MAX_T, PathLoader, StraightenModel, t_list

CLASSES = 4
SIZE = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES)


def network() -> torch.nn.Module:
    """The teacher: here a random one."""
    torch.manual_seed(0)
    net = DiT(**SIZE, class_dropout_prob=0.0).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return net


def velocity(net: torch.nn.Module, condition: torch.Tensor) -> fk.VelocityField:
    """A network of FastGen's as a velocity: told 1 - t, with the flow, -dx/dt, as what it predicts."""
    return fk.VelocityField(net, reverse_time=True, conditioning=dict(condition=condition, fwd_pred_type="flow"))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of weights, bank and checkpoints")
    parser.add_argument("--method", choices=("straighten", "kd"), default="straighten")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--grid", type=int, default=40, help="fine steps of the teacher")
    parser.add_argument("--size", type=int, default=256, help="trajectories")
    parser.add_argument("--batch", type=int, default=32, help="of a process")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    out, steps = Path(args.out), 4  # of which FastGen's KDModel takes no other number
    out.mkdir(parents=True, exist_ok=True)

    teacher = network()
    torch.save(teacher.state_dict(), out / "teacher.pth")

    def noise(n: int, generator: torch.Generator) -> torch.Tensor:  # at FastGen's first time
        return MAX_T * torch.randn(n, 1, 8, 8, generator=generator)

    def classes(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = torch.randint(CLASSES, (n,), generator=generator)
        return {"condition": torch.nn.functional.one_hot(drawn, CLASSES).float()}

    made, n = torch.Generator().manual_seed(1), 128
    grid = torch.linspace(1 - MAX_T, 1, args.grid + 1, dtype=torch.float64)
    start, condition = noise(n, made), classes(n, made)["condition"]
    cal = fk.calibrate(velocity(teacher, condition), start, grid=grid, steps=[steps], progress=False)
    bank = fk.TrajectoryBank(
        velocity(teacher, condition[:1]),
        cal[steps],
        noise=noise,
        size=args.size,
        conditioning=classes,
        storage=out / "bank",
        device="cpu",
        progress=False,
    ).fill()

    config = create_config()
    for name in [name for name in config.trainer.callbacks if name != "grad_clip"]:
        del config.trainer.callbacks[name]  # which report to elsewhere, or on a GPU
    config.trainer.max_iter, config.trainer.resume = args.iterations, False
    config.trainer.checkpointer.save_dir = str(out / args.method)
    model = config.model
    model.net, model.input_shape, model.device = LazyCall(DiT)(**SIZE, class_dropout_prob=0.0), [1, 8, 8], "cpu"
    model.pretrained_model_path, model.enable_preprocessors = str(out / "teacher.pth"), False
    model.net_optimizer.lr = args.lr
    model.student_sample_steps, model.student_sample_type = steps, "ode"
    model.sample_t_cfg.t_list = t_list(cal[steps])
    method = {"straighten": StraightenModel, "kd": KDModel}[args.method]
    config.model_class = LazyCall(method)(config=model)
    config.dataloader_train = LazyCall(PathLoader)(
        storage=str(out / "bank"), batch_size=args.batch, sampler_start_idx=None
    )
    student = instantiate(config.model_class)
    config.model_class.config = None
    Trainer(config).run(student)

    ends, found = bank.ends(64, cal[steps]), {}
    sampling = dict(student_sample_steps=steps, student_sample_type="ode", t_list=model.sample_t_cfg.t_list)
    for name, net in (("untrained", teacher), ("trained", student.net)):
        condition = ends.conditioning["condition"]
        x = student.generator_fn(net, ends.states[0] / MAX_T, condition=condition, **sampling)
        found[name] = (x - ends.states[1]).square().mean().sqrt().item()
    mine = fk.sample(velocity(student.net.eval(), condition), ends.states[0], cal[steps])
    found["difference"] = (x - mine).abs().max().item()
    told = f"{found['untrained']:.4g}, trained {found['trained']:.4g}"
    print(f"rms to the teacher's samples in {steps} of FastGen's steps: {told}")
    print(f"fk.sample differs from FastGen's by {found['difference']:.2g}")
    return found


if __name__ == "__main__":
    main()
