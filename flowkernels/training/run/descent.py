"""Steps down a loss, of which none is taken after a loss or gradient that is not finite.

On the CPU each is looked at as it is there. Of a GPU that would wait for its queue in every iteration: there what is
known stays on the device, where a loss that is not finite holds back the steps from its own on, and is read now and
then, such as where the history has a row.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.runtime.sharded import is_sharded, local
from flowkernels.runtime.torch_private import norms_of_each, scale_each_

SKIPPING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)  # with fused=True


class Descent:
    """An optimiser's steps along gradients whose norm is at most `clip`.

    A step that is held back changes neither weights nor the optimiser's state with torch's fused Adam, AdamW, SGD and
    Adagrad, which have a switch for it on the device. Of others on a GPU the weights are kept beside, once, and put
    back as `read` finds that a step was bad; what their state and averages have become is of no use then.

    Args:
        optimizer: of the parameters, or some of them: the gradients of the others do not count.
        clip: largest norm of the gradient, or None.
        iteration: that of the first step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None, iteration: int = 0
    ):
        self.optimizer, self.clip = optimizer, clip
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.parameters = [p for p in parameters if id(p) in stepped]
        self.others = [p for p in parameters if id(p) not in stepped]
        self.done, device = iteration, parameters[0].device  # done: steps that were read
        self.waits = has_queue(device)
        if self.waits:
            self.seen: Tensor | None = None  # [2], loss and norm of the last step, or of the first that is not finite
            self.fine = torch.ones((), dtype=torch.bool, device=device)
            self.count = torch.zeros((), dtype=torch.int64, device=device)  # steps since `read`, to that and with it
            self.skips = skips(optimizer)
            self.kept = [] if self.skips else [p.detach().clone() for p in self._stepped()]
        else:
            self.last = math.nan, math.nan

    def step(self, losses: Iterable[Tensor]) -> None:
        """One step down the sum of losses `[]`, each of which goes back before the next is computed; on the CPU
        ValueError, as `read`, before the weights change."""
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.others:
            p.grad = None
        loss = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)
        for part in losses:
            part.backward()
            loss = loss + part.detach().to(loss.device)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = norm_of(grads, loss.device)
        if self.waits:
            self._note(loss, norm)
            if self.clip is not None:
                scale(grads, self.clip, norm)
            self._step_if_fine()
            return
        self.last = loss.item(), norm.item()
        self._expect_finite(*self.last)
        if self.clip is not None and self.last[1] > 0.99 * self.clip:  # else it would be times 1
            scale(grads, self.clip, norm)
        self.optimizer.step()
        self.done += 1

    def read(self) -> tuple[float, float]:
        """(loss, norm of the gradient before it was clipped) of the last step.

        ValueError, naming the first iteration, for NaN or Inf in either since the last call; the weights are those
        before its step.
        """
        if self.waits and self.seen is not None:
            loss, norm = self.last = tuple(self.seen.cpu().tolist())
            steps = int(self.count)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                with torch.no_grad():
                    for p, before in zip(self._stepped() if self.kept else (), self.kept, strict=True):
                        p.copy_(before)
                self.done += steps - 1
            self._expect_finite(loss, norm)
            self.done += steps
            self.count.zero_()
        return self.last

    @torch.no_grad()
    def _note(self, loss: Tensor, norm: Tensor) -> None:
        wide = torch.promote_types(loss.dtype, norm.dtype)
        now = torch.stack([loss.detach().to(wide), norm.to(loss.device, wide)]).to(self.fine.device)
        if not self.skips:  # a copy of the last weights that were fine
            for p, before in zip(self._stepped(), self.kept, strict=True):
                torch.where(self.fine.to(p.device), p, before, out=before)
        self.count += self.fine
        self.seen = now if self.seen is None else torch.where(self.fine, now, self.seen)
        self.fine = (self.seen * 0 == 0).all()

    def _step_if_fine(self) -> None:
        if not self.skips:
            self.optimizer.step()
            return
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.fine.logical_not().float()
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf

    def _stepped(self) -> list[Tensor]:
        return [local(p) for group in self.optimizer.param_groups for p in group["params"]]

    def _expect_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            got = f"loss {loss}, gradient norm {norm} at iteration {self.done}"
            expect(False, "student", "a finite loss and gradient (a smaller lr?)", got)


def has_queue(device: torch.device) -> bool:
    """Whether reading a value waits for what is computed before."""
    return device.type != "cpu"


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is none where its attribute `found_inf`, a tensor on the device, is 1, as GradScaler has it."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in SKIPPING and fused


def norm_of(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Of all of them as one vector, `[]`, of sharded ones with all shards; on a device, where there are none."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=device)
    sharded = [t for t in tensors if is_sharded(t)]
    if not sharded:
        return _norm_of_plain(tensors)
    meshes: dict[Any, list[Tensor]] = {}
    for t in sharded:
        meshes.setdefault(t.device_mesh, []).append(t)
    norms = [torch.linalg.vector_norm(torch.stack(norms_of_each(there))).full_tensor() for there in meshes.values()]
    if len(sharded) < len(tensors):
        norms.append(_norm_of_plain([t for t in tensors if not is_sharded(t)]))
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))


def _norm_of_plain(tensors: list[Tensor]) -> Tensor:
    norms = norms_of_each(tensors)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def scale(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Make their norm `most` where it is larger, as `nn.utils.clip_grad_norm_` does."""
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in gradients:
        by_device.setdefault(g.device, []).append(local(g))
    for device, there in by_device.items():
        scale_each_(there, factor.to(device))
