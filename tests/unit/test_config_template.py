"""Whose template a run's questions are put in: its own, its world's, its parent's, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlx.config import Config, ConfigError, load_config
from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import TemplateConfig
from megarlx.run.branch import recipe_config
from megarlx.study.world.maker import WorldMaker
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.world import World

START = """
[model]
vocab_size = 97
hidden_size = 64
heads = 4
layers = 2
intermediate_size = 128
[training]
sequence_length = 32
"""
STEPS = START + "steps = 3\n"
WORLD = '[data]\nmaker = "world"\nfolder = "world"\n'
OWN = '[template]\nuser = "Q: {content}"\n'
RL = "[rl]\nprompts = 'q.jsonl'\n[[stages]]\nsteps = 2\n[stages.objectives.rl]\nlr = 1e-6\n"
SUITE = '[[evaluation.suites]]\nname = "mine"\npath = "q.jsonl"\n'
AGENTS = (
    '[data]\nmaker = "agents"\nfolder = "a"\n[[data.options.environments]]\nfunction = "sokoban"\n'
)


def loaded(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.toml"
    path.write_text(text)
    return load_config(path, overrides)


def test_a_world_has_the_template_that_its_text_is_written_in(tmp_path: Path) -> None:
    assert loaded(tmp_path, STEPS + WORLD).template == WorldMaker.template
    world = World(WorldSettings(seed=2))
    problem = world.problem("train", 5)
    asked = WorldMaker.template.user.replace("{content}", world.writer.question(problem))
    assert world.prompt(problem) == asked
    assert loaded(tmp_path, STEPS + WORLD + OWN).template == TemplateConfig(user="Q: {content}")


def test_a_run_of_no_world_has_no_template_unless_it_says_one(tmp_path: Path) -> None:
    config = loaded(tmp_path, STEPS)
    assert config.template is None
    resolved = tmp_path / "resolved.json"
    resolved.write_text(config.to_json())
    assert load_config(resolved) == config
    # As `generate` and `evaluate` may be told for a converted run.
    told = load_config(resolved, ['template.user="Q: {content}"'])
    assert told.template == TemplateConfig(user="Q: {content}")


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (START + RL, "what objective 'rl' reads"),
        (
            STEPS + "[evaluation]\nat_end = true\n" + SUITE + 'kind = "pass_at_k"\n',
            "what suite 'mine' asks",
        ),
        (STEPS + AGENTS, "what data.maker = 'agents' makes"),
    ],
)
def test_what_is_written_in_a_template_is_refused_without_one(
    tmp_path: Path, text: str, who: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    (said,) = raised.value.problems
    assert f"run.toml: template is missing, and {who}" in said
    assert r'user = "Question: {content}\nAnswer:"' in said
    assert loaded(tmp_path, text + OWN).template is not None


def test_suites_that_training_does_not_measure_need_no_template(tmp_path: Path) -> None:
    loaded(tmp_path, STEPS + SUITE + 'kind = "pass_at_k"\n')
    likelihoods = SUITE + 'kind = "perplexity"\n'
    loaded(tmp_path, STEPS + "[evaluation]\nat_end = true\n" + likelihoods)


def test_a_recipe_has_its_own_template_or_else_its_parents(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    of_world, of_none = loaded(tmp_path, STEPS + WORLD), loaded(tmp_path, STEPS)
    recipe.write_text(RL)
    assert recipe_config(of_world, recipe, (), "parent").template == WorldMaker.template
    with pytest.raises(ConfigError, match=r"recipe\.toml: template is missing, and what"):
        recipe_config(of_none, recipe, (), "parent")
    recipe.write_text(RL + OWN)
    for parent in (of_world, of_none):
        assert recipe_config(parent, recipe, (), "parent").template == TemplateConfig(
            user="Q: {content}"
        )


@pytest.mark.parametrize("field", ["user", "system", "assistant"])
def test_a_template_has_one_place_for_the_content(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"template\.{field} is 'twice \S+ \S+'; it must hold"):
        loaded(tmp_path, STEPS + OWN, f"template.{field}='twice {{content}} {{content}}'")


@pytest.mark.parametrize(
    ("given", "uses"),
    [
        ({"kind": "pass_at_k"}, True),
        ({"kind": "pass_at_k", "templated": False}, False),
        (
            {"kind": "pass_at_k", "templated": False, "few_shot": 2, "few_shot_path": "d.jsonl"},
            True,
        ),
        ({"kind": "agent", "environment": {"function": "sokoban"}}, True),
        ({"kind": "choice"}, False),
        ({"kind": "behaviour", "rewards": [{"function": "final_number"}]}, True),
    ],
)
def test_a_suite_knows_whether_it_writes_in_the_template(given: dict, uses: bool) -> None:
    assert SuiteConfig(**{"name": "s", "path": "q.jsonl", **given}).uses_template is uses


NAMED = "[templates.quick]\nuser = '<reserved_0>{content}'\n"


def test_an_objective_and_a_suite_may_be_put_in_another_template(tmp_path: Path) -> None:
    rl = RL.replace("[rl]", '[rl]\ntemplate = "quick"')
    config = loaded(
        tmp_path, START + rl + NAMED + SUITE + 'kind = "pass_at_k"\ntemplate = "quick"\n'
    )
    assert config.template is None  # nothing asks in it
    (suite,) = config.evaluation.suites
    assert config.rl is not None
    assert config.rl.template == suite.template == "quick"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (RL.replace("[rl]", '[rl]\ntemplate = "slow"'), "rl.template"),
        (
            "[objectives.more.rl]\ntemplate = 'slow'\nprompts = 'q.jsonl'\n[training]\nsteps = 3\n",
            "objectives.more.template",
        ),
        (
            SUITE + 'kind = "pass_at_k"\ntemplate = "slow"\n[training]\nsteps = 3\n',
            "evaluation.suites[0].template",
        ),
    ],
    ids=["rl", "objective", "suite"],
)
def test_an_unknown_template_lists_the_known(tmp_path: Path, text: str, place: str) -> None:
    start = START.replace("[training]\nsequence_length = 32\n", "")
    if "[training]" in text:
        text = text + "sequence_length = 32\n"
    else:
        start = START
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, start + OWN + NAMED + NAMED.replace("quick", "brief") + text)
    known = "is 'slow'; allowed are the names in [templates]: brief, quick"
    assert f"{place} {known}" in str(error.value)


def test_the_name_of_a_chat_template_is_kept_and_what_asks_in_none_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"templates\.model is a name that is kept"):
        loaded(tmp_path, STEPS + NAMED.replace("quick", "model"))
    choice = SUITE + 'kind = "choice"\ntemplated = false\ntemplate = "quick"\n'
    with pytest.raises(ConfigError, match=r"template is 'quick'; this suite asks in none"):
        loaded(tmp_path, STEPS + NAMED + choice)
