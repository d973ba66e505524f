"""How far samples end from a teacher's, from equal noise."""

from torch import Tensor


def endpoint_errors(x: Tensor, teacher: Tensor) -> Tensor:
    """Squared L2 distance of each sample from the teacher's; float64 `[n]`.

    x, teacher: endpoints `[n, *shape]`, floating point, on one device; subtracted in their own dtype.
    """
    return (x - teacher).double().square().flatten(1).sum(1)


def endpoint_error(x: Tensor, teacher: Tensor) -> float:
    """The mean of `endpoint_errors` over samples."""
    return endpoint_errors(x, teacher).mean().item()
