"""Triton kernels compiled for sm_80 and run on the host: their PTX, translated (csrc/host_cuda/ptx_to_cpp.py).

    python tests/_triton_ptx.py [kernels] [OP...]

runs the kernels of _triton_kernels.py and the sample inputs of ops with the Triton backend, and prints a line of JSON
for each, with its error and bound. A process of its own: Triton decides between its interpreter and its compiler when
it is imported. `drive()` gives Triton a driver whose GPU is the emulation, so that `kernel[grid](...)` compiles,
specialises and launches as on a GPU, on tensors in host memory.
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import _host_cuda
import torch

import flowkernels as fk

TARGET, SHARED = ("cuda", 80, 32), 99 << 10  # what a block may have: the emulation's limit, that of every target
SCALARS = dict(i1="int8", u1="uint8", fp32="float", fp64="double")
SCALARS |= {f"{kind[0]}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)}

launches = 0


def _flat(types, values):
    """Pairs of a type and a value, without what is compiled in."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def extent(t: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the memory that a tensor's elements lie in."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size() if t.numel() else 0


class Launcher:
    def __init__(self, source, metadata):
        self.types, self.metadata = tuple(source.signature.values()), metadata
        if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name}: clusters and scratch memory are not emulated")

    def __call__(self, x, y, z, stream, library, packed, launch_metadata, enter, leave, *arguments):
        global launches
        values, memory = [], []
        for kind, value in _flat(self.types, arguments):
            if kind.startswith("*"):
                values.append(ctypes.c_void_p(value.data_ptr()))
                memory.append(extent(value))
            else:
                values.append(getattr(ctypes, f"c_{SCALARS[kind]}")(value))
        values += [ctypes.c_void_p(), ctypes.c_void_p()]  # Triton's scratch memory, global and of a profiler
        if x * y * z:
            launches += 1
            threads = self.metadata.num_warps * self.metadata.warp_size
            library.launch(self.metadata.name, (x, y, z), (threads,), self.metadata.shared, *values, memory=memory)


class Driver:
    """Of Triton's driver, what compiling and launching ask for."""

    launcher_cls = Launcher

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.utils, self.libraries = GPUTarget(*TARGET), self, {}

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return dict(max_shared_mem=SHARED, multiprocessor_count=108)

    def load_binary(self, name, ptx, shared, device):
        """Module, function, registers, spills, threads at most: of these the function is what a launch gets."""
        if ptx not in self.libraries:
            self.libraries[ptx] = _host_cuda.PtxLibrary(ptx.decode())
        return None, self.libraries[ptx], 0, 0, 1024

    def unload_module(self, module):
        pass


def drive() -> Driver:
    """From now on Triton compiles for sm_80, as far as PTX, and launches on the emulation."""
    import triton
    from triton.runtime import driver

    def stages(backend=None, stages=None, *_):
        if stages is None:
            return "ptx", "ptx"  # of the key of Triton's cache
        stages["cubin"] = lambda ptx, metadata: ptx.encode()

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels are Python, and there is no PTX")
    triton.knobs.runtime.add_stages_inspection_hook = stages
    driver.set_active(emulation := Driver())
    return emulation


def row(of: str, name: str, call) -> dict:
    """What came of a call that returns an error and its bound, as JSON holds it."""
    before = launches
    try:
        error, bound = call()
        failed = None
    except Exception as e:
        error = bound = 0.0
        failed = "".join(traceback.format_exception(e))
    return dict(of=of, id=name, error=float(error), bound=float(bound), failed=failed, launches=launches - before)


def run_op(op: str) -> Iterator[dict]:
    """Every sample input of an op, twice: threads forward and copies late, and backward and at once."""
    from _contract import identical

    from flowkernels.runtime import backends

    samples = importlib.import_module(f"flowkernels.ops.{op}.samples")

    def call(sample):
        results = []
        for order, async_lazy in (("forward", True), ("reverse", False)):
            _host_cuda.ptx_order(order, async_lazy)
            with backends.backend("triton"):
                results.append(getattr(fk, op)(*sample.args, **sample.kwargs))
        if not identical(*results):
            raise AssertionError("threads in another order give other bits")
        return samples.error_and_bound(sample, results[0])

    with patch.object(backends, "_why_not_triton", lambda device: None):  # the emulation's GPU has CPU tensors
        for sample in samples.sample_inputs():
            # nothing to launch: no elements, or no increments of a single velocity
            empty = any(t.numel() == 0 for t in sample.args if isinstance(t, torch.Tensor)) or (
                op == "velocity_gram" and "x" not in sample.kwargs and len(sample.args[0]) == 1
            )
            yield row(op, sample.id, functools.partial(call, sample)) | dict(empty=empty)


if __name__ == "__main__":
    os.environ |= dict(TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1", FLOWKERNELS_TRITON_CONFIGS="")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    gc.disable()  # it would look again and again at all that torch and Triton import
    torch.use_deterministic_algorithms(True)  # every torch.empty holds NaN, or the largest integer
    drive()
    for of in sys.argv[1:]:
        if of == "kernels":
            import _triton_kernels

            found = (row(of, name, case) for name, case in _triton_kernels.CASES.items())
        else:
            found = run_op(of)
        for r in found:
            print(json.dumps(r), flush=True)
