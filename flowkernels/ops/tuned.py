"""The tables that `flowkernels tune` writes: configurations of Triton kernels that were fastest on one kind of GPU.

The table of a GPU is read at the first launch on it: the file that FLOWKERNELS_TRITON_CONFIGS names, none if that is
empty, else one in the user's cache, named after the GPU. What a table does not have stays as it is shipped.
"""

import functools
import importlib
import logging
import os
import re
from pathlib import Path

import torch

from flowkernels._checks import expect
from flowkernels._files import SUM, damaged, digest, expect_unchanged, read_json, warn_of_no_sum

FORMAT = 1
VARIABLE = "FLOWKERNELS_TRITON_CONFIGS"
log = logging.getLogger("flowkernels")


@functools.cache
def asked() -> str | None:
    """What FLOWKERNELS_TRITON_CONFIGS names; read once a process."""
    return os.environ.get(VARIABLE)


def default_path(gpu: str) -> Path:
    """The table in the user's cache for GPUs of this name."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as its specification has it
        cache = os.path.expanduser("~/.cache")
    return Path(cache) / "flowkernels" / f"triton-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def kernels(op: str) -> tuple[dict, dict]:
    """CONFIGS and SEARCH of an op."""
    module = importlib.import_module(f"flowkernels.ops.{op}.triton_kernel")
    return module.CONFIGS, module.SEARCH


def read(path: str | Path, gpu: str) -> dict:
    """A table for GPUs of this name; ValueError says which entry is not as expected."""
    wanted = "a table of `flowkernels tune`"
    try:
        table = read_json(path, str(path), wanted)
    except OSError as e:
        raise ValueError(f"{path}: expected {wanted}, got {type(e).__name__}: {e}") from e
    expect(isinstance(table, dict), str(path), wanted, table)
    for entry, expected in (("format", FORMAT), ("device", gpu)):
        same = type(table.get(entry)) is type(expected) and table[entry] == expected
        expect(same, f"{path}: {entry}", repr(expected), table.get(entry))
    with damaged(str(path), wanted, path):
        found = digest(table)
        if SUM in table:
            expect_unchanged(table[SUM], found)
    for entry in ("configs", "times"):
        expect(isinstance(table.get(entry, {}), dict), f"{path}: {entry}", "an object", table.get(entry))
    configs = table.get("configs")
    expect(isinstance(configs, dict), f"{path}: configs", "configurations by kernel", configs)
    known = _known()
    for kernel, config in configs.items():
        entry = f"{path}: configs.{kernel}"
        expect(kernel in known, entry, "a kernel with a configuration", f"{kernel!r}, which is none")
        _expect_config(config, entry, *known[kernel])
    if SUM not in table:
        warn_of_no_sum(path)
    return table


def _known() -> dict[str, tuple[dict, dict]]:
    """Of each kernel its shipped configuration, and what is tried."""
    from flowkernels.ops.public import OPS

    return {kernel: (configs[kernel], search.get(kernel, {}))
            for configs, search in map(kernels, OPS) for kernel in configs}  # fmt: skip


def _expect_config(config, entry: str, shipped: dict, search: dict) -> None:
    """The names and values that `flowkernels tune` tries: a kernel may take no others."""
    expect(isinstance(config, dict), entry, f"values of {', '.join(shipped)}", config)
    for name in shipped:
        expect(name in config, f"{entry}.{name}", "a value", "none")
    for name, value in config.items():
        values = list(dict.fromkeys((*([shipped[name]] if name in shipped else []), *search.get(name, ()))))
        expect(bool(values), f"{entry}.{name}", f"one of {', '.join(shipped | search)}", f"{name!r}")
        fits = any(type(value) is type(v) and value == v for v in values)  # true is no 1
        expect(fits, f"{entry}.{name}", f"one of {', '.join(map(repr, values))}", value)


@functools.cache
def of_device(index: int) -> dict[str, dict]:
    """The table's configurations for this GPU. A file that was asked for has to be one; in the cache one that is not
    is left out, with a warning."""
    gpu = torch.cuda.get_device_name(index)
    if asked() is not None:
        return read(asked(), gpu)["configs"] if asked() else {}
    path = default_path(gpu)
    if not path.exists():
        return {}
    try:
        configs = read(path, gpu)["configs"]
    except ValueError as e:
        log.warning("shipped configurations of Triton kernels are used: %s", e)
        return {}
    log.debug("configurations of Triton kernels: %s", path)
    return configs


def in_words() -> str:
    """Where configurations come from, for each kind of GPU here: a line to read."""
    if asked() == "":
        return f"shipped ({VARIABLE} is empty)"
    gpus = dict.fromkeys(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    if not gpus:
        return "shipped (there is no GPU)" if asked() is None else f"{asked()} on a GPU, of {VARIABLE}"
    return "; ".join(map(_of_gpu, gpus))


def _of_gpu(gpu: str) -> str:
    path = default_path(gpu) if asked() is None else asked()
    if asked() is None and not path.exists():
        return f"shipped (there is no {path})"
    try:
        table = read(path, gpu)
    except (ValueError, ImportError) as e:  # or Triton is missing
        return f"shipped ({e})" if asked() is None else f"none: {e}"
    return f"{path}, of {table.get('date')}, for {len(table['configs'])} kernels"
