"""The machine code of the built kernels keeps the rules of csrc/<op>/rules.py; and the checks find what they should."""

import dataclasses
import itertools
import re
import subprocess
from importlib.metadata import version

import _host_cuda
import gpu_model
import pytest
from machine_code import binaries, rules
from machine_code.rules import Rule

ARCHITECTURES = {"80", "90a", "100", "120"}


def cuda_ops() -> list[str]:
    return [path.parent.name for path in (_host_cuda.ROOT / "csrc").glob("*/cuda.cu")]


def kernels():
    return binaries.read(binaries.built())


def test_every_kernel_keeps_its_rule():
    found = rules.problems(kernels(), rules.cuda())
    assert not found, "\n".join(found)


def test_every_kernel_is_there_for_every_architecture():
    archs = {}
    for k in kernels():
        archs.setdefault(k.name, set()).add(k.arch)
    assert [name for name, of in archs.items() if of != ARCHITECTURES] == []


def test_every_op_is_there():
    assert [op for op in cuda_ops() if not any(k.name.startswith(f"{op}_") for k in kernels())] == []


def test_a_module_is_read_as_its_cubins_one_by_one(tmp_path):
    paths = binaries.cubins(binaries.built(), tmp_path)
    with_code = [p for p in paths if any(name.startswith(".text.") for name, _ in binaries.sections(p.read_bytes()))]
    for path in sorted(with_code, key=lambda path: path.stat().st_size)[:3]:
        one_by_one = binaries.read_cubin(path)
        assert one_by_one
        assert all(k in kernels() for k in one_by_one)


# ---- the checks, on kernels that are not as they should be ----
BAD = """
__global__ void __launch_bounds__(128) fine_kernel(float* p) { p[threadIdx.x] *= 2.5f; }
__global__ void __launch_bounds__(128) array_kernel(float* p, int n) {
  float a[32];
  for (int i = 0; i < 32; i++) a[i] = p[i * n];
  for (int i = 0; i < n; i++) a[int(p[i]) & 31] += 1;
  for (int i = 0; i < 32; i++) p[i] = a[i];
}
__global__ void __launch_bounds__(128) literal_kernel(float* p) { p[threadIdx.x] *= 2.7; }
template <class T> __global__ void typed_kernel(T* p) { p[threadIdx.x] *= T(2.7); }
template __global__ void typed_kernel(double*);
__global__ void __launch_bounds__(1024) wide_kernel(float4* p) { p[threadIdx.x] = p[threadIdx.x + 1024]; }
__global__ void __launch_bounds__(128) shared_kernel(float* p) {
  __shared__ float s[128 * 64];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; i++) p[i] = s[threadIdx.x * i];
}
__global__ void __maxnreg__(24) spilling_kernel(float* p) {
  float a[64];
  #pragma unroll
  for (int i = 0; i < 64; i++) a[i] = p[i * 128];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; i++) p[i * 128 + 1] = a[i] * a[63 - i];
}
"""
ANY = dict(registers=255, occupancy=0.0)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.cu").write_text(BAD)
    binaries.run(_host_cuda.nvcc(), "-arch=sm_80", "-cubin", "-o", folder / "bad.cubin", folder / "bad.cu")
    return {k.name: k for k in binaries.read(str(folder / "bad.cubin"))}


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (Rule("fine_kernel", 16, 1.0, has="LDG STG>=1 LDG.128<=0"), None),
        (Rule("fine_kernel", 4, 1.0), r"\d+ registers, more than 4"),
        (Rule("fine_kernel", **ANY, has="LDG.128"), r"0 LDG.128, wanted LDG.128"),
        (Rule("fine_kernel", **ANY, has="HMMA>=2"), r"0 HMMA, wanted HMMA>=2"),
        (Rule("fine_kernel", 16, 0.5, dynamic=40 << 10), r"occupancy 25% \(by shared memory\), less than 50%"),
        (Rule("fine_kernel", 16, {80: 0.5, 90: 1.0}, {80: 40 << 10, 90: 0}), r"occupancy 25%.*, less than 50%"),
        (Rule("fine_kernel", 16, {80: 0.25, 90: 1.0}, {80: 40 << 10, 90: 0}), None),
        (Rule("fine_kernel", 16, 1.0, threads=32), r"occupancy 50% \(by blocks\), less than 100%"),
        (Rule("array_kernel", **ANY), r"128 bytes of stack, 0 of local memory, \d+ accesses to it"),
        (Rule("spilling_kernel", **ANY), r"[1-9]\d* bytes of stack"),
        (Rule("literal_kernel", **ANY), r"[1-9]\d* double-precision instructions"),
        (Rule("literal_kernel", **ANY, double=True), None),
        (Rule("typed_kernel<double>", **ANY), None),
        (Rule("wide_kernel", **ANY, has="LDG.128 STG.128"), None),
        (Rule("wide_kernel", **ANY, has="STG.128<=0"), r"1 STG.128, wanted STG.128<=0"),
        (Rule("shared_kernel", 255, 0.31, has="LDS STS BAR"), r"occupancy 25%"),
    ],
)
def test_checks(bad, rule, problem):
    found = rules.problems([bad[rule.name]], [rule])
    assert len(found) == (problem is not None), found
    assert not found or re.search(f"^sm_80 {re.escape(rule.name)}: {problem}", found[0])


def test_checks_of_rules_and_counts(bad):
    fine = bad["fine_kernel"]
    rule = Rule("fine_kernel", **ANY)
    assert rules.problems([fine], []) == ["sm_80 fine_kernel: 0 rules"]
    assert rules.problems([fine], [rule, rule]) == ["sm_80 fine_kernel: 2 rules"]
    assert rules.problems([fine], [rule, Rule("other", **ANY)]) == ["rule other: no such kernel"]
    invented = dataclasses.replace(
        fine, instructions=["HMMA.16816.F32.BF16", "LDSM.16.M88.4", "F2F.F32.F64", "MUFU.RCP64H"]
    )
    assert [invented.count(what) for what in ("HMMA", "LDSM", "LDG", "FP64")] == [1, 1, 0, 2]
    assert bad["shared_kernel"].shared == 32 << 10
    assert (bad["wide_kernel"].threads, fine.threads) == (1024, 128)
    assert bad["array_kernel"].hot_loop is not None


def test_names():
    unnamed = "_ZN2fk4cuda39_GLOBAL__N__03d58b6f_7_cuda_cu_d0e51c6a17mlp_sample_kernelINS1_3MmaILi1EEELb1EEEvNS1_3RunE"
    named = "_ZN2fk4cuda17euler_step_kernelIf6__halffLb0ELi8EEEvPKT_PKT0_S8_PS3_PT1_liS3_S3_"
    expected = ["mlp_sample_kernel<Mma<1>, true>", "euler_step_kernel<float, __half, float, false, 8>", "plain"]
    assert binaries.demangle([unnamed, named, "plain"]) == expected


def test_hot_loop():
    listing = """
.L_x_0:
        /*0000*/   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/   LDG.E.128 R4, [R2.64] ;
        /*0020*/   FFMA R3, R4, R5, R3 ;
        /*0030*/   @!P0 BRA `(.L_x_1) ;
        /*0040*/   @P1 BRA `(.L_x_0) ;
        /*0050*/   EXIT ;
.L_x_2:
        /*0060*/   BRA `(.L_x_2) ;
        /*0070*/   NOP ;
"""
    found, loops = binaries.instructions(listing)
    assert found == ["MOV", "LDG.E.128", "FFMA", "BRA", "BRA", "EXIT", "BRA"]
    assert loops == [range(1, 4)]


OCCUPANCY = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int sm, registers, shared, threads, memory, warps;
  while (scanf("%d %d %d %d %d %d", &sm, &registers, &shared, &threads, &memory, &warps) == 6) {
    cudaOccDeviceProp p{};
    p.computeMajor = sm / 10, p.computeMinor = sm % 10, p.maxThreadsPerBlock = 1024, p.warpSize = 32, p.numSms = 100;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.maxThreadsPerMultiprocessor = warps * 32;
    p.sharedMemPerBlock = 48 << 10, p.sharedMemPerMultiprocessor = memory;
    p.sharedMemPerBlockOptin = memory - 1024, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a{};
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.maxDynamicSharedSizeBytes = 1 << 20, a.numBlockBarriers = 1;
    a.partitionedGCConfig = PARTITIONED_GC_OFF, a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState s{};
    cudaOccResult r{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared)) return 1;
    printf("%d ", r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_what_nvidia_reckons(tmp_path):
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    binaries.run(_host_cuda.nvcc(), "-w", "-o", tmp_path / "occupancy", tmp_path / "occupancy.cpp")
    cases = list(
        itertools.product(binaries.MULTIPROCESSORS, (16, 40, 41, 128, 168, 255), (0, 1000, 32768, 90000), (32, 96, 256))
    )
    lines = []
    for sm, registers, shared, threads in cases:
        warps, _, memory = binaries.MULTIPROCESSORS[sm]
        lines.append(f"{sm} {registers} {shared} {threads} {memory} {warps}")
    expected = subprocess.run(
        tmp_path / "occupancy", input="\n".join(lines), capture_output=True, text=True, check=True
    )
    got = [binaries.occupancy(*case)[0] for case in cases]
    assert got == list(map(int, expected.stdout.split()))


# ---- docs/gpu.md ----
TRITON = "## The Triton kernels"


def skeleton(text: str) -> list[str]:
    """Without what depends on the release of the compiler."""
    floors, _, compiled = text.rpartition("## One kernel of each op")
    plain = [line for line in floors.splitlines() if not line.startswith("Compiled by")]
    of_kernels = [line for line in compiled.splitlines() if not line.startswith("Compiled by")]
    return plain + [line.split(" | ")[0] if line.startswith("|") else line for line in of_kernels]


def test_document_is_up_to_date():
    """Written by `python scripts/gpu_model.py --write docs/gpu.md`."""
    written, now = (_host_cuda.ROOT / "docs/gpu.md").read_text(), gpu_model.document()
    compilers = f"nvcc {binaries.compiler(binaries.built())}.", f"Triton {version('triton')},"
    for compiler, old, new in zip(compilers, written.split(TRITON), now.split(TRITON), strict=True):
        line = f"\nCompiled by {compiler}"
        assert line in new
        assert old == new if line in old else skeleton(old) == skeleton(new)


def test_every_op_has_a_floor(monkeypatch):
    assert set(gpu_model.FLOORS) == set(cuda_ops())
    assert all(gpu_model.FLOORS.values())
    unknown = dataclasses.replace(gpu_model.FLOORS["euler_step"][0], kernel="other_kernel")
    monkeypatch.setattr(gpu_model, "FLOORS", {"euler_step": [unknown]})
    with pytest.raises(RuntimeError, match=r"no such kernel: \['other_kernel'\]"):
        gpu_model.document()


def test_floors():
    (a100,) = (g for g in gpu_model.GPUS if g.name.startswith("A100"))
    floor = rules.Floor("", dict(n=10**9, k=3), "n * 2 * k", "n * 5", "fp32", "")
    assert a100.seconds(floor) == (pytest.approx(6 / 2040), "memory")
    assert a100.seconds(dataclasses.replace(floor, computes="n * 195")) == (pytest.approx(0.01), "fp32")
