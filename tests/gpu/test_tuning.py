"""`flowkernels tune` on a GPU: it ends, and what it writes is used. No speed is asserted."""

import json

import pytest
import torch

from flowkernels._files import sealed
from flowkernels.cli import main
from flowkernels.ops import triton_common, tuned
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.euler_step.triton_kernel import CONFIGS, SEARCH
from flowkernels.runtime import backends


@pytest.mark.parametrize("on", ["triton"])
def test_a_few_seconds(on, gpu, tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.json"
    assert main.main(["tune", "euler_step", "--minutes", "0.25", "--out", str(path)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "WRONG" not in out
    table = json.loads(path.read_text())
    config = table["configs"]["euler_step"]
    assert config.keys() == CONFIGS["euler_step"].keys()
    assert all(value in SEARCH["euler_step"][name] for name, value in config.items())
    assert table["times"]["euler_step"]["best_us"] > 0
    assert table["device"] == torch.cuda.get_device_name(gpu)

    # another than the shipped one, to see that it is taken
    table["configs"]["euler_step"] = other = {"BLOCK": 2048, "num_warps": 8}
    path.write_text(json.dumps(sealed(table)))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    caches = (tuned.asked, tuned.of_device)
    for cached in caches:
        cached.cache_clear()
    try:
        launch, seen = triton_common.launch, []

        def record(*args, config, **options):
            seen.append(config)
            launch(*args, config=config, **options)

        monkeypatch.setattr(triton_common, "launch", record)
        x = torch.randn(5000, device=gpu)
        with backends.backend(on):
            assert torch.equal(euler_step(x, x, 0.5), 1.5 * x)
        assert seen == [other]
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()
