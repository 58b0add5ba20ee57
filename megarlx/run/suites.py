"""Which suites an opened run is asked, in which template, and their results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from megarlx import plug
from megarlx.comm import launch
from megarlx.comm.collectives import barrier
from megarlx.config import Config, ConfigError, load_config
from megarlx.config.evaluation import SAMPLED, EvaluationConfig, SuiteConfig, SuitesConfig
from megarlx.config.objectives import WRITE_TEMPLATE, TemplateConfig, unknown_template
from megarlx.data.making import Made
from megarlx.evaluation.beforehand import check_files
from megarlx.evaluation.interface import Subject
from megarlx.evaluation.results import Result
from megarlx.evaluation.suites import Parent, Say, evaluate
from megarlx.run.directory import RunDirectory
from megarlx.run.made import made_for, write_data
from megarlx.run.tokenizer import template_of, written

if TYPE_CHECKING:
    from megarlx.run.opened import OpenedRun


class Templates(NamedTuple):
    own: TemplateConfig | None  # of suites that name none
    named: Mapping[str, TemplateConfig]


def chosen(
    config: Config,
    run: str,
    *,
    file: str | Path | None = None,
    names: Collection[str] = (),
    samples: int | None = None,
    temperature: float | None = None,
) -> tuple[EvaluationConfig, Templates]:
    """The suites of the file, else the run's own, with what is said of them besides; and their
    templates: those of the file, else the run's."""
    evaluation, templates = suites_of(config, file)
    there = [suite.name for suite in evaluation.suites]
    if not there:
        said = "no suites: the run's configuration has none; give a file: --config FILE.toml"
        if file is not None:
            said = f"no suites: {file} has none; each is a [[suites]]"
        raise ConfigError([said])
    if unknown := [name for name in names if name not in there]:
        raise ConfigError([f"--suite {unknown[0]}: there is none; allowed are {', '.join(there)}"])
    changes = {"samples": samples, "temperature": temperature}
    changes = {name: value for name, value in changes.items() if value is not None}
    wanted = [suite for suite in evaluation.suites if suite.name in (names or there)]
    named = [one for one in wanted if one.template is not None]
    if lost := [one for one in named if one.template not in templates.named]:
        wrong = unknown_template(lost[0].template or "", templates.named)
        raise ConfigError([f"suite {lost[0].name}: template {wrong}"])
    asking = [one.name for one in wanted if one.uses_template and one.template is None]
    if templates.own is None and asking:
        raise ConfigError([_no_template(asking, run, file)])
    suites = tuple(_changed(suite, changes) for suite in wanted)
    return evaluation.model_copy(update={"suites": suites}), templates


def suites_of(config: Config, file: str | Path | None = None) -> tuple[EvaluationConfig, Templates]:
    """Those of the file, else the run's own, else what its data maker has to be measured with."""
    own, named = config.template, config.templates
    if file is not None:
        given = suites_in(file)
        return given, Templates(given.template or own, {**named, **given.templates})
    evaluation = config.evaluation
    if not evaluation.suites and config.data is not None and config.data.maker is not None:
        suites = plug.resolve("data maker", config.data.maker).evaluated
        evaluation = EvaluationConfig(suites=suites)
    return evaluation, Templates(own, named)


def suites_in(file: str | Path) -> SuitesConfig:
    return load_config(file, (), SuitesConfig, prepare=_without_training)


def _without_training(values: dict[str, Any]) -> dict[str, Any]:
    """Of a recipe or a run's configuration: what it is measured by, and its templates."""
    if "evaluation" not in values or "suites" in values:
        return values
    templates = {key: values[key] for key in ("template", "templates") if key in values}
    return {**values["evaluation"], **templates}


def _no_template(asking: list[str], run: str, file: str | Path | None) -> str:
    return (
        f"{run} has no [template], in which suite '{asking[0]}' asks its questions; into "
        f"{file or 'a file of suites, for --config'} {WRITE_TEMPLATE}, as what it is compared with "
        "is asked, or templated = false for questions as they stand"
    )


def _changed(suite: SuiteConfig, changes: dict[str, Any]) -> SuiteConfig:
    if not changes or suite.kind not in SAMPLED:
        return suite
    try:
        return SuiteConfig.model_validate({**suite.model_dump(), **changes})
    except ValidationError as error:
        details = error.errors(include_url=False)
        said = [f"{'.'.join(map(str, d['loc']))}: {d['msg']}".removeprefix(": ") for d in details]
        raise ConfigError([f"suite {suite.name}: {one}" for one in said]) from None


def made_suites(opened: OpenedRun, evaluation: EvaluationConfig) -> Made | None:
    """What these suites ask of the run's maker, which writes it unless it is there."""
    if any(suite.made is not None for suite in evaluation.suites):
        if launch.read().local_rank == 0:
            write_data(opened.config)
        barrier(opened.model.mesh.world)
    return made_for(evaluation.suites, opened.config)


def measured(
    opened: OpenedRun,
    evaluation: EvaluationConfig,
    templates: Templates,
    made: Made | None,
    *,
    keep: bool,
    say: Say | None = None,
) -> list[Result]:
    """Of every suite, on every rank. With `keep`, results are written into the run's folder, and
    those that are there are not computed again."""
    run = opened.reference.run
    if opened.weights != "last":  # results of both are kept side by side
        named = (
            s.model_copy(update={"name": f"{s.name}_{opened.weights}"}) for s in evaluation.suites
        )
        evaluation = evaluation.model_copy(update={"suites": tuple(named)})
    start = RunDirectory(run).parent
    parent = None if start is None else Parent(Path(start.run), start.iteration)
    subject = Subject(
        opened.model,
        opened.tokenizer,
        template_of(templates.own),
        opened.is_base,
        opened.reference.iteration,
        opened.trunk_tokens,
        opened.loaded.digest,
        made,
        written(templates.named),
    )
    check_files(subject, evaluation)
    return evaluate(subject, evaluation, run=run if keep else None, parent=parent, say=say)
