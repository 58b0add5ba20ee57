"""No arguments make a CPU op crash, loop, or touch memory that is not its own."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fault_runs import environment
from fuzz_ops import OPS, E, K, L, M, S, arguments

MOST_FAILURES = 10  # enough to see what is wrong


def fuzz(seed: int, calls: int) -> tuple[list[str], Counter[str]]:
    """What ended the process, by call, and how often the ops took or refused their arguments."""
    program = str(Path(__file__).with_name("fuzz_ops.py"))
    failures: list[str] = []
    outcomes: Counter[str] = Counter()
    first = 0
    while first < calls and len(failures) < MOST_FAILURES:
        words = [sys.executable, program, str(seed), str(first), str(calls - first)]
        done = subprocess.run(words, env=environment(), capture_output=True, check=False)
        said = done.stdout.decode(errors="replace").splitlines()
        outcomes.update(line for line in said if line in ("ok", "refused"))
        if done.returncode == 0:
            break
        assert done.returncode < 0, done.stderr.decode(errors="replace")
        call = [line for line in said if line.startswith("call ")][-1]
        failures.append(f"{signal.Signals(-done.returncode).name}: {call}")
        first = int(call.split()[1]) + 1
    return failures, outcomes


@pytest.mark.parametrize(
    ("seed", "calls"), [(1, 2_000), pytest.param(2, 20_000, marks=pytest.mark.slow)]
)
def test_ops_take_their_arguments_or_refuse_them(seed: int, calls: int) -> None:
    failures, outcomes = fuzz(seed, calls)
    assert failures == []
    assert outcomes.total() == calls
    assert outcomes["ok"] > calls / 5
    assert outcomes["refused"] > calls / 3
    assert len(OPS) > 20


EMPTY: dict[str, dict[str, Any]] = {
    "decode_attention_": {"keys": (S, M, 0, E), "values": (S, M, 0, E)},
    "decode_attention_ of no size": {"keys": (S, M, K, 0), "values": (S, M, K, 0)},
    "decode_step_": {"keys": (L, S, M, 0, E), "values": (L, S, M, 0, E)},
    "swiglu": {"gate_up": (2**40, 0)},
    "decode_swiglu_": {"gate_up": (2**40, 0), "out": (2**40, 0)},
    "decode_norm_": {"x": (2**40, 0), "y": (2**40, 0), "out": (2**40, 0), "weight": (0,)},
}


@pytest.mark.parametrize("name", EMPTY)
def test_heads_and_rows_of_no_size_end_at_once(name: str) -> None:
    op = name.split()[0]
    given = arguments(op, random.Random(0), wrong=0)
    given |= {key: torch.empty(shape) for key, shape in EMPTY[name].items()}
    call = getattr(torch.ops.megarlx, op)
    if op == "swiglu":
        assert call(**given).shape == (2**40, 0)
        return
    with pytest.raises(ValueError, match=f"megarlx.{op}: "):
        call(**given)


@pytest.mark.parametrize("heads", [2**62, 2**63 - 1, -(2**63), 3 * 2**61])
def test_more_heads_than_can_be_counted_are_refused(heads: int) -> None:
    for key in ("heads", "kv_heads"):
        given = arguments("_heads", random.Random(0), wrong=0) | {key: heads}
        with pytest.raises(ValueError, match=f"{key} is {heads}"):
            torch.ops.megarlx._heads(**given)
