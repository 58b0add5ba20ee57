"""The kinds of suites that come with megarlx."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from megarlx.comm.collectives import gather_values
from megarlx.config.reward import RewardConfig
from megarlx.evaluation import agents, capability
from megarlx.evaluation import behaviour as behaviours
from megarlx.evaluation.interface import Asked, Measured
from megarlx.evaluation.pass_at_k import Pool, guessing_pass_at_k
from megarlx.evaluation.questions import Question, few_shot_of, questions_of, short_enough
from megarlx.evaluation.readiness import informative_groups
from megarlx.evaluation.sampling import ScoredQuestion, sample_and_score
from megarlx.objectives.answers import final_answer

Item = dict[str, Any]


def pass_at_k(asked: Asked) -> Measured:
    suite = asked.suite
    questions, items, samples = _sampled(asked, lambda one: _item(one, suite.correct_from))
    pool = _pool_of(items)
    metrics, errors, guessing = {}, {}, {}
    answers = _answers(asked, questions)
    for k in (k for k in suite.ks if k <= suite.samples):
        estimate = pool.estimate(k)
        metrics[f"pass_at_{k}"] = estimate.mean
        errors[f"pass_at_{k}"] = estimate.standard_error
        if answers:
            guessing[f"pass_at_{k}"] = guessing_pass_at_k(answers, k, leave_one_out=True)
    metrics["truncated"] = sum(i["truncated"] for i in items) / sum(pool.samples)
    if suite.group_size is not None:
        _add_informative(suite.group_size, pool, metrics, errors)
    return Measured(metrics, items, errors, guessing, samples)


def behaviour(asked: Asked) -> Measured:
    limit = asked.suite.violation_below
    _, items, samples = _sampled(asked, lambda one: behaviours.item(one, limit))
    metrics, errors = behaviours.summary(items)
    return Measured(metrics, items, errors, samples=samples)


def perplexity(asked: Asked) -> Measured:
    subject = asked.subject
    metrics, errors, items = capability.perplexity(
        subject.model,
        subject.tokenizer,
        capability.documents_of(asked.suite, subject.made),
        tokens_per_pass=asked.config.tokens_per_pass,
    )
    return Measured(metrics, items, errors)


def choice(asked: Asked) -> Measured:
    subject = asked.subject
    metrics, errors, items = capability.choose(
        subject.model,
        subject.tokenizer,
        asked.suite,
        capability.tests_of(asked.suite, subject.made),
        tokens_per_pass=asked.config.tokens_per_pass,
    )
    return Measured(metrics, items, errors)


cloze = choice  # the suite's kind says what a test of it looks like


def agent(asked: Asked) -> Measured:
    subject, config, suite = asked.subject, asked.config, asked.suite
    items, samples = agents.play(
        subject.model,
        subject.tokenizer,
        asked.template,
        suite,
        seed=config.seed,
        slots=config.slots,
        prefill_tokens=config.prefill_tokens,
        kept_samples=config.kept_samples,
    )
    metrics, errors = agents.summary(items)
    group = suite.group_size or 0
    whole = [i for i in items if 0 < group <= i["samples"]]  # no episode of the group was lost
    if whole:
        pool = _pool_of(whole)
        for k in (k for k in suite.ks if k <= group):
            metrics[f"pass_at_{k}"] = pool.estimate(k).mean
            errors[f"pass_at_{k}"] = pool.estimate(k).standard_error
        _add_informative(group, pool, metrics, errors)
    return Measured(metrics, items, errors, agents.at_random(suite, config.seed), samples)


def _sampled(
    asked: Asked, item: Callable[[ScoredQuestion], Item]
) -> tuple[list[Question], list[Item], list[Item]]:
    """(questions, an item for each, samples to read), the same on every rank."""
    subject, config, suite = asked.subject, asked.config, asked.suite
    mesh, template = subject.model.mesh, asked.template
    few_shot = few_shot_of(suite, subject.made, config.seed, is_base=subject.is_base)
    questions = short_enough(
        suite, questions_of(suite, subject.made), few_shot, template, subject.tokenizer
    )
    scored = sample_and_score(
        subject.model,
        subject.tokenizer,
        template,
        suite.model_copy(update={"rewards": suite.rewards or _default_rewards(asked)}),
        questions,
        few_shot,
        seed=config.seed,
        slots=config.slots,
        prefill_tokens=config.prefill_tokens,
        progress=asked.progress,
    )
    kept = range(min(config.kept_samples, suite.samples))
    mine = [(item(one), [_line(one, at) for at in kept]) for one in scored]
    every = gather_values(mine, mesh.dp)
    # Rank r took questions r, r + size, …
    ordered = [every[i % mesh.dp.size][i // mesh.dp.size] for i in range(len(questions))]
    items, lines = [entry for entry, _ in ordered], [line for _, held in ordered for line in held]
    return questions, items, lines


def _default_rewards(asked: Asked) -> tuple[RewardConfig, ...]:
    """These only look at text, in time that its length bounds: no process of their own."""
    name = "final_number" if asked.made is None else asked.made.reward
    return (RewardConfig(function=name, workers=0),)


def _item(scored: ScoredQuestion, correct_from: float) -> dict[str, Any]:
    """A sample whose reward is not known is not correct."""
    question = scored.question
    found = {
        "id": question.id,
        "samples": len(scored.samples),
        "correct": sum(reward >= correct_from for reward in scored.rewards),
        "truncated": scored.truncated,
    }
    return found if question.group is None else {**found, "group": question.group}


def _line(scored: ScoredQuestion, at: int) -> dict[str, Any]:
    sample, reward = scored.samples[at], scored.rewards[at]
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "reference": sample.reference,
        "reward": None if math.isnan(reward) else reward,
        "finish_reason": sample.finish_reason,
        "id": scored.question.id,
    }


def _pool_of(items: Sequence[Mapping[str, Any]]) -> Pool:
    return Pool(tuple(i["samples"] for i in items), tuple(i["correct"] for i in items))


def _add_informative(
    group_size: int, pool: Pool, metrics: dict[str, float], errors: dict[str, float]
) -> None:
    informative = informative_groups(pool, group_size)
    metrics["informative_groups"] = informative.mean
    errors["informative_groups"] = informative.standard_error


def _answers(asked: Asked, questions: Sequence[Question]) -> list[Hashable]:
    """What a guesser draws from; nothing where some question has no reference."""
    if asked.made is not None and asked.made.guesses is not None:
        return list(asked.made.guesses())
    if len(questions) < 2 or not all(q.reference for q in questions):
        return []
    return [final_answer(q.reference or "") or q.reference for q in questions]
