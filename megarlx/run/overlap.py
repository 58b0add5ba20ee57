"""Which questions of a run stand in its training text, beside how well each kind is answered.

Every token file that the run's data name is looked at whole, also what has not been read yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from megarlx.config import Config, RlConfig, load_config
from megarlx.config.trust import check_trust, names_in
from megarlx.data.overlap import Runs
from megarlx.data.prompts import PromptKeys, read_prompts
from megarlx.data.token_files import TokenFile
from megarlx.evaluation.questions import questions_of
from megarlx.evaluation.results import results_of
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.made import data_of, made_for, path_of
from megarlx.run.reference import resolve
from megarlx.run.suites import suites_of
from megarlx.run.tokenizer import load_tokenizer_of

ASKING = ("pass_at_k", "behaviour")  # kinds of suites that are looked at


@dataclass(frozen=True)
class Measured:
    """pass@1 of a result, of the questions that stand in training text and of those that do not."""

    iteration: int
    found: float | None
    not_found: float | None

    def __str__(self) -> str:
        told = [
            f"{name} {value:.1%}"
            for name, value in (("found", self.found), ("not found", self.not_found))
            if value is not None
        ]
        return ", ".join(told)


@dataclass(frozen=True)
class Overlap:
    """Of one file of prompts, or of one suite."""

    name: str
    run_tokens: int
    questions: int
    short: int  # with fewer tokens than a run has
    by_source: dict[str, int]  # questions of which a run stands there
    measured: tuple[Measured, ...] = ()

    @property
    def long(self) -> int:
        return self.questions - self.short


@dataclass(frozen=True)
class _Asked:
    name: str
    ids: list[str]
    texts: list[str]


def overlaps(
    run: str,
    *,
    suites: str | Path | None = None,
    token_files: Sequence[str] = (),
    run_tokens: int = 13,
    trusted: Collection[str] = (),
) -> list[Overlap]:
    """Of the prompts of every RL objective and of every suite that asks questions.

    suites        a TOML file of [[suites]]; absent: the run's own [evaluation]
    token_files   NAME=PREFIX, besides the sources of the run's [data]
    run_tokens    so many tokens in a row, of question and file, count as found
    trusted       names of code in the run's [data] that may be used
    """
    folder = resolve(run).run
    config = load_config(folder / "resolved.json", trusted=trusted)
    check_trust(names_in(config, {"data"}), str(folder), trusted)
    tokenizer = load_tokenizer_of(config, RunDirectory(folder))
    if tokenizer is None:
        raise RunError(f"{folder} has no tokenizer: its token files cannot be compared with text")
    files = dict(_token_files(config, token_files))
    if not files:
        raise RunError(f"{folder} names no token files; give --tokens-from NAME=PREFIX")
    found = []
    for asked in _asked(config, suites):
        ids = tokenizer.encode_batch(asked.texts)
        runs = Runs(ids, run_tokens)
        counts = {name: runs.counted_in(file) for name, file in files.items()}
        hits = {name: [n > 0 for n in runs.shared(one)] for name, one in counts.items()}
        somewhere = [any(of) for of in zip(*hits.values(), strict=True)]
        known = {
            name: stands
            for name, stands, one in zip(asked.ids, somewhere, ids, strict=True)
            if len(one) >= run_tokens
        }
        found.append(
            Overlap(
                asked.name,
                run_tokens,
                len(ids),
                sum(len(one) < run_tokens for one in ids),
                {name: int(np.sum(of)) for name, of in hits.items()},
                tuple(_measured(folder, asked, known)),
            )
        )
    return found


def _token_files(config: Config, given: Sequence[str]) -> Iterator[tuple[str, TokenFile]]:
    data = data_of(config)
    sources = data.sources if data is not None else ()
    named = [(source.name, source.prefix) for source in sources if source.prefix is not None]
    for text in given:
        name, equals, prefix = text.partition("=")
        if not equals or not name or not prefix:
            raise RunError(f"--tokens-from is {text!r}; it must be NAME=PREFIX")
        named.append((name, prefix))
    for name, prefix in named:
        yield name, TokenFile(prefix, config.model.vocab_size)


def _asked(config: Config, suites: str | Path | None) -> Iterator[_Asked]:
    for name, objective in config.named_objectives.items():
        if isinstance(objective, RlConfig) and objective.environment is None:
            path = path_of(objective.prompts, config)
            keys = PromptKeys(objective.question_key, objective.answer_key)
            texts = [prompt.question for prompt in read_prompts(path, keys)]
            yield _Asked(f"prompts of {name}", list(map(str, range(len(texts)))), texts)
    evaluation, _ = suites_of(config, suites)
    made = made_for(evaluation.suites, config)
    for suite in evaluation.suites:
        if suite.kind in ASKING:
            questions = questions_of(suite, made)
            yield _Asked(suite.name, [q.id for q in questions], [q.text for q in questions])


def not_looked_at(
    run: str, *, suites: str | Path | None = None, trusted: Collection[str] = ()
) -> list[str]:
    """The suites that ask no questions, which `overlaps` leaves out."""
    config = load_config(resolve(run).run / "resolved.json", trusted=trusted)
    evaluation, _ = suites_of(config, suites)
    return [f"{one.name} ({one.kind})" for one in evaluation.suites if one.kind not in ASKING]


def _measured(run: Path, asked: _Asked, found: dict[str, bool]) -> Iterator[Measured]:
    """Of the newest result of the suite that there is; `found` leaves short questions out."""
    for result in results_of(run, asked.name)[-1:]:
        items = [
            i for i in result["items"] if i.get("samples") and "correct" in i and i["id"] in found
        ]
        shares = {
            kind: [i["correct"] / i["samples"] for i in items if found[i["id"]] is kind]
            for kind in (True, False)
        }
        means = {kind: fmean(values) if values else None for kind, values in shares.items()}
        if shares[True] or shares[False]:
            yield Measured(result["iteration"], means[True], means[False])
