"""One directed case for each kernel: small, through every barrier, and compared with the CPU's op.

    python -m cuda_emulation.cases KIND|LIBRARY [KERNEL …]

in the environment of build.environment(KIND).

What a sanitizer finds it prints itself, and makes the exit status other than 0, as a wrong result
does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlx.ops.loss_spec import LossSpec

from .library import LARGE, SMALL, Library, PretendedCard, load

CPU: Any = torch.ops.megarlx
BFLOAT16, DOUBLE = torch.bfloat16, torch.float64
Check = Callable[[Library], None]
SPEC = LossSpec("ppo_clip", 0.2, 0.3, 0.0, "k3", 0.3, 0.1).arguments


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(), dtype=DOUBLE) * scale).to(dtype)


def near(a: Tensor, b: Tensor, relative: float, absolute: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=relative, atol=absolute, equal_nan=True)


def same_draws(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert torch.equal(ours[0], theirs[0]), f"tokens {ours[0].tolist()}, CPU {theirs[0].tolist()}"
    near(ours[1], theirs[1], 4e-6, 4e-6)
    near(ours[2], theirs[2], 4e-6, 4e-6)


def rows_of(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    keys, seed = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([9])
    logits = normal(3, vocabulary, dtype=dtype, scale=2)
    logits[2] = -math.inf  # a row that holds nothing
    return logits, seed, keys, torch.tensor([1.0, 0.8, 1.0])


def draws(library: Library) -> None:
    for vocabulary, dtype in ((4225, torch.float32), (2176, torch.bfloat16)):
        row = rows_of(vocabulary, dtype)
        arguments = (*row, None, None, None, vocabulary)
        same_draws(library.ops.sample(*arguments), CPU.sample(*arguments))


def filtered_draws(library: Library) -> None:
    filters = [(5, None, None), (300, None, None), (None, 0.9, None), (3, 0.7, 0.05)]
    for vocabulary, dtype in ((4225, torch.float32), (2176, torch.bfloat16)):
        row = rows_of(vocabulary, dtype)
        for k, p, m in filters:
            values = (
                None if value is None else torch.tensor([value], dtype=kind)
                for value, kind in ((k, torch.int64), (p, torch.float32), (m, torch.float32))
            )
            arguments = (*row, *values, vocabulary)
            same_draws(library.ops.sample(*arguments), CPU.sample(*arguments))


def combined_draws(library: Library) -> None:
    logits, *rest, heat = rows_of(2048, torch.float32)
    partials = [
        torch.stack([op(logits[:, i : i + 512], *rest, heat, i, 2000) for i in range(0, 2048, 512)])
        for op in (library.ops.sample_partials, CPU.sample_partials)
    ]
    same_draws(library.ops.sample_combine(partials[0], heat), CPU.sample_combine(partials[1], heat))


def loss_inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    precision = DOUBLE if dtype == DOUBLE else torch.float32
    targets = torch.randint(0, vocabulary, (3,), generator=generator())
    logits = normal(3, vocabulary, dtype=dtype, scale=2)
    logprobs = logits.to(precision).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    mask = torch.tensor([True, False, True])
    tokens = (normal(3, dtype=precision), logprobs + 0.1, logprobs - 0.2, normal(3).to(precision))
    numbers = (torch.tensor(2.0, dtype=precision), torch.tensor(0.9, dtype=precision))
    return logits, targets, mask, *tokens, *numbers


def losses(library: Library) -> None:
    # Rows that are aligned and not; in bf16 one that is longer than a small card's shared memory.
    for vocabulary, dtype in (
        *((97, torch.float32), (1032, torch.float32), (1030, DOUBLE)),
        *((1032, torch.bfloat16), (52_000, torch.bfloat16)),
    ):
        inputs = loss_inputs(vocabulary, dtype)
        arguments = (*inputs, vocabulary - 3, *SPEC)
        for with_gradient in (True, False):
            ours = library.ops.token_loss(*arguments, with_gradient)
            theirs = CPU.token_loss(*arguments, with_gradient)
            for a, b in zip(ours[:4], theirs[:4], strict=True):
                near(a, b, 1e-4, 1e-4)
            gap = (ours[4].double() - theirs[4].double()).norm()
            assert gap <= 6e-3 * theirs[4].double().norm(), f"gradient off by {gap}"
        logits, targets, mask, *_, heat = inputs
        place = (heat, 0, vocabulary - 3)
        partials = library.ops.token_loss_sums(logits, targets, mask, *place)
        near(partials, CPU.token_loss_sums(logits, targets, mask, *place), 1e-4, 1e-4)
        slopes = normal(3, 3, dtype=partials.dtype)
        gradients = [torch.empty_like(logits) for _ in range(2)]
        for ops, gradient in zip((library.ops, CPU), gradients, strict=True):
            of_rows = (partials, targets, mask, *slopes, *place)
            ops.token_loss_gradient_(logits, *of_rows, gradient)
        gap = (gradients[0].double() - gradients[1].double()).norm()
        assert gap <= 6e-3 * gradients[1].double().norm(), f"gradient off by {gap}"


def scaled_gradients(library: Library) -> None:
    for dtype in (torch.float32, DOUBLE, torch.bfloat16):
        for offset in (0, 1):
            a, b = (normal(20_000, dtype=dtype)[offset:] for _ in range(2))
            factor = torch.tensor(0.3, dtype=DOUBLE if dtype == DOUBLE else torch.float32)
            library.ops._scale_gradient_(a, factor)
            CPU._scale_gradient_(b, factor)
            assert torch.equal(a, b), f"{dtype} at {offset}"


def updates(library: Library) -> None:
    for dtype in (torch.float32, DOUBLE):
        for count in (1, 20_003):
            states = []
            for ops in (library.ops, CPU):
                state = [normal(count, dtype=dtype) for _ in range(6)]
                two = torch.full((2,), 0.5, dtype=DOUBLE)
                steps, out = torch.tensor([0, 7]), torch.empty(count, dtype=torch.bfloat16)
                ops.average_adamw_(
                    state[0], [state[1].bfloat16(), state[2].bfloat16()], state[3:5],
                    [normal(count, dtype=dtype) ** 2 for _ in range(2)], lrs=two,
                    beta1s=[0.9, 0.8], beta2s=[0.95, 0.9], eps=[1e-8, 1e-9], weight_decays=two,
                    steps=steps, clips=two, weights=two, found_inf=torch.tensor([False, True]),
                    param_out=out,
                )  # fmt: skip
                states.append((state[0], *state[3:5], steps, out))
            for a, b in zip(*states, strict=True):
                near(a, b, 1e-6, 1e-7)


def packs(library: Library) -> None:
    weight = torch.full((1,), 0.3, dtype=DOUBLE)
    # On one multiprocessor eight blocks take ten chunks, so that one goes round.
    for dtype, count in ((torch.float32, 600_001), (DOUBLE, 70_001)):
        x = normal(count, dtype=dtype)
        packed = [torch.empty_like(x), torch.empty_like(x)]
        ours = library.ops.replica_average_pack(x, weight, None, packed[0])
        theirs = CPU.replica_average_pack(x, weight, None, packed[1])
        assert torch.equal(*packed)
        near(ours[0], theirs[0], 1e-12)


def applies(library: Library) -> None:
    for dtype in (torch.float32, DOUBLE):
        summed = normal(20_003, dtype=dtype).bfloat16()
        targets = [normal(20_003, dtype=dtype) for _ in range(2)]
        for ops, target in zip((library.ops, CPU), targets, strict=True):
            ops.replica_average_apply_(target, summed, True, None)
        assert torch.equal(*targets)


def skips(library: Library) -> None:
    for flag in (True, False):
        x = torch.full((20_003,), math.nan)
        library.ops.replica_average_skip_(x, torch.tensor([flag]))
        assert x.eq(0).all() if flag else x.isnan().all()


def of_cpu(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The CPU's results, in fp32 where the arguments are bf16."""
    wide = (a.float() if isinstance(a, Tensor) and a.dtype == BFLOAT16 else a for a in arguments)
    found = getattr(CPU, op)(*wide)
    return found if isinstance(found, tuple) else (found,)


def elementwise(library: Library, op: str, *arguments: Any) -> tuple[Tensor, ...]:
    """The results of an op, compared with the CPU's to their own rounding."""
    found = getattr(library.ops, op)(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    for i, (a, b) in enumerate(zip(found, of_cpu(op, arguments), strict=True)):
        bound = {DOUBLE: 1e-13, BFLOAT16: 4e-3}.get(a.dtype, 1e-6)
        a, b = (x.nan_to_num(neginf=-9) for x in (a, b))
        gap, length = (a.to(b.dtype) - b).norm(), b.norm()
        assert gap <= bound * length, f"{op} {arguments[0].shape}, result {i}: {gap} of {length}"
    return found


# Rows of a part of a warp, of several warps, and too wide for a block's registers; aligned or not.
WIDTHS = {
    BFLOAT16: (24, 130, 2056, 8200),
    torch.float32: (24, 130, 1032, 4100),
    DOUBLE: (24, 131, 520, 2050),
}


def norms(library: Library) -> None:
    for dtype, widths in WIDTHS.items():
        for width in widths:
            x, weight = normal(19, width, dtype=dtype), normal(width, dtype=dtype, scale=2)
            for residual in (None, normal(19, width, dtype=dtype, scale=3)):
                _, inverse = elementwise(library, "rms_norm", x, weight, 1e-5, residual)
            for with_weight in (True, False):
                grad = normal(19, width, dtype=dtype, scale=0.5)
                given = (grad, x, weight, inverse, with_weight)
                elementwise(library, "rms_norm_backward", *given)


def swiglus(library: Library) -> None:
    for dtype, widths in WIDTHS.items():
        for width in widths:
            gate_up = normal(5, 2 * width + 1, dtype=dtype, scale=3)[:, : 2 * width]
            for rows in (gate_up, gate_up.contiguous()):
                elementwise(library, "swiglu", rows)
                elementwise(library, "swiglu_backward", normal(5, width, dtype=dtype), rows)


def heads_of(library: Library, dtype: torch.dtype, h: int, k: int, dim: int) -> None:
    turn = normal(19, 1, dim // 2, dtype=DOUBLE)
    cos, sin = turn.cos().to(dtype), turn.sin().to(dtype)
    qkv = normal(19, (h + 2 * k) * dim, dtype=dtype)
    for sizes in ((), (h * dim, k * dim), (dim, dim)):
        weights: list[Any] = [normal(size, dtype=dtype) for size in sizes] or [None, None]
        given = (qkv, *weights, cos, sin)
        q, keys, inverse = elementwise(library, "_heads", *given, h, k, 1e-5)
        grads = (q, keys, keys.flip(0).contiguous())
        for with_weights in {False, bool(sizes)}:
            elementwise(library, "_heads_backward", *grads, *given, inverse, with_weights)
        if len(sizes) == 2 and sizes[0] == h * dim:
            (sums,) = elementwise(library, "_heads_sums", qkv, h, k)
            elementwise(library, "_heads", *given, h, k, 1e-5, 3 * sums, 2)
            (sums,) = elementwise(library, "_heads_backward_sums", *grads[:2], *given)
            elementwise(library, "_heads_backward", *grads, *given, inverse, True, sums / 3, 2)


def heads(library: Library) -> None:
    for dtype in (BFLOAT16, torch.float32, DOUBLE):
        for h, k, dim in ((2, 1, 32), (4, 2, 22), (1, 1, 2)):
            heads_of(library, dtype, h, k, dim)
    heads_of(library, BFLOAT16, 17, 3, 128)  # 136 pairs of packs: two warps
    heads_of(library, DOUBLE, 17, 1, 128)  # too wide


def in_place(library: Library, op: str, *arguments: Any) -> None:
    """An op that writes its arguments, compared with the CPU's."""
    wide = [
        a.float() if isinstance(a, Tensor) and a.dtype == BFLOAT16 else copied(a) for a in arguments
    ]
    getattr(CPU, op)(*wide)
    getattr(library.ops, op)(*arguments)
    for i, (a, b) in enumerate(zip(arguments, wide, strict=True)):
        if isinstance(a, Tensor):
            bound = {DOUBLE: 1e-13, BFLOAT16: 6e-3}.get(a.dtype, 1e-6)
            a, b = a.double(), b.double()
            gap = (a - b).norm()
            assert gap <= bound * b.norm(), f"{op} {a.shape}, argument {i}: {gap} of {b.norm()}"


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def decode_parts(library: Library) -> None:
    for dtype, widths in WIDTHS.items():
        for width in widths:
            x, y, out = (normal(3, width, dtype=dtype, scale=s) for s in (1, 2, 3))
            weight = normal(width, dtype=dtype)
            in_place(library, "decode_norm_", x.clone(), y, weight, 1e-5, None)
            in_place(library, "decode_norm_", x.clone(), None, weight, 1e-5, out.clone())
            in_place(library, "decode_norm_", x, y, weight, 1e-5, out)
            in_place(library, "decode_swiglu_", torch.cat((x, y), 1), out)
        h, k, dim = 4, 2, 32
        turn = normal(12, dim // 2, dtype=DOUBLE)
        qkv, caches = normal(4, 8 * dim, dtype=dtype), normal(2, 6, 4, k, dim, dtype=dtype)
        # three tokens in shared pages, and none; there is no page 9
        table = torch.tensor([[3, 3, 0, 0, 5, 0, 2], [0, 0, 0, 0, 1, 9, 4]], dtype=torch.int32)
        places = (torch.tensor([1, 0, -1, 0]), torch.tensor([5, 11, 0, 0]))
        for sizes in ((), (h * dim, k * dim), (dim, dim)):
            weights: list[Any] = [normal(size, dtype=dtype) for size in sizes] or [None, None]
            in_place(
                library, "decode_heads_", qkv, caches[0].clone(), caches[1].clone(), table, *places,
                turn.cos().to(dtype), turn.sin().to(dtype), *weights, None, 1, 1e-5,
                normal(4, h, dim, dtype=dtype),
            )  # fmt: skip


def merges(library: Library) -> None:
    for dtype in (BFLOAT16, torch.float32, DOUBLE):
        for width in (24, 130):
            a, b = (normal(7, 3, width, dtype=dtype, scale=s) for s in (1, 2))
            wide = DOUBLE if dtype == DOUBLE else torch.float32
            lse = [normal(7, 3, dtype=wide, scale=s) for s in (3, 1)]
            lse[0][2], lse[1][3] = -math.inf, math.inf
            lse[1] = lse[1].t().contiguous().t()
            elementwise(library, "merge_attention", a, lse[0], b, lse[1])


def advances(library: Library) -> None:
    rows, ring = 300, 3
    whole = torch.arange(rows)
    state = (
        *(whole.clone(), whole.clone(), whole.clone(), torch.stack((whole, whole % 5), 1)),
        *(whole % 7 == 0, torch.tensor([4]), torch.zeros(ring, rows, dtype=torch.int64)),
        torch.zeros(2, ring, rows),
    )
    drawn, ends = whole % 11 - 1, torch.tensor([3, 5])
    for _ in range(2):
        given = (drawn, normal(rows), normal(rows, scale=2), ends, whole % 4 + 1, 77)
        in_place(library, "decode_advance_", *given, *state)


def normals(library: Library) -> None:
    for dtype in (torch.float32, DOUBLE, BFLOAT16):
        for rows, columns, step in ((1, 5000, 0), (7, 100, 100), (5, 130, 1000), (9, 1, 63)):
            outs = [torch.full((rows, columns + 3), 7.0, dtype=dtype) for _ in range(2)]
            for ops, out in zip((library.ops, CPU), outs, strict=True):
                ops.normal_slice_(out[:, 1 : 1 + columns], -5, 2**33 + 17, step, 0.02)
            assert torch.equal(*outs), f"{dtype} {rows} {columns} {step}"


def narrow_products(library: Library) -> None:
    """Aligned and not; fewer columns than a warp's part, several rounds, a last part of a pack."""
    for dtype in (BFLOAT16, torch.float32, DOUBLE):
        for rows, columns, outputs in ((1, 24, 5), (8, 4200, 9), (16, 1032, 17), (3, 4097, 3)):
            x, weight = normal(rows, columns, dtype=dtype), normal(outputs, columns, dtype=dtype)
            for bias in (None, normal(outputs, dtype=dtype, scale=9)):
                out = normal(rows, outputs, dtype=dtype)
                in_place(library, "narrow_product_", x, weight, bias, None, True, out)
            if dtype == BFLOAT16:
                narrow = (weight * 40).to(torch.float8_e4m3fn)
                given = (bias, normal(outputs, scale=0.1), False, out)
                in_place(library, "narrow_product_", x, narrow, *given)


def e4m3_rows(library: Library) -> None:
    for dtype in (BFLOAT16, torch.float32, DOUBLE):
        for columns in (24, 130, 2060):
            x, found = normal(5, columns, dtype=dtype, scale=7), []
            for ops, given in ((library.ops, x), (CPU, x.float())):
                values = torch.zeros(5, columns, dtype=torch.float8_e4m3fn)
                found.append((values.view(torch.uint8), torch.zeros(5)))
                ops.e4m3_rows_(given, values, found[-1][1])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), f"{dtype} {columns}"


CASES: dict[str, Check] = {
    "e4m3_kernel": e4m3_rows,
    "narrow_mma_kernel": narrow_products,
    "narrow_fma_kernel": narrow_products,
    "normal_kernel": normals,
    "merge_attention_kernel": merges,
    "advance_kernel": advances,
    "rms_norm_kernel": norms,
    "rms_norm_backward_kernel": norms,
    "sum_blocks_kernel": norms,
    "swiglu_kernel": swiglus,
    "swiglu_backward_kernel": swiglus,
    "heads_kernel": heads,
    "heads_backward_kernel": heads,
    "tile_kernel": draws,
    "finish_kernel": draws,
    "filtered_kernel": filtered_draws,
    "combine_kernel": combined_draws,
    "token_loss_kernel": losses,
    "scale_gradient_kernel": scaled_gradients,
    "prepare_adamw": updates,
    "average_adamw_kernel": updates,
    "pack_kernel": packs,
    "finish_pack": packs,
    "apply_kernel": applies,
    "zero_if_kernel": skips,
}
CARDS = [
    PretendedCard(multiprocessors=2, shared_bytes=LARGE, seed=5),
    PretendedCard(1, SMALL, "backwards", 6, poison=0x7F, inexact_exp2=True),
]


def run(library: Library, names: list[str]) -> int:
    """The number of cases that went wrong."""
    wrong: set[Check] = set()
    for case in dict.fromkeys(CASES[name] for name in names):
        for card in CARDS:
            library.pretend(card)
            try:
                case(library)
            except (AssertionError, RuntimeError) as error:
                wrong.add(case)
                print(f"{case.__name__} on {card}: {error}")
    for name in names:
        if library.launches(name) == 0 and CASES[name] not in wrong:
            wrong.add(CASES[name])
            print(f"{name}: its case {CASES[name].__name__} did not launch it")
    return len(wrong)


def main() -> int:
    where, *names = sys.argv[1:]
    library = Library(Path(where)) if "/" in where else load(where)
    torch.set_num_threads(1)
    names = names or list(CASES)
    wrong = run(library, names)
    print(f"{len(names)} kernels, {wrong} cases wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
