"""The emulation itself (tests/emulation): what it promises, and what it finds.

Each operation of csrc/cuda/ptx.cuh has a micro-kernel that must be right in every order and build,
and each check has a kernel with that one mistake, which must be found.
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulation import build

FOLDER = build.ROOT / "tests" / "emulation"
RECORDS = sorted((FOLDER / "recorded").glob("*.json"))
ORDERS = [("forward", "0"), ("reverse", "0"), *(("random", str(seed)) for seed in range(1, 7))]

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def kind_of(variant: str) -> str:
    """ "ucontext" is plain, with threads switched as on processors other than x86-64."""
    return "plain" if variant == "ucontext" else variant


@functools.cache
def program(name: str, variant: str) -> Path:
    """A program of tests/emulation, up to date."""
    defines = ["LSTM_EMULATE_UCONTEXT"] if variant == "ucontext" else []
    out = build.FOLDER / f"{name}-{variant}"
    return build.compile([FOLDER / f"{name}.cpp"], kind_of(variant), out, defines=defines)


def missing(variant: str) -> str | None:
    return build.unavailable(kind_of(variant))


@pytest.fixture(scope="module", autouse=True)
def _build_at_once() -> None:
    """All programs in parallel; those that a test cannot build fail there."""
    wanted = [(n, v) for n in ("test_micro", "known_bad", "test_runtime") for v in build.VARIANTS]
    wanted.append(("test_micro", "ucontext"))
    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(program, *w) for w in wanted if not missing(w[1])]:
            job.exception()


def run(name: str, variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if reason := missing(variant):
        pytest.skip(reason)
    return build.run(program(name, variant), *arguments, variant=kind_of(variant))


@pytest.mark.parametrize("variant", ["plain", "ucontext", "asan", "tsan"])
def test_micro_kernels_are_right_in_every_order(variant: str) -> None:
    done = run("test_micro", variant)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"[1-9]\d* ran, 0 failed\n", done.stdout)


@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
def test_orders_repeat_and_launches_leave_nothing_behind(variant: str) -> None:
    done = run("test_runtime", variant)
    assert (done.returncode, done.stdout) == (0, "all hold\n"), done.stdout + done.stderr


# ---- what is found ----


@dataclass(frozen=True)
class Found:
    """What must be said about a kernel with a mistake, by which build."""

    plain: str | None = None  # None: only a sanitizer is sure to find it
    order: str | None = None  # that finds it in a plain run; None: every one
    asan: str | None = None
    tsan: str | None = None


RACE = "WARNING: ThreadSanitizer: data race"
FAULT = "invalid access"
DEADLOCK = "deadlock: no thread can go on"
KNOWN_BAD = {
    # barriers of a block
    "divergent_barrier": Found("divergent block_sync: other threads wait at known_bad_kernels"),
    "exit_before_barrier": Found("exits while others wait at block_sync|after a thread has exited"),
    "named_counts_differ": Found("named_sync: (32|64) threads here, (32|64) at|" + DEADLOCK),
    "named_out_of_range": Found("no barrier 16 of 64 threads"),
    "missing_block_sync": Found("wrong", "reverse", tsan=RACE),
    "single_buffer": Found("wrong", "forward", tsan=RACE),
    # warps
    "missing_warp_sync": Found("wrong", tsan=RACE),
    "shuffle_for_a_barrier": Found(tsan=RACE),
    "lane_exits": Found("a lane exits while others wait for it at shuffle|has exited"),
    "caller_not_in_mask": Found("not in (its|the) mask"),
    "source_not_in_mask": Found("lane 20 is not in the mask"),
    "divergent_operation": Found("divergent (ballot|shuffle): other lanes wait at"),
    "masks_that_cross": Found("lanes wait with another mask|" + DEADLOCK),
    "ldmatrix_misaligned": Found("ldmatrix: a row is not aligned"),
    # memory
    "misaligned_load": Found("an access of 4 bytes to .* is misaligned"),
    "too_little_shared": Found("takes 128 bytes of shared memory, the launch gives 112"),
    "different_pieces": Found("threads take shared memory differently"),
    "past_a_piece": Found("written behind the piece of 128 bytes", asan="use-after-poison"),
    "past_a_buffer": Found("wrote past the end of a buffer", asan="heap-buffer-overflow"),
    "far_past_a_buffer": Found(FAULT, asan="heap-buffer-overflow"),
    "not_a_pointer": Found(FAULT, asan="SEGV", tsan="SEGV"),
    "uninitialised_shared": Found("wrong"),
    "unwritten_output": Found("wrong"),
    "blocks_share_output": Found(tsan=RACE),
    # cp.async
    "read_before_landing": Found("wrong", "forward"),
    "landed_for_one_thread": Found("wrong", "forward", tsan=RACE),
    "exit_with_copies": Found("exits with cp_async16 in flight"),
    "copy_misaligned": Found("cp_async16: an address is not aligned"),
    "copy8_misaligned": Found("cp_async8: an address is not aligned to 8 bytes"),
    "copy8_for_4": Found("written behind the piece of 252 bytes"),
    # mbarriers
    "over_arrival": Found("more arrivals in a phase than mbarrier_init announced"),
    "wrong_parity": Found(DEADLOCK + ".*mbarrier_wait, known_bad_kernels.cuh:"),
    "too_few_arrivals": Found(DEADLOCK + ".*32 threads .*mbarrier_wait, known_bad_kernels.cuh:"),
    "bulk_read_before_landing": Found("wrong", "forward", tsan=RACE),
    "bulk_of_more_than_expected": Found(DEADLOCK),
    "no_mbarrier_init": Found("the mbarrier was not initialised"),
    "two_mbarrier_inits": Found("mbarrier_init twice"),
    "init_not_published": Found("the mbarrier was not initialised", "reverse", tsan=RACE),
    "arrival_for_others": Found("wrong", "random", tsan=RACE),
    # clusters
    "store_to_a_block_not_started": Found(FAULT, "forward", asan="SEGV", tsan=f"SEGV|{RACE}"),
    "store_to_a_block_that_left": Found(FAULT, "forward", asan="SEGV", tsan=f"SEGV|{RACE}"),
    "leaves_before_stores": Found("block 1 has left", "forward"),
    "transfers_for_a_barrier": Found(tsan=RACE),
    "no_such_block": Found("the cluster has no block 2"),
    "wait_without_arrive": Found("cluster_wait without cluster_arrive"),
    "cluster_too_large": Found("larger than the device allows"),
    # grids
    "grid_sync_of_a_plain_launch": Found("grid_sync in a launch that is not cooperative"),
    "grid_larger_than_the_device": Found("too many blocks in cooperative launch"),
    "shared_memory_of_no_device": Found("more shared memory than the device has"),
    "waits_for_a_later_block": Found(DEADLOCK + ".*flag_wait", "forward"),
    "flag_before_data": Found(tsan=RACE),
    "torn_words": Found("wrong"),
    # launches that overlap
    "no_dependency_wait": Found("block 0 ends without dependency_wait"),
    "late_dependency_wait": Found(tsan=RACE),
}


def test_every_known_bad_kernel_is_expected_to_be_found() -> None:
    listed = run("known_bad", "plain", "--list").stdout.split()
    assert listed == list(KNOWN_BAD)
    assert all(f.plain or f.asan or f.tsan for f in KNOWN_BAD.values())


@pytest.mark.parametrize("name", [n for n, f in KNOWN_BAD.items() if f.plain])
def test_a_plain_run_finds(name: str) -> None:
    expected = KNOWN_BAD[name]
    assert expected.plain
    orders = [o for o in ORDERS if expected.order in (None, o[0])]
    said = {}
    for order in orders:
        done = run("known_bad", "plain", *order, name)
        said[order] = done.stdout + done.stderr
    finds = [o for o, text in said.items() if re.search(expected.plain, text)]
    # Of the random orders one is enough.
    assert finds if expected.order == "random" else finds == orders, said


@pytest.mark.parametrize("name", [n for n, f in KNOWN_BAD.items() if f.asan])
def test_address_sanitizer_finds(name: str) -> None:
    done = run("known_bad", "asan", "forward", "0", name)
    assert done.returncode != 0
    assert re.search(KNOWN_BAD[name].asan or "", done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("name", [n for n, f in KNOWN_BAD.items() if f.tsan])
def test_thread_sanitizer_finds(name: str) -> None:
    # In forward order, that is, in the first run anybody makes.
    done = run("known_bad", "tsan", "forward", "0", name)
    assert done.returncode != 0
    assert re.search(KNOWN_BAD[name].tsan or "", done.stderr), done.stdout + done.stderr


# ---- ties to hardware ----


def _differences(case: str, recorded: dict, emulated: dict) -> list[str]:
    """Words of one micro-kernel that differ by more than the record's tolerance allows."""
    if len(recorded["words"]) != len(emulated["words"]):
        return [f"{case}: {len(recorded['words'])} words, emulated {len(emulated['words'])}"]
    found = []
    for i, (ours, theirs) in enumerate(zip(emulated["words"], recorded["words"], strict=True)):
        a, b = (struct.unpack("<f", struct.pack("<I", w))[0] for w in (ours, theirs))
        near = abs(a - b) <= recorded["tolerance"] * max(1.0, abs(b))
        if ours != theirs and not (math.isnan(a) and math.isnan(b)) and not near:
            found.append(f"{case}[{i}]: {ours:08x} ({a}), recorded {theirs:08x} ({b})")
    return found


@pytest.mark.parametrize("record", RECORDS or [None], ids=lambda r: r.stem if r else "none")
def test_the_emulation_does_what_hardware_did(record: Path | None, tmp_path: Path) -> None:
    if record is None:
        pytest.skip("no hardware record yet: tests/emulation/README.md says how to make one")
    assert run("test_micro", "plain", str(tmp_path / "emulated.json")).returncode == 0
    emulated = json.loads((tmp_path / "emulated.json").read_text())["cases"]
    recorded = json.loads(record.read_text())["cases"]
    assert recorded
    assert not [d for case in recorded for d in _differences(case, recorded[case], emulated[case])]


def test_a_record_that_differs_would_be_noticed() -> None:
    exact = {"tolerance": 0, "words": [1, 0x3F800000]}
    close = {"tolerance": 1e-3, "words": [0x3F800000, 0x7FC00000]}
    assert not _differences("exact", exact, exact)
    assert not _differences("close", close, {"words": [0x3F800100, 0xFFC00000]})
    assert _differences("exact", exact, {"words": [1, 0x3F800001]})
    assert _differences("close", close, {"words": [0x3F900000, 0x7FC00000]})
    assert _differences("close", close, {"words": [0x3F800000, 0x3F800000]})
    assert _differences("exact", exact, {"words": [1]})


def _compile_record(architecture: str, out: Path) -> None:
    nvcc = build.nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    below = ["-DLSTM_BELOW_SM90"] if int(architecture.rstrip("a")) < 90 else []
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    include = f"-I{build.ROOT / 'csrc'}"
    flags = ["-std=c++20", "-O2", "-Werror", "all-warnings", target, include, *below]
    build.compiler([nvcc, *flags, FOLDER / "record.cu", "-o", out])


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_micro_kernels_compile_for(architecture: str, tmp_path: Path) -> None:
    _compile_record(architecture, tmp_path / "record")


@pytest.mark.gpu
def test_micro_kernels_are_right_on_the_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major in (9, 10) else "")
    _compile_record(architecture, tmp_path / "record")
    record = build.FOLDER / f"recorded-sm{major}{minor}.json"
    done = subprocess.run(
        [tmp_path / "record", record], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
