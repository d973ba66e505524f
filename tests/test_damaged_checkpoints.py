"""Training checkpoints that say what no training wrote: refused by name before anything of them is used."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from test_straighten import Stopped, small_net, stop_after, trained
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowkernels.training.run.checkpoint import SINCE_2
from flowkernels.velocity.hashes import tensors_hash

SETTINGS = dict(checkpoint_every=5, refresh=7, t_sampling="uniform", held_out=6, evaluate_every=3, patience=9)
LIKE = {  # another value of each type
    int: [-1, 0, 7, 2**40, 1.5, "5", None],
    float: [math.nan, 1, "1.0", None, [1.0]],
    str: ["", "another", 3, None],
    bool: ["yes", 1, None],
    type(None): [0, "none", [None], torch.ones(2)],
}


def write(path):
    student = small_net(1)
    student.register_forward_pre_hook(stop_after(13))
    with pytest.raises(Stopped):
        trained(student, checkpoint=path, **SETTINGS)


def resumed(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(small_net(5), checkpoint=path, **SETTINGS)


def places(value, at=()):
    """Where the parts of a checkpoint are."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def other_tensor(r, t: Tensor):
    wide = torch.cat([t.flatten(), t.flatten()[:1]]) if t.numel() else t.new_ones(1)
    return r.choice(
        [
            *(wide, t.flatten()[:-1], t.new_zeros(0), t[None], t.tolist(), None, t.flatten()[:1].expand(10**9)),
            *(t.double() if t.dtype != torch.float64 else t.float(), t.to(torch.bool), t.to(torch.complex64)),
            *(t.to(torch.int64) if t.dtype != torch.int64 else t.int(), t.to_sparse(), t.to("meta")),
        ]
    )


def changed(r, saved: dict, at) -> dict:
    """The checkpoint with another entry at a place."""
    saved = copy.deepcopy(saved)
    *path, last = at
    owner = saved
    for key in path:
        owner = owner[key]
    value, how = owner[last], r.randrange(4)
    if at[:2] in (("optimizer", "param_groups"), ("optimizer", "state")) and len(at) in (3, 4):
        how = 3  # settings that an earlier torch did not have; a parameter without a gradient has no state
    if how == 0 and isinstance(owner, dict):
        del owner[last]
    elif how == 1 and isinstance(owner, dict):
        owner[f"{last} " if isinstance(last, str) else last + 99] = owner.pop(last)
    elif isinstance(value, Tensor):
        owner[last] = other_tensor(r, value)
        while at[0] in ("average", "evaluations") and is_as_good(owner[last], value):
            owner[last] = other_tensor(r, value)
    else:
        nested = isinstance(value, (dict, list, tuple))
        others = [None, [], {}, 3, torch.ones(3), [value], {"x": value}] if nested else LIKE[type(value)]
        may_be_nan = "interval_loss" in at or at[0] == "evaluations"
        others = [v for v in others if repr(v) != repr(value) and not (repr(v) == "nan" and may_be_nan)]
        owner[last] = r.choice(others)
    return saved


def is_as_good(t, value) -> bool:
    """Of weights that are averaged, in a wider or narrower float."""
    return isinstance(t, Tensor) and t.shape == value.shape and t.is_floating_point() and t.layout is torch.strided


def is_free(at) -> bool:
    """Whether another value of the right type is as good as the one that is there."""
    return at[0] in ("bank_noise", "format") or at[:2] == ("setting", "attributes") or "lr" in at


def outcomes(folder: Path, count: int, seed: int) -> list[str]:
    """What is wrong with how changed checkpoints are taken, of `count` of each kind of file."""
    path, r, wrong = folder / "run.pt", random.Random(seed), []
    write(path)
    state = torch.load(path, weights_only=True)
    state.pop("sha256")
    where = [at for at in places(state) if at and not is_free(at)]
    setting = {k: v for k, v in state["setting"].items() if k not in (*SINCE_2, "attributes")}
    version_1 = {k: v for k, v in state.items() if k != "bank_noise"} | {"version": 1, "setting": setting}
    for i in range(count):
        at = where[i % len(where)] if count >= len(where) else r.choice(where)
        old = at[0] != "bank_noise" and (at[0] != "setting" or at[-1] in setting or len(at) == 1)
        known = version_1 if old and r.random() < 0.3 else state
        new = changed(r, known, at)
        if known is state:
            tensors = [t for t in tree_leaves(new) if isinstance(t, Tensor)]
            plain = all(t.device.type == "cpu" and t.numel() < 1e6 for t in tensors)
            new["sha256"] = tensors_hash(new) if plain else ""
        torch.save(new, path)
        print(i, at, file=sys.stderr, flush=True)
        try:
            resumed(path)
            wrong.append(f"{at}: accepted")
        except ValueError as e:
            if not str(e).startswith("checkpoint: ") or str(path) not in str(e):
                wrong.append(f"{at}: {e}")
        except Exception as e:
            wrong.append(f"{at}: {type(e).__name__}: {e}")
    return wrong


def test_entries_that_no_training_wrote(tmp_path):
    """With the checksum made right, in a process of its own: some of these ended the interpreter."""
    count = int(os.environ.get("FLOWKERNELS_DAMAGED", "60"))
    program = """
        import json, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import torch
        torch.set_num_threads(1)
        from test_damaged_checkpoints import outcomes
        print(json.dumps(outcomes(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*arguments, str(count), "7"], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


def test_weights_that_were_changed_afterwards_are_noticed(tmp_path):
    """In a file that is whole: all but its sum is as a training writes it."""
    write(path := tmp_path / "run.pt")
    saved = torch.load(path, weights_only=True)
    next(iter(saved["student"].values())).view(-1)[0] += 1
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*changed since it was written"):
        resumed(path)
