"""Likelihoods against one pass a token; choices, cloze and perplexity from their definitions."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_models import MADE, WORLD, logits_behind, logprob, small_model

from megarlx.config.evaluation import SuiteConfig
from megarlx.data.documents import BadLineError
from megarlx.data.tokenizer import ByteTokenizer
from megarlx.evaluation.capability import (
    CapabilityTest,
    choose,
    continuation,
    documents_of,
    perplexity,
    score_texts,
    windows,
)
from megarlx.evaluation.capability import tests_of as read_tests
from megarlx.evaluation.questions import SuiteError
from megarlx.model.token_scores import Text

TOKENIZER = WORLD.tokenizer()


def suite(kind: str = "choice", **fields: Any) -> SuiteConfig:
    given = {} if "path" in fields else {"made": "facts"}
    return SuiteConfig.model_validate({"name": "s", "kind": kind, **given, **fields})


def test_scores_are_those_of_one_pass_a_token_whatever_stands_beside() -> None:
    model = small_model()
    generator = torch.Generator().manual_seed(2)
    texts = []
    for length, first in ((2, 1), (3, 2), (17, 5), (31, 1), (9, 8), (40, 39)):
        ids = torch.randint(301, (length,), generator=generator).tolist()
        texts.append(Text(ids, first))
    for width in (64, 4096):
        for text, found in zip(
            texts, score_texts(model, texts, tokens_per_pass=width), strict=True
        ):
            tokens = list(text.tokens)
            expected = logprob(model, tokens[: text.first], tokens[text.first :])
            assert found.logprob == pytest.approx(expected, abs=2e-4)
            assert found.tokens == len(tokens) - text.first
            assert not found.likeliest


def test_a_greedy_continuation_is_the_likeliest_and_its_neighbours_are_not() -> None:
    model = small_model()
    greedy = [3, 8]
    for _ in range(4):
        greedy.append(int(logits_behind(model, greedy).argmax()))
    other = [*greedy[:-1], (greedy[-1] + 1) % 301]
    found = score_texts(model, [Text(greedy, 2), Text(other, 2), Text(other[:-1], 2)])
    assert [score.likeliest for score in found] == [True, False, True]


@pytest.mark.parametrize("longest", [3, 4, 7, 20])
def test_windows_score_every_token_once_with_all_the_context_that_fits(longest: int) -> None:
    for length in range(2, 20):
        ids = list(range(100, 100 + length))
        scored = []
        for window in windows(ids, longest):
            tokens = list(window.tokens)
            assert len(tokens) - 1 <= longest
            at = ids.index(tokens[0])
            assert tokens == ids[at : at + len(tokens)]
            scored += tokens[window.first :]
        assert scored == ids[1:]


def test_choices_are_compared_by_log_likelihood_and_margins_say_by_how_much() -> None:
    model = small_model()
    tests = list(read_tests(suite(questions=11, options={"choices": 3}), MADE))
    for normalise, lengths in (("none", None), ("bytes", len)):
        metrics, _, items = choose(model, TOKENIZER, suite(normalise=normalise), tests)
        right = 0
        for test, item in zip(tests, items, strict=True):
            before = TOKENIZER.encode(test.context)
            values = [
                logprob(model, before, TOKENIZER.encode(choice))
                / (lengths(choice) if lengths else 1)
                for choice in test.choices
            ]
            best = max(v for i, v in enumerate(values) if i != test.answer)
            assert item["margin"] == pytest.approx(values[test.answer] - best, abs=2e-4)
            assert item["correct"] == (values[test.answer] > best)
            right += item["correct"]
        assert metrics["accuracy"] == pytest.approx(right / 11)
        assert len(tests[0].choices) == 3


def test_cloze_without_choices_is_right_where_greedy_decoding_says_it() -> None:
    model = small_model()
    context = "the home of"
    answer = TOKENIZER.decode([int(logits_behind(model, TOKENIZER.encode(context))[:200].argmax())])
    tests = [
        CapabilityTest("a", context, (f" {answer}",)),
        CapabilityTest("b", context, (" pears",)),
    ]
    _, _, items = choose(model, TOKENIZER, suite("cloze"), tests)
    likeliest = int(logits_behind(model, TOKENIZER.encode(context)).argmax())
    assert items[0]["correct"] == (TOKENIZER.encode(answer) == [likeliest])
    assert items[1]["correct"] is False
    assert items[0]["margin"] > items[1]["margin"]


def test_perplexity_is_over_tokens_and_not_over_documents() -> None:
    model = small_model(longest=24)
    documents = [("a", "tom buys 4 pears ."), ("b", " ".join(["tom eats 3 plums ."] * 9))]
    metrics, errors, items = perplexity(model, TOKENIZER, documents)
    totals = []
    for (_, text), item in zip(documents, items, strict=True):
        ids = [TOKENIZER.eos_id, *TOKENIZER.encode(text)]
        total = 0.0
        for begin in range(1, len(ids), 24):
            end = min(begin + 24, len(ids))
            start = max(0, end - 25)
            total += logprob(model, ids[start:begin], ids[begin:end])
        assert item["tokens"] == len(ids) - 1
        assert item["nll"] == pytest.approx(-total / item["tokens"], abs=1e-4)
        totals.append(-total)
    tokens = sum(item["tokens"] for item in items)
    assert metrics["nll"] == pytest.approx(sum(totals) / tokens, abs=1e-4)
    size = sum(len(text) for _, text in documents)
    assert metrics["bits_per_byte"] == pytest.approx(sum(totals) / math.log(2) / size, abs=1e-4)
    assert errors["nll"] > 0


def test_a_continuation_owns_the_space_before_it_and_long_contexts_are_cut_at_the_left() -> None:
    words = ByteTokenizer()
    for context, text in (("ab ", "cd"), ("ab", " cd")):
        found = continuation(words, context, text, 50)
        assert list(found.tokens) == list(b"ab cd")
        assert found.first == 2
    cut = continuation(words, "x" * 30, "cd", 8)
    assert (list(cut.tokens), cut.first) == (list(b"xxxxxxxcd"), 7)
    assert continuation(words, "", "cd", 8) == Text([words.eos_id, *b"cd"], 1)


def test_lines_of_a_file_become_tests_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        {"context": "a", "choices": [" b", " c"], "answer": 1, "id": "one", "group": "easy"},
        {"context": "d", "choices": ["e", "f", "g"], "answer": 0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_tests(suite(path=str(path)), None)
    assert found == [
        CapabilityTest("one", "a", (" b", " c"), 1, "easy"),
        CapabilityTest("t/2", "d", ("e", "f", "g")),
    ]
    path.write_text('{"context": "The capital is", "answer": " Paris"}\n')
    (cloze,) = read_tests(suite("cloze", path=str(path)), None)
    assert cloze.choices == (" Paris",)
    for line, said in (
        ('{"context": "a", "choices": ["b"], "answer": 0}', "at least 2 texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer True"),
        ("[1]", "holds a list"),
        ("{", "not JSON"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(BadLineError, match=said):
            read_tests(suite(path=str(path)), None)
    path.write_text("")
    with pytest.raises(SuiteError, match="holds nothing"):
        read_tests(suite(path=str(path)), None)
    with pytest.raises(SuiteError, match="names no maker"):
        read_tests(suite(), None)


def test_worlds_tests_ask_what_training_text_says_elsewhere() -> None:
    told = read_tests(suite("cloze", made="held_out_facts"), MADE)
    assert len(told) == len(WORLD.facts)
    training = " ".join(WORLD.document("facts", i) for i in range(2000))
    for number, test in enumerate(told):
        fact = WORLD.facts[number]
        whole = test.context + test.choices[test.answer]
        assert test.choices[test.answer] == f" {fact.value}"
        assert whole not in training
    documents = documents_of(suite("perplexity", made="stories", questions=3), MADE)
    assert [name for name, _ in documents] == ["held_out/0", "held_out/1", "held_out/2"]


@pytest.mark.parametrize(
    ("context", "choices", "told"),
    [
        ("The sea is", ["blue", "green"], True),
        ("The sea is", [" blue", " green"], False),
        ("The sea is ", ["blue", "green"], False),
        ("The sea is", ["n't green", ", blue"], False),
        ("海是", ["蓝", "绿"], False),
        ("", ["blue", "green"], False),
    ],
)
def test_choices_that_run_on_from_the_last_word_of_the_context_are_told(
    context: str, choices: list[str], told: bool, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    line = json.dumps({"context": context, "choices": choices, "answer": 0})
    path.write_text(f"{line}\n{line}\n")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        read_tests(suite(path=str(path)), None)
    said = [f"every line of {path} ('The sea isblue'); begin it" in str(w.message) for w in found]
    assert said == [True] * told
