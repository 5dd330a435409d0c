"""The checks of compiled kernels and of the CUDA build: they must fail on what they look for."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / ".ci"))
import check_cuda_build
import check_kernels

NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin" + os.pathsep + os.environ["PATH"])
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

REPORT = """
ptxas info    : 272 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPd' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 512 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5spillPd' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPd
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 32 bytes cumulative stack size
ptxas info    : Function properties for _Z6calledd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SASS = """
                Function : _Z5cleanPd
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 STG.E desc[UR4][R2.64], R5 ; /* 0x0000000502007986 */
                Function : _Z5spillPd
        /*0210*/                   STL [R1+0x110], R13 ;        /* 0x0001100d01007387 */
        /*0220*/               @P1 LDL.64 R2, [R1] ;            /* 0x0000000001027983 */
"""


def compilation(**changes: object) -> object:
    arguments = {
        "source": Path("a.cu"),
        "architecture": "90a",
        "seconds": 1.0,
        "output": "",
        "failed": False,
        **changes,
    }
    return check_kernels.Compilation(**arguments)


def test_report_of_ptxas() -> None:
    usages = check_kernels.read_usages(REPORT, "90a")
    found = [(u.name, u.registers, u.shared_bytes, u.spill_bytes, u.stack_bytes) for u in usages]
    assert found == [
        ("_Z5cleanPd", 30, 512, 0, 0),
        ("_Z5spillPd", 255, 0, 20, 32),
        ("_Z6calledd", None, 0, 0, 0),
    ]


def test_local_memory_in_machine_code() -> None:
    assert check_kernels.read_local_accesses(SASS) == {"_Z5cleanPd": 0, "_Z5spillPd": 2}


def test_failures_name_what_and_where() -> None:
    usages = check_kernels.read_usages(REPORT, "90a")
    names = check_kernels.demangle((usage.name for usage in usages), {})
    both = [
        compilation(
            architecture=architecture,
            usages=usages,
            local_accesses=check_kernels.read_local_accesses(SASS),
        )
        for architecture in ("80", "90a")
    ]
    assert check_kernels.failures(both, names) == [
        "a.cu: spill spills 20 bytes of registers (sm_80, sm_90a)",
        "a.cu: spill has a stack frame of 32 bytes (sm_80, sm_90a)",
        "a.cu: spill holds 2 LDL or STL (sm_80, sm_90a)",
    ]
    slow = "ptxas info : (C7510) Potential Performance Loss: wgmma instructions are serialized"
    assert check_kernels.failures([compilation(output=slow)], {}) == [f"a.cu: {slow} (sm_90a)"]
    (failure,) = check_kernels.failures([compilation(failed=True, output="no such thing")], {})
    assert "does not compile" in failure and "no such thing" in failure
    assert check_kernels.failures([compilation()], {}) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void lstm_cuda::step<(lstm_cuda::A)1, 4>(lstm_cuda::P)", "step<(A)1, 4>"),
        ("lstm_cuda::(anonymous namespace)::f(int)", "f"),
        ("lstm_cuda::_GLOBAL__N__7d0_7_good_cu_fed_296::f(P)", "f"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert check_kernels.shorten(name) == short


def test_names_of_template_arguments() -> None:
    text = "enum class Tile { small, large };  // of {a product}\nenum class Bits {\n  eight,\n};"
    names = check_kernels.read_enumerators(text)
    assert names == {"(Tile)0": "small", "(Tile)1": "large", "(Bits)0": "eight"}
    mangled = "_Z4stepIL4Tile1ELi1EEvv"  # void step<(Tile)1, 1>()
    assert check_kernels.demangle([mangled], names) == {mangled: "step<large, 1>"}


KERNELS = {
    "good": ("__global__ void f(float* x) { x[threadIdx.x] *= 2; }", None),
    "warns": ("__global__ void f(float* x) { int unused; x[0] = 1; }", "never referenced"),
    "warns on the host": (
        "__global__ void f(float* x) { x[0] = 1; }\n"
        "int g(unsigned n) { for (int i = 0; i < n; ++i) f<<<1, 1>>>(nullptr); return 0; }",
        "sign",
    ),
    "stack": (
        "__global__ void f(float* x, int n) {\n"
        "  float a[8]; for (int i = 0; i < 8; ++i) a[i] = x[i] * i;\n"
        "  for (int k = 0; k < n; ++k) a[(k * n) & 7] += a[k & 7]; x[0] = a[n & 7]; }",
        "has a stack frame of",
    ),
    "spills": (
        "__global__ void __launch_bounds__(1024) f(float* x) {\n"
        "  float a[96];\n#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];\n#pragma unroll 1\n"
        "  for (int k = 0; k < 10; ++k)\n#pragma unroll\n"
        "    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i + 7) % 96] + x[k];\n#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = a[i]; }",
        "spills",
    ),
    "nothing": ("int f() { return 1; }", "no kernel"),
}


@needs_nvcc
@pytest.mark.parametrize("case", KERNELS)
def test_real_kernels(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, wrong = KERNELS[case]
    file = tmp_path / "kernel.cu"
    file.write_text(f"{text}\n")
    status = check_kernels.main([str(file), "--arch", "90a"])
    printed = capsys.readouterr()
    if wrong is None:
        assert (status, printed.err) == (0, "")
        assert "kernel.cu" in printed.out and "1 architectures" in printed.out
    else:
        assert status == 1
        assert wrong in printed.err


def test_a_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="no bin/nvcc"):
        check_kernels.find_nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(check_kernels.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="set CUDA_HOME"):
        check_kernels.find_nvcc()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_cuda_build_needs_a_torch_with_cuda() -> None:
    with pytest.raises(SystemExit, match="has no CUDA"):
        check_cuda_build.main(["--python", sys.executable])


def test_passed_tests_are_counted() -> None:
    assert check_cuda_build.passed_tests("...\n166 passed, 113 skipped in 15.21s") == 166
    assert check_cuda_build.passed_tests("113 skipped in 0.1s") == 0
