"""Samples of each question, scored: what pass@k and behaviour suites are made of.

Data-parallel ranks share the questions. The same seed gives a question the same samples whatever
the layout, up to what generation/widths.py says about rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megarlx.comm.collectives import gather_values
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.conversations import Template
from megarlx.data.prompts import FewShot
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.questions import Question, SuiteError
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.model.build import ParallelModel
from megarlx.objectives.reward_process import RewardError
from megarlx.objectives.rewards import Rewards
from megarlx.objectives.samples import Sample

ROUNDS = 8  # a round fills the engine's slots so often: its end, with empty slots, is short
Progress = Callable[[int, int], None]  # questions done, of all


@dataclass(frozen=True)
class ScoredQuestion:
    """Rewards are NaN where they are not known."""

    question: Question
    samples: tuple[Sample, ...]
    rewards: tuple[float, ...]

    @property
    def truncated(self) -> int:
        return sum(sample.finish_reason == "length" for sample in self.samples)


def settings_of(suite: SuiteConfig, tokenizer: Tokenizer) -> SamplingSettings:
    return SamplingSettings(
        temperature=suite.temperature,
        top_p=suite.top_p,
        stop_tokens=(tokenizer.eos_id,),
        stop_strings=suite.stop_strings,
    )


def sample_and_score(
    model: ParallelModel,
    tokenizer: Tokenizer,
    template: Template,
    suite: SuiteConfig,
    questions: Sequence[Question],
    few_shot: FewShot,
    *,
    seed: int,
    slots: int = 256,
    prefill_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[ScoredQuestion]:
    """Called by all ranks; each gets the questions of its data-parallel rank, scored."""
    shots = few_shot.ids(template, tokenizer)
    prompts = [shots + q.prompt_ids(template, tokenizer) for q in questions]
    longest = max(map(len, prompts)) + suite.max_new_tokens
    allowed = model.config.max_sequence_length
    if longest > allowed:
        raise SuiteError(
            f"suite {suite.name}: its longest prompt has {longest - suite.max_new_tokens} tokens "
            f"and max_new_tokens is {suite.max_new_tokens}; model.max_sequence_length allows "
            f"{allowed} together"
        )
    settings = settings_of(suite, tokenizer)
    group = model.mesh.dp
    mine = range(group.rank, len(questions), group.size)
    most = -(-len(questions) // group.size)  # of any rank
    at_once = min(slots, most * suite.samples)
    engine = Engine.of(
        model,
        slots=at_once,
        longest=longest,
        detokenize=tokenizer.decode_sampled,
        prefill_tokens=prefill_tokens,
    )
    rewards = Rewards(suite.rewards) if model.mesh.model.is_first else None
    # Every data-parallel rank scores as often as the others: they stop together.
    per_round = max(1, ROUNDS * slots // suite.samples)
    rounds = -(-most // per_round)
    found: list[ScoredQuestion] = []
    try:
        for number in range(rounds):
            part = mine[number * per_round : (number + 1) * per_round]
            requests = [
                Request(
                    prompts[i],
                    range(i * suite.samples, (i + 1) * suite.samples),
                    suite.max_new_tokens,
                )
                for i in part
            ]
            completions = engine.generate(requests, settings, seed) if requests else []
            samples = [
                _sample(c, questions[part[at // suite.samples]], tokenizer, settings)
                for at, c in enumerate(completions)
            ]
            scores = _scored(rewards, samples, model)
            for at, i in enumerate(part):
                held = slice(at * suite.samples, (at + 1) * suite.samples)
                found.append(
                    ScoredQuestion(questions[i], tuple(samples[held]), tuple(scores[held]))
                )
            if progress is not None:
                done = min(len(questions), (number + 1) * per_round * group.size)
                progress(done, len(questions))
    finally:
        if rewards is not None:
            rewards.close()
    return found


def _sample(
    completion: Completion, question: Question, tokenizer: Tokenizer, settings: SamplingSettings
) -> Sample:
    tokens = completion.tokens.tolist()
    return Sample(
        question.text,
        text_of(tokens, settings, tokenizer.decode_sampled),
        question.reference,
        question.metadata,
        completion.finish_reason,
        len(tokens),
    )


def _scored(rewards: Rewards | None, samples: list[Sample], model: ParallelModel) -> list[float]:
    """One rank of each copy of the model scores, and tells the others."""
    answer: dict[str, Any] = {}
    if rewards is not None:
        try:
            totals = rewards.score(samples, model.mesh.dp).totals
            answer = {"totals": [None if math.isnan(t) else t for t in totals]}
        except RewardError as error:
            answer = {"error": str(error)}
    answer = gather_values(answer, model.mesh.model)[0]
    if "error" in answer:
        raise RewardError(answer["error"])
    return [math.nan if total is None else total for total in answer["totals"]]
