"""The Python of README.md and docs/, run as it stands there, on small networks and with small numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk

ROOT = Path(__file__).parents[1]


class Policy(nn.Module):
    """Of a state of four features, with an observation."""

    def __init__(self, features=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features + 4, 16), nn.SiLU(), nn.Linear(16, features))

    def forward(self, x, t, obs=None):
        obs = x.new_zeros(len(x), 3) if obs is None else obs
        return self.body(torch.cat([x, (t / 1000)[:, None], obs], 1))


def blocks(page):
    """The indented blocks of a page that are Python of this library."""
    text = (ROOT / page).read_text()
    found = re.findall(r"(?:^    .+\n(?:\n(?=    ))?)+", text, re.MULTILINE)
    code = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]
    return [block for block in code if re.search(r"\bfk\.\w+\(", block)]


SMALLER = {"iterations=5000": "iterations=2", "noise=(3, 32, 32)": "noise=(4,)", "grid=100": "grid=24", "100)": "12)"}


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/fused-samplers.md", 1)])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_code_runs(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    features = 4 if page == "README.md" else 64
    names = dict(net=Policy(features).eval(), noise=normal(16, features), policy=Policy(64).eval(), torch=torch, nn=nn)
    names |= dict(obs=normal(16, 3), zeros=torch.zeros(1, 3), next_obs=normal(16, 3, seed=1), fk=fk, np=np)
    found = blocks(page)
    assert len(found) == count
    if page != "README.md":
        names["cal"] = {4: fk.Schedule([0, 0.2, 0.4, 0.7, 1])}
    for code in found:
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(compile(code, page, "exec"), names)
    result = names["x1"] if page == "README.md" else names["actions"]
    assert result.shape == names["noise"].shape
    assert result.isfinite().all()
