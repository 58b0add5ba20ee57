"""Code that another run's configuration names is run only where its user says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlx.config import Config, ConfigError, load_config
from megarlx.config.trust import check_trust, names_in, used
from megarlx.run.branch import excursion_config
from megarlx.run.opening import open_config

TRUNK = """
[model]
vocab_size = 330
hidden_size = 32
layers = 2
heads = 2
intermediate_size = 64
max_sequence_length = 64
[training]
steps = 4
sequence_length = 64
[data]
sources = [{ name = "text", prefix = "text" }]
[template]
user = "Question: {content} Answer:"
[rl]
prompts = "prompts.jsonl"
rewards = [{ function = "strangers:reward" }]
[objectives.second.rl]
prompts = "prompts.jsonl"
policy = { preset = "sampo" }
environment = { function = "subprocess:Popen", workers = 0, max_episode_tokens = 64 }
[[evaluation.suites]]
name = "s"
kind = "agent"
path = "tasks.jsonl"
environment = { function = "os:system", options = { command = "touch gone" } }
"""
RECIPE = "[[stages]]\nsteps = 2\nobjectives.{} = {{ lr = 1e-6 }}\n"


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "trunk.toml").write_text(TRUNK)
    (run / "resolved.json").write_text(load_config(tmp_path / "trunk.toml").to_json())
    return run


def recipe(tmp_path: Path, objective: str, more: str = "") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(more + RECIPE.format(objective))
    return path


def test_every_name_of_a_configuration_is_found(stranger: Path) -> None:
    config = load_config(stranger / "resolved.json")
    found = {(where, kind): name for where, kind, name in names_in(config)}
    assert found["rl.rewards[0].function", "reward"] == "strangers:reward"
    assert found["objectives.second.rl.environment.function", "environment"] == "subprocess:Popen"
    assert found["evaluation.suites[0].environment.function", "environment"] == "os:system"
    only = {where for where, _, _ in names_in(config, {"evaluation"})}
    assert only
    assert all(where.startswith("evaluation.") for where in only)


def test_an_evaluation_of_a_strangers_run_refuses_its_code(stranger: Path) -> None:
    open_config(stranger, 1)  # to generate: nothing that it names is used
    with pytest.raises(ConfigError, match=r"'os:system'.* allow it with --trust os:system"):
        open_config(stranger, 1, uses=("evaluation",))
    assert open_config(stranger, 1, uses=("evaluation",), trusted=["os:system"])


def test_an_excursion_runs_no_code_that_only_its_parent_names(
    stranger: Path, tmp_path: Path
) -> None:
    clean = "evaluation = { suites = [] }\n"
    with pytest.raises(ConfigError) as caught:
        excursion_config(stranger, recipe(tmp_path, "rl"))
    assert len(caught.value.problems) == 2  # the reward, and the suite's environment
    assert "second" not in str(caught.value)  # which no stage trains
    with pytest.raises(ConfigError, match="strangers:reward"):
        excursion_config(stranger, recipe(tmp_path, "rl", clean))
    with pytest.raises(ConfigError, match="subprocess:Popen"):
        excursion_config(stranger, recipe(tmp_path, "second", clean), (), ["strangers:reward"])
    trusted = excursion_config(stranger, recipe(tmp_path, "rl", clean), (), ["strangers:reward"])
    assert trusted.rl is not None
    own = clean + 'rl.rewards = [{ function = "mine:reward" }]\n'
    mine = excursion_config(stranger, recipe(tmp_path, "rl", own))
    assert mine.rl is not None
    assert mine.rl.rewards[0].function == "mine:reward"


def test_a_name_of_ours_that_runs_what_its_options_name_needs_trust_too() -> None:
    """A judge sends variables of the environment to whom its options name."""
    names = [("a", "environment", "gymnasium"), ("b", "environment", "shop")]
    names += [("c", "reward", "judge"), ("d", "reward", "final_number")]
    with pytest.raises(ConfigError, match=r"^run: a is 'gymnasium'.*\nrun: c is 'judge'") as caught:
        check_trust(names, "run")
    assert len(caught.value.problems) == 2
    check_trust(names, "run", ["gymnasium", "judge"])


def test_what_ships_is_trusted(stranger: Path) -> None:
    config = load_config(stranger / "resolved.json")
    ours = config.model_copy(update={"rl": None, "objectives": {}})
    assert isinstance(used(ours), Config)
    check_trust(names_in(used(ours), {"model", "data", "rl"}), "run")
