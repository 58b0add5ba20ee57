"""What the engine reports: small kernels of one mistake each, compiled and run."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_emulation.build import COMMON, DEVICE, HERE, KINDS, compiler, environment, why_not  # noqa: E402
from cuda_emulation.rewrite import rewrite_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the emulation's fibers are written for x86-64 Linux",
)

PROGRAM = """
#include <cuda_runtime.h>
#include <cstdio>
#include <string>
namespace {
__global__ void in_order(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}
__global__ void without_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}
__global__ void within_a_warp(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[blockIdx.x * 64 + threadIdx.x] = values[threadIdx.x ^ 31];
}
__global__ void after_a_shuffle(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __shfl_xor_sync(0xffffffffu, 1, 1);
  out[blockIdx.x * 64 + threadIdx.x] = values[threadIdx.x ^ 31];
}
__global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void one_lane_left(int*) {
  if (threadIdx.x == 5) return;
  __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void half_a_mask(int*) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void waits_for_ever(int*) {
  if (threadIdx.x != 3) __shfl_xor_sync(0xffffffffu, 1, 1);
  if (threadIdx.x == 3) __syncthreads();
}
__global__ void past_its_end(int*) {
  __shared__ int values[64];
  volatile int* first = values;
  first[threadIdx.x + 1] = 1;
}
__global__ void __launch_bounds__(32) narrow(int*) {}
__global__ void reads_unwritten(int* out) {
  __shared__ int values[64];
  out[threadIdx.x] = values[threadIdx.x];
}
}  // namespace
extern "C" void emulated_pretend(int, unsigned long, int, int, int, int);
int main(int, char** words) {
  const std::string which = words[1];
  emulated_pretend(2, 7, 0xa5, 2, 101376, 0);
  static int out[128];
  const cudaStream_t stream = nullptr;
LAUNCHES
  std::printf("%s; out[0] %d, out[127] %d\\n", cudaGetErrorString(cudaGetLastError()), out[0],
              out[127]);
}
"""
KERNELS = [
    *("in_order", "without_barrier", "within_a_warp", "after_a_shuffle", "two_barriers"),
    *("one_lane_left", "half_a_mask", "waits_for_ever", "past_its_end", "narrow"),
    "reads_unwritten",
]


def compiled(kind: str, folder: Path) -> Path:
    launches = "\n".join(
        f'  if (which == "{name}") {name}<<<2, 64, 0, stream>>>(out);' for name in KERNELS
    )
    source = folder / "program.cpp"
    text = PROGRAM.replace("LAUNCHES", launches)
    source.write_text(rewrite_kernels("program.cu", text))
    what = KINDS[kind]
    engine, program = folder / "engine.o", folder / "program"
    macro = [f"-D{what.macro}"] if what.macro else []
    subprocess.run(
        [compiler(), *COMMON, "-O1", *macro, "-c", str(HERE / "engine.cpp"), "-o", str(engine)],
        check=True,
    )
    subprocess.run(
        [
            *(compiler(), *COMMON, "-O1", "-g1", "-fno-threadsafe-statics", *DEVICE, *what.flags),
            *(f"-I{HERE / 'include'}", str(source), str(engine), "-o", str(program)),
        ],
        check=True,
    )
    return program


def ran(program: Path, kernel: str, kind: str) -> str:
    given = {k: v for k, v in environment(KINDS[kind]).items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [str(program), kernel], env=given, capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("plain", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("in_order", "no error; out[0] 63, out[127] 0"),
        ("within_a_warp", "no error; out[0] 31, out[127] 32"),
        ("two_barriers", "two_barriers: threads of a block at different __syncthreads"),
        ("one_lane_left", "one_lane_left: a "),
        ("half_a_mask", "half_a_mask: a shuffle from outside the mask"),
        ("waits_for_ever", "waits_for_ever: "),
        ("narrow", "invalid configuration argument"),
        (
            "reads_unwritten",
            "no error; out[0] -1515870811",
        ),
    ],
)
def test_a_mistake_is_reported(plain: Path, kernel: str, report: str) -> None:
    assert report in ran(plain, kernel, "plain")


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := why_not(KINDS["thread"])) is not None:
        pytest.skip(f"the thread sanitizer does not start: {reason}")
    return compiled("thread", tmp_path_factory.mktemp("thread"))


@pytest.mark.parametrize(
    ("kernel", "races"),
    [
        *(("in_order", False), ("within_a_warp", False)),
        *(("without_barrier", True), ("after_a_shuffle", True)),
    ],
)
def test_a_race_is_seen_whatever_the_schedule_was(thread: Path, kernel: str, races: bool) -> None:
    assert ("data race" in ran(thread, kernel, "thread")) == races


def test_an_access_past_shared_memory_is_seen(tmp_path: Path) -> None:
    if (reason := why_not(KINDS["address"])) is not None:
        pytest.skip(f"the address sanitizer does not start: {reason}")
    program = compiled("address", tmp_path)
    assert "AddressSanitizer: heap-buffer-overflow" in ran(program, "past_its_end", "address")
    assert "no error; out[0] 63" in ran(program, "in_order", "address")
