"""Versions and hardware, as a report and every row of a benchmark state them."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from flowkernels._version import __version__
from flowkernels.runtime import backends


def environment() -> dict:
    """Versions and hardware, as a report states them."""
    extension = backends.extension()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "flowkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "safetensors": importlib.metadata.version("safetensors"),
        "matplotlib": importlib.metadata.version("matplotlib"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": extension.isa() if extension else None,
        "thread_runtime": Path(extension.thread_runtime()).name if extension else None,
        "compiled_module": "available" if extension else backends.extension_error(),
    }


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def provenance(device: torch.device) -> dict:
    """What every row says of where it comes from."""
    e = environment()
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu(device) else f"{e['cpu']}, {e['cores']} cores",
        "processor": torch.cuda.get_device_name(device) if is_gpu(device) else processor(e["instruction_set"]),
        "isa": e["instruction_set"],
        "cpu": e["cpu"],
        "torch": e["torch"],
        "python": e["python"],
        "flowkernels": __version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    } | (_of_the_gpu(device) if is_gpu(device) else {})


def _of_the_gpu(device: torch.device) -> dict:
    """Driver, CUDA runtime and clocks; what only nvidia-smi knows is empty where that is missing."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # CUDA_VISIBLE_DEVICES renumbers
    which = str(device.index or 0) if uuid is None else f"GPU-{uuid}".replace("GPU-GPU-", "GPU-")
    keys = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        query = ["nvidia-smi", f"--id={which}", f"--query-gpu={keys}", "--format=csv,noheader"]
        answer = subprocess.check_output(query, text=True, timeout=30).strip().split(", ")
        driver, sm, most, memory, power = answer
        clocks = f"SM {sm} of {most}, memory {memory}, power limit {power}"
    except (OSError, subprocess.SubprocessError, ValueError):
        driver = clocks = ""
    return {"driver": driver, "cuda": torch.version.cuda or "", "clocks": clocks}


def _commit() -> str:
    """Of the checkout that this file is in; "+" for changes on top; "" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno", "--", "csrc", "flowkernels"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


# (vendor, family) -> first model of a range and its microarchitecture; "" where no name is certain
_MICROARCHITECTURES = {
    ("AMD", 23): ((0x00, "Zen"), (0x30, "Zen 2")),
    ("AMD", 25): (
        *((0x00, "Zen 3"), (0x10, "Zen 4"), (0x20, "Zen 3"), (0x60, "Zen 4"), (0x80, "")),
        *((0xA0, "Zen 4"), (0xB0, "")),
    ),
    ("AMD", 26): ((0x00, "Zen 5"), (0x50, ""), (0x60, "Zen 5"), (0x80, "")),
    ("Intel", 6): (
        *((0x00, ""), (0x55, "Skylake-SP"), (0x56, ""), (0x6A, "Ice Lake-SP"), (0x6B, "")),
        *((0x8F, "Sapphire Rapids"), (0x90, ""), (0xAD, "Granite Rapids"), (0xAF, "")),
        *((0xCF, "Emerald Rapids"), (0xD0, "")),
    ),
}


def processor(isa: str | None) -> str:
    """The kind of this machine's CPU, such as "AMD Zen 3 (avx2)": maker, microarchitecture, instruction set."""
    found = _cpuinfo()
    vendor = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(found.get("vendor_id", ""), "")
    kind = _cpu_name()
    if vendor:
        family, model = int(found["cpu family"]), int(found["model"])
        names = [name for first, name in _MICROARCHITECTURES.get((vendor, family), ()) if first <= model]
        kind = f"{vendor} {names[-1]}" if names and names[-1] else f"{vendor} family {family} model {model}"
    elif "CPU part" in found:
        kind = f"{platform.machine()} implementer {found['CPU implementer']} part {found['CPU part']}"
    return f"{kind} ({isa or 'no compiled module'})"


def _cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What the system says of the first processor; nothing where it says nothing."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        lines = f.read().partition("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}
