"""The whole pipeline on a GPU against the same on the CPU; the checks are in tests/_gpu_pipeline.py."""

import _gpu_pipeline
import pytest


@pytest.mark.parametrize("stage", _gpu_pipeline.STAGES)
def test_stage(stage, gpu):
    _gpu_pipeline.STAGES[stage](gpu)
