"""Samples on another device keep how they lie in memory."""

import pytest
import torch
from _contract import identical
from _gpu_checks import tensors_in

from flowkernels.ops.public import OPS
from flowkernels.ops.samples import moved, op_args, samples_of

CPU = torch.device("cpu")


def layout(t):
    return t.dtype, t.shape, t.stride(), t.storage_offset(), t.untyped_storage().nbytes()


@pytest.mark.parametrize("op", OPS)
def test_moved_samples_are_laid_out_as_they_were(op):
    for sample in samples_of(op).sample_inputs():
        there = moved(sample, CPU)
        before, after = (tensors_in(op_args(op, s)) for s in (sample, there))
        assert len(before) == len(after) > 0
        for a, b in zip(before, after, strict=True):
            assert layout(a) == layout(b)
            assert identical(a, b)
            assert not a.numel() or a.data_ptr() != b.data_ptr()
            assert a.data_ptr() % 16 == b.data_ptr() % 16
        assert there.id == sample.id
        assert there.kwargs.keys() == sample.kwargs.keys()


def test_tensors_that_share_memory_still_do():
    memory = torch.arange(10.0)
    a, b = moved([memory[1:4], memory[::2]], CPU)
    a[1] = 7
    assert b.tolist() == [0, 7, 4, 6, 8]
    assert memory[2] == 2


def test_a_tensor_in_two_places_is_one_tensor_still():
    t = torch.ones(3)
    a, b, c = moved((t, [t], torch.ones(3)), CPU)
    assert a is b[0] is not c
    assert a is not t


def test_moving_leaves_what_lies_between():
    wide = torch.full((3, 5), torch.nan)
    wide[:, 1:3] = 1
    t = moved(wide[:, 1:3], CPU)
    assert t.as_strided((15,), (1,), 0).isnan().sum() == 9


def test_settings_are_not_touched():
    given = dict(low=torch.bfloat16, b=[0.5, 1.0], name=None, pair=(1, "x"))
    assert moved(given, CPU) == given
