"""Decoding in place, read late by the host: on a CPU, by the twins of its kernels.

The decoder of a card is given to engines of the CPU here, and compared with the model's own layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import FAMILIES, OF_FAMILY, engine, mixed_requests, prompt, small_stage
from torch.utils._python_dispatch import TorchDispatchMode

from megarlx.config.families import listed
from megarlx.generation import ahead
from megarlx.generation.ahead import AheadRun
from megarlx.generation.decoders import choose, in_place, products
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.interface import WrongDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.model.transformer import Stage
from megarlx.ops.narrow_product import MOST_ROWS

NATIVE = [family for family in FAMILIES if family not in OF_FAMILY]
ON_CPU = listed(Stage="device=cpu")


@pytest.fixture
def in_place_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "DECODERS", (InPlaceDecoder, StageDecoder))
    assert InPlaceDecoder.implements is not None
    monkeypatch.setattr(InPlaceDecoder, "implements", InPlaceDecoder.implements | ON_CPU)


def slow_engine(stage: Stage, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    with monkeypatch.context() as only:
        only.setattr(choose, "DECODERS", (StageDecoder,))
        return engine(stage, **options)


def same(a: list[Completion], b: list[Completion]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.sequence_id == y.sequence_id
        assert x.tokens.tolist() == y.tokens.tolist()
        assert x.finish_reason == y.finish_reason
        for one, other in ((x.logprobs, y.logprobs), (x.sampled_logprobs, y.sampled_logprobs)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


SETTINGS = {
    "plain": SamplingSettings(),
    "stops": SamplingSettings(stop_tokens=(11, 60, 71), temperature=0.9),
    "filters": SamplingSettings(stop_tokens=(5,), top_k=20, top_p=0.9, min_p=0.01),
    "greedy": SamplingSettings(temperature=0.0, stop_tokens=(3, 4)),
    "strings": SamplingSettings(stop_strings=("b7", "c"), stop_tokens=(11,)),
}


def text(tokens: Any) -> str:
    return "".join(f"{'abc'[t % 3]}{t % 10}" for t in tokens)


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("slots", [3, 20, 64])
@pytest.mark.parametrize("lag", [0, 1, 4, 9])
def test_tokens_are_those_of_the_plain_decoder_whatever_the_lag(
    lag: int, slots: int, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end at different steps, slots are taken again, widths shrink."""
    monkeypatch.setattr(ahead, "LAG", lag)
    stage, requests = small_stage("olmo2", torch.float64), mixed_requests(9, 5)
    options: dict[str, Any] = {"slots": slots, "detokenize": text}
    expected = slow_engine(stage, monkeypatch, **options).generate(
        requests, SETTINGS[settings], seed=7
    )
    kept = engine(stage, **options)
    assert kept.device_rows is not None
    same(kept.generate(requests, SETTINGS[settings], seed=7), expected)
    # and once more, over what the last generation left behind
    same(kept.generate(requests[::2], SETTINGS[settings], seed=7), [
        one for one in expected if one.request in requests[::2]
    ])  # fmt: skip


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_family_decodes_in_place(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, requests = small_stage(family, dtype), mixed_requests(4, 4)
    expected = slow_engine(stage, monkeypatch).generate(requests, SETTINGS["stops"], seed=3)
    kept = engine(stage)
    assert type(kept.decoders[0]) is InPlaceDecoder
    same(kept.generate(requests, SETTINGS["stops"], seed=3), expected)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(1.2)
    expected = slow_engine(stage, monkeypatch).generate(requests, SETTINGS["stops"], seed=3)
    same(kept.generate(requests, SETTINGS["stops"], seed=3), expected)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_streams_and_episodes_are_read_without_a_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, requests = small_stage("llama3", torch.float64), mixed_requests(3, 2)
    monkeypatch.setattr(AheadRun, "finished", None)  # nobody comes there
    kept, slow = engine(stage), slow_engine(stage, monkeypatch)
    tokens = [
        [(new.sequence_id, new.token) for new in one.stream(requests, SETTINGS["stops"], seed=3)]
        for one in (kept, slow)
    ]
    assert tokens[0] == tokens[1]

    def answer(turns: list[Any]) -> list[list[int] | None]:
        return [None if turn.turn == 2 or turn.room < 3 else [7, 9] for turn in turns]

    played = [
        [e.tokens.tolist() for e in one.episodes(requests, SETTINGS["stops"], 3, answer)]
        for one in (kept, slow)
    ]
    assert played[0] == played[1]


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("lag", [1, 4])
def test_the_host_waits_for_no_step_but_one_that_is_a_lag_behind(
    lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "LAG", lag)
    behind: list[int] = []
    take_in = AheadRun._take_in

    def watched(self: AheadRun, flight: Any) -> None:
        behind.append(self.number - 1 - flight.number)
        take_in(self, flight)

    monkeypatch.setattr(AheadRun, "_take_in", watched)
    kept = engine(small_stage())
    kept.generate(mixed_requests(4, 4), SamplingSettings(), seed=1)
    assert set(behind) == {lag}
    assert kept.counts.steps == len(behind) + lag  # so many are made for nothing, at the end
    assert kept.counts.tokens_decoded == sum(12 + g % 5 for g in range(4) for _ in range(4))


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_row_is_frozen_by_its_end_token_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the host knows: the row then takes the idle slot, and nothing is drawn for it."""
    monkeypatch.setattr(ahead, "LAG", 6)
    seen: list[tuple[list[bool], list[int]]] = []
    step = AheadRun._step

    def watched(self: AheadRun, state: Any, width: int) -> None:
        step(self, state, width)
        seen.append((state.frozen[:2].tolist(), state.history[0, :2].tolist()))

    monkeypatch.setattr(AheadRun, "_step", watched)
    kept = engine(small_stage(dtype=torch.float64), slots=2)
    requests = [Request(prompt(5, 0), [1], 3), Request(prompt(4, 1), [2], 9)]
    kept.generate(requests, SamplingSettings(), seed=1)
    assert [frozen for frozen, _ in seen[:5]] == [[False, False]] * 2 + [[True, False]] * 3
    assert [history[0] for _, history in seen[3:6]] == [-2, -2, -2]
    assert seen[8][0] == [True, True]


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_logits_that_are_no_numbers_are_refused_though_late() -> None:
    stage = small_stage()
    kept = engine(stage)
    kept.generate(mixed_requests(1, 1), SamplingSettings(), seed=1)
    with torch.no_grad():
        stage.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="no token can be drawn for sequence 1000"):
        kept.generate(mixed_requests(1, 1), SamplingSettings(), seed=1)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_wrong_step_is_found_at_once_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        in_place, "decode_swiglu_", lambda gate_up, out: out.copy_(gate_up[:, : out.shape[1]])
    )
    kept = engine(small_stage())
    for _ in range(2):
        with pytest.raises(WrongDecoder, match="InPlaceDecoder is"):
            kept.generate(mixed_requests(2, 2), SamplingSettings(), seed=1)


class Launches(TorchDispatchMode):
    """Calls that compute; views, and casts of what has the type already, are none."""

    VIEWS = ("t", "view", "slice", "select", "unsqueeze", "flatten", "unbind", "detach", "to")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split("::")[1].split(".")[0] not in self.VIEWS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("family", NATIVE)
def test_a_layer_is_nine_launches_and_a_step_a_few_more(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention counts as one: flash-attn reads the cache where it lies."""
    monkeypatch.setattr(in_place, "decode_attention", lambda q, *_: torch.ops.aten.relu(q))
    stage = small_stage(family)
    kept = engine(stage)
    kept.unchecked.clear()
    run = AheadRun(kept, mixed_requests(4, 4), SamplingSettings(stop_tokens=(3,)), 1)
    with torch.inference_mode():
        run._admit(run.scheduler.fill(0))
        width = kept.widths[-1]
        state = kept.device_rows.state(width)
        run._step(state, width)  # which makes its buffers
        with Launches() as launches:
            run._step(state, width)
    layers = stage.config.layers
    around = ("aten::index_select.out", "megarlx::sample", "megarlx::decode_advance_")
    assert all(launches.names.count(name) == 1 for name in around)
    # with the final norm and the head; before norms, one addition behind the last layer
    assert len(launches.names) <= 9 * layers + len(around) + 3


def test_rows_of_a_set_are_held_together(in_place_on_a_cpu: None) -> None:
    """Few long sequences among many short ones: the step becomes narrower."""
    kept = engine(small_stage(), slots=40)
    requests = [
        Request(prompt(3, 0), list(range(36)), 3),
        Request(prompt(3, 1), list(range(36, 40)), 40),
    ]
    widths: list[int] = []
    step = AheadRun._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AheadRun, "_step", lambda self, s, width: (widths.append(width), step(self, s, width))
        )
        kept.generate(requests, SamplingSettings(), seed=1)
    assert widths[0] == 48
    assert widths[-1] == min(kept.widths)


@pytest.mark.parametrize(("slots", "widths"), [(1, (1,)), (16, (16,)), (17, (16, 32))])
def test_few_slots_have_one_width_and_one_kernel(
    slots: int, widths: tuple[int, ...], in_place_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of two kernels multiplies a row must not follow from what else is in the step."""
    used: set[str] = set()
    for name in ("mm", "narrow"):
        of = (torch, "mm") if name == "mm" else (products, "narrow_product_")
        kept = getattr(*of)
        monkeypatch.setattr(
            *of, lambda *a, kept=kept, name=name, **b: (used.add(name), kept(*a, **b))[1]
        )
    made = engine(small_stage(), slots=slots, one_width=False)
    assert made.widths == widths
    made.unchecked.clear()
    made.generate(mixed_requests(3, 3), SamplingSettings(), seed=1)
    assert used == {"narrow" if slots <= MOST_ROWS else "mm"}
