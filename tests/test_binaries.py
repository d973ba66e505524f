"""The machine code of the built kernels keeps the rules of csrc/<op>/rules.py; and the checks find what they should."""

import dataclasses
import itertools
import re
import subprocess
from importlib.metadata import version

import _host_cuda
import gpu_model
import pytest
import torch
from machine_code import binaries, rules
from machine_code.rules import Rule

from flowkernels.bench import suite

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
    found, loops, places = binaries.instructions(listing)
    assert found == ["MOV", "LDG.E.128", "FFMA", "BRA", "BRA", "EXIT", "BRA"]
    assert loops == [range(1, 4)]
    assert places == list(range(7))


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


def test_the_program_that_measures_rates_is_compiled(tmp_path):
    source = _host_cuda.ROOT / "scripts/gpu_rates.cu"
    binaries.run(_host_cuda.nvcc(), "-std=c++17", "-arch=sm_90a", "-c", "-o", tmp_path / "rates.o", source)


# ---- docs/gpu.md ----
TRITON = "## The Triton kernels"


def skeleton(text: str) -> list[str]:
    """Without what depends on the release of the compiler."""
    floors, _, compiled = text.partition("## What the kernels are expected to take")
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


def test_the_cases_are_those_that_a_gpu_is_given_first():
    for op, of_op in gpu_model.FLOORS.items():
        assert {f.case for f in of_op} <= {c.name for c in suite.cases(op, torch.device("cuda")) if c.main}


def test_floors():
    (a100,) = (g for g in gpu_model.GPUS if g.name.startswith("A100"))
    floor = rules.Floor("", dict(n=10**9, k=3), "n * 2 * k", "n * 5", "fp32", "n", "", "1", "")
    assert a100.seconds(floor) == (pytest.approx(6 / 2040), "memory")
    assert a100.seconds(dataclasses.replace(floor, computes="n * 195")) == (pytest.approx(0.01), "fp32")


# ---- the model ----
def control(stall: int, write: int = 7, read: int = 7, wait: int = 0) -> int:
    return stall | write << 5 | read << 8 | wait << 11


def modelled(registers: int = 64, loop: tuple = ("FFMA",) * 8, stall: int = 4, shared: int = 0) -> binaries.Kernel:
    """A kernel of one loop, in blocks of 256 threads."""
    among = [range(1, 1 + len(loop))]
    controls = [control(1), *(control(stall) for _ in loop)]
    return binaries.Kernel("k", "80", registers, 0, 0, shared, 256, ["MOV", *loop], among, controls)


def test_clocks():
    """Two loads that one instruction waits for, one after the other, and stores that read late."""
    kernel = dataclasses.replace(
        modelled(loop=("LDS", "LDS", "FFMA", "STS")),
        control=[0, control(2, write=0), control(1, write=1), control(4, wait=0b11), control(1, read=3)],
    )
    assert kernel.clocks(range(1, 5)) == 2 + 29 + 4 + 1
    assert kernel.clocks(range(3, 5)) == 5
    waiting = dataclasses.replace(kernel, control=[0, control(2, wait=8), *kernel.control[2:]])
    assert waiting.clocks(range(1, 5)) > 2 + 1 + 4 + 1  # the next turn begins with what the store has read
    assert kernel.code != waiting.code


@pytest.mark.parametrize(
    ("what", "by"),
    [
        (dict(computes="n * 4096"), "fp32"),
        (dict(moves="n * 4000"), "memory"),
        (dict(memory="n * 4000", l2="n"), "memory"),
        (dict(l2="n * 16000"), "L2"),
        (dict(shared="n * 40000"), "shared memory"),
        (dict(issues="n * 40 * FFMA"), "instructions"),
        (dict(launches=1000), "launches"),
    ],
)
def test_what_limits_a_model(monkeypatch, what, by):
    (a100,) = (g for g in gpu_model.GPUS if g.name.startswith("A100"))
    monkeypatch.setattr(rules, "cuda", lambda: [Rule("k", 255, 0)])
    floor = rules.Floor("", dict(n=1 << 20), "n", "n", "fp32", "n", "k", "ceil(n, 1024)", "n / 32 * FFMA")
    before, _ = a100.model(floor, [modelled()])
    after, found = a100.model(dataclasses.replace(floor, **what), [modelled()])
    assert found == by
    assert after > 2 * before


@pytest.mark.parametrize(
    "worse", [dict(registers=255), dict(shared=100 << 10), dict(stall=9), dict(loop=("IADD3",) * 12 + ("FFMA",) * 8)]
)
def test_a_model_sees_the_machine_code(monkeypatch, worse):
    (a100,) = (g for g in gpu_model.GPUS if g.name.startswith("A100"))
    monkeypatch.setattr(rules, "cuda", lambda: [Rule("k", 255, 0)])
    floor = rules.Floor("", dict(n=1 << 24), "n", "n", "fp32", "n", "k", "ceil(n, 1024)", "n * FFMA")
    assert a100.model(floor, [modelled(**worse)])[0] > 1.1 * a100.model(floor, [modelled()])[0]


def test_waves():
    """A block more than fit takes as long again as those."""
    (a100,) = (g for g in gpu_model.GPUS if g.name.startswith("A100"))
    (floor,) = (f for f in gpu_model.FLOORS["cost_from_gram"])
    took = [
        a100.model(dataclasses.replace(floor, blocks=str(blocks), issues=f"{blocks} * 3200 * DMUL"), kernels())[0]
        for blocks in (108, 109)
    ]
    assert took[1] > 1.8 * took[0]


def test_no_kernel_is_further_from_its_floor():
    """Each kernel's last row in benchmarks/results/gpu/model.csv, which gpu_model.py --write appends, less 5 %."""
    if gpu_model.history()[-1]["nvcc"] != (compiler := binaries.compiler(binaries.built())):
        pytest.skip(f"built by nvcc {compiler}")
    new = gpu_model.news(kernels())
    found = gpu_model.further(new)
    assert not found, "\n".join(found)
    assert not new, "python scripts/gpu_model.py --write docs/gpu.md"


def test_a_kernel_further_from_its_floor_is_found(monkeypatch, tmp_path):
    rows = gpu_model.news(kernels()) or gpu_model.history()[-3:]
    monkeypatch.setattr(gpu_model, "HISTORY", tmp_path / "model.csv")
    gpu_model.append(rows)
    again = [{**row, "fraction": str(0.96 * float(row["fraction"]))} for row in rows if row["fraction"]]
    assert gpu_model.further(again) == []
    lower = [{**row, "fraction": str(0.94 * float(row["fraction"]))} for row in again]
    assert len(gpu_model.further(lower)) == len(again) > 0


def test_the_history_grows_with_changes_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_model, "HISTORY", tmp_path / "model.csv")
    first = gpu_model.news(kernels())
    assert len(first) == len(gpu_model.cases()) * len(ARCHITECTURES)
    gpu_model.append(first)
    assert gpu_model.news(kernels()) == []
    changed = [dataclasses.replace(k, local=8) if k.name == first[0]["kernel"] else k for k in kernels()]
    new = gpu_model.news(changed)
    assert {row["arch"] for row in new} == {"80", "90", "100", "120"}
    gpu_model.append(new)
    assert gpu_model.history() == first + new


def test_measurements_stand_beside_the_model_of_what_was_measured(monkeypatch, tmp_path):
    (op, f), *_ = gpu_model.cases()
    monkeypatch.setattr(gpu_model, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_model, "HISTORY", tmp_path / "model.csv")
    row = next(r for r in gpu_model.news(kernels()) if r["op"] == op and r["case"] == f.case and r["gpu"] == "H200")
    row |= {"floor_us": "29", "model_us": "60"}
    gpu_model.append([row | {"commit": "abc"}, row | {"commit": "def", "code": "other", "model_us": "50"}])
    folder = tmp_path / "nvidia-h200-2026-11-29"
    folder.mkdir()
    source = "NVIDIA H200,580,{},2026-11-29"
    for commit, model, ratio, since in (("abc", 60, "2.05", ""), ("def", 50, "2.46", "yes")):
        (folder / "kernels.csv").write_text(
            "op,case,kernel,us,device,driver,commit,date\n"
            + "".join(
                f'{op},"{f.case}",{kernel},{us},{source.format(commit)}\n' for kernel, us in (("a", 100), ("b", 23))
            )
        )
        text = "\n".join(gpu_model.measured(kernels()))
        assert f"NVIDIA H200, driver 580, commit {commit}, 2026-11-29:" in text
        assert f"| {op} | {f.case} | 29 | {model} | 123 |  | {row['limit']} | {ratio} | 24% | {since} |" in text
        assert text.count(f"| {op} |") == 1


@pytest.mark.parametrize(
    ("row", "alone"),
    [
        (dict(host_us=300.0, looped_us=300.0, p50_us=20.0), True),
        (dict(host_us="", looped_us="", p50_us=3000.0), True),
        (dict(host_us="", looped_us=140.0, p50_us=130.0), True),
        (dict(looped_us=120.0, p50_us=80.0), False),
    ],
)
def test_times_that_hold_launches_are_not_the_device_s(row, alone):
    assert gpu_model.of_the_device(row) == alone
