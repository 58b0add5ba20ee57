"""What a model knows, read from likelihoods: choices, cloze and perplexity. Nothing is sampled."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.launch import EveryRankWarning
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.documents import BadLineError, open_input
from megarlx.data.making import Made
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.questions import checked, made_lines
from megarlx.model.build import ParallelModel
from megarlx.model.token_scores import Text, token_scores
from megarlx.rollouts.exchange import gather_ragged

LETTERS_OF_SCRIPTS_WITHOUT_SPACES = "\u0e00"  # Thai; Chinese, Japanese and others stand behind it

Metrics = dict[str, float]


@dataclass(frozen=True)
class CapabilityTest:
    """A context and what may follow it. `answer` is the place of the right choice.

    A cloze with one choice is right where no other text is likelier, token by token.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int = 0
    group: str | None = None


class TextScore(NamedTuple):
    logprob: float  # nats, summed over the scored tokens
    tokens: int
    likeliest: bool  # each of them was the likeliest there


def score_texts(
    model: ParallelModel, texts: Sequence[Text], *, tokens_per_pass: int = 4096
) -> list[TextScore]:
    """Of each text, on every rank, in order; the data-parallel ranks share the work."""
    dp = model.mesh.dp
    # Long ones first: each rank gets its share of them, and texts of a pass are of like length.
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].tokens), i))
    mine = [texts[i] for i in order[dp.rank :: dp.size]]
    table = torch.zeros(len(mine), 3, dtype=torch.float64)
    found = token_scores(model, mine, tokens_per_pass=tokens_per_pass, likeliest=True)
    for row, scores in enumerate(found):  # none but on the last pipeline stage
        assert scores.likeliest is not None
        total = math.fsum(scores.logprobs.tolist())
        table[row] = torch.tensor([total, len(scores.logprobs), scores.likeliest.all()])
    all_reduce_(table, model.mesh.pp)
    rows = gather_ragged(table, dp).tolist()
    places = [i for rank in range(dp.size) for i in order[rank :: dp.size]]
    by_text = dict(zip(places, rows, strict=True))
    return [
        TextScore(logprob, int(tokens), bool(best))
        for logprob, tokens, best in (by_text[i] for i in range(len(texts)))
    ]


def continuation(tokenizer: Tokenizer, context: str, text: str, longest: int) -> Text:
    """`text` behind `context`, cut at the left to what the model can read.

    Encoded in one piece, as running text is; a space between the two belongs to the text.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(kept + context[len(kept) :] + text)
    before = tokenizer.encode(kept) if kept else []
    # An empty context is the beginning of a document.
    start = [] if before and tokenizer.bos_id is None else [tokenizer.start_id]
    ids, first = [*start, *whole], len(start) + len(before)
    if first >= len(ids):
        raise ValueError(f"continuation: {text!r} behind {context!r} adds no token")
    cut = max(0, len(ids) - longest - 1)
    return Text(ids[cut:], max(1, first - cut))


def windows(ids: Sequence[int], longest: int) -> list[Text]:
    """A document of any length, every token but its first scored once, in windows that the model
    can read. The last one has as much before it as fits."""
    found = []
    for begin in range(1, len(ids), longest):
        end = min(begin + longest, len(ids))
        start = max(0, end - longest - 1)
        found.append(Text(ids[start:end], begin - start))
    return found


def choose(
    model: ParallelModel,
    tokenizer: Tokenizer,
    suite: SuiteConfig,
    tests: Sequence[CapabilityTest],
    *,
    tokens_per_pass: int = 4096,
) -> tuple[Metrics, Metrics, list[dict[str, Any]]]:
    """Accuracy, its standard error, and the items of a choice or cloze suite."""
    longest = model.config.max_sequence_length
    texts = [
        continuation(tokenizer, test.context, choice, longest)
        for test in tests
        for choice in test.choices
    ]
    scores = iter(score_texts(model, texts, tokens_per_pass=tokens_per_pass))
    items = []
    for test in tests:
        own = [next(scores) for _ in test.choices]
        item: dict[str, Any] = {"id": test.id}
        if len(own) == 1:
            item |= {"correct": own[0].likeliest, "margin": own[0].logprob}
        else:
            values = [
                score.logprob / _length(suite, choice, score)
                for score, choice in zip(own, test.choices, strict=True)
            ]
            best_other = max(v for i, v in enumerate(values) if i != test.answer)
            margin = values[test.answer] - best_other
            item |= {"correct": margin > 0, "margin": margin}
        items.append(item if test.group is None else {**item, "group": test.group})
    right = [float(item["correct"]) for item in items]
    accuracy = math.fsum(right) / len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / max(1, len(right) - 1))
    return {"accuracy": accuracy}, {"accuracy": error}, items


def _length(suite: SuiteConfig, choice: str, score: TextScore) -> float:
    if suite.normalise == "bytes":
        return len(choice.encode())
    return score.tokens if suite.normalise == "tokens" else 1


def perplexity(
    model: ParallelModel,
    tokenizer: Tokenizer,
    documents: Sequence[tuple[str, str]],
    *,
    tokens_per_pass: int = 4096,
) -> tuple[Metrics, Metrics, list[dict[str, Any]]]:
    """Nats a token over all documents, (id, text) each; an item's `nll` is its own mean.

    A document begins behind what begins it, or ended the one before; its own end is not scored.
    """
    longest = model.config.max_sequence_length
    parts = [windows([tokenizer.start_id, *tokenizer.encode(t)], longest) for _, t in documents]
    scores = iter(
        score_texts(model, [p for held in parts for p in held], tokens_per_pass=tokens_per_pass)
    )
    items: list[dict[str, Any]] = []
    for (name, _), held in zip(documents, parts, strict=True):
        own = [next(scores) for _ in held]
        tokens = sum(score.tokens for score in own)
        nll = -math.fsum(score.logprob for score in own) / max(tokens, 1)
        items.append({"id": name, "nll": nll, "tokens": tokens})
    tokens = sum(item["tokens"] for item in items)
    mean = math.fsum(item["nll"] * item["tokens"] for item in items) / tokens
    # Of a ratio of sums over documents, by its linear part.
    spread = math.fsum(((item["nll"] - mean) * item["tokens"]) ** 2 for item in items)
    count = len(items)
    error = math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else math.nan
    bits = mean * tokens / math.log(2) / sum(len(text.encode()) for _, text in documents)
    return {"nll": mean, "bits_per_byte": bits}, {"nll": error}, items


def tests_of(suite: SuiteConfig, made: Made | None) -> list[CapabilityTest]:
    """Lines of a file are {"context", "choices", "answer": place}, or for a cloze {"context",
    "answer": text}; `id` and `group` may be there."""
    where, tests = _where(suite), []
    for number, line in _lines(suite, made):
        tests.append(_test(suite, where, number, line))
        if len(tests) == suite.questions:
            break
    if suite.path is not None and tests and all(map(_runs_on, tests)):
        joined = tests[0].context[-20:] + tests[0].choices[0][:20]
        warnings.warn(
            f"suite {suite.name}: what follows stands behind the context as it is, in the middle "
            f"of a word in every line of {where} ({joined!r}); begin it with a space",
            EveryRankWarning,
            stacklevel=2,
        )
    return checked(suite, tests)


def _runs_on(test: CapabilityTest) -> bool:
    """Whether a choice goes on with the context's last word, in a script that parts words."""
    edges = (test.context[-1:], *(choice[:1] for choice in test.choices))
    return all(edge.isalnum() and edge < LETTERS_OF_SCRIPTS_WITHOUT_SPACES for edge in edges)


def _test(suite: SuiteConfig, path: str, number: int, line: dict[str, Any]) -> CapabilityTest:
    context, choices, answer = line.get("context"), line.get("choices"), line.get("answer")
    if choices is None and suite.kind == "cloze" and isinstance(answer, str):
        choices, answer = [answer], 0
    least = 1 if suite.kind == "cloze" else 2
    good = isinstance(context, str) and isinstance(choices, list) and len(choices) >= least
    good = good and all(str(choice) for choice in choices or ())
    if not good or type(answer) is not int or not 0 <= answer < len(choices):  # type: ignore[arg-type]
        raise BadLineError(
            path,
            number,
            f"has context {context!r}, choices {choices!r} and answer {answer!r}; expected a text, "
            f"at least {least} texts that are not empty, and the place of the right one counted "
            "from 0" + (" (or, without choices, the text itself)" if suite.kind == "cloze" else ""),
        )
    name, group = line.get("id", f"{Path(path).stem}/{number}"), line.get("group")
    return CapabilityTest(
        str(name),
        str(context),
        tuple(map(str, choices or ())),
        answer,
        None if group is None else str(group),
    )


def documents_of(suite: SuiteConfig, made: Made | None) -> list[tuple[str, str]]:
    """(id, text) of a perplexity suite; lines of a file are {"text"}."""
    where, found = _where(suite), []
    for number, line in _lines(suite, made):
        text = line.get("text")
        if not isinstance(text, str) or not text:
            raise BadLineError(where, number, f"has the text {text!r}; expected some text")
        found.append((str(line.get("id", f"{Path(where).stem}/{number}")), text))
        if len(found) == suite.questions:
            break
    if not found:
        checked(suite, found)
    return found


def _where(suite: SuiteConfig) -> str:
    return suite.path or f"made {suite.made}"


def _lines(suite: SuiteConfig, made: Made | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if suite.path is None:
        yield from enumerate(made_lines(suite, made), start=1)
    else:
        yield from _lines_of_file(suite.path)


def _lines_of_file(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_input(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadLineError(path, number, f"not JSON: {error}") from None
            if not isinstance(value, dict):
                raise BadLineError(
                    path, number, f"holds a {type(value).__name__}; expected an object"
                )
            yield number, value
