"""The entries of the benchmark: a module each in benchmarks/, which a wheel carries as flowkernels._benchmarks."""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType

import torch

from flowkernels.bench.case import Case
from flowkernels.models.bundled import BENCHMARKS
from flowkernels.ops.public import OPS

PACKAGE = "flowkernels._benchmarks"


def entries() -> tuple[str, ...]:
    """The modules that are there, those of ops in the ops' order, then the others. Packages, such as `quality`, hold
    no cases."""
    names = {module.name for module in pkgutil.iter_modules([str(BENCHMARKS)]) if not module.ispkg}
    return *(op for op in OPS if op in names), *sorted(names - set(OPS))


def module(name: str) -> ModuleType:
    """The module `name` of the suite, such as "bellman" or "quality.data"."""
    if PACKAGE not in sys.modules and BENCHMARKS.name == "benchmarks":  # a checkout, which is looked at first
        spec = importlib.util.spec_from_file_location(
            PACKAGE, BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
        )
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{name}")


def cases(entry: str, device: torch.device) -> list[Case]:
    """What the entry measures on the device; the inputs are made later."""
    return list(module(entry).cases(device))
