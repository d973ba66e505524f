"""`axpy`: by hand."""

import pytest
import torch

import flowkernels as fk


def test_by_hand():
    assert fk.axpy(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]), 0.5).tolist() == [2.5, 0.0]


def test_bad_input():
    with pytest.raises(ValueError, match=r"^y: "):
        fk.axpy(torch.ones(2), torch.ones(3), 0.5)
