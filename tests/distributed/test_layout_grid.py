"""Any layout trains the same model: gradients and weights equal the single process.

In fp64, where what is left of a difference is rounding: in fp32 Adam would amplify it.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grid import SEQUENCES, Case, assemble, model, train

from megarlx.comm.groups import Layout
from megarlx.model.check_layout import LayoutError, check_layout


@functools.cache
def single_process(case: Case) -> dict[str, Any]:
    return train(case)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def compare(run: Callable[..., list[Any]], case: Case) -> None:
    expected = single_process(case.single)
    found = run(case.world_size, train, case)
    config = model(case.family, case.tied)
    if case.precision == "fp64":
        for what in ("gradient", "weights"):
            ours = assemble(config, [rank[what] for rank in found])
            theirs = assemble(config, [expected[what]])
            worst = {name: relative(ours[name], theirs[name]) for name in ours}
            assert max(worst.values()) <= 1e-9, (what, worst)
    tolerance = 1e-10 if case.precision == "fp64" else 1e-5
    for rank in found:
        np.testing.assert_allclose(rank["losses"], expected["losses"], rtol=tolerance)
        np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=tolerance * 10)


FAMILIES = ("olmo2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
TIED = ("qwen2", "gemma2")
SIZES = [
    (tp, pp, dp)
    for tp, pp, dp in itertools.product((1, 2, 4, 8), range(1, 9), range(1, 9))
    if 1 < tp * pp * dp <= 8
]
EVERY_LAYOUT = [
    Case(
        family,
        tp,
        pp,
        dp,
        microbatches=2,
        tied=family in TIED,
        sequences=2 * dp * -(-SEQUENCES // (2 * dp)),
    )
    for (tp, pp, dp), family in itertools.product(SIZES, FAMILIES)
]
# Every pair of (family, axis sizes, schedule, sequence parallel, micro-batches, tied, recompute)
# that can meet, at least once.
PAIRS = [
    Case("olmo2", tp=2, pp=2, dp=2, sequence_parallel=True, microbatches=4),
    Case("olmo2", tp=4, dp=2, microbatches=2, recompute="full"),
    Case("llama3", tp=4, dp=1, sequence_parallel=True, microbatches=1),
    Case("llama3", tp=1, pp=4, dp=2, microbatches=4, recompute="selective"),
    Case("llama3", pp=2, microbatches=4, schedule="zero_bubble", recompute="selective"),
    Case("llama3", pp=2, schedule="interleaved", virtual_stages=2, dp=2, microbatches=4),
    Case("qwen2", tp=2, pp=2, schedule="zero_bubble", microbatches=4, tied=True),
    Case("qwen2", pp=2, dp=2, schedule="zbv", virtual_stages=2, microbatches=4, tied=True),
    Case("qwen2", tp=4, pp=2, microbatches=2, tied=True, sequence_parallel=True),
    Case("qwen3", tp=2, dp=4, sequence_parallel=True, microbatches=2),
    Case("qwen3", tp=8, microbatches=1, tied=True),
    Case("qwen3", pp=3, layers_per_stage=(4, 1, 3), dp=2, microbatches=4),
    Case("olmo2", pp=4, schedule="interleaved", virtual_stages=2, microbatches=4, tied=True),
    Case("gemma2", tp=2, pp=2, sequence_parallel=True, microbatches=2, tied=True),
    Case("gemma2", pp=2, schedule="zero_bubble", microbatches=4, tied=True, recompute="selective"),
    Case("gemma3", tp=4, dp=2, sequence_parallel=True, microbatches=2, recompute="full"),
    Case("gemma3", tp=2, pp=2, schedule="zbv", virtual_stages=2, microbatches=4),
]
OTHERS = [
    *(Case("llama3", dp=d, microbatches=m) for d in (1, 2) for m in (1, 2, 4)),
    *(Case("olmo2", tp=2, sequence_parallel=s, microbatches=2) for s in (False, True)),
    *(
        Case(f, pp=2, schedule=s, virtual_stages=v, microbatches=4, tied=f in TIED)
        for f in FAMILIES
        for s, v in (("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2))
    ),
    *(Case(f, 2, 2, 2, microbatches=2, precision="fp32", tied=f in TIED) for f in FAMILIES),
]


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_a_layout_trains_the_single_process_model(run: Callable[..., Any], case: Case) -> None:
    compare(run, case)


@pytest.mark.parametrize("case", random.Random(0).sample(OTHERS, 6), ids=str)
def test_schedules_micro_batches_and_precisions_do_not_matter(
    run: Callable[..., Any], case: Case
) -> None:
    compare(run, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*EVERY_LAYOUT, *OTHERS], ids=str)
def test_every_layout_trains_the_single_process_model(run: Callable[..., Any], case: Case) -> None:
    compare(run, case)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (Layout(tp=3), {}, "8 heads cannot be split over tp=3"),
        (Layout(pp=9), {}, "8 layers are fewer than 9 pipeline stages"),
        (Layout(tp=2), {"sequence_length": 7, "sequence_parallel": True}, "nearest: 6 or 8"),
        (Layout(dp=3), {"world_size": 4}, "needs 3 processes; there are 4"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_one_that_can(
    layout: Layout, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=message) as error:
        check_layout(model("llama3", False), layout, **options)
    assert "Nearest for" in str(error.value)
