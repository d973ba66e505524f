"""Is a field's convention the right one? Its velocities beside a reference's, and which convention would agree."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS, expect, expect_float64, expect_noise
from flowkernels._guidance import guided
from flowkernels._warnings import warn
from flowkernels.velocity.evaluate import evaluate
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.protocol import VelocityBase, resolve, samples_of

if TYPE_CHECKING:
    from flowkernels.velocity.field import VelocityField


@dataclass(frozen=True)
class Convention:
    """How a network is told the time, and what it predicts; as `VelocityField` has it."""

    reverse_time: bool = False
    time_scale: float = 1.0
    time_offset: float = 0.0
    sign: int = 1


SIGMA = Convention(reverse_time=True, sign=-1)  # told sigma = 1 - t; predicts noise - data
THOUSANDTHS = Convention(reverse_time=True, time_scale=1000.0, sign=-1)
TIME_NAMES = {"HiDreamImageTransformer2DModel": "timesteps"}  # where it is not "timestep"
STOCK = {  # diffusers' transformers, as their pipelines call them
    "SD3Transformer2DModel": THOUSANDTHS,
    "FluxTransformer2DModel": SIGMA,
    "Flux2Transformer2DModel": SIGMA,
    "QwenImageTransformer2DModel": SIGMA,
    "WanTransformer3DModel": THOUSANDTHS,
    "LTXVideoTransformer3DModel": THOUSANDTHS,
    "SanaTransformer2DModel": THOUSANDTHS,  # times its config's timestep_scale
    "Lumina2Transformer2DModel": Convention(),
    "MochiTransformer3DModel": Convention(time_scale=1000.0),
    "HiDreamImageTransformer2DModel": Convention(reverse_time=True, time_scale=1000.0, sign=1),
    "AuraFlowTransformer2DModel": SIGMA,
    "HunyuanVideoTransformer3DModel": THOUSANDTHS,
}
SCALES = (1.0, 1000.0, 999.0)
EPS = 1e-3  # of networks that take (t (1 - eps) + eps) 999
ROUNDING = 1e-5  # an error that needs no other reason in float32


def stock_settings(net: nn.Module) -> dict[str, Any]:
    """The settings of a VelocityField around one of diffusers' transformers; KeyError for one that is not known."""
    name = type(net).__name__
    settings = dict(vars(STOCK[name]), x_name="hidden_states", time_name=TIME_NAMES.get(name, "timestep"))
    settings["time_scale"] *= getattr(getattr(net, "config", None), "timestep_scale", None) or 1.0
    return settings


def is_pipeline(reference: Any) -> bool:
    return isinstance(getattr(reference, "transformer", None), nn.Module) and hasattr(reference, "scheduler")


def check(field: "VelocityField", reference: Any, x: Tensor | None, times: Sequence[float]) -> float:
    """What `VelocityField.check` says."""
    times = expect_float64(times, "times", "times between 0 and 1").flatten().tolist()
    expect(len(times) > 0 and all(0 <= t <= 1 for t in times), "times", "times between 0 and 1", times)
    velocity = _of_pipeline(field, reference) if is_pipeline(reference) else resolve(reference, "reference")
    if x is None:
        noise = getattr(reference, "noise", None)
        expect(callable(noise), "x", "a state [n, *shape], where the reference has no noise of its own", "None")
        x = noise(samples_of(field))
    x = expect_noise(x, "x").detach()
    x = x if x.dtype == torch.float64 else x.float()
    try:
        wanted = [_velocity(velocity, x, t)[0] for t in times]
    except (TypeError, ValueError) as e:
        if str(e).startswith("velocity: "):
            raise type(e)(f"reference{str(e).removeprefix('velocity')}") from e
        raise
    norm = torch.stack([v.norm() for v in wanted]).norm().item()
    expect(norm > 0, "reference", "velocities that are not all 0", "zeros")
    judge = _Judge(field, x, times, wanted, norm)
    own = Convention(field.reverse_time, field.time_scale, field.time_offset, field.sign)
    error = judge.error(own)
    if error <= min(judge.tolerance, ROUNDING):
        return judge.agrees(error)
    tried = sorted(((judge.error(c), i, c) for i, c in enumerate(_candidates(own))), key=lambda tried: tried[:2])
    best, _, found = tried[0]
    if error <= judge.tolerance and best > error / 10:
        return judge.agrees(error)
    if best > judge.tolerance:
        for _, _, near in tried[:2]:
            for solved in judge.solved(near):
                if best > judge.tolerance and (there := judge.error(solved)) < best:
                    best, found = there, solved
    at = " and ".join(f"{t:.3g}" for t in times)
    got = f"others (relative error {error:.2g}, at t = {at})"
    if best <= judge.tolerance:
        way_out = f"velocity agrees with the reference if {_changes(own, found)}"
    else:
        way_out = (
            f"it agrees with no other sign, direction, scale or offset of the time (nearest: {best:.2g}, with "
            f"{_changes(own, found)}): conditioning, guidance, weights, dtype or x may differ"
        )
    raise ValueError(f"velocity: expected the reference's velocities, got {got}; {way_out}")


def _of_pipeline(field: "VelocityField", pipe: Any) -> VelocityBase:
    """A pipeline's own transformer by its stock convention, with the field's conditioning and guidance."""
    nets = [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if isinstance(net, nn.Module)]
    net = next((net for net in nets if unwrapped(net) is unwrapped(field.net)), nets[0])
    kind = type(unwrapped(net)).__name__
    expected = f"a pipeline with one of {', '.join(STOCK)}; of another, pipeline_velocity(pipe, ...)"
    expect(kind in STOCK, "reference", expected, f"one with a {kind}")
    return field.replaced(net=net, time_column=False, **stock_settings(unwrapped(net)))


@torch.no_grad()
def _velocity(velocity: VelocityBase, x: Tensor, t: float) -> tuple[Tensor, torch.dtype]:
    """(v, the network's dtype)"""
    now = torch.full((len(x),), t, dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)
    v, v_uncond, w = evaluate(velocity, x.clone(), now)
    return guided(v, v_uncond, w, torch.float32 if x.dtype != torch.float64 else x.dtype), v.dtype


def _candidates(own: Convention) -> Iterator[Convention]:
    """Other conventions, those with fewer changes first."""
    scales = [(scale, offset) for scale in dict.fromkeys((own.time_scale, *SCALES))
              for offset in dict.fromkeys((own.time_offset, 0.0))]  # fmt: skip
    scales += [(999 * (1 - EPS), 999 * EPS)]
    reverses, signs = (own.reverse_time, not own.reverse_time), (own.sign, -own.sign)
    found = [Convention(r, scale, o, sign) for r, (scale, o), sign in itertools.product(reverses, scales, signs)]
    found = [c for c in dict.fromkeys(found) if c != own]
    return iter(sorted(found, key=lambda c: sum(vars(c)[k] != v for k, v in vars(own).items())))


def _changes(own: Convention, found: Convention) -> str:
    """What has to be changed, in words."""
    said = []
    if found.reverse_time != own.reverse_time:
        said.append(f"reverse_time={found.reverse_time}")
    said += [f"{name}={getattr(found, name):.9g}" for name in ("time_scale", "time_offset")
             if getattr(found, name) != getattr(own, name)]  # fmt: skip
    if found.sign != own.sign:
        said.append(f"sign is reversed (sign={found.sign})")
    elif found.reverse_time != own.reverse_time:
        said.append(f"sign={found.sign}")  # whose default follows the direction
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


class _Judge:
    """Velocities of a field in other conventions beside those that are wanted."""

    def __init__(self, field: "VelocityField", x: Tensor, times: list[float], wanted: list[Tensor], norm: float):
        self.field, self.x, self.times, self.wanted, self.norm = field, x, times, wanted, norm
        self.own: list[Tensor] = []
        self.tolerance = 1e-4

    def error(self, convention: Convention) -> float:
        """The distance at all times together, as a part of the reference."""
        field = self.field if not self.own else self.field.replaced(**vars(convention))
        try:
            found = [_velocity(field, self.x, t) for t in self.times]
        except Exception:  # whatever a network raises that does not take such times
            if not self.own:
                raise
            return float("inf")
        if not self.own:  # the first is the field's own
            self.own = [v for v, _ in found]
            narrow = [found[0][1], self.x.dtype, *([] if self.field.dtype is None else [self.field.dtype])]
            self.tolerance = max(1e-4, *(8 * torch.finfo(d).eps for d in narrow if d in FLOATS))
        away = torch.stack([(v - w).norm() for (v, _), w in zip(found, self.wanted, strict=True)]).norm()
        error = away.item() / self.norm
        return error if error == error else float("inf")

    def agrees(self, error: float) -> float:
        spread = max((v - self.own[0]).norm().item() for v in self.own) / self.norm
        if len(self.own) > 1 and spread <= self.tolerance:
            text = (
                "velocity: agrees with the reference, but hardly depends on the time, whose convention is not checked"
            )
            warn(text, stacklevel=4)
        return error

    def solved(self, near: Convention) -> Iterator[Convention]:
        """Conventions that might agree at two times, near one that does not: Newton's steps on the network's time."""
        if len(set(self.times)) < 2:
            return
        scale, found = near.time_scale, []
        for t, wanted in zip(self.times[:2], self.wanted, strict=False):
            time = scale * (1 - t if near.reverse_time else t) + near.time_offset
            for _ in range(8):
                h = 1e-4 * scale
                try:
                    v, after = (self._told(near.sign, told, t).double() for told in (time, time + h))
                except Exception:
                    return
                slope, rest = (after - v) / h, wanted.double() - v
                if not (size := slope.square().sum().item()) > 0:
                    return
                step = (slope * rest).sum().item() / size
                time += max(-scale, min(scale, step))
            found.append(time)
        (a, b), (s, t) = found, self.times[:2]
        slope = (b - a) / (t - s)
        if not abs(slope) > 1e-6 * scale:
            return
        reverse, exact = slope < 0, abs(slope)
        for scale in (*(c for c in (near.time_scale, *SCALES) if abs(exact - c) <= 1e-3 * c), exact):
            offset = sum(f - scale * (1 - t if reverse else t) for f, t in zip(found, self.times, strict=False)) / 2
            yield Convention(reverse, float(f"{scale:.6g}"), round(offset / scale, 6) * scale, near.sign)

    def _told(self, sign: int, time: float, t: float) -> Tensor:
        """The velocity where the network is told this time."""
        field = self.field.replaced(reverse_time=False, time_scale=0.0, time_offset=time, sign=sign)
        return _velocity(field, self.x, t)[0]
