"""When a run probes whether its model is ready for RL, and with what."""

from __future__ import annotations

from megarlx.config import Config, RlConfig
from megarlx.config.evaluation import EvaluationConfig
from megarlx.data.conversations import read_conversations
from megarlx.evaluation.readiness import readiness_suite
from megarlx.run.made import path_of


def beginnings_of_rl(config: Config) -> dict[int, list[str]]:
    """The steps after which RL begins, and what begins there; what goes on does not begin."""
    found = {
        done: [name for name in names if isinstance(config.named_objectives.get(name), RlConfig)]
        for done, names in config.timeline.beginnings().items()
    }
    return {done: names for done, names in found.items() if names}


def readiness_of(config: Config, names: list[str]) -> EvaluationConfig:
    """The probes of these objectives."""
    suites = []
    for name in names:
        rl = config.named_objectives[name]
        assert isinstance(rl, RlConfig)  # beginnings_of_rl saw to it
        room = config.model.max_sequence_length - rl.max_completion_tokens
        examples = None if rl.examples is None else path_of(rl.examples, config)
        suites.append(
            readiness_suite(
                name,
                rl,
                prompts=config.evaluation.readiness_prompts,
                path=path_of(rl.prompts, config),
                max_prompt_tokens=min(rl.max_prompt_tokens or room, room),
                examples=examples,
                shown=0 if examples is None else sum(1 for _ in read_conversations(examples)),
            )
        )
    return config.evaluation.model_copy(update={"suites": tuple(suites)})
