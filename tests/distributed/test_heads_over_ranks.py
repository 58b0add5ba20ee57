"""QK-norm that spans the heads of several ranks, against one process with all of them.

n ranks with H query and K key/value heads of D numbers each.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.ops.elementwise import attention_heads, attention_heads_reference

TOKENS, H, K, D, EPS = 7, 2, 1, 6, 1e-5


def parts(n: int) -> dict[str, list[Tensor]]:
    """What each rank holds: heads of each kind, their weights, upstream gradients."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> list[Tensor]:
        return list(torch.randn(n, *shape, generator=generator, dtype=torch.float64))

    found = {name: drawn(TOKENS, heads * D) for name, heads in (("q", H), ("k", K), ("v", K))}
    found |= {"q_weight": drawn(H * D), "k_weight": drawn(K * D)}
    return found | {f"d{x}": drawn(TOKENS, heads, D) for x, heads in (("q", H), ("k", K), ("v", K))}


def turn() -> tuple[Tensor, Tensor]:
    angle = torch.arange(TOKENS * D // 2, dtype=torch.float64).view(TOKENS, 1, D // 2)
    return angle.cos(), angle.sin()


def of_one(n: int) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v) of all ranks' heads, and the gradients of the projection and of both weights."""
    p = parts(n)
    qkv = torch.cat([x for name in "qkv" for x in p[name]], 1).requires_grad_()
    weights = [torch.cat(p[name]).requires_grad_() for name in ("q_weight", "k_weight")]
    named = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS}
    out = attention_heads_reference(qkv, *turn(), n * H, n * K, **named)
    upstream = [torch.cat(p[name], 1) for name in ("dq", "dk", "dv")]
    return list(out), list(torch.autograd.grad(out, [qkv, *weights], upstream))


def of_a_rank(n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    group = Mesh.build(tp=n, timeout_seconds=20).tp
    mine = {name: found[group.rank] for name, found in parts(n).items()}
    qkv = torch.cat([mine[name] for name in "qkv"], 1).requires_grad_()
    weights = [mine[name].requires_grad_() for name in ("q_weight", "k_weight")]
    named = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS}
    out = attention_heads(qkv, *turn(), H, K, **named, group=group)
    upstream = [mine[name] for name in ("dq", "dk", "dv")]
    gradients = torch.autograd.grad(out, [qkv, *weights], upstream)
    with torch.no_grad():
        plain = attention_heads(qkv, *turn(), H, K, **named, group=group)
    return [x.detach() for x in out], list(gradients), list(plain), group.rank


@pytest.mark.parametrize("n", [1, 2, 3])
def test_heads_of_several_ranks_are_those_of_one_process(run, n):
    (q, k, v), (by_qkv, by_q_weight, by_k_weight) = of_one(n)
    by_q, by_k, by_v = by_qkv.split((n * H * D, n * K * D, n * K * D), dim=1)
    for out, gradients, plain, rank in run(n, of_a_rank, n):
        for found, without_grad, whole in zip(out, plain, (q, k, v), strict=True):
            torch.testing.assert_close(found, whole.chunk(n, 1)[rank])
            assert torch.equal(found, without_grad)
        expected = torch.cat([x.chunk(n, 1)[rank] for x in (by_q, by_k, by_v)], 1)
        torch.testing.assert_close(gradients[0], expected)
        torch.testing.assert_close(gradients[1], by_q_weight.chunk(n)[rank])
        torch.testing.assert_close(gradients[2], by_k_weight.chunk(n)[rank])
