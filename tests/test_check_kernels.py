"""The checks of compiled kernels and of the CUDA build: they must fail on what they look for."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / ".ci"))
import check_cuda_build
import check_kernels
import machine_code

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
    usages = check_kernels.read_usages(REPORT)
    found = [(u.name, u.registers, u.shared_bytes, u.spill_bytes, u.stack_bytes) for u in usages]
    assert found == [
        ("_Z5cleanPd", 30, 512, 0, 0),
        ("_Z5spillPd", 255, 0, 20, 32),
        ("_Z6calledd", None, 0, 0, 0),
    ]


def local_accesses() -> dict[str, int]:
    functions = machine_code.read_functions(SASS)
    return {name: machine_code.local_accesses(code) for name, code in functions.items()}


def test_local_memory_in_machine_code() -> None:
    assert local_accesses() == {"_Z5cleanPd": 0, "_Z5spillPd": 2}


def test_failures_name_what_and_where() -> None:
    usages = check_kernels.read_usages(REPORT)
    names = check_kernels.demangle((usage.name for usage in usages), {})
    both = [
        compilation(
            architecture=architecture,
            usages=usages,
            local_accesses=local_accesses(),
            step_faults={"_Z5cleanPd": [], "_Z5spillPd": ["has 1 MEMBAR"]},
        )
        for architecture in ("80", "90a")
    ]
    assert check_kernels.failures(both, names) == [
        "a.cu: spill spills 20 bytes of registers (sm_80, sm_90a)",
        "a.cu: spill has a stack frame of 32 bytes (sm_80, sm_90a)",
        "a.cu: spill holds 2 LDL or STL (sm_80, sm_90a)",
        "a.cu: spill has 1 MEMBAR (sm_80, sm_90a)",
    ]
    slow = "ptxas info : (C7510) Potential Performance Loss: wgmma instructions are serialized"
    assert check_kernels.failures([compilation(output=slow)], {}) == [f"a.cu: {slow} (sm_90a)"]
    (failure,) = check_kernels.failures([compilation(failed=True, output="no such thing")], {})
    assert "does not compile" in failure and "no such thing" in failure
    unknown = compilation(step_faults={"": ["no kernel was recognised"]})
    assert check_kernels.failures([unknown], {}) == ["a.cu: no kernel was recognised (sm_90a)"]
    assert check_kernels.failures([compilation()], {}) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void lstm_cuda::step<(lstm_cuda::A)1, 4>(lstm_cuda::P)", "step<(A)1, 4>"),
        ("lstm_cuda::(anonymous namespace)::f(int)", "f"),
        ("lstm_cuda::_GLOBAL__N__7d0_7_good_cu_fed_296::f(P)", "f"),
        (
            "void lstm_cuda::resident::f<lstm_cuda::resident::AConfig<(lstm_cuda::A)2, "
            "lstm_cuda::ResidentShape{768, 48}, 4>, lstm_cuda::resident::Team<lstm_cuda::resident::"
            "AConfig<(lstm_cuda::A)2, lstm_cuda::ResidentShape{768, 48}, 4>, "
            "lstm_cuda::resident::E> >(P)",
            "f<AConfig<(A)2, {768, 48}, 4>, E >",
        ),
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


def listing(*lines: str) -> list[machine_code.Instruction]:
    """Code of these lines, at addresses 0x00, 0x10, ..."""
    text = [f"  /*{16 * i:04x}*/   {line} ;  /* 0x0000 */" for i, line in enumerate(lines)]
    sass = "\n".join(["  Function : f", *text])
    return machine_code.read_functions(sass)["f"]


def test_instructions_are_read() -> None:
    code = listing("@!P0 BRA 0x20", "BRA.U UP1, 0x0", "@PT BRA 0x10", "MOV R1, c[0x0][0x28]")
    assert [(each.address, each.name, each.target, each.goes_on) for each in code] == [
        (0x00, "BRA", 0x20, True),
        (0x10, "BRA", 0x00, True),
        (0x20, "BRA", 0x10, False),
        (0x30, "MOV", None, True),
    ]


PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R12.reuse, R4"
LOOP = (
    "MEMBAR.ALL.GPU",  # 0x00: before the loop
    "LDS R8, [R2]",  # 0x10: the loop begins
    "@P1 BRA 0x80",  # something rare, moved to the end
    PRODUCT,  # 0x30: the loop goes on from there
    "STAS.128 [R18.64], R156",
    "@!P0 BRA 0x10",
    "STG.E [R2], R4",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R181+URZ], R184",  # 0x80
    "BRA.U !UP0, 0x80",
    "BRA 0x30",
)


def test_the_loop_is_what_repeats_with_its_products() -> None:
    (loop,) = machine_code.product_loops(listing(*LOOP))
    assert loop == {"LDS": 1, "BRA": 4, "HMMA": 1, "STAS": 1, "SYNCS": 1}
    twice = machine_code.product_loops(listing(*LOOP[:6], PRODUCT, "EXIT", *LOOP[8:]))
    assert [sum(loop.values()) for loop in twice] == [8, 1]
    assert machine_code.product_loops(listing("EXIT")) == []


def mangled(
    name: str,
    arithmetic: int,
    shape: tuple[int, ...],
    tiles: int,
    turns: int,
    family: str,
    cell: int | None = None,
) -> str:
    numbers = "".join(f"Li{number}E" for number in shape)
    kind = "" if cell is None else f"LNS_8CellKindE{cell}E"
    exchange = "15ClusterExchange" if family == "Cluster" else "11GroupReduce"
    return (
        f"_ZN9lstm_cuda8resident14forward_kernelINS0_13{name}ConfigILNS_10ArithmeticE{arithmetic}EXtl"
        f"NS_13ResidentShapeE{numbers}EELi{tiles}ELi{turns}E{kind}EENS0_{exchange}EEEvNS0_13ForwardParamsE"
    )


# float32 is 1 and bfloat16 4; hidden, blocks, warps, split.
@pytest.mark.parametrize(
    ("direction", "arithmetic", "shape", "tiles", "turns", "family", "products", "sends"),
    [
        ("Forward", 4, (512, 16, 8, 2), 1, 1, "Cluster", 32, 4),
        ("Forward", 4, (512, 16, 8, 2), 4, 1, "Cluster", 128, 8),
        ("Forward", 4, (512, 16, 8, 2), 1, 2, "Cluster", 64, 8),
        ("Forward", 1, (256, 8, 8, 2), 1, 1, "Cluster", 48, 4),
        ("Forward", 4, (384, 8, 12, 2), 1, 1, "Cluster", 24, 2),
        ("Forward", 4, (1024, 64, 8, 8), 1, 1, "Group", 36, 0),
        ("Forward", 1, (1024, 64, 8, 8), 2, 1, "Group", 216, 0),
        ("Backward", 4, (512, 16, 8, 2), 2, 1, "Cluster", 64, 8),
        ("Backward", 4, (384, 8, 12, 2), 1, 1, "Cluster", 24, 2),
        ("Backward", 4, (384, 8, 12, 2), 1, 2, "Cluster", 48, 4),
        ("Backward", 4, (2048, 128, 8, 8, 8, 8), 1, 1, "Group", 40, 0),
        ("Backward", 4, (2048, 128, 8, 8, 8, 8), 2, 1, "Group", 72, 0),
        ("Backward", 4, (1024, 64, 8, 8), 4, 1, "Group", 32, 0),
        ("Backward", 1, (1024, 64, 8, 8, 5, 4), 1, 1, "Group", 60, 0),
        ("Backward", 4, (512, 16, 8, 2), 4, 1, "Cluster", 32, 4),
        ("Backward", 1, (512, 32, 8, 8), 1, 1, "Group", 48, 0),
    ],
)
def test_products_and_sends_of_a_step(
    direction: str,
    arithmetic: int,
    shape: tuple[int, ...],
    tiles: int,
    turns: int,
    family: str,
    products: int,
    sends: int,
) -> None:
    kernel = machine_code.StepKernel.of(mangled(direction, arithmetic, shape, tiles, turns, family))
    assert kernel is not None
    assert (kernel.family, kernel.tiles, kernel.turns) == (family, tiles, turns)
    assert (kernel.backward, kernel.exact) == (direction == "Backward", arithmetic == 1)
    assert (kernel.hidden, kernel.blocks, kernel.warps, kernel.split) == shape[:4]
    assert (kernel.products(), kernel.sends()) == (products, sends)


# None: a template without kinds; else enum class CellKind.
@pytest.mark.parametrize(("cell", "sends"), [(None, 4), (0, 4), (1, 4), (2, 12)])
@pytest.mark.parametrize("direction", ["Forward", "Backward"])
def test_totals_of_rows_are_sent(direction: str, cell: int | None, sends: int) -> None:
    name = mangled(direction, 4, (512, 16, 8, 2, 0, 0), 1, 1, "Cluster", cell)
    kernel = machine_code.StepKernel.of(name)
    assert kernel is not None
    assert (kernel.family, kernel.norm) == ("Cluster", cell == 2)
    assert (kernel.products(), kernel.sends()) == (32, sends)


def test_faults_of_a_loop() -> None:
    name = mangled("Forward", 4, (32, 4, 2, 2, 0, 0), 1, 1, "Cluster")  # two products, one send
    assert machine_code.StepKernel.of("_Z5cleanPd") is None
    good = [*LOOP[:4], PRODUCT, *LOOP[4:5], "@!P0 BRA 0x10", "EXIT", *LOOP[8:]]

    def faults(*lines: str) -> list[str]:
        return list(machine_code.step_faults(name, listing(*lines)))

    assert faults(*good) == []
    assert list(machine_code.step_faults("_Z5cleanPd", listing(*LOOP))) == []
    assert faults(*LOOP) == ["has 1 HMMA in its loop over the steps, not 2"]
    assert faults(*good[:5], "NOP", *good[6:]) == ["has 0 STAS in its loop over the steps, not 1"]
    for fence in ("MEMBAR.ALL.GPU", "ERRBAR"):
        found = faults(good[0], fence, *good[2:])
        assert found == [f"has 1 {fence.split('.')[0]} in its loop over the steps"]
        assert faults(*good[:-1], "@P5 BRA 0x30", fence) == []  # where no way leads back
        moved = faults(*good[:9], fence, *good[10:])  # among what was moved to the end
        assert moved == [f"has 1 {fence.split('.')[0]} in its loop over the steps"]
    for other in ([PRODUCT, PRODUCT, "EXIT"], [*good[:7], PRODUCT, *good[7:]], ["EXIT"]):
        (fault,) = faults(*other)
        assert "not in one loop over the steps" in fault


def test_cluster_kernels_are_compiled_where_there_are_clusters() -> None:
    everywhere = check_kernels.ARCHITECTURES
    for name, architectures, with_loops in (
        ("rec_cluster_forward.cu", ["90a", "80", "100"], ["90a", "100"]),
        ("variant_cluster_backward.cu", ["90a", "80", "100"], ["90a", "100"]),
        ("rec_group_backward.cu", list(everywhere), list(everywhere)),
        ("rec_cta_forward.cu", list(everywhere), []),
    ):
        found = check_kernels.architectures_of(Path(name), everywhere)
        assert found == architectures
        assert [a for a in found if check_kernels.has_step_kernels(Path(name), a)] == with_loops
    assert check_kernels.architectures_of(Path("rec_cluster_forward.cu"), ["86", "90a"]) == ["90a"]


def test_architectures_without_a_difference_share_their_ptx() -> None:
    files = [path for path in (check_kernels.ROOT / "csrc").rglob("*") if path.is_file()]
    asked = re.findall(r"__CUDA_ARCH\w*(.*)", "\n".join(path.read_text() for path in files))
    assert set(asked) == {")", " >= 900", " >= 900;"}, "PTX_OF says that nothing else is asked"
    for each, other in check_kernels.PTX_OF.items():
        assert (int(each) >= 90) == (int(other) >= 90)
    groups = check_kernels.groups_of(Path("a.cu"), check_kernels.ARCHITECTURES)
    assert groups == [["90a"], ["80", "86", "89"], ["100", "120"]]
    assert check_kernels.groups_of(Path("a.cu"), ["86", "120"]) == [["86"], ["120"]]


@needs_nvcc
def test_each_architecture_has_its_own_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text(KERNELS["stack"][0])
    assert check_kernels.main([str(file), "--arch", "86", "80", "120"]) == 1
    printed = capsys.readouterr()
    assert "3 architectures" in printed.out
    assert "has a stack frame of 32 bytes (sm_86, sm_80, sm_120)" in printed.err
    if check_kernels.find_cuobjdump(str(NVCC)):
        assert len(re.findall(r"holds \d+ LDL or STL", printed.err)) > 0


STEP_KERNEL = """
namespace lstm_cuda {
enum class Arithmetic { float64, float32, tf32, float16, bfloat16 };
struct ResidentShape { int hidden, blocks, warps, split, shared_forward, shared_backward; };
namespace resident {
template <Arithmetic, ResidentShape, int, int> struct ForwardConfig {};
template <class> struct GroupExchange {};
template <class F, template <class> class Exchange>
__global__ void forward_kernel(float* x, int n) {
  float d[4] = {x[0], x[1], x[2], x[3]};
  #pragma unroll 1
  for (int step = 0; step < n; ++step) {
    #pragma unroll
    for (int i = 0; i < PRODUCTS; ++i)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(step), "r"(i));
    FENCE;
  }
  x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
using Config = ForwardConfig<Arithmetic::bfloat16, ResidentShape{512, 32, 8, 8, 0, 0}, 1, 1>;
template __global__ void forward_kernel<Config, GroupExchange>(float*, int);
}
}
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("products", "fence", "wrong"),
    [
        ("20", "", None),
        ("19", "", "has 19 HMMA in its loop over the steps, not 20"),
        ("20", "__threadfence()", "has 1 MEMBAR in its loop over the steps"),
        (None, "", "no kernel with a loop over the steps was recognised"),
    ],
)
def test_real_loops_over_steps(
    products: str | None,
    fence: str,
    wrong: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if check_kernels.find_cuobjdump(str(NVCC)) is None:
        pytest.skip("no cuobjdump")
    text = STEP_KERNEL if products else "__global__ void f(float* x) { x[0] = 1; }\n"
    file = tmp_path / "rec_group_forward.cu"
    file.write_text(text.replace("PRODUCTS", products or "").replace("FENCE", fence))
    status = check_kernels.main([str(file), "--arch", "90a"])
    printed = capsys.readouterr()
    if wrong is None:
        assert (status, printed.err) == (0, "")
        assert "loops over the steps: 1 were looked at" in printed.out
    else:
        assert status == 1 and wrong in printed.err


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
