"""Couplings: which noise goes with which data, and what weight a pair has."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import (
    describe,
    expect,
    expect_bool,
    expect_choice,
    expect_noise,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_takes,
    expect_values,
    one_of,
)
from flowkernels._warnings import warn
from flowkernels.sampling.loop import initial_state
from flowkernels.training.pairs.pairs import Pairs, expect_generator, expect_rows

Coupling = str | Callable[[Tensor, Tensor], Tensor]

COSTS = {"squared": 2, "euclidean": 1}  # the power of the distance
FEW = 5  # effective pairs, of which a warning tells
UNDERFLOW = 300.0  # largest cost over reg that Sinkhorn's iterations take outside of logarithms
MOST_ITERATIONS = 1000  # of Sinkhorn


class Regularised(NamedTuple):
    """reg, and whether it is in units of the mean cost; the power of the distance."""

    reg: float
    relative: bool
    power: int

    def of(self, cost: Tensor) -> float:
        """reg in the units of the costs; ValueError, naming it, where they are not finite numbers of times that."""
        mean, most = cost.mean().item(), cost.max().item()
        reg = self.reg * mean if self.relative and mean > 0 else self.reg
        fits = reg > 0 and math.isfinite(most / reg)
        expect(fits, "reg", f"one that costs of up to {most:.3g} can be divided by", f"{self.reg:g}")
        return reg


def exact(cost: Tensor, how: Regularised, generator: torch.Generator) -> Tensor:
    """Of each column its row in the permutation of least cost. Unit masses keep the plan one of zeros and ones."""
    mass = np.ones(len(cost))
    plan, log = _pot("ot").emd(mass, mass, cost.numpy(), numItermax=10**9, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"coupling: ot.emd did not find the optimal plan ({log['warning']})")
    return torch.from_numpy(plan).argmax(0)


def sinkhorn(cost: Tensor, how: Regularised, generator: torch.Generator) -> Tensor:
    """Of each column a row drawn from it, in the plan of the entropic problem."""
    n, reg = len(cost), how.of(cost)
    mass = np.full(n, 1 / n)
    method = "sinkhorn" if cost.max().item() < UNDERFLOW * reg else "sinkhorn_log"
    accuracy = 1e-4 / math.sqrt(n)  # of the marginals, in the norm in which they are 1 / sqrt(n)
    limits = dict(numItermax=MOST_ITERATIONS, stopThr=accuracy, warn=False, log=True)
    with np.errstate(over="ignore"):  # of what is reported beside the plan
        plan, _ = _pot("sinkhorn").sinkhorn(mass, mass, cost.numpy(), reg, method=method, **limits)
    columns = torch.from_numpy(plan)
    columns = columns / columns.sum(0)
    left = (columns.sum(1) - 1).abs().max().item()
    if not left < 0.05:
        told = f"reg: Sinkhorn's {MOST_ITERATIONS} iterations have not converged: some noise is drawn {left:.2g} times"
        warn(f"{told} too often or seldom; a larger reg than {how.reg:g} converges sooner", stacklevel=6)
    return torch.multinomial(columns.T.contiguous(), 1, generator=generator)[:, 0]


def gibbs(noise: Tensor, data: Tensor, how: Regularised) -> Tensor:
    """`exp(-cost / reg)` of the pairs, float64 `[n]`, times what makes their mean 1."""
    cost = _expect_costs((noise.double() - data.double()).flatten(1).norm(dim=1) ** how.power)
    return torch.softmax(-cost / how.of(cost), 0) * len(cost)


PLANS: dict[str, Callable[[Tensor, Regularised, torch.Generator], Tensor]] = {"ot": exact, "sinkhorn": sinkhorn}
INDEPENDENT, GIBBS = "independent", "gibbs"
NAMES = (INDEPENDENT, *PLANS, GIBBS)


@torch.inference_mode(False)
@no_grad
def couple(
    noise: Tensor | None,
    data: Tensor,
    coupling: Coupling = "ot",
    *,
    reg: float = 0.05,
    relative: bool = True,
    cost: str = "squared",
    batch: int | None = None,
    groups: Tensor | None = None,
    generated: Tensor | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Noise and data in pairs. The data stay in their order, so that labels and other conditioning stay beside them;
    what is chosen is the noise of each.

    Straight lines between independent pairs cross, and where they do a velocity can only be their mean: its flow is
    curved. Couplings of less cost cross less, and need fewer steps.

    Couplings:

    - "independent": the i-th noise with the i-th datum, as they come.
    - "ot": the permutation of least cost, of all pairs or within minibatches (`batch`): minibatch optimal transport
      (Tong et al., arXiv 2302.00482; Pooladian et al., arXiv 2304.14772). By POT's `ot.emd`.
    - "sinkhorn": the entropic plan, of least `sum P c + reg sum P log P`, by POT's `ot.sinkhorn`. The noise of each
      datum is drawn from its column of the plan, so that each datum is there once, some noise several times and some
      not at all; the law of a pair is the plan.
    - "gibbs": independent pairs with weights `exp(-c / reg)`, of mean 1: weighted conditional flow matching (W-CFM,
      arXiv 2507.22270). No plan is computed, at the price of pairs that count for little: `Pairs.effective_size` says
      how many are left, and a warning where they are fewer than 5. The formula was compared with the paper's abstract
      and a public implementation that is not its authors', which takes `cost="euclidean", relative=False`.
    - a function (noise, data) -> int64 `[m]`, the place of the noise of each of m data.

    Args:
        noise: `[n, *shape]`; None draws standard normal noise like the data.
        data: `[n, *shape]`, as many.
        coupling: one of those above.
        reg: the regularisation of "sinkhorn" and "gibbs", > 0.
        relative: reg is in units of the mean cost, of all pairs of a minibatch for "sinkhorn", of the pairs there are
            for "gibbs". False takes it as it is, as torchcfm does, the same in every batch.
        cost: c, "squared", the squared Euclidean distance of a noise and a datum, all features of them; or "euclidean",
            the distance.
        batch: the plan is that of so many at a time, drawn at random, and not of all n: a plan of m pairs takes m^2
            memory, and up to m^3 log m time. Of "ot", "sinkhorn" and functions.
        groups: integers `[n]`: noise is given to data of its own group alone, as one with the i-th noise in the group
            of the i-th datum. With labels it keeps the noise of every label normal; a network that knows the labels is
            sampled on such noise, and would otherwise be trained on another. Of the same couplings.
        generated: `[n, *shape]`, what a teacher makes of the noise, in whose place it goes into the cost: each datum
            has the noise of the generated sample that the plan moves to it. With "ot" that is the projection, in the
            Wasserstein distance, of the teacher's pairs onto those of the same noise and real data (the shadow of
            Eckstein and Nutz, arXiv 2110.06798). Simple ReFlow (arXiv 2410.07815) trains on projected pairs too; its
            own algorithm, which has a parameter, could not be compared. Of the same couplings.
        conditioning: keyword arguments of the student's network, tensors with a row for each datum, such as labels:
            `Pairs.conditioning`.
        generator: of all that is drawn, on the CPU; None is torch's own.

    Returns:
        Pairs: states `[2, n, *shape]`, float32 (float64 where one of the two is), weights, and the places of the noise.

    Raises:
        TypeError, ValueError: naming the argument, for sets of unequal sizes both.
        ImportError: where "ot" or "sinkhorn" needs POT (`pip install POT`) and it is not there.

    Examples:
        >>> noise, data = torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [4.0]])
        >>> fk.couple(noise, data, "ot").index
        tensor([1, 0])
        >>> pairs = fk.couple(None, torch.randn(64, 2), "sinkhorn", batch=32)
        >>> student = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> fk.StraightenLoss(fk.Schedule([0, 1]), target="reflow")(student, pairs.batch()).loss.backward()
    """
    plans = _expect_coupling(coupling)
    data = initial_state(expect_noise(data, "data"))
    generator = expect_generator(generator)
    how = Regularised(
        expect_real(reg, "reg", "a positive number", lambda a: a > 0),
        expect_bool(relative, "relative"),
        COSTS[expect_choice(cost, "cost", tuple(COSTS))],
    )
    noise = None if noise is None else initial_state(_expect_beside(noise, data, "noise"))
    size = len(data)
    for name, value in (("batch", batch), ("groups", groups), ("generated", generated)):
        expect(plans or value is None, name, f"None with coupling={coupling!r}", value)
    if batch is not None:
        size = min(size, expect_positive_int(batch, "batch"))
    if groups is not None:
        _expect_groups(groups, data)
    if generated is not None:
        generated = initial_state(_expect_beside(generated, data, "generated"))
    if conditioning is not None:
        expect_rows(conditioning, len(data), data.device)
    if isinstance(coupling, str) and plans:
        _pot(coupling)
        expect_room(3 * 8 * size * size, "batch", "costs and plans", f"{size} pairs at once")
    if noise is None:
        noise = torch.randn(data.shape, generator=generator, dtype=data.dtype, device="cpu").to(data.device)
    near = noise if generated is None else generated
    dtype = torch.promote_types(noise.dtype, data.dtype)
    weight, index = None, torch.arange(len(data), dtype=torch.int64, device=data.device)
    if plans:
        for rows in _parts(len(data), groups, size, generator):
            rows = rows.to(data.device)
            index[rows] = rows[_plan(coupling, near[rows], data[rows], how, generator)]
    elif coupling == GIBBS:
        weight = gibbs(noise, data, how).to(dtype)
    pairs = Pairs(torch.stack([noise[index].to(dtype), data.to(dtype)]), weight, conditioning, index)
    if (left := pairs.effective_size) < min(FEW, len(pairs) / 2):
        told = f"reg: {reg:g} gives a few pairs all the weight: the effective sample size is {left:.3g}"
        warn(f"{told} of {len(pairs)}; a larger reg evens them out", stacklevel=4)
    return pairs


def _plan(coupling: Coupling, near: Tensor, data: Tensor, how: Regularised, generator: torch.Generator) -> Tensor:
    """Of each of m data the place of its noise, int64 `[m]`, where they are."""
    m = len(data)
    if isinstance(coupling, str):
        near, data = near.flatten(1).double(), data.flatten(1).double()
        middle = data.mean(0)  # far from the origin, distances by a product of matrices cancel
        cost = _expect_costs(torch.cdist(near - middle, data - middle) ** how.power)
        return PLANS[coupling](cost.cpu(), how, generator).to(data.device)
    index = coupling(near, data)
    expected = f"a function (noise, data) that returns int64 [{m}], a place 0..{m - 1} for each datum"
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (m,):
        expect(False, "coupling", expected, describe(index))
    index = index.to(data.device)
    expect(bool(((index >= 0) & (index < m)).all()), "coupling", expected, "a place outside of them")
    return index


def _expect_costs(cost: Tensor) -> Tensor:
    finite = bool(torch.isfinite(cost.sum()))
    expect(finite, "data", "noise and data whose costs add up to a finite number", "an overflow of float64")
    return cost


def _parts(n: int, groups: Tensor | None, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of each minibatch, on the CPU: of one group, and drawn where there are several of it."""
    rows = torch.arange(n, dtype=torch.int64, device="cpu")
    if groups is None:
        of_group = [rows]
    else:
        groups = groups.cpu()
        of_group = [rows[groups == g] for g in groups.unique()]
    for rows in of_group:
        if len(rows) > size:
            rows = rows[torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu")]
        yield from rows.split(size)


def _expect_coupling(coupling) -> bool:
    """Whether it chooses the noise."""
    if isinstance(coupling, str):
        return expect_choice(coupling, "coupling", NAMES) in PLANS
    expect_takes(coupling, "coupling", f"{one_of(NAMES)} or a function (noise, data)", None, None)
    return True


def _expect_beside(noise, data: Tensor, name: str) -> Tensor:
    """Samples that are as many as the data, and like them."""
    expect_noise(noise, name)
    expect(len(noise) == len(data), name, f"{len(data)} samples, as many as the data", f"{len(noise)}")
    fits = noise.shape == data.shape and noise.device == data.device
    expect(fits, name, f"the data's shape {list(data.shape)} on {data.device}", noise)
    return noise


def _expect_groups(groups, data: Tensor) -> None:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    expect_values(groups, "groups", integers)
    expect(groups.shape == (len(data),), "groups", f"shape [{len(data)}], one for each pair", groups)


def _pot(coupling: str):
    """POT, which is imported here alone."""
    try:
        import ot

        return ot if ot.emd and ot.sinkhorn else None
    except Exception as e:  # what is broken in it included
        expected = f"POT for coupling={coupling!r} (pip install POT)"
        expect(False, "coupling", expected, f"{type(e).__name__}: {e}", ImportError)
