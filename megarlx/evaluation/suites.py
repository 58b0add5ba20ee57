"""All suites of an evaluation on one model: from inside training, or of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megarlx.comm.collectives import gather_values
from megarlx.config.evaluation import SAMPLED, EvaluationConfig, SuiteConfig
from megarlx.config.objectives import PLACE, WRITE_TEMPLATE
from megarlx.data.conversations import Template
from megarlx.data.synthetic.problems import guesses
from megarlx.data.synthetic.world import World
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation import behaviour, capability, sampled
from megarlx.evaluation.pass_at_k import Pool, guessing_pass_at_k
from megarlx.evaluation.questions import (
    Question,
    SuiteError,
    few_shot_of,
    questions_of,
    short_enough,
)
from megarlx.evaluation.readiness import informative_groups
from megarlx.evaluation.results import (
    FORMAT,
    Result,
    finished,
    read_result,
    result_path,
    samples_path,
    write_result,
    write_samples,
)
from megarlx.evaluation.sampled import Played, Progress
from megarlx.model.build import ParallelModel
from megarlx.objectives.answers import final_answer
from megarlx.redact import redacted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is measured. A `base` model has seen pre-training only, and is shown examples."""

    model: ParallelModel
    tokenizer: Tokenizer
    template: Template | None  # None: nobody has said how this model is asked
    is_base: bool
    iteration: int
    trunk_tokens: int
    digest: str = ""  # of the checkpoint; empty for weights that are being trained
    world: World | None = None


@dataclass(frozen=True)
class Parent:
    """Where an excursion came from: what behaviour drifts away from."""

    run: Path
    iteration: int


def evaluate(
    subject: Subject,
    config: EvaluationConfig,
    *,
    run: Path | None = None,
    parent: Parent | None = None,
    say: Say | None = None,
    again: bool = False,
) -> list[Result]:
    """The result of every suite, on every rank; called by all of them.

    With `run`, results are written there, and those that are there already are not computed
    again; with `again` they are.
    """
    return [_suite(subject, config, suite, run, parent, say, again) for suite in config.suites]


def metrics_of(results: Sequence[Result]) -> dict[str, float]:
    """As keys of metrics.jsonl and TensorBoard: eval/SUITE/accuracy, …"""
    return {
        f"eval/{result['suite']}/{name}": value
        for result in results
        for name, value in result["metrics"].items()
    }


def _suite(
    subject: Subject,
    config: EvaluationConfig,
    suite: SuiteConfig,
    run: Path | None,
    parent: Parent | None,
    say: Say | None,
    again: bool,
) -> Result:
    mesh = subject.model.mesh
    first = mesh.rank == 0
    settings = settings_of(subject, config, suite)
    path = None if run is None else result_path(run, subject.iteration, suite.name)
    # One process looks: the others might see another moment of a shared file system.
    there = finished(path, settings) if first and path is not None and not again else None
    there = gather_values(there, mesh.world)[0]
    if there is not None:
        if say is not None and first:
            say(f"{suite.name}: there already")
        done: Result = there
        return done
    begin = time.perf_counter()
    result: Result = {
        "format": FORMAT,
        "suite": suite.name,
        "kind": suite.kind,
        "iteration": subject.iteration,
        "trunk_tokens": subject.trunk_tokens,
    }
    lines: list[dict[str, Any]] = []
    if suite.kind == "agent":
        found, lines = _acted(subject, config, suite, say)
    elif suite.kind in SAMPLED:
        found, lines = _sampled(subject, config, suite, say)
    else:
        found = _read(subject, config, suite)
    result |= found
    if suite.kind == "behaviour" and parent is not None:
        _add_drift(result, settings, parent, first, mesh.world)
    result |= {"settings": settings, "seconds": time.perf_counter() - begin}
    if first and run is not None and path is not None:
        if lines:
            write_samples(samples_path(run, subject.iteration, suite.name), lines)
        write_result(path, result)  # last: it says that the suite is done
    if first and say is not None:
        say(f"{suite.name}: {described(result)}")
    return result


def settings_of(subject: Subject, config: EvaluationConfig, suite: SuiteConfig) -> dict[str, Any]:
    """All that a result depends on."""
    template = subject.template if suite.uses_template else None
    return {
        "suite": redacted(suite.model_dump(mode="json")),
        "seed": config.seed,
        "kept_samples": config.kept_samples,
        "checkpoint": subject.digest,
        "precision": str(subject.model.pipeline.dtype).removeprefix("torch."),
        "is_base": subject.is_base,
        "tokenizer": subject.tokenizer.fingerprint,
        "template": None if template is None else asdict(template),
        "files": {
            path: _sha256(path) for path in (suite.path, suite.few_shot_path) if path is not None
        },
        "world": None
        if subject.world is None or suite.world is None
        else hashlib.sha256(
            json.dumps(subject.world.settings.to_json(), sort_keys=True).encode()
        ).hexdigest(),
    }


def _template_of(subject: Subject, suite: SuiteConfig) -> Template:
    if subject.template is None and suite.uses_template:
        raise SuiteError(
            f"suite {suite.name}: it asks in a template, and this model has none; {WRITE_TEMPLATE}"
        )
    return subject.template or Template(user=PLACE)  # nothing is written in it


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(subject: Subject, config: EvaluationConfig, suite: SuiteConfig) -> Result:
    model, tokenizer, width = subject.model, subject.tokenizer, config.tokens_per_pass
    if suite.kind == "perplexity":
        documents = capability.documents_of(suite, subject.world)
        found = capability.perplexity(model, tokenizer, documents, tokens_per_pass=width)
    else:
        tests = capability.tests_of(suite, subject.world)
        found = capability.choose(model, tokenizer, suite, tests, tokens_per_pass=width)
    metrics, errors, items = found
    return {"metrics": metrics, "standard_errors": errors, "items": items}


def _sampled(
    subject: Subject, config: EvaluationConfig, suite: SuiteConfig, say: Say | None
) -> tuple[Result, list[dict[str, Any]]]:
    limit = suite.violation_below if suite.kind == "behaviour" else suite.correct_from
    item = behaviour.item if suite.kind == "behaviour" else _item
    questions, items, lines = _played(subject, config, suite, say, lambda one: item(one, limit))
    if suite.kind == "behaviour":
        metrics, errors = behaviour.summary(items)
        return {"metrics": metrics, "standard_errors": errors, "items": items}, lines
    return {**_pass_at_k(suite, subject.world, questions, items), "items": items}, lines


def _acted(
    subject: Subject, config: EvaluationConfig, suite: SuiteConfig, say: Say | None
) -> tuple[Result, list[dict[str, Any]]]:
    assert suite.environment is not None
    penalty = suite.environment.invalid_action_penalty
    _, items, lines = _played(
        subject, config, suite, say, lambda one: sampled.agent_item(one, penalty)
    )
    metrics, errors = sampled.agent_summary(items)
    group = suite.group_size or 0
    whole = [i for i in items if 0 < group <= i["samples"]]  # no episode of the group was lost
    if whole:
        pool = _pool_of(whole)
        for k in (k for k in suite.ks if k <= group):
            metrics[f"pass_at_{k}"] = pool.estimate(k).mean
            errors[f"pass_at_{k}"] = pool.estimate(k).standard_error
        _add_informative(group, pool, metrics, errors)
    guessing = sampled.at_random(suite, config.seed)
    made = {"metrics": metrics, "standard_errors": errors, "guessing": guessing, "items": items}
    return made, lines


def _played(
    subject: Subject,
    config: EvaluationConfig,
    suite: SuiteConfig,
    say: Say | None,
    item: Callable[[Played], dict[str, Any]],
) -> tuple[list[Question], list[dict[str, Any]], list[dict[str, Any]]]:
    """(questions, an item for each, samples to read), the same on every rank."""
    mesh, template = subject.model.mesh, _template_of(subject, suite)
    few_shot = few_shot_of(suite, subject.world, config.seed, is_base=subject.is_base)
    questions = short_enough(
        suite, questions_of(suite, subject.world), few_shot, template, subject.tokenizer
    )
    played = sampled.play(
        subject.model,
        subject.tokenizer,
        template,
        suite,
        questions,
        few_shot,
        seed=config.seed,
        slots=config.slots,
        prefill_tokens=config.prefill_tokens,
        kept_samples=config.kept_samples,
        progress=_progress(suite) if mesh.rank == 0 and say is not None else None,
    )
    every = sampled.gathered([(item(one), one.lines) for one in played], len(questions), mesh.dp)
    return questions, [made for made, _ in every], [line for _, lines in every for line in lines]


def _item(played: Played, correct_from: float) -> dict[str, Any]:
    """A sample whose reward is not known is not correct."""
    question = played.question
    found = {
        "id": question.id,
        "samples": len(played.episodes),
        "correct": sum(reward >= correct_from for reward in played.rewards),
        "truncated": played.truncated,
    }
    return found if question.group is None else {**found, "group": question.group}


def _pass_at_k(
    suite: SuiteConfig,
    world: World | None,
    questions: Sequence[Question],
    items: Sequence[Mapping[str, Any]],
) -> Result:
    pool = _pool_of(items)
    metrics, errors, guessing = {}, {}, {}
    answers = _answers(suite, world, questions)
    for k in (k for k in suite.ks if k <= suite.samples):
        estimate = pool.estimate(k)
        metrics[f"pass_at_{k}"] = estimate.mean
        errors[f"pass_at_{k}"] = estimate.standard_error
        if answers:
            guessing[f"pass_at_{k}"] = guessing_pass_at_k(answers, k, leave_one_out=True)
    metrics["truncated"] = sum(i["truncated"] for i in items) / sum(pool.samples)
    if suite.group_size is not None:
        _add_informative(suite.group_size, pool, metrics, errors)
    return {"metrics": metrics, "standard_errors": errors, "guessing": guessing}


def _pool_of(items: Sequence[Mapping[str, Any]]) -> Pool:
    return Pool(tuple(i["samples"] for i in items), tuple(i["correct"] for i in items))


def _add_informative(
    group_size: int, pool: Pool, metrics: dict[str, float], errors: dict[str, float]
) -> None:
    informative = informative_groups(pool, group_size)
    metrics["informative_groups"] = informative.mean
    errors["informative_groups"] = informative.standard_error


def _answers(
    suite: SuiteConfig, world: World | None, questions: Sequence[Question]
) -> list[Hashable]:
    """What a guesser draws from; nothing where some question has no reference."""
    if suite.world == "problems" and world is not None:
        return list(guesses(world.settings))
    if len(questions) < 2 or not all(q.reference for q in questions):
        return []
    return [final_answer(q.reference or "") or q.reference for q in questions]


def _add_drift(
    result: Result, settings: Mapping[str, Any], parent: Parent, first: bool, world: Any
) -> None:
    """Where the parent was measured with the same suite, and asked in the same template."""
    path = result_path(parent.run, parent.iteration, result["suite"])
    found: Any = None
    if first and path.exists():
        before = read_result(path)
        if before["settings"]["template"] == settings["template"]:
            away = behaviour.drift(result, before)
            found = [away.estimate, away.low, away.high]
        else:
            found = f"none: {path} was asked in another template"
    found = gather_values(found, world)[0]
    if isinstance(found, str):
        result["no_drift"] = found
    elif found is not None:
        result["metrics"]["drift"] = found[0]
        result["drift_interval"] = found[1:]


def described(result: Result) -> str:
    """In one line; guessing beside every pass@k."""
    parts = []
    for name, value in result["metrics"].items():
        error = result["standard_errors"].get(name)
        around = "" if error is None or math.isnan(error) else f" ± {error:.3f}"
        guess = result.get("guessing", {}).get(name)
        by_guessing = "" if guess is None else f" (guessing {guess:.3f})"
        parts.append(f"{name} {value:.3f}{around}{by_guessing}")
    if "no_drift" in result:
        parts.append(f"drift {result['no_drift']}")
    return "  ".join(parts)


def _progress(suite: SuiteConfig) -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{suite.name}: {done} of {total} questions", end=end, file=sys.stderr, flush=True)

    return show
