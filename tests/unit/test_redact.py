"""Secrets of a configuration are used, and stand in nothing that a run keeps."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from megarlx.cli import main
from megarlx.config import load_config
from megarlx.config.reward import RewardConfig
from megarlx.redact import (
    NOT_KEPT,
    check_kept,
    from_environment,
    hidden,
    hidden_toml,
    is_secret,
    redacted,
    secrets_in,
)
from megarlx.rollouts.rewards.process import RewardError
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.run.directory import RunDirectory
from megarlx.run.rank_logs import log_path, rank_log

SECRET = "s3crét-of-the-judge"
CONFIG = """
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
tokenizer = "tokenizer.json"
[template]
user = "Question: {content} Answer:"
[rl]
prompts = "prompts.jsonl"
rewards = [{ function = "judge", options = { url = "http://x", headers = { X-Api-Key = "%s" } } }]
"""


@pytest.mark.parametrize(
    "key",
    ["Authorization", "X-Api-Key", "apiKey", "PRIVATE-TOKEN", "access_token", "password", "secret"],
)
def test_keys_of_secrets_are_known(key: str) -> None:
    assert is_secret(key, "anything")


@pytest.mark.parametrize("key", ["tokenizer", "monkey", "Content-Type", "author", "keyboard"])
def test_other_keys_are_kept_unless_their_text_holds_a_password(key: str) -> None:
    assert not is_secret(key, "anything")
    assert not is_secret(key, "https://host/path@x:y")
    assert is_secret(key, "https://me:pass@host/path")


def test_only_options_are_touched_and_names_of_variables_are_kept() -> None:
    options = {"url": "u", "headers": {"Authorization": SECRET}, "max_tokens": 3, "key": [SECRET]}
    value = {"token": "kept", "rewards": [{"options": options}]}
    found = redacted(value)
    assert found["token"] == "kept"
    assert found["rewards"][0]["options"] == {
        "url": "u", "headers": {"Authorization": NOT_KEPT}, "max_tokens": 3, "key": [NOT_KEPT],
    }  # fmt: skip
    assert list(secrets_in(value)) == [SECRET, SECRET]
    assert list(secrets_in(found)) == []
    named = {"options": {"headers_from_env": {"Authorization": "JUDGE_TOKEN"}}}
    assert redacted(named) == named
    assert list(secrets_in(named)) == []


def test_what_stands_in_the_environment_is_hidden_in_logs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    named = {"options": {"headers_from_env": {"Authorization": "JUDGE_TOKEN"}}}
    monkeypatch.setattr("sys.argv", ["train", "--set", f"rl.options.key={json.dumps(SECRET)}"])

    def work() -> None:
        print("asked with", SECRET)
        raise ZeroDivisionError(SECRET)

    with pytest.raises(ZeroDivisionError), rank_log(tmp_path, 0, set(from_environment(named))):
        work()
    text = log_path(tmp_path, 0).read_text()
    assert "asked with " + NOT_KEPT in text
    assert SECRET not in text
    assert json.dumps(SECRET)[1:-1] not in text


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_kept_file_is_the_same_but_for_its_secrets(quote: str) -> None:
    text = f"# mine\n[x.options]\na_key = {quote}{SECRET}{quote}\nb = {quote}b{quote}\n"
    kept = hidden_toml(text)
    assert tomllib.loads(kept)["x"]["options"] == {"a_key": NOT_KEPT, "b": "b"}
    assert kept.startswith("# mine\n")


def test_a_file_whose_secret_cannot_be_hidden_is_not_kept() -> None:
    text = '[x.options]\nkey = "s\\u0065cret"\n'
    assert hidden_toml(text).startswith("# This file held secrets")


def test_nothing_that_describes_a_run_holds_its_secrets_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG % SECRET)
    config = load_config(path)
    run = RunDirectory(tmp_path / "run")
    run.write_description(config, path)
    assert main(["config", str(path)]) == 0
    assert SECRET not in capsys.readouterr().out
    kept = [file for file in run.path.rglob("*") if file.is_file()]
    assert {"config.toml", "resolved.json"} <= {file.name for file in kept}
    for file in kept:
        assert SECRET not in file.read_text(), file
    run.check_same_run(config)
    again = load_config(run.path / "resolved.json")
    assert again.rl is not None
    with pytest.raises(RewardError, match=r"headers.X-Api-Key is not kept with a run; give it"):
        Rewards(again.rl.rewards)


def test_what_was_not_kept_is_asked_for_when_it_is_used() -> None:
    check_kept({"headers": {"Authorization": "there"}}, "options")
    with pytest.raises(ValueError, match=r"^options\.headers\.Authorization is not kept"):
        check_kept({"headers": {"Authorization": NOT_KEPT}}, "options")
    with pytest.raises(RewardError, match="headers_from_env"):
        Rewards([RewardConfig(function="judge", options={"headers": {"key": NOT_KEPT}})])


def test_short_words_are_not_hidden_in_text() -> None:
    assert hidden("a key in a log", ["a", "key"]) == "a key in a log"
    assert hidden("it is 123456!", ["123456", "1234567"]) == f"it is {NOT_KEPT}!"
