"""The kinds of suites that come with megarlx."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from megarlx.config.evaluation import SuiteConfig
from megarlx.config.reward import RewardConfig
from megarlx.evaluation import behaviour as behaviours
from megarlx.evaluation import capability, form, sampled
from megarlx.evaluation.interface import Asked, Measured
from megarlx.evaluation.pass_at_k import Pool, guessing_pass_at_k
from megarlx.evaluation.questions import Question, few_shot_of, questions_of, short_enough
from megarlx.evaluation.readiness import equal_rewards, informative_groups
from megarlx.evaluation.sampled import Played
from megarlx.rollouts.rewards.answers import Style, final_answer

Item = dict[str, Any]


def pass_at_k(asked: Asked) -> Measured:
    suite = asked.suite
    questions, items, samples = _played(asked, lambda one: _item(one, suite))
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
        _add_informative(suite.group_size, items, metrics, errors)
    if suite.form is not None:
        of_form, their_errors = form.summary(items)
        metrics |= of_form
        errors |= their_errors
    return Measured(metrics, items, errors, guessing, samples)


def behaviour(asked: Asked) -> Measured:
    limit = asked.suite.violation_below
    _, items, samples = _played(asked, lambda one: behaviours.item(one, limit))
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
    suite = asked.suite
    assert suite.environment is not None  # the configuration saw to it
    penalty = suite.environment.invalid_action_penalty
    questions, items, samples = _played(asked, lambda one: sampled.agent_item(one, penalty))
    metrics, errors = sampled.agent_summary(items)
    group = suite.group_size or 0
    whole = [i for i in items if 0 < group <= i["samples"]]  # no episode of the group was lost
    if whole:
        pool = _pool_of(whole)
        for k in (k for k in suite.ks if k <= group):
            metrics[f"pass_at_{k}"] = pool.estimate(k).mean
            errors[f"pass_at_{k}"] = pool.estimate(k).standard_error
        _add_informative(group, whole, metrics, errors)
    guessing = sampled.at_random(suite, questions, asked.config.seed)
    return Measured(metrics, items, errors, guessing, samples)


def _played(
    asked: Asked, item: Callable[[Played], Item]
) -> tuple[list[Question], list[Item], list[Item]]:
    """(questions, an item for each, samples to read), the same on every rank."""
    subject, config, suite = asked.subject, asked.config, asked.suite
    mesh, template = subject.model.mesh, asked.template
    few_shot = few_shot_of(suite, subject.made, config.seed, is_base=subject.is_base)
    questions = short_enough(
        suite, questions_of(suite, subject.made), few_shot, template, subject.tokenizer
    )
    played = sampled.play(
        subject.model,
        subject.tokenizer,
        template,
        suite.model_copy(update={"rewards": suite.rewards or _default_rewards(asked)}),
        questions,
        few_shot,
        seed=config.seed,
        slots=config.slots,
        prefill_tokens=config.prefill_tokens,
        kept_samples=config.kept_samples,
        progress=asked.progress,
    )
    every = sampled.gathered([(item(one), one.lines) for one in played], len(questions), mesh.dp)
    return questions, [made for made, _ in every], [line for _, lines in every for line in lines]


def _default_rewards(asked: Asked) -> tuple[RewardConfig, ...]:
    """These only look at text, in time that its length bounds: no process of their own."""
    name = "final_number" if asked.made is None else asked.made.reward
    return (RewardConfig(function=name, workers=0),)


def _item(played: Played, suite: SuiteConfig) -> Item:
    """A sample whose reward is not known is not correct."""
    question, correct_from = played.question, suite.correct_from
    found = {
        "id": question.id,
        "samples": len(played.episodes),
        "correct": sum(reward >= correct_from for reward in played.rewards),
        "truncated": played.truncated,
    }
    if suite.group_size is not None:
        found["alike"] = equal_rewards(played.rewards)
    if suite.form is not None:
        found |= form.of_item(played.episodes, played.rewards, correct_from)
    return found if question.group is None else {**found, "group": question.group}


def _pool_of(items: Sequence[Mapping[str, Any]]) -> Pool:
    return Pool(tuple(i["samples"] for i in items), tuple(i["correct"] for i in items))


def _add_informative(
    group_size: int, items: Sequence[Item], metrics: dict[str, float], errors: dict[str, float]
) -> None:
    informative = informative_groups(items, group_size)
    metrics["informative_groups"] = informative.mean
    errors["informative_groups"] = informative.standard_error


def _answers(asked: Asked, questions: Sequence[Question]) -> list[Hashable]:
    """What a guesser draws from; nothing where some question has no reference."""
    if asked.made is not None and asked.made.guesses is not None:
        return list(asked.made.guesses())
    if len(questions) < 2 or not all(q.reference for q in questions):
        return []
    rewards = asked.suite.rewards or _default_rewards(asked)
    by_number = any(reward.function == "final_number" for reward in rewards)
    style: Style = "any" if by_number else "marked"  # of "3. May 2021" 2021 answers nothing
    return [final_answer(q.reference or "", style) or q.reference for q in questions]
