"""Stages and objectives in a configuration: defaults, courses, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlx.config import Config, ConfigError, load_config
from megarlx.config.load import over
from megarlx.run.branch import recipe_config
from megarlx.run.opening import open_config

START = """
[model]
vocab_size = 97
hidden_size = 64
heads = 4
layers = 6
intermediate_size = 128
[training]
sequence_length = 32
[optimizer]
lr = 5e-3
clip_norm = 0.5
[template]
user = "Question: {content} Answer:"
[rl]
[sft]
"""
AVERAGE = '[[stages]]\nsteps = 10\ncombine = "average"\n'


def loaded(folder: Path, text: str) -> Config:
    path = folder / "run.toml"
    path.write_text(START + text)
    return load_config(path)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        loaded(folder, text)
    return "\n".join(raised.value.problems)


def test_what_a_stage_does_not_say_about_adam_the_optimizer_section_says(tmp_path: Path) -> None:
    text = AVERAGE + "[stages.objectives.rl]\nlr = 1e-4\n[stages.objectives.sft]\n"
    (stage,) = loaded(tmp_path, text).stages
    rl, sft = stage.objectives["rl"], stage.objectives["sft"]
    assert (rl.lr, sft.lr) == (1e-4, 5e-3)
    assert rl.clip_norm == sft.clip_norm == 0.5


def test_a_resolved_configuration_with_stages_is_itself(tmp_path: Path) -> None:
    text = AVERAGE + "[stages.objectives.rl]\n[stages.objectives.sft]\nweight.first = 0.3\n"
    config = loaded(tmp_path, text)
    resolved = tmp_path / "resolved.json"
    resolved.write_text(config.to_json())
    assert load_config(resolved) == config


def test_a_setting_of_the_command_line_that_every_objective_replaces_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.toml"
    text = START + AVERAGE + "[stages.objectives.rl]\nlr = 1e-4\n[stages.objectives.sft]\n"

    def given(text: str, *overrides: str) -> Config:
        path.write_text(text)
        return load_config(path, overrides)

    for override in ("optimizer.lr=1e-5", "optimizer . lr = 1e-5"):
        with pytest.raises(ConfigError) as raised:
            given(text + "lr = 2e-4\n", override)
        assert raised.value.problems == [
            f"--set {override}: optimizer.lr is read by nothing here: set "
            "stages.0.objectives.rl.lr, stages.0.objectives.sft.lr"
        ]
    # One that says nothing itself reads it; so does a run without stages.
    (stage,) = given(text, "optimizer.lr=1e-5").stages
    assert (stage.objectives["rl"].lr, stage.objectives["sft"].lr) == (1e-4, 1e-5)
    assert given(text + "lr = 2e-4\n", "optimizer.clip_norm=0.25").optimizer.clip_norm == 0.25
    alone = START.replace("[training]", "[training]\nsteps = 1") + (
        "[data]\nsources = [{ name = 'web', prefix = 'p' }]\n"
    )
    assert given(alone, "optimizer.lr=1e-5").optimizer.lr == 1e-5


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_learning_rate_that_nobody_said_is_refused_and_not_that_of_pretraining(
    tmp_path: Path, kind: str
) -> None:
    path, table = tmp_path / "run.toml", f"[stages.objectives.{kind}]\n"
    start = START.replace("lr = 5e-3\n", "")

    def said(text: str, *overrides: str) -> list[str]:
        path.write_text(text)
        try:
            load_config(path, overrides)
        except ConfigError as error:
            return error.problems
        return []

    text = start + "[[stages]]\nname = 'second'\nsteps = 10\n" + table
    (problem,) = said(text)
    assert f"stages[0].objectives.{kind}.lr is missing: in stage 'second' '{kind}' would" in problem
    assert "lr = 0.0004, weight_decay = 0.1 and schedule = 'cosine'; write lr = 1e-6" in problem
    assert f"run.toml:{text[: text.index(table)].count(chr(10)) + 1}:" in problem
    # In its table, in this file's [optimizer], or by the command line.
    assert said(text + "lr = 2e-6\n") == []
    assert said(text.replace("[optimizer]\n", "[optimizer]\nlr = 2e-6\n")) == []
    assert said(text, f"stages.0.objectives.{kind}.lr=2e-6") == []
    # Pre-training has a rate by default, beside others too.
    source = "[[data.sources]]\nname = 'web'\nprefix = 'p'\n"
    assert said(start + source + "[[stages]]\nsteps = 2\n[stages.objectives.pretraining]\n") == []


def test_a_recipe_does_not_take_its_parents_learning_rate_unless_the_objective_goes_on(
    tmp_path: Path,
) -> None:
    recipe, stage = tmp_path / "recipe.toml", "[[stages]]\nsteps = 10\n[stages.objectives.{}]\n"
    parent = loaded(tmp_path, stage.format("sft") + "lr = 3e-5\n")
    for text, missing in (
        (stage.format("sft"), True),
        (stage.format("sft") + "inherit = true\n", False),
        (stage.format("rl") + "inherit = true\n", True),
        ("[optimizer]\nlr = 1e-6\n" + stage.format("rl"), False),
        ("[optimizer]\nclip_norm = 0.3\n" + stage.format("rl"), True),
    ):
        recipe.write_text(text)
        if missing:
            with pytest.raises(ConfigError, match=r"\.lr is missing"):
                recipe_config(parent, recipe, (), "parent")
        else:
            made = recipe_config(parent, recipe, (), "parent").stages[0].objectives
            assert [one.lr for one in made.values()] == [3e-5 if "inherit" in text else 1e-6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[stages]]\nsteps = 1\n[stages.objectives.chat]\n", "is not known; allowed are"),
        ("[[stages]]\nsteps = 1\n[stages.objectives.pretraining]\n", "needs [data]"),
        (
            "[[stages]]\nsteps = 1\n[stages.objectives.sft]\n[stages.objectives.rl]\n",
            "combine is 'single' with 2 objectives; it takes one",
        ),
        (
            AVERAGE + "[stages.objectives.sft]\n",
            "combine is 'average' with 1 objectives; it takes two",
        ),
        (
            '[[stages]]\nsteps = 1\nof = "gradients"\n[stages.objectives.sft]\n',
            "of is for combine = 'average' only",
        ),
        (
            AVERAGE + 'of = "gradients"\n[stages.objectives.sft]\nlr = 1e-5\n'
            "[stages.objectives.rl]\n",
            "one Adam; its objectives' settings must be the same",
        ),
        (
            AVERAGE + "[stages.objectives.sft]\nweight.first = 0\n"
            "[stages.objectives.rl]\nweight.first = 0\n",
            "objectives have no weight above 0",
        ),
        (
            "[objectives.rl.sft]\n[[stages]]\nsteps = 1\n[stages.objectives.rl]\n",
            "uses the name rl, which is taken",
        ),
        (
            "[objectives.chat]\n[[stages]]\nsteps = 1\n[stages.objectives.rl]\n",
            "or rl, distill or own: exactly one of them must be given",
        ),
        ("", "training.steps is missing; give it, or [[stages]]"),
        (
            "[[stages]]\nsteps = 4\n[stages.objectives.rl]\nwarmup_steps = 5\n",
            "+ decay_steps = 5; the stage allows at most 4",
        ),
        (
            '[[stages]]\nsteps = 4\ncombine = "alternate"\n[stages.objectives.rl]\n'
            "warmup_steps = 3\n[stages.objectives.sft]\n",
            "+ decay_steps = 3; the stage allows at most 2",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_reason(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in refused(tmp_path, text)


V = '[layout]\npipeline = 2\nvirtual_stages = 2\nschedule = "zbv"\n'
SINGLE = "[[stages]]\nsteps = 10\n[stages.objectives.{}]\n"
SUITE = '[evaluation]\nat_end = true\n[[evaluation.suites]]\nname = "s"\nkind = "{}"\npath = "x"\n'


def test_a_pipeline_in_a_v_is_refused_where_text_is_generated_and_says_what_works(
    tmp_path: Path,
) -> None:
    loaded(tmp_path, V + SINGLE.format("sft"))
    loaded(tmp_path, V + SINGLE.format("sft") + SUITE.format("choice"))
    for text, who in (
        (SINGLE.format("rl"), "objective 'rl' generates text"),
        (SINGLE.format("sft") + SUITE.format("pass_at_k"), "suite 's' generates text"),
    ):
        said = refused(tmp_path, V + text)
        assert "layout.schedule is 'zbv'" in said
        assert who in said
        assert "needs 1f1b, interleaved or zero_bubble" in said


def test_a_run_trained_in_a_v_is_opened_without_it(tmp_path: Path) -> None:
    config = loaded(tmp_path, V + SINGLE.format("sft"))
    (tmp_path / "resolved.json").write_text(config.to_json())
    opened = open_config(tmp_path, 2).layout
    assert (opened.schedule, opened.pipeline, opened.virtual_stages) == ("1f1b", 2, 1)


def test_steps_beside_stages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(START + "[[stages]]\nsteps = 1\n[stages.objectives.rl]\n")
    with pytest.raises(ConfigError, match=r"is 3, but \[\[stages\]\] have steps of their own"):
        load_config(path, ["training.steps=3"])


def test_a_preset_of_a_recipe_is_not_mixed_with_the_settings_of_the_parent() -> None:
    parent = {"rl": {"slots": 8, "policy": {"preset": "sampo", "loss": "gspo", "kl": "k3"}}}
    recipe = {"rl": {"policy": {"preset": "dapo"}}}
    assert over(parent, recipe) == {"rl": {"slots": 8, "policy": {"preset": "dapo"}}}
    assert over(parent, {"rl": {"policy": {"kl": "k2"}}})["rl"]["policy"]["loss"] == "gspo"
