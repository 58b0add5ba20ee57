"""Episodes: a turn's cache goes on, every token is computed once, and samples stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from generation_cases import engine, mixed_requests, prompt, small_stage

from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings, Trajectory, TurnEnd
from megarlx.model.transformer import Stage
from megarlx.ops import sample

STOPS = (11, 60, 71)
SETTINGS = SamplingSettings(stop_tokens=STOPS)
LONGEST = 160


def observation(turn: TurnEnd, longest: int = 45) -> list[int]:
    """A function of what was said, so that a wrong token anywhere changes all that follows."""
    length = (sum(turn.tokens) + turn.sequence_id + turn.turn) % longest + 1
    return prompt(length, 31 * turn.sequence_id + turn.turn + turn.tokens[-1])


def turns_of(most: int, longest: int = 45) -> object:
    def on_turns_end(turns: list[TurnEnd]) -> list[Sequence[int] | None]:
        return [None if t.turn + 1 == most else observation(t, longest) for t in turns]

    return on_turns_end


def requests(groups: int, samples: int) -> list[Request]:
    return mixed_requests(groups, samples, new=7)


def generated(made: Engine, wanted: list[Request], most_turns: int = 4, **options) -> list:
    return made.episodes(wanted, SETTINGS, 8, turns_of(most_turns), **options)


def same_bits(a: list[Trajectory], b: list[Trajectory]) -> bool:
    def by_id(found: list[Trajectory]) -> dict[int, Trajectory]:
        return {t.sequence_id: t for t in found}

    one, other = by_id(a), by_id(b)
    return one.keys() == other.keys() and all(
        t.reasons == other[i].reasons
        and torch.equal(t.tokens, other[i].tokens)
        and torch.equal(t.turn, other[i].turn)
        and torch.equal(t.logprobs, other[i].logprobs)
        for i, t in one.items()
    )


def recomputed(stage: Stage, request: Request, sequence_id: int, most_turns: int) -> tuple:
    """Every token of every turn from a full forward over everything before it."""
    tokens, turn_of, logprobs = list(request.prompt), [-1] * len(request.prompt), []
    for turn in range(most_turns):
        begin, reason = len(tokens), "length"
        while len(tokens) < min(begin + request.max_new_tokens, LONGEST):
            with torch.no_grad():
                logits = stage.logits(stage(torch.tensor([tokens])))[-1:].float()
            keys = torch.tensor([[sequence_id, len(tokens)]])
            drawn = sample(logits, seed=8, keys=keys, vocab_size=97)
            tokens.append(int(drawn.token))
            turn_of.append(turn)
            logprobs.append(float(drawn.logprob))
            if tokens[-1] in STOPS:
                reason = "stop"
                break
        room = LONGEST - len(tokens) - 1
        end = TurnEnd(sequence_id, turn, tokens[begin:], reason, room)  # type: ignore[arg-type]
        seen = observation(end)
        if turn + 1 == most_turns or len(seen) > room:
            break
        tokens += seen
        turn_of += [-1] * len(seen)
    return tokens, turn_of, torch.tensor(logprobs)


@pytest.mark.parametrize("feed_up_to", [0, 20, 100])
@pytest.mark.parametrize("family", ["olmo2", "qwen2"])
def test_every_token_is_that_of_a_full_forward_over_all_before_it(
    family: str, feed_up_to: int
) -> None:
    stage = small_stage(family, max_sequence_length=256)
    wanted = requests(5, 2)
    made = engine(stage, slots=4, longest=LONGEST)
    found = generated(made, wanted, 5, feed_up_to=feed_up_to)
    expected = [recomputed(stage, r, i, 5) for r in wanted for i in r.sequence_ids]
    assert [t.sequence_id for t in found] == [i for r in wanted for i in r.sequence_ids]
    assert {reason for t in found for reason in t.reasons} == {"stop", "length"}
    for mine, (tokens, turn_of, logprobs) in zip(found, expected, strict=True):
        assert mine.tokens.tolist() == tokens
        assert mine.turn.tolist() == turn_of
        torch.testing.assert_close(mine.logprobs[mine.written], logprobs, rtol=0, atol=2e-5)
        assert mine.logprobs[~mine.written].abs().sum() == 0
        assert torch.equal(mine.logprobs, mine.sampled_logprobs)


@pytest.mark.parametrize("feed_up_to", [0, 20, 100])
def test_prompts_and_observations_are_computed_once_and_nothing_else_is(feed_up_to: int) -> None:
    stage = small_stage(max_sequence_length=512)
    made = engine(stage, slots=6, longest=400)
    wanted = requests(7, 3)
    found = generated(made, wanted, 8, feed_up_to=feed_up_to)
    assert all(len(t.reasons) == 8 for t in found)
    observed = sum(int((~t.written).sum()) - len(t.request.prompt) for t in found)
    written = sum(int(t.written.sum()) for t in found)
    counts, once = made.counts, sum(len(r.prompt) - 1 for r in wanted)
    assert counts.tokens_observed == observed
    if feed_up_to == 0:  # of each turn the last token, of each observation all but the last
        assert counts.tokens_prefilled == once + observed
        assert counts.tokens_decoded == written
    # each token but an episode's last is an input once; prompts are shared by their samples
    inputs = sum(len(t.tokens) - 1 - (len(t.request.prompt) - 1) for t in found)
    assert counts.tokens_prefilled - once + counts.tokens_decoded == inputs


def test_all_slots_decode_while_others_take_in_observations() -> None:
    stage = small_stage(max_sequence_length=512)
    made = engine(stage, slots=16, longest=400, one_width=True)
    generated(made, requests(16, 8), 3)
    assert made.counts.tokens_decoded / (made.counts.steps * 16) > 0.85


def test_same_seed_gives_same_bits_under_any_order_slots_and_split_over_ranks() -> None:
    stage = small_stage(max_sequence_length=256)
    wanted = requests(8, 4)
    whole = generated(engine(stage, slots=12, longest=LONGEST, one_width=True), wanted)
    shuffled = list(wanted)
    random.Random(1).shuffle(shuffled)
    for slots in (9, 16):
        made = engine(stage, slots=slots, longest=LONGEST, one_width=True)
        assert same_bits(whole, generated(made, shuffled))
    made = engine(stage, slots=12, longest=LONGEST, one_width=True)
    parts = [generated(made, wanted[rank::3]) for rank in range(3)]
    assert same_bits(whole, [t for part in parts for t in part])


def test_one_turn_gives_the_bits_of_generate() -> None:
    stage, wanted = small_stage(), mixed_requests(6, 4)
    made = engine(stage, slots=24)
    plain = made.generate(wanted, SETTINGS, seed=8)
    episodes = generated(made, wanted, 1)
    for one, other in zip(plain, episodes, strict=True):
        assert torch.equal(one.tokens, other.tokens[other.written])
        assert torch.equal(one.logprobs, other.logprobs[other.written])
        assert other.reasons == (one.finish_reason,)


def test_an_observation_without_room_for_an_answer_ends_the_episode() -> None:
    stage, seen = small_stage(), []

    def on_turns_end(turns: list[TurnEnd]) -> list[Sequence[int] | None]:
        seen.extend(turns)
        return [prompt(max(t.room, 1), 3) for t in turns]

    made = engine(stage, slots=4)
    (found,) = made.episodes(
        [Request(prompt(5, 0), [0], 6)], SamplingSettings(), 1, on_turns_end, max_tokens=40
    )
    assert [t.room for t in seen] == [40 - 11 - 1, 0]
    assert found.full
    assert len(found.tokens) == 40
    assert [int((found.turn == k).sum()) for k in (0, 1)] == [6, 1]
    assert found.reasons == ("length", "length")


def test_stop_strings_begin_anew_with_every_turn() -> None:
    """An "a" at the end of one turn and a "b" at the beginning of the next are no "ab"."""
    stage = small_stage(max_sequence_length=256)
    made = engine(
        stage, slots=4, longest=200, detokenize=lambda ids: "".join("ab"[i % 2] for i in ids)
    )
    settings = SamplingSettings(stop_strings=("ab",))
    wanted = [Request(prompt(5, k), [k], 9) for k in range(6)]
    found = made.episodes(wanted, settings, 1, turns_of(6))
    ended = 0
    for t in found:
        for turn, reason in enumerate(t.reasons):
            text = "".join("ab"[i % 2] for i in t.tokens[t.turn == turn].tolist())
            assert (reason == "stop_string") == text.endswith("ab")
            assert "ab" not in text[:-1]
            ended += reason == "stop_string"
    assert ended > 10


@pytest.mark.parametrize(("answers", "message"), [
    ([[1]], r"on_turns_end answered 1 of 2 turns"),
    ([[1], []], r"behind turn 0 of sequence \d has 0 tokens; allowed: 1 id or more, of 0 to 96"),
    ([[1], [97]], r"sequence \d holds token id 97; allowed: 1 id or more, of 0 to 96"),
])  # fmt: skip
def test_wrong_observations_are_named(answers: list, message: str) -> None:
    wanted = [Request(prompt(4, k), [k], 3) for k in range(2)]
    with pytest.raises(ValueError, match=message):
        engine(small_stage()).episodes(wanted, SamplingSettings(), 1, lambda t: answers)


def test_limits_that_cannot_hold_are_refused() -> None:
    made, wanted = engine(small_stage()), [Request(prompt(30, 0), [0], 3)]
    with pytest.raises(ValueError, match="max_tokens of an episode is 65; allowed: 2 to 64"):
        made.episodes(wanted, SETTINGS, 1, turns_of(1), max_tokens=65)
    with pytest.raises(ValueError, match="the prompt has 30 tokens; allowed: 1 to 29"):
        made.episodes(wanted, SETTINGS, 1, turns_of(1), max_tokens=30)
