"""LoRA where peft is not installed: named, before any work; nothing else asks for it."""

import sys

import pytest
from torch import nn

import flowkernels as fk


def test_adapters_name_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora: expected peft to be installed \(pip install 'flowkernels\[lora\]'\)"):
        fk.add_lora(nn.Linear(8, 8), 2)
    evaluated = []

    class Net(nn.Linear):
        def forward(self, x, t):
            evaluated.append(1)
            return super().forward(x)

    with pytest.raises(ImportError, match="lora: expected peft to be installed"):
        fk.straighten(None, Net(8, 8), fk.Schedule.uniform(2), noise=(8,), iterations=1, grid=2, lora=2)
    assert not evaluated
    with pytest.raises(TypeError, match=r"lora: expected a rank, a peft\.LoraConfig, .* got 2\.5"):
        fk.add_lora(nn.Linear(8, 8), 2.5)
    with pytest.raises(ValueError, match="student: expected a network with an adapter of peft's"):
        fk.save_lora(nn.Linear(8, 8), "folder")
    with pytest.raises(ValueError, match="student: expected a network with adapters of peft's"):
        fk.without_adapters(nn.Linear(8, 8))
