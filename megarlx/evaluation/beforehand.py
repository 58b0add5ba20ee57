"""What of a run's suites can be known before anything is trained: that their files can be asked."""

from __future__ import annotations

from pathlib import Path

from megarlx import plug
from megarlx.config.evaluation import SAMPLED, EvaluationConfig
from megarlx.config.trust import names_in
from megarlx.evaluation import sampled
from megarlx.evaluation.capability import documents_of, tests_of
from megarlx.evaluation.interface import Asked, Subject
from megarlx.evaluation.questions import SuiteError, few_shot_of, questions_of, short_enough


def check_files(subject: Subject, config: EvaluationConfig) -> None:
    """They are there, can be read, and leave an answer room; what a maker made is not looked at."""
    check_there(config)
    for suite in config.suites:
        if suite.path is not None and suite.is_ours:
            _read(Asked(subject, config, suite))


def check_there(config: EvaluationConfig) -> None:
    for suite in config.suites:
        for key in ("path", "few_shot_path"):
            path = getattr(suite, key)
            if path is not None and not Path(path).is_file():
                raise SuiteError(f"suite {suite.name}: {key} is {path!r}: there is no such file")
        for where, _, name in names_in(suite):
            if ".py:" in name and plug.file_of(name) is None:
                raise SuiteError(f"suite {suite.name}: {where} is {name!r}: there is no such file")


def _read(asked: Asked) -> None:
    suite = asked.suite
    if suite.kind in SAMPLED:
        _check_room(asked)
    elif suite.kind == "perplexity":
        documents_of(suite, None)
    else:
        tests_of(suite, None)


def _check_room(asked: Asked) -> None:
    subject, suite, template = asked.subject, asked.suite, asked.template
    few_shot = few_shot_of(suite, None, asked.config.seed, is_base=subject.is_base)
    questions = questions_of(suite, None)
    questions = short_enough(suite, questions, few_shot, template, subject.tokenizer)
    prompts = sampled.prompts_of(template, subject.tokenizer, suite, questions, few_shot)
    sampled.longest_of(subject.model, suite, prompts)
