"""A merge: the mean of checkpoints' weights, Σ shareᵢ θᵢ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarlx.run.branch import parent_of
from megarlx.run.directory import RunError
from megarlx.run.reference import resolve
from megarlx.run.sums import Term, WeightSum

RECIPE = "merge"
SUM_TOLERANCE = 1e-9  # of shares, as they are written in decimals


def merged(runs: Sequence[str], shares: Sequence[float] = ()) -> WeightSum:
    """It stands beside the one whose pre-training is furthest; of equals, the first."""
    if len(runs) < 2:
        raise RunError(f"{len(runs)} checkpoint is no merge; allowed are two or more")
    if not shares:
        shares = [1.0 / len(runs)] * len(runs)
    elif len(shares) != len(runs):
        raise RunError(f"--shares has {len(shares)} values for {len(runs)} checkpoints")
    elif not all(map(math.isfinite, shares)) or abs(math.fsum(shares) - 1) > SUM_TOLERANCE:
        raise RunError(
            f"--shares is {', '.join(map(str, shares))}; allowed are finite numbers whose sum is 1"
        )
    references = [resolve(text) for text in runs]
    furthest = max(references, key=lambda one: parent_of(one).trunk_tokens)
    terms = tuple(Term(share, one) for share, one in zip(shares, references, strict=True))
    return WeightSum(RECIPE, furthest, None, terms)
