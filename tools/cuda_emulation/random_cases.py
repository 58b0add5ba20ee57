"""Random calls of the ops, on emulated kernels and on the CPU's, until a time is over.

    python -m cuda_emulation.random_cases KIND SECONDS [SEED [CASE …]]

in the environment of build.environment(KIND).

Values, shapes, strides, alignment, filters and pretended cards are drawn; a difference is printed
with the call that made it. What may differ by rounding is compared within it; tokens, moments,
updates, packed and scaled numbers have the same bits.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlx.ops.loss_spec import KL_ESTIMATORS, MODES

from .library import LARGE, SMALL, Library, PretendedCard, load

CPU: Any = torch.ops.megarlx
BFLOAT16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64


class Draw:
    """What a case is made of, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int, dtype: torch.dtype = FLOAT, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, dtype=DOUBLE) * scale).to(dtype)

    def card(self) -> PretendedCard:
        return PretendedCard(
            multiprocessors=self.of(1, 2, 132),
            shared_bytes=self.of(49_152, SMALL, LARGE),
            order=self.of("forwards", "backwards", "random"),
            seed=self.random.randrange(1 << 30),
            poison=self.of(0xFF, 0x7F, 0x00, 0xA5),
            inexact_exp2=self.chance(0.5),
        )

    def placed(self, rows: Tensor, around: float = math.nan) -> Tensor:
        """The same rows in a wider buffer, at some offset."""
        offset, padding = self.of((0, 0), (0, 0), (1, 3), (3, 0), (0, 8), (8, 16), (4, 4))
        count, width = rows.shape
        whole = torch.full((count * (width + padding) + offset + 16,), around, dtype=rows.dtype)
        view = whole.as_strided((count, width), (width + padding, 1), offset)
        return view.copy_(rows)

    def flat(self, values: Tensor, offset: int) -> Tensor:
        whole = torch.full((len(values) + offset + 24,), 7.0, dtype=values.dtype)
        return whole[offset : offset + len(values)].copy_(values)


def copied(tensor: Tensor) -> Tensor:
    """A copy at the same offset in memory of its own."""
    whole = tensor._base if tensor._base is not None else tensor
    return whole.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_bits(a: Tensor, b: Tensor, name: str) -> None:
    """Of all that is around, too; NaNs of any kind are alike."""
    for x, y in ((a, b), *([(a._base, b._base)] if a._base is not None else [])):
        assert x is not None
        assert y is not None
        equal = torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(5), y.nan_to_num(5))
        assert equal, f"{name}: {(x.double() - y.double()).abs().nan_to_num(0).max()} apart"


def near(a: Tensor, b: Tensor, relative: float, absolute: float, name: str) -> None:
    torch.testing.assert_close(
        *(x.double() for x in (a, b)), rtol=relative, atol=absolute, equal_nan=True, msg=name
    )


def sampling(draw: Draw, ops: Any) -> None:
    rows, vocabulary = draw.of(1, 2, 5), draw.of(1, 7, 127, 128, 129, 700, 1024, 4097, 5003)
    logits = draw.normal(rows, vocabulary, scale=draw.of(0.01, 1, 3, 30, 1e4, 1e30))
    style = draw.of("normal", "normal", "ties", "equal", "holes", "one", "broken")
    if style == "ties":
        logits = logits.round().clamp(-3, 3)
    elif style == "equal":
        logits[:] = draw.of(0.0, -5.0, 3e38, -3e38, 1e-40)
    elif style == "holes":
        logits[draw.normal(rows, vocabulary) > 0] = -math.inf
    elif style == "one":
        logits[:] = -math.inf
        logits[:, draw.random.randrange(vocabulary)] = draw.of(0.0, 5.0, -3e38)
    elif style == "broken":
        logits[0, draw.random.randrange(vocabulary)] = draw.of(math.nan, math.inf)
    logits = draw.placed(logits.to(draw.of(FLOAT, BFLOAT16)))

    def numbers(dtype: torch.dtype, *choices: float) -> Tensor:
        return torch.tensor([draw.of(*choices) for _ in range(draw.of(1, rows))], dtype=dtype)

    heat = numbers(FLOAT, 0.0, 1.0, 1.0, 0.7, 1.3, 0.01, 1e-20, 1e35)
    filters: list[Tensor | None] = [
        numbers(torch.int64, 0, 1, 5, vocabulary // 2, vocabulary + 5, 10**9),
        numbers(FLOAT, 0.0, 1.0, 0.5, 0.9, 0.999999),
        numbers(FLOAT, 0.0, 1.0, 0.02, 1e-30),
    ]
    filters = [value if draw.chance(0.5) else None for value in filters]
    seed = torch.tensor([draw.random.randrange(-(2**62), 2**62)])
    keys = torch.randint(0, 1 << 40, (rows, 2), generator=draw.generator)
    real = max(1, vocabulary - draw.of(0, 0, draw.random.randrange(min(vocabulary, 300))))
    arguments = (logits, seed, keys, heat, *filters, real)
    ours, theirs = ops.sample(*arguments), CPU.sample(*arguments)
    assert torch.equal(ours[0], theirs[0]), f"tokens {ours[0].tolist()}, CPU {theirs[0].tolist()}"
    for name, a, b in zip(("logprob", "sampled_logprob"), ours[1:], theirs[1:], strict=True):
        near(a, b, 4e-6, 4e-6, name)


def losses(draw: Draw, ops: Any) -> None:
    mode, kl = draw.of(*MODES), draw.of(*KL_ESTIMATORS)
    tokens, columns = draw.of(1, 2, 5), draw.of(1, 3, 8, 9, 97, 512, 1030, 4099, 25_601, 51_208)
    dtype = draw.of(FLOAT, BFLOAT16, DOUBLE)
    precision = DOUBLE if dtype == DOUBLE else FLOAT
    vocabulary = max(1, columns - draw.of(0, 0, draw.random.randrange(min(columns, 70))))
    logits = draw.normal(tokens, columns, dtype=precision, scale=draw.of(0.1, 2, 2, 10))
    targets = torch.randint(0, vocabulary, (tokens,), generator=draw.generator)
    style = draw.of("normal", "normal", "holes", "nan")
    if style == "holes":
        logits[draw.normal(tokens, columns) > 0.5] = -math.inf
        logits.scatter_(1, targets[:, None], 1.0)
    elif style == "nan":
        logits[draw.random.randrange(tokens), draw.random.randrange(columns)] = math.nan
    logits = logits.to(dtype)
    logits[:, vocabulary:] = draw.of(math.nan, math.inf, 50.0)
    inside = logits[:, :vocabulary].to(precision).log_softmax(-1)
    logprobs = inside.gather(1, targets[:, None])[:, 0].nan_to_num(-3).clamp(-50)

    def maybe(values: Tensor) -> Tensor | None:
        return values if draw.chance(0.6) else None

    def normal() -> Tensor:
        return draw.normal(tokens, dtype=precision)

    arguments = (
        draw.placed(logits),
        targets,
        maybe(draw.normal(tokens) > -0.5),
        None if mode == "nll" else normal(),
        maybe(logprobs + 0.4 * normal()),
        logprobs + 0.4 * normal() if kl != "none" else None,
        maybe(normal()),
        torch.tensor(draw.of(1.0, 5.0, 0.0), dtype=precision),
        torch.tensor(draw.of(1.0, 0.9, 2.0), dtype=precision),
        vocabulary,
        *(mode, kl, 0.2, 0.3, draw.of(0.0, 3.0), draw.of(0.0, 0.3), draw.of(0.0, 0.1, -0.2)),
        draw.of(0.0, 0.1),
        draw.chance(0.8),
    )
    before = arguments[0].clone()
    ours, theirs = ops.token_loss(*arguments), CPU.token_loss(*arguments)
    same_bits(arguments[0].clone(), before, "logits are written")
    relative = {DOUBLE: 1e-9, FLOAT: 1e-4, BFLOAT16: 1e-4}[dtype]
    for name, a, b in zip(("loss", "logprobs", "entropy", "metrics"), ours, theirs, strict=False):
        size = max(1.0, b.double().nan_to_num(0, 0, 0).abs().max().item())
        near(a, b, relative, relative * size, name)
    if arguments[-1]:
        same_gradients(ours[4], theirs[4])
    half_losses(ops, arguments, draw.normal(3, tokens, dtype=precision))


def same_gradients(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours.isnan(), theirs.isnan()), "gradient's NaNs"
    a, b = (gradient.double().nan_to_num(0, 0, 0) for gradient in (ours, theirs))
    bound = {DOUBLE: 1e-9, FLOAT: 2e-4, BFLOAT16: 8e-3}[ours.dtype]
    assert (a - b).norm() <= bound * b.norm() + 1e-6, f"gradient {(a - b).norm()} apart"


def half_losses(ops: Any, arguments: tuple[Any, ...], slopes: Tensor) -> None:
    """The same rows through the two ops around the seam; the second writes over the logits."""
    logits, targets, mask = arguments[:3]
    place = (arguments[8], 0, arguments[9])
    found = []
    for of in (ops, CPU):
        sums = of.token_loss_sums(logits, targets, mask, *place)
        gradient = logits.clone()
        of.token_loss_gradient_(gradient, sums, targets, mask, *slopes, *place)
        found.append((sums, gradient))
    relative = 1e-9 if sums.dtype == DOUBLE else 1e-4
    size = max(1.0, found[1][0].double().nan_to_num(0, 0, 0).abs().max().item())
    ours, theirs = (sums.clone() for sums, _ in found)
    unknown = theirs[1].isnan()  # a row with a NaN has no maximum that means something
    ours[0].masked_fill_(unknown, 0)
    theirs[0].masked_fill_(unknown, 0)
    near(ours, theirs, relative, relative * size, "sums")
    same_gradients(found[0][1], found[1][1])


def updates(draw: Draw, ops: Any) -> None:
    n, count = draw.of(1, 2, 3, 8), draw.of(0, 1, 3, 4, 5, 255, 2049, 5000, 40_001)
    dtype = draw.of(FLOAT, DOUBLE)
    narrow, out_dtype = draw.of(dtype, BFLOAT16), draw.of(None, dtype, BFLOAT16)

    def buffer(kind: torch.dtype, scale: float = 1.0, square: bool = False) -> Tensor:
        values = draw.normal(count, scale=scale)
        return draw.flat((values**2 if square else values).to(kind), draw.of(0, 0, 1, 2, 3, 4, 8))

    def numbers(*choices: float) -> Tensor:
        return torch.tensor([draw.of(*choices) for _ in range(n)], dtype=DOUBLE)

    master, out = buffer(dtype), None if out_dtype is None else buffer(out_dtype)
    lists = [
        [buffer(kind, scale, square) for _ in range(n)]
        for kind, scale, square in ((narrow, 1.0, False), (dtype, 0.1, False), (dtype, 0.1, True))
    ]
    if count and draw.chance(0.3):
        lists[0][0][draw.random.randrange(count)] = draw.of(math.inf, math.nan, 3e38)
    steps = torch.tensor([draw.of(0, 1, 5, 100_000) for _ in range(n)])
    flags = torch.tensor([draw.chance(0.3) for _ in range(n)]) if draw.chance(0.5) else None
    others: dict[str, Any] = {
        "lrs": numbers(1e-2, 1e-3, 0.0), "beta1s": [draw.of(0.9, 0.0) for _ in range(n)],
        "beta2s": [0.999] * n, "eps": [draw.of(1e-8, 1e-15) for _ in range(n)],
        "weight_decays": numbers(0.0, 0.1), "clips": numbers(1.0, 0.7),
        "weights": numbers(0.0, 0.5, 1.0, -1.0), "found_inf": flags,
    }  # fmt: skip
    results = []
    for of in (ops, CPU):
        state: list[Any] = [copied(master)]
        state += [[copied(t) for t in part] for part in lists]
        counted, into = steps.clone(), None if out is None else copied(out)
        of.average_adamw_(*state, **others, steps=counted, param_out=into)
        written = [state[0], *state[2], *state[3], counted]
        results.append(written if into is None else [*written, into])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        same_bits(a, b, f"buffer {i}")


def replicas(draw: Draw, ops: Any) -> None:
    count, dtype = draw.of(0, 1, 3, 4, 2049, 65_535, 65_537, 140_001), draw.of(FLOAT, DOUBLE)
    wire, out_dtype = draw.of(dtype, BFLOAT16), draw.of(None, dtype, BFLOAT16)
    x = draw.flat(draw.normal(count, dtype=dtype), draw.of(0, 0, 1, 4))
    if count and draw.chance(0.3):
        x[draw.random.randrange(count)] = draw.of(math.inf, math.nan, 2e38)
    weight = torch.tensor([draw.of(0.5, 1.0, 0.0)], dtype=DOUBLE)
    flag = draw.of(None, torch.tensor([True]), torch.tensor([False]))
    empty = draw.flat(torch.zeros(count, dtype=wire), draw.of(0, 1))
    target = draw.flat(draw.normal(count, dtype=dtype), draw.of(0, 0, 1))
    out = None if out_dtype is None else draw.flat(torch.zeros(count, dtype=out_dtype), 0)
    skip, add = torch.tensor([draw.chance(0.3)]), draw.chance(0.5)
    results = []
    for of in (ops, CPU):
        packed, moved = copied(empty), copied(target)
        into = None if out is None else copied(out)
        norm, found = of.replica_average_pack(x, weight, flag, packed)
        of.replica_average_skip_(packed, skip)
        of.replica_average_apply_(moved, packed, add, into)
        results.append((norm, found, packed, moved, *([] if into is None else [into])))
    near(results[0][0], results[1][0], 1e-12, 0, "squared norm")
    for i, (a, b) in enumerate(zip(*(result[1:] for result in results), strict=True)):
        same_bits(a, b, f"result {i}")


def linear_losses(draw: Draw, ops: Any) -> None:
    dtype, mode, kl = draw.of(FLOAT, BFLOAT16, DOUBLE), draw.of(*MODES), draw.of(*KL_ESTIMATORS)
    precision = DOUBLE if dtype == DOUBLE else FLOAT
    tokens, size, columns = draw.of(1, 9, 33), draw.of(8, 24, 31), draw.of(97, 256, 513)
    vocabulary = columns - draw.of(0, 5)

    def normal() -> Tensor:
        return draw.normal(tokens, dtype=precision) - 3

    arguments = (
        draw.normal(tokens, size, dtype=dtype),
        draw.normal(columns, size, dtype=dtype, scale=0.3),
        torch.randint(0, vocabulary, (tokens,), generator=draw.generator),
        draw.normal(tokens) > -0.5 if draw.chance(0.6) else None,
        None if mode == "nll" else normal(),
        normal() if draw.chance(0.5) else None,
        normal() if kl != "none" else None,
        None,
        *(torch.tensor(value, dtype=precision) for value in (3.0, 0.9)),
        vocabulary,
        *(mode, kl, 0.2, 0.3, 0.0, 0.2, 0.1, draw.of(0.0, 0.1)),
        *(draw.of(1, 4, 16, 1000), draw.of(0, 1), draw.chance(0.5), True),
    )
    bound = {FLOAT: 2e-4, BFLOAT16: 1e-2, DOUBLE: 1e-10}[dtype]
    for i, (a, b) in enumerate(
        zip(ops.linear_token_loss(*arguments), CPU.linear_token_loss(*arguments), strict=True)
    ):
        gap, length = (a.double() - b.double()).norm(), b.double().norm()
        assert gap <= bound * length + 1e-9, f"result {i} is {gap} of {length} apart"


def elementwise(draw: Draw, ops: Any) -> None:
    """In bf16 against the CPU's fp32 of the same numbers."""
    dtype, rows = draw.of(BFLOAT16, FLOAT, DOUBLE), draw.of(0, 1, 5, 33, 70)
    h, k, dim = draw.of(1, 2, 5), draw.of(1, 2), 2 * draw.of(1, 3, 8, 16, 33, 64)
    width = draw.of(1, 7, 24, 128, 130, 519, 1032, 4100)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return draw.normal(*shape, dtype=dtype, scale=scale)

    def both(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        wide = (a.float() if isinstance(a, Tensor) and dtype == BFLOAT16 else a for a in arguments)
        found, wanted = getattr(ops, op)(*arguments), getattr(CPU, op)(*wide)
        found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            bound = {FLOAT: 1e-5, BFLOAT16: 6e-3, DOUBLE: 1e-12}[a.dtype]
            gap, length = (a.double() - b.double()).norm(), b.double().norm()
            assert gap <= bound * length + 1e-6, f"{op}, result {i} is {gap} of {length} apart"
        return found

    x, weight = draw.placed(normal(rows, width)), normal(width)
    _, inverse = both("rms_norm", x, weight, 1e-3, draw.of(None, normal(rows, width)))
    both("rms_norm_backward", normal(rows, width), x, weight, inverse, draw.chance(0.5))
    gate_up = draw.placed(normal(rows, 2 * width, scale=draw.of(1, 30)))
    both("swiglu", gate_up)
    both("swiglu_backward", normal(rows, width), gate_up)
    turn = draw.normal(rows, 1, dim // 2, dtype=DOUBLE)
    sizes = draw.of((), (h * dim, k * dim), (dim, dim))
    weights: list[Any] = [normal(size) for size in sizes] or [None, None]
    qkv = draw.placed(normal(rows, (h + 2 * k) * dim))
    given = (qkv, *weights, turn.cos().to(dtype), turn.sin().to(dtype))
    *_, inverse = both("_heads", *given, h, k, 1e-3)
    grads = (normal(rows, h, dim), normal(rows, k, dim), normal(rows, k, dim))
    both("_heads_backward", *grads, *given, inverse, bool(sizes) and draw.chance(0.7))


def normals(draw: Draw, ops: Any) -> None:
    rows, columns = draw.of(1, 2, 9), draw.of(1, 15, 64, 65, 200, 1024)
    first, step = draw.of(0, 5, 63, 2**34 - 100, 2**60), draw.of(0, 1, columns, 777)
    key, std = draw.random.randrange(-(2**63), 2**63), draw.of(0.0, 0.02, 1.0)
    ours = draw.placed(torch.ones(rows, columns, dtype=draw.of(FLOAT, BFLOAT16, DOUBLE)))
    theirs = copied(ours)
    ops.normal_slice_(ours, key, first, step, std)
    CPU.normal_slice_(theirs, key, first, step, std)
    same_bits(ours, theirs, f"normal numbers of {key}")


CASES: dict[str, Callable[[Draw, Any], None]] = {
    case.__name__: case
    for case in (sampling, losses, updates, replicas, linear_losses, elementwise, normals)
}


def run(library: Library, seconds: float, seed: int, names: Sequence[str]) -> tuple[Counter, int]:
    """(cases done by name, how many went wrong); stops at the tenth that does."""
    done: Counter[str] = Counter()
    wrong, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and wrong < 10:
        seed += 1
        draw = Draw(seed)
        name = draw.of(*names)
        library.pretend(card := draw.card())
        try:
            CASES[name](draw, library.ops)
        except (AssertionError, RuntimeError) as error:
            wrong += 1
            print(f"{name}, seed {seed}, {card}: {error}", flush=True)
        done[name] += 1
    return done, wrong


def main() -> int:
    kind, seconds, *others = sys.argv[1:]
    seed, *names = others or ["0"]
    torch.set_num_threads(1)
    done, wrong = run(load(kind), float(seconds), int(seed), names or list(CASES))
    print(f"{dict(done)}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
