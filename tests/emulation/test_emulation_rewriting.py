"""How csrc becomes C++: what is rewritten, what is kept, what is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_emulation.cases import CASES  # noqa: E402
from cuda_emulation.mutations import SUPERFLUOUS, mutations  # noqa: E402
from cuda_emulation.rewrite import (  # noqa: E402
    CannotRewrite,
    kernels,
    operators,
    rewrite_binding,
    rewrite_kernels,
)

CSRC = ROOT / "csrc"


def rewritten(text: str) -> str:
    return rewrite_kernels("csrc/cuda/example.cu", text).split("\n", 1)[1]


def test_an_unknown_ptx_instruction_is_named_with_its_place() -> None:
    text = 'void f() {\n  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" : : "r"(a));\n}'
    with pytest.raises(CannotRewrite, match=r"example.cu:2: the PTX instruction cp.async.ca"):
        rewritten(text)


def test_a_known_ptx_instruction_becomes_a_call() -> None:
    text = 'asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(g(1, 2)));'
    assert rewritten(text) == "y = ::emulated::max_nan(x, g(1, 2));"


def test_ptx_with_several_results_gets_them_as_references_and_without_any_is_a_statement() -> None:
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    text = f'asm("{mma} {{%0, %1}}, {{%2}};" : "+f"(d[0]), "+f"(d[1]) : "r"(a));'
    assert rewritten(text) == "::emulated::mma_m16n8k16(d[0], d[1], a);"
    text = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    assert rewritten(text) == "::emulated::nothing();"


def test_a_launch_that_may_begin_early_becomes_a_plain_one() -> None:
    text = (
        "const auto kernel = k<T, W>;\nlaunch_dependent(args.early, kernel, f(1, 2), 64, stream,\n"
        "                 args);"
    )
    found = rewritten(text)
    assert found.count("\n") == text.count("\n")
    assert 'launch("k", ::emulated::address(kernel), 0, f(1, 2), 64, 0' in found
    assert "kernel(args);" in found


@pytest.mark.parametrize("kernel", ["k", "k<T, W>", "k<T, kWidth<T>>", "a::k<float>"])
def test_a_launch_keeps_its_kernel_its_arguments_and_its_lines(kernel: str) -> None:
    text = f"if (x)\n  {kernel}\n    <<<g(1, 2), 32 * n, bytes, stream>>>(a, f(b, c),\n d);\nend"
    found = rewritten(text)
    assert found.count("\n") == text.count("\n")
    assert f"::emulated::address({kernel}), 0, g(1, 2), 32 * n, bytes," in found
    assert f"on_stream = stream] {{ (void)on_stream; {kernel}(a, f(b, c),\n d); }})" in found


def test_a_launch_knows_how_many_threads_its_kernel_allows() -> None:
    text = "__global__ void __launch_bounds__(32 * kWarps, 1)\n    k(int a) {}\nk<<<1, 64>>>(a);"
    assert "::emulated::address(k), 32 * kWarps, 1, 64, 0," in rewritten(text)


def test_shared_memory_of_an_unknown_form_is_refused() -> None:
    assert "Shared<Sums<T>[4]> shared_x" in rewritten("  __shared__ Sums<T> x[4];")
    with pytest.raises(CannotRewrite, match="shared memory of an unknown form"):
        rewritten("__shared__ float x = 0;")


def test_a_binding_is_registered_apart_and_takes_tensors_of_the_cpu() -> None:
    text = rewrite_binding(
        "if (x.is_cuda()) {}\nif (x.is_cpu()) {}\n"
        "TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }\n"
        "TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }"
    )
    assert text.split("\n") == [
        "if (x.is_cpu()) {}",
        "if (x.is_cuda()) {}",
        "",
        "TORCH_LIBRARY_IMPL(megarlx_emulated, CPU, m) { implement(m); }",
    ]


def test_every_kernel_has_a_case() -> None:
    assert sorted(CASES) == kernels(CSRC)
    assert len(CASES) > 10
    assert {"sample", "token_loss", "average_adamw_"} <= set(operators(CSRC))


def test_barriers_that_are_called_superfluous_exist() -> None:
    known = {(mutation.file, mutation.number) for mutation in mutations(CSRC)}
    assert len(known) > 10
    assert set(SUPERFLUOUS) <= known


def test_a_mutation_takes_out_one_barrier(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    text = "a __syncthreads();\nb __syncthreads();\nc __syncthreads();\n"
    (tmp_path / "cuda" / "x.cu").write_text(text)
    list(mutations(tmp_path))[1].apply(tmp_path)
    changed = (tmp_path / "cuda" / "x.cu").read_text()
    assert changed == "a __syncthreads();\nb ;\nc __syncthreads();\n"
