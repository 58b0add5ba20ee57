"""The divergence from frozen teachers against a textbook that makes all logits, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_cases import case, textbook
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.ops import Teacher, linear_distill_loss


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows_per_chunk": 4, "shares": (0.25, 0.75)},
        {"rows_per_chunk": 5, "masked": True, "temperature": 0.7},
        {"final_cap": 3.0, "vocabulary": 17, "temperature": 1.6, "shares": (0.5, 0.2, 0.3)},
    ],
    ids=str,
)
def test_value_and_gradient_are_the_textbooks(kl: str, options: dict[str, Any]) -> None:
    made = case(**options)
    found = linear_distill_loss(made.head(), made.teachers, kl=kl, **made.rest)
    found.loss.backward()
    expected = textbook(made, kl)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12, abs=1e-14)
    torch.testing.assert_close(found.logprobs, expected.each, rtol=1e-12, atol=1e-14)
    for ours, theirs in ((made.hidden, expected.hidden), (made.weight, expected.weight)):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-12, atol=1e-14)
    kept = expected.each if made.mask is None else expected.each[made.mask]
    assert found.metrics.tolist()[:2] == pytest.approx([len(kept), float(kept.sum())], rel=1e-12)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_teacher_that_is_the_student_gives_0(kl: str) -> None:
    made = case()
    same = [Teacher(made.hidden.detach(), made.weight.detach(), 1.0)]
    found = linear_distill_loss(made.head(), same, kl=kl, **made.rest)
    found.loss.backward()
    assert abs(found.loss.item()) < 1e-14
    for one in (made.hidden, made.weight):
        assert one.grad is not None
        assert one.grad.abs().max() < 1e-14


class Products(TorchDispatchMode):
    """Matrix products, and the most rows of logits in one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("aten.mm", "aten.addmm", "aten.bmm")):
            self.count += 1
        made = isinstance(found, Tensor) and "aten.t." not in str(func)
        if made and found.dim() == 2 and found.shape[1] == VOCABULARY:
            self.rows = max(self.rows, 0 if found.shape[0] == VOCABULARY else found.shape[0])
        return found


VOCABULARY = 23


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.25, 0.25)], ids=len)
def test_a_chunk_costs_three_products_and_one_a_teacher(shares: tuple[float, ...]) -> None:
    made = case(vocabulary=VOCABULARY, shares=shares)
    rows, tokens = 4, len(made.hidden)
    with Products() as seen:
        result = linear_distill_loss(
            made.head(), made.teachers, kl="reverse", normalizer=1.0, rows_per_chunk=rows
        )
        result.loss.backward()
    assert seen.count == -(-tokens // rows) * (3 + len(shares))
    assert seen.rows == rows
    with Products() as without, torch.no_grad():
        linear_distill_loss(made.head(), made.teachers, kl="forward", normalizer=1.0)
    assert without.count == 1 + len(shares)


def test_no_tokens_and_no_normaliser_give_0_and_wrong_arguments_are_named() -> None:
    made = case()
    nothing = torch.zeros(len(made.hidden), dtype=torch.bool)
    found = linear_distill_loss(
        made.head(), made.teachers, kl="reverse", normalizer=0.0, mask=nothing
    )
    found.loss.backward()
    assert found.loss.item() == 0
    assert made.hidden.grad is not None
    assert not made.hidden.grad.any()
    (one,) = made.teachers
    wrong: dict[str, dict[str, Any]] = {
        "kl is 'both'; allowed: reverse, forward": {"kl": "both"},
        "temperature is 0; allowed: a number > 0": {"temperature": 0},
        r"shares is \[0.4\]; allowed: numbers that sum to 1": {
            "teachers": [Teacher(one.hidden, one.weight, 0.4)]
        },
        "a teacher's weight is": {"teachers": [Teacher(one.hidden, one.weight[:-1], 1.0)]},
    }
    usual = {"teachers": made.teachers, "kl": "reverse", "normalizer": 1.0}
    for text, changes in wrong.items():
        with pytest.raises(ValueError, match=text):
            linear_distill_loss(made.head(), **(usual | changes))
