"""Products of matrices and linear layers, by the fastest kernel: torch's, or our own.

On a CPU whose library does not use AVX-512, fp32 goes through a kernel of ours (csrc/product.cpp
has the rule). A row of its result has the same bits whatever rows are beside it, and so has all of
it for any number of threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.ops import native


def is_own(x: Tensor) -> bool:
    """Whether its products are made by our kernel."""
    return native.load().own_products and x.is_cpu and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias"""
    out: Tensor
    if is_own(x):
        out = torch.ops.megarlx.linear(x, weight, bias)
    else:
        out = F.linear(x, weight, bias)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., depth] @ b [depth, columns]"""
    out: Tensor = torch.ops.megarlx.linear(a, b.t(), None) if is_own(a) else torch.matmul(a, b)
    return out


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, of matrices of one type; `out` is contiguous."""
    if is_own(out):
        torch.ops.megarlx.product_(out, a, b, add)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


@torch.library.register_fake("megarlx::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("megarlx::product_")
def _(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    return None
