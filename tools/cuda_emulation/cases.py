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
DOUBLE = torch.float64
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


CASES: dict[str, Check] = {
    "tile_kernel": draws,
    "finish_kernel": draws,
    "threshold_kernel": filtered_draws,
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
