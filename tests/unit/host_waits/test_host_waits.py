"""A training step and a decode step on a GPU: the host queues work and does not wait for it.

All of it runs in a process of its own, on a device that is not there (watch.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch brings a CUDA device of its own"
)

Told = dict[str, dict[str, Any]]
TOKENS = ("generation/run.py: Run._work", "copy to the host")
# Where the host has to wait, and why.
ALLOWED: dict[str, dict[tuple[str, str], str]] = {
    "training": {},
    "recomputing": {},
    "in_a_layout": {},
    "first_of_a_pipeline": {},
    "last_of_a_pipeline": {},
    "averaging": {
        (
            "ops/linear_token_loss.py: _LinearTokenLoss.forward",
            "megarlx._linear_token_loss_.default that drops masked rows",
        ): "most of an SFT batch may be masked; how many rows are left the device alone knows"
    },
    "muon": {},
    "muon_in_a_layout": {},
    "projecting": {
        (
            "training/combine.py: without_skipped",
            "copy to the host",
        ): "which updates are combined is known on the host"
    },
    "prefill": {TOKENS: "what the scheduler does next follows from the drawn tokens"},
    "decode": {TOKENS: "as in a prefill"},
    "admission": {
        TOKENS: "as in a prefill",
        (
            "generation/run.py: Run._keep",
            "copy to the host",
        ): "log-probs of a finished sequence; its last token was waited for just before",
    },
    "flags": {},
}
# Operators of a step, each a kernel or more: 3 layers, 2 micro-batches of 2 sequences. Of those of
# decode 26 say which rows share a prompt, once for all layers, and one a layer takes out what rows
# that share nothing have read.
MOST_OPERATORS = {"training": 1060, "recomputing": 1215, "decode": 216}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("device")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("steps.py")), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Told = json.loads(done.stdout)
    return found


def places(told: Told, scenario: str) -> set[tuple[str, str]]:
    return {(place, what) for place, what, _ in told[scenario]["waits"]}


@pytest.mark.parametrize("scenario", ALLOWED)
def test_the_host_waits_where_it_must_and_nowhere_else(told: Told, scenario: str) -> None:
    assert places(told, scenario) == set(ALLOWED[scenario])


@pytest.mark.parametrize("scenario", MOST_OPERATORS)
def test_a_step_is_made_of_no_more_operators_than_it_was(told: Told, scenario: str) -> None:
    operators = told[scenario]["operators"]
    assert 0.5 * MOST_OPERATORS[scenario] < sum(operators.values()) <= MOST_OPERATORS[scenario], (
        operators
    )


@pytest.mark.parametrize(
    "scenario",
    ["training", "averaging", "in_a_layout", "first_of_a_pipeline", "last_of_a_pipeline"],
)
def test_attention_is_told_the_longest_document_of_the_step(told: Told, scenario: str) -> None:
    """Of 24 tokens a sequence: 48 are what it would be without."""
    bounds = told[scenario]["bounds"]
    assert bounds
    assert set(bounds) == {17}


def test_non_finite_gradients_are_told_one_step_later(told: Told) -> None:
    steps = [None if flags is None else flags["step"] for flags in told["flags"]["result"]]
    assert steps == [None, 0, 1, 2, None]


def test_every_kind_of_wait_is_seen_and_nothing_else(told: Told) -> None:
    assert places(told, "mistakes") == {
        ("elsewhere", "aten._local_scalar_dense.default"),
        ("elsewhere", "copy to the host"),
        ("elsewhere", "aten.nonzero.default"),
        ("elsewhere", "aten.index.Tensor by a mask"),
        ("elsewhere", "copy to the device that is waited for"),
    }
    counts = {what: count for _, what, count in told["mistakes"]["waits"]}
    assert counts["copy to the host"] == 2
    assert counts["copy to the device that is waited for"] == 3
    assert places(told, "no_mistakes") == set()
