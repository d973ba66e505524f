"""How far samples end from a teacher's."""

import pytest
import torch

from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.ops.samples import generator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (4, 1, 3, 2)])
def test_squared_distances(shape, dtype):
    g = generator(0)
    x, teacher = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    errors = endpoint_errors(x, teacher)
    assert errors.dtype == torch.float64
    differences = (x - teacher).double().reshape(len(x), -1)
    expected = [sum(d * d for d in row) for row in differences.tolist()]
    assert errors.tolist() == pytest.approx(expected, rel=1e-15 * x[0].numel())
    assert endpoint_error(x, teacher) == errors.mean().item()
    assert endpoint_error(x, x) == 0.0
