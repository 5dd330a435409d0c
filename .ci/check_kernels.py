"""Compiles the CUDA kernels for every architecture, without torch or a GPU, and reads the reports.

    check_kernels.py [--arch 90a ...] [--jobs N] [FILE.cu ...]

A spilled register, a byte of stack (an array that slipped into local memory shows only there) or a
warning fails the check. Where there is a `cuobjdump`, the machine code is read too: it must hold no
load or store of local memory, and in loops over the steps what machine_code.py expects. All of that
is ptxas' work, which differs by architecture: each has its own machine code. What comes before it,
from C++ to PTX, takes longer and is done once where sources see no difference. Only the first
architecture makes an object, so that host code is compiled with warnings once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from machine_code import StepKernel, local_accesses, read_functions, step_faults

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("90a", "80", "86", "89", "100", "120")
# Whose PTX an architecture's machine code is made from, if not its own. Sources ask whether it is
# 90 or more, which has clusters and launches that overlap, and nothing else (ptx_device.cuh).
PTX_OF = {"86": "80", "89": "80", "120": "100"}
# Cluster kernels have a body only where clusters are used; elsewhere one compilation shows that
# nothing else is left in their files.
CLUSTER_FILES = ("rec_cluster_", "variant_cluster_")
CLUSTER_ARCHITECTURES = ("90a", "100")
WITHOUT_CLUSTERS = "80"
# What torch's builds define: 16-bit types convert only by name.
TORCH_DEFINES = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *TORCH_DEFINES)
HOST_FLAGS = ("-Xcompiler", "-Wall,-Wextra,-Werror")


@dataclass
class Usage:
    """What ptxas says of one function.

    Attributes:
        name: mangled.
        registers: None for a function that is called, not launched.
        shared_bytes: static shared memory only.
    """

    name: str
    architecture: str
    registers: int | None = None
    shared_bytes: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0


@dataclass
class Compilation:
    """One file for one architecture."""

    source: Path
    architecture: str
    seconds: float
    output: str
    failed: bool
    usages: list[Usage] = field(default_factory=list)
    local_accesses: dict[str, int] = field(default_factory=dict)  # by mangled name
    step_faults: dict[str, list[str]] = field(default_factory=dict)  # the same
    step_kernels: int = 0  # whose loops over the steps were looked at


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME if that is set, else of /usr/local/cuda or PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found is None:
            sys.exit(f"error: CUDA_HOME is {home}, but there is no bin/nvcc in it")
        return found
    found = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if found is None:
        sys.exit(
            "error: checking the kernels needs nvcc, which is neither in /usr/local/cuda/bin nor "
            "on PATH. Install a CUDA toolkit (no GPU is needed), or set CUDA_HOME to one."
        )
    return found


def find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, or that of the package nvidia-cuda-cuobjdump in this environment."""
    packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    folders = [Path(nvcc).resolve().parent, *packages]
    found = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return next((path for path in found if path), None) or shutil.which("cuobjdump")


def read_usages(report: str) -> list[Usage]:
    """The functions in ptxas' verbose report, of each architecture in it."""
    usages: dict[tuple[str, str], Usage] = {}
    entry = current = None
    architecture = ""

    def usage(name: str) -> Usage:
        return usages.setdefault((name, architecture), Usage(name, architecture))

    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            architecture = match[2]
            entry = usage(match[1])
        elif match := re.search(r"Function properties for (\S+)", line):
            current = usage(match[1])
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            assert current is not None, f"ptxas speaks of a function it has not named: {line}"
            current.stack_bytes = max(current.stack_bytes, int(match[1]))
            current.spill_bytes = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            assert entry is not None, f"ptxas speaks of a kernel it has not named: {line}"
            entry.registers = int(match[1])
            if smem := re.search(r"(\d+) bytes smem", line):
                entry.shared_bytes = int(smem[1])
            if stack := re.search(r"(\d+) bytes (?:cumulative stack size|lmem)", line):
                entry.stack_bytes = max(entry.stack_bytes, int(stack[1]))
    return list(usages.values())


def architectures_of(source: Path, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted architectures that a file is compiled for."""
    if not source.name.startswith(CLUSTER_FILES):
        return list(wanted)
    return [each for each in wanted if each in (*CLUSTER_ARCHITECTURES, WITHOUT_CLUSTERS)]


def has_step_kernels(source: Path, architecture: str) -> bool:
    """Whether there must be kernels whose loops over the steps are looked at."""
    if source.name.startswith(CLUSTER_FILES):
        return architecture in CLUSTER_ARCHITECTURES
    return source.name.startswith("rec_group_")


def read_warnings(output: str) -> list[str]:
    """Lines that warn. A serialised wgmma is called a loss of performance, not a warning."""
    marks = r"\bwarning\b|Potential Performance Loss"
    return [line.strip() for line in output.splitlines() if re.search(marks, line, re.IGNORECASE)]


def read_enumerators(text: str) -> dict[str, str]:
    """What demanglers print for the enumerators in C++ text, and their names.

    Only enumerations in one line or more without given values: "(Tile)1" is "medium".
    """
    text = re.sub(r"//.*", "", text)
    found = {}
    for name, body in re.findall(r"\benum class (\w+)[^{;]*\{([^}=]*)\}", text):
        for value, enumerator in enumerate(re.findall(r"\w+", body)):
            found[f"({name}){value}"] = enumerator
    return found


def demangle(names: Iterable[str], enumerators: dict[str, str]) -> dict[str, str]:
    """Short readable names: no parameters, no namespaces; mangled ones where c++filt is missing."""
    unique = list(dict.fromkeys(names))
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not unique:
        return {name: name for name in unique}
    done = subprocess.run([tool], input="\n".join(unique), text=True, capture_output=True)
    readable = [shorten(line) for line in done.stdout.splitlines()]
    for number, name in enumerators.items():
        readable = [re.sub(re.escape(number) + r"\b", name, line) for line in readable]
    return dict(zip(unique, readable, strict=True))


def shorten(name: str) -> str:
    """ "lstm_cuda::(anonymous namespace)::f<(lstm_cuda::A)1>(P)" becomes "f<(A)1>"."""
    name = name.removeprefix("void ")
    name = re.sub(r"(_GLOBAL__N_\w*|\(anonymous namespace\)|<unnamed>)::", "", name)
    name = re.sub(r"\b(lstm_cuda|ptx|resident)::|\bResidentShape(?={)", "", name)
    name = re.sub(r"\bTeam<\w+Config<[^<>]*>, (\w+)>", r"\1", name)  # which repeats a neighbour
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


def groups_of(source: Path, wanted: Sequence[str]) -> list[list[str]]:
    """The architectures that a file is compiled for; those of the same PTX together."""
    groups: dict[str, list[str]] = {}
    for each in architectures_of(source, wanted):
        groups.setdefault(PTX_OF.get(each, each), []).append(each)
    return list(groups.values())


def compile_group(
    nvcc: str, cuobjdump: str | None, source: Path, architectures: Sequence[str]
) -> list[Compilation]:
    """Compiles a file for architectures of the same PTX, and reads what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels"
        kind = ("-c", *HOST_FLAGS) if ARCHITECTURES[0] in architectures else ("-fatbin",)
        ptx = PTX_OF.get(architectures[0], architectures[0])
        codes = ",".join(f"sm_{each}" for each in architectures)
        target = f"-gencode=arch=compute_{ptx},code=[{codes}]"
        command = [nvcc, *FLAGS, target, *kind, str(source), "-o", str(binary)]
        start = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        seconds = (time.perf_counter() - start) / len(architectures)
        failed = done.returncode != 0
        usages = [] if failed else read_usages(done.stdout)
        results = []
        for each in architectures:
            own = [usage for usage in usages if usage.architecture == each]
            results.append(Compilation(source, each, seconds, done.stdout, failed, own))
            if cuobjdump is not None and not failed:
                read_machine_code(cuobjdump, binary, results[-1])
        return results


def read_machine_code(cuobjdump: str, binary: Path, result: Compilation) -> None:
    """Adds to a compilation what the machine code of its architecture shows."""
    source, architecture = result.source, result.architecture
    command = [cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(binary)]
    sass = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for name, code in read_functions(sass.stdout).items():
        result.local_accesses[name] = local_accesses(code)
        if has_step_kernels(source, architecture) and StepKernel.of(name):
            result.step_kernels += 1
            result.step_faults[name] = list(step_faults(name, code))
    if has_step_kernels(source, architecture) and not result.step_kernels:
        result.step_faults[""] = ["no kernel with a loop over the steps was recognised"]


def failures(results: Sequence[Compilation], names: dict[str, str]) -> list[str]:
    """One sentence for each thing that must not be, and the architectures where it is."""
    found: dict[str, list[str]] = {}

    def add(sentence: str, result: Compilation) -> None:
        found.setdefault(f"{result.source.name}: {sentence}", []).append(result.architecture)

    for result in results:
        if result.failed:
            add(f"it does not compile\n{result.output.strip()}\n   ", result)
            continue
        for line in read_warnings(result.output):
            add(line, result)
        for usage in result.usages:
            if usage.spill_bytes:
                add(f"{names[usage.name]} spills {usage.spill_bytes} bytes of registers", result)
            if usage.stack_bytes:
                add(f"{names[usage.name]} has a stack frame of {usage.stack_bytes} bytes", result)
        for name, count in result.local_accesses.items():
            if count:
                add(f"{names.get(name, name)} holds {count} LDL or STL", result)
        for name, faults in result.step_faults.items():
            for fault in faults:
                add(f"{names.get(name, name)} {fault}".strip(), result)
    return [f"{sentence} (sm_{', sm_'.join(where)})" for sentence, where in found.items()]


def table(
    results: Sequence[Compilation], names: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each function: registers by architecture, the worst of the rest."""
    architectures = list(dict.fromkeys(result.architecture for result in results))
    by_function: dict[tuple[str, str], dict[str, Usage]] = {}
    for result in results:
        for usage in result.usages:
            key = (result.source.name, names[usage.name])
            by_function.setdefault(key, {})[usage.architecture] = usage
    rows = []
    for (source, name), usages in sorted(by_function.items()):
        found = [usages.get(architecture) for architecture in architectures]
        registers = [str(u.registers) if u and u.registers is not None else "-" for u in found]
        worst = [
            str(max(getattr(usage, what) for usage in usages.values()))
            for what in ("shared_bytes", "spill_bytes", "stack_bytes")
        ]
        rows.append([source, name, *registers, *worst])
    headings = ["file", "kernel", *(f"sm_{a}" for a in architectures), "shared", "spill", "stack"]
    return headings, rows


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich if it is there, else in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        for row in (headings, *rows):
            cells = zip(row, widths, strict=True)
            print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
        return
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    grid = Table(title="registers by architecture; bytes of the rest", title_justify="left")
    for index, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if index > 1 else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles the CUDA kernels and reads the reports.")
    parser.add_argument("files", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="compilers at once; default: cores")
    options = parser.parse_args(arguments)
    sources = options.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        sys.exit(f"error: there are no kernels (*.cu) in {ROOT / 'csrc' / 'cuda'}")
    if missing := [str(source) for source in sources if not source.is_file()]:
        sys.exit(f"error: no such file: {', '.join(missing)}")
    nvcc = find_nvcc()
    cuobjdump = find_cuobjdump(nvcc)

    # Large files first, so that none is left over for one core at the end.
    sources = sorted(sources, key=lambda source: -source.stat().st_size)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(compile_group, nvcc, cuobjdump, source, group)
            for source in sources
            for group in groups_of(source, options.arch)
        ]
        results = [result for job in waiting for result in job.result()]
    seconds = time.perf_counter() - start

    headers = [path.read_text() for path in sorted((ROOT / "csrc").rglob("*.h"))]
    mangled = (usage.name for result in results for usage in result.usages)
    names = demangle(mangled, read_enumerators("\n".join(headers)))
    print_table(*table(results, names))
    for source in sources:
        of_file = [result.seconds for result in results if result.source == source]
        print(f"{source.name}: {sum(of_file):.1f} s for {len(of_file)} architectures")
    mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"all: {seconds:.1f} s, {options.jobs} at once; the largest process took {mib:.0f} MiB")
    if looked_at := sum(result.step_kernels for result in results):
        print(f"loops over the steps: {looked_at} were looked at")
    if cuobjdump is None:
        print("machine code was not read: no cuobjdump (a part of the toolkit)")
    found = failures(results, names)
    for failure in found:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not any(result.usages for result in results) and not found:
        print("FAILED: no kernel was compiled from any of the files", file=sys.stderr)
        return 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
