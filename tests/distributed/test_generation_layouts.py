"""Generation on every layout: ranks agree to the bit, and layouts in all but a few sequences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_generation import requests, small

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit" / "generation"))
from sampling_gap import sampling_gap

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, SamplingSettings
from megarlx.model.build import build_model

STOPS = SamplingSettings(stop_tokens=(11, 60))


def generated(
    family: str, layout: dict[str, int], options: dict[str, Any], settings: SamplingSettings
) -> dict[str, Any]:
    mesh = Mesh.build(**layout, timeout_seconds=20.0)
    model = build_model(small(family), mesh, seed=3, **options)
    engine = Engine.of(model, slots=24, longest=48)
    mine = requests(9, 6, shortest=10)[mesh.dp.rank :: mesh.dp.size]
    mesh.traffic.reset()
    found = engine.generate(mine, settings, seed=5)
    sent = {key: (c.calls, c.bytes) for key, c in mesh.traffic.counts.items()}
    counts = engine.counts
    streamed = [(n.sequence_id, n.token) for n in engine.stream(mine, settings, seed=5)]
    return {
        "found": [plain(c) for c in found],
        "gap": sampling_gap(model, found, tokens_per_pass=256),
        "counts": counts,
        "streamed": streamed,
        "sent": sent,
        "last": model.pipeline.holds_last_stage,
        "dp": mesh.dp.rank,
    }


def plain(c: Completion) -> tuple[int, list[int], list[float], list[float], str]:
    return (
        c.sequence_id,
        c.tokens.tolist(),
        c.logprobs.tolist(),
        c.sampled_logprobs.tolist(),
        (c.finish_reason),
    )


LAYOUTS = {
    "tp2": ({"tp": 2}, {}),
    "tp2-sp": ({"tp": 2}, {"sequence_parallel": True}),
    "tp4": ({"tp": 4}, {}),
    "pp2": ({"pp": 2}, {}),
    "pp3": ({"pp": 3}, {"layers_per_stage": [1, 2, 1]}),
    "pp2-interleaved": ({"pp": 2}, {"schedule": "interleaved", "virtual_stages": 2}),
    "dp2": ({"dp": 2}, {}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {}),
}


@pytest.mark.parametrize(
    "settings", [STOPS, SamplingSettings(top_k=40, top_p=0.9)], ids=["all", "filtered"]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_samples_of_one_process(
    run: Callable, name: str, settings: SamplingSettings
) -> None:
    compare(run, name, settings, "qwen3" if settings.top_k else "olmo2")


@pytest.mark.parametrize("name", ["tp2-sp", "tp2-pp2"])
def test_layouts_with_windows_give_the_samples_of_one_process(run: Callable, name: str) -> None:
    compare(run, name, STOPS, "gemma3")


def compare(run: Callable, name: str, settings: SamplingSettings, family: str) -> None:
    layout, options = LAYOUTS[name]
    (alone,) = run(1, generated, family, {}, {}, settings)
    world = 1
    for size in layout.values():
        world *= size
    ranks = run(world, generated, family, layout, options, settings)
    expected = {c[0]: c for c in alone["found"]}
    together: dict[int, tuple] = {}
    for rank in ranks:
        for completion in rank["found"]:
            known = together.setdefault(completion[0], completion)
            assert known == completion, "ranks of one model differ"
    assert together.keys() == expected.keys()
    differing = [i for i in expected if expected[i][1] != together[i][1]]
    assert len(differing) <= 0.01 * len(expected), differing
    for i in expected:
        if i not in differing:
            assert expected[i][4] == together[i][4]
            torch.testing.assert_close(
                torch.tensor(together[i][2]), torch.tensor(expected[i][2]), rtol=0, atol=2e-5
            )
    if name == "dp2":
        assert together == expected, "a data-parallel split changed bits"
    for rank in ranks:
        mean, largest, kl, tokens = rank["gap"]
        assert largest <= 1e-5
        assert 0 <= mean <= largest
        assert abs(kl) <= 1e-9
        assert tokens == sum(len(c[1]) for c in expected.values())
        if rank["last"]:
            mine = [(c[0], t) for c in rank["found"] for t in c[1]]
            assert sorted(rank["streamed"]) == sorted(mine)


def test_token_ids_agree_without_gathering_logits(run: Callable) -> None:
    """Unfiltered, a token costs its layers' reductions, the embedding's and 104 bytes a rank."""
    ranks = run(2, generated, "olmo2", {"tp": 2}, {}, STOPS)
    config, rank = small("olmo2"), ranks[0]
    gathered = rank["sent"]["tp", "all_gather"]
    decoded = rank["counts"].tokens_decoded
    assert gathered == (rank["counts"].steps, decoded * 104)
    assert 104 * decoded < decoded * config.padded_vocab(2) / 2 * 4


def test_hidden_states_go_forward_and_token_ids_back(run: Callable) -> None:
    first, last = run(2, generated, "olmo2", {"pp": 2}, {}, STOPS)
    counts, config = last["counts"], small("olmo2")
    rows = counts.tokens_decoded + counts.rows_padded
    prefilled = counts.tokens_prefilled + counts.tokens_padded
    assert first["sent"]["decode", "send"][1] == (rows + prefilled) * config.hidden_size * 4
    # the last rank sends every token once, and at the end log-probs of them all
    assert last["sent"]["decode", "send"][1] == counts.tokens_decoded * 8
    assert last["sent"]["decode", "broadcast"][1] == counts.tokens_decoded * 2 * 4


def failing(layout: dict[str, int]) -> str:
    """The second stage's weights are broken: no rank may wait for ever."""
    mesh = Mesh.build(**layout, timeout_seconds=5.0)
    model = build_model(small("olmo2"), mesh, seed=3)
    with torch.no_grad():
        for stage in model.stages:
            if stage.has_head:
                stage.norm.weight.fill_(torch.nan)
    try:
        Engine.of(model, slots=8, longest=48).generate(requests(3, 2, shortest=10), STOPS, seed=1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_logits_without_a_number_stop_every_rank_within_the_time_limit(run: Callable) -> None:
    first, last = run(2, failing, {"pp": 2}, time_limit=30.0)
    assert "no token can be drawn for sequence" in last
    assert first, "the first stage went on"
