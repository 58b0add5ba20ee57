"""Prompts: reading, templates, order and resume."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.chat_template import ChatTemplate
from megarlx.data.conversations import Conversation, Frames, Turn
from megarlx.data.difficulty import Difficulty
from megarlx.data.documents import BadLineError
from megarlx.data.prompts import (
    Drawn,
    FewShot,
    Prompt,
    PromptData,
    PromptError,
    PromptKeys,
    read_prompts,
)
from megarlx.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
TEMPLATE = Frames(user="Q: {content}\n", opening="A:", assistant=" {content}")


def data(count: int = 7, seed: int = 3, **rest: Any) -> PromptData:
    prompts = [Prompt(f"{i} + {i}?", str(2 * i), {"level": i}) for i in range(count)]
    return PromptData(prompts, TEMPLATE, BYTES, seed, **rest)


def questions(drawn: list[Drawn]) -> list[str]:
    return [d.prompt.question for d in drawn]


def test_lines_become_prompts_and_other_fields_metadata(tmp_path: Path) -> None:
    lines = [{"question": "a?", "answer": "1", "level": 2}, {"question": "b?"}]
    lines += [{"question": "c?", "answer": 5}]
    expected = [Prompt("a?", "1", {"level": 2}), Prompt("b?"), Prompt("c?", "5")]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "p.jsonl").write_text(text)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read_prompts(tmp_path / "p.jsonl") == expected
    assert read_prompts(tmp_path / "p.jsonl.gz") == expected
    (tmp_path / "other.jsonl").write_text('{"problem": "x", "solution": "y"}')
    keys = PromptKeys(question="problem", answer="solution")
    assert read_prompts(tmp_path / "other.jsonl", keys) == [Prompt("x", "y")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "holds a str; expected an object"),
        ('{"query": "x"}', r"'question' is None; expected text, or messages \(its keys: query\)"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "'messages' ends in a turn of the assistant",
        ),
        ('{"prompt": [{"role": "user"}]}', "'prompt': message 0 must be an object with role"),
        ('{"question": " "}', "'question' is ' '"),
        ('{"question": "x", "answer": [1]}', r"'answer' is \[1\]; expected text"),
        ('{"question": "x", "answer": true}', "'answer' is True"),
        ('{"question": "\\ud800"}', "'question' holds half a surrogate pair"),
    ],
)
def test_bad_lines_are_named_or_skipped_and_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "good"}\n\n' + line + '\n{"question": "also"}\n')
    with pytest.raises(BadLineError, match=rf"p\.jsonl, line 3: {reason}"):
        read_prompts(path)
    skipped: list[BadLineError] = []
    assert [p.question for p in read_prompts(path, on_bad_line="skip", skipped=skipped)] == [
        "good", "also"
    ]  # fmt: skip
    assert len(skipped) == 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120) | st.text('{}[]",:questionanwr 1\\u\n', max_size=60))
def test_any_bytes_give_prompts_or_named_lines(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes | str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz_prompts.jsonl"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    skipped: list[BadLineError] = []
    prompts = read_prompts(path, on_bad_line="skip", skipped=skipped)
    # No line is lost: it is empty, a prompt, or named.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(prompts) + len(skipped) == len(lines)
    assert all(f"{path}, line " in str(bad) for bad in skipped)
    if skipped:
        with pytest.raises(BadLineError) as error:
            read_prompts(path)
        assert str(error.value) == str(skipped[0])


def test_a_prompt_ends_where_the_model_is_to_answer() -> None:
    (drawn,) = data(count=1).take(1)
    assert BYTES.decode(drawn.ids) == "Q: 0 + 0?\nA:"
    example = Conversation((Turn("user", "1 + 1?"), Turn("assistant", "2")))
    (shot,) = data(count=1, few_shot=FewShot((example, example))).take(1)
    assert BYTES.decode(shot.ids) == "Q: 1 + 1?\nA: 2\n\n" * 2 + "Q: 0 + 0?\nA:"
    (ended,) = data(count=1, few_shot=FewShot((example,), separator=None)).take(1)
    assert BYTES.decode(ended.ids) == "Q: 1 + 1?\nA: 2<eos>Q: 0 + 0?\nA:"


def test_every_epoch_holds_every_prompt_once_in_its_own_order() -> None:
    found = data().take(21)
    assert [d.number for d in found] == list(range(21))
    assert [d.number // 7 for d in found] == [0] * 7 + [1] * 7 + [2] * 7
    epochs = [questions(found[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert questions(data(seed=4).take(7)) != epochs[0]
    assert questions(data(name="other").take(7)) != epochs[0]


@pytest.mark.parametrize("first", [0, 1, 6, 7, 8, 30])
def test_resume_goes_on_exactly_through_the_ends_of_epochs(first: int) -> None:
    whole, stopped, resumed = data(), data(), data()
    expected = whole.take(first + 20)
    stopped.take(first)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    sizes = (3, 7, 10)
    assert [d for size in sizes for d in resumed.take(size)] == expected[first:]


def test_resume_refuses_other_prompts_and_says_what_changed() -> None:
    state = data().state()
    for other, what in ((data(count=6), "prompts was 7, is 6"), (data(seed=9), "seed was 3, is 9")):
        with pytest.raises(PromptError, match=what):
            other.load_state(state)
    changed = PromptData(
        [*data().prompts[:-1], Prompt("6 + 6?", "13", {"level": 6})], TEMPLATE, BYTES, 3
    )
    with pytest.raises(PromptError, match="content was"):
        changed.load_state(state)


def test_prompts_that_are_too_long_stop_or_are_left_out_and_counted() -> None:
    prompts = [Prompt("x"), Prompt("long " * 10)]
    with pytest.raises(PromptError, match=r"'long long .* tokens; it may have 9"):
        PromptData(prompts, TEMPLATE, BYTES, 0, max_prompt_tokens=9)
    kept = PromptData(prompts, TEMPLATE, BYTES, 0, max_prompt_tokens=9, too_long="skip")
    assert (kept.too_long, questions(kept.take(3))) == (1, ["x"] * 3)
    with pytest.raises(PromptError, match=r"no prompt to draw \(1 were too long\)"):
        PromptData(prompts[1:], TEMPLATE, BYTES, 0, max_prompt_tokens=9, too_long="skip")


def taught(prompts: PromptData, rounds: int) -> list[Drawn]:
    """Draws in rounds of 4; a prompt's own number says how often it is solved."""
    found = []
    for _ in range(rounds):
        drawn = prompts.take(4)
        assert prompts.difficulty is not None
        prompts.difficulty.learn((one.place, one.place / 6) for one in drawn)
        found += drawn
    return found


def test_draws_by_difficulty_have_the_frequencies_of_their_weights() -> None:
    one = data(by_difficulty=(0.05, 0.5))
    assert one.difficulty is not None
    solved = [0.0, 1.0, 0.5, 0.9, 0.2, None, None]  # of the last two nothing is known
    one.difficulty.learn((i, p) for i, p in enumerate(solved) if p is not None for _ in range(99))
    p = [0.5 if share is None else share for share in solved]
    weights = [x * (1 - x) + 0.05 for x in p]
    draws = 20_000
    counts = Counter(drawn.place for drawn in one.take(draws))
    expected = [draws * w / sum(weights) for w in weights]
    chi_squared = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_squared < 22.5  # 6 degrees of freedom: P = 0.001
    assert [d.number for d in one.take(2)] == [draws, draws + 1]


def test_draws_by_difficulty_resume_exactly() -> None:
    whole, stopped, resumed = (data(by_difficulty=(0.05, 0.9)) for _ in range(3))
    expected = taught(whole, 12)
    taught(stopped, 5)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    assert taught(resumed, 7) == expected[20:]
    assert resumed.state() == whole.state()
    assert resumed.difficulty is not None
    assert resumed.difficulty.weights().tolist() != [0.3] * 7
    with pytest.raises(PromptError, match="draw was None, is difficulty"):
        resumed.load_state(data().state())


def test_a_prompts_share_is_a_running_mean_that_begins_at_one_half() -> None:
    one = Difficulty(3, 0, "rl", 0.05, 0.9)
    one.learn([(1, 1.0), (1, 1.0), (2, 0.0)])
    p = [0.5, 0.9 * (0.9 * 0.5 + 0.1) + 0.1, 0.45]
    assert one.weights().tolist() == pytest.approx([x * (1 - x) + 0.05 for x in p], abs=1e-15)


def test_a_task_without_a_question_is_not_put_into_the_template() -> None:
    """Chat templates look at their first message; an environment has not said it yet."""
    chat = ChatTemplate("{% if messages[0].role == 'user' %}{{ messages[0].content }}{% endif %}")
    (drawn,) = PromptData([Prompt("", None, {"goal": 1})], chat, BYTES, seed=0).take(1)
    assert drawn.ids == ()
