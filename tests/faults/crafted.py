"""Attacks as data: files that fit their own digests and lie, and what is said to each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Change = Callable[[dict[str, Any]], object]


def put(*path: str, value: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        here = state
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value

    return change


def drop(*path: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        here = state
        for key in path[:-1]:
            here = here[key]
        del here[path[-1]]

    return change


# The state of a run's checkpoint, with a digest that is right.
STATES: dict[str, tuple[Change, str]] = {
    "nothing": (lambda state: state.clear(), "its state cannot be read: KeyError"),
    "another step": (put("steps_done", value=1), "its state is of step 1, its manifest of"),
    "a step as text": (put("steps_done", value="2"), "its state is of step '2'"),
    "a stage beyond": (put("stage", value=7), "stage 7"),
    "no run": (drop("run"), "its state cannot be read: KeyError: 'run'"),
    "a run as text": (put("run", value="x"), "its state cannot be read: TypeError"),
    "no cost": (drop("run", "cost"), "its state cannot be read: KeyError: 'cost'"),
    "negative cost": (put("run", "cost", "seconds", value=-1), "run.cost.seconds is -1"),
    "negative tokens": (put("tokens", "pretraining", value=-5), "tokens.pretraining is -5"),
    "tokens beyond": (put("tokens", "pretraining", value=10**30), "tokens.pretraining is 1000"),
    "tokens as text": (put("tokens", "pretraining", value="5"), "tokens.pretraining is '5'"),
    "no tokens": (put("tokens", value=None), "its state cannot be read: AttributeError"),
    "tokens of a stranger": (put("tokens", "x", value=1), "its state cannot be read: KeyError"),
    "a position before": (put("positions", "pretraining", value=-1), "positions.pretraining is -1"),
    "no objective": (put("objectives", value={}), "has nothing about 'pretraining'"),
    "an empty objective": (
        put("objectives", "pretraining", value={}),
        "its state cannot be read: KeyError",
    ),
    "an objective as list": (
        put("objectives", "pretraining", value=[]),
        "its state cannot be read: TypeError",
    ),
    "unknown work": (
        put("work", "pretraining", "x", value=1),
        "its state cannot be read: TypeError",
    ),
    "work that is less than none": (
        put("work", "pretraining", "generated_tokens", value=-1),
        "work.pretraining.generated_tokens is -1",
    ),
    "shares beyond": (
        put("shares", value={"means": {"pretraining": 1e300}}),
        "shares.means.pretraining is 1e+300; expected a number from 0 to 1",
    ),
    "shares as text": (put("shares", value="x"), "its state cannot be read: AttributeError"),
    "an optimizer as text": (put("optimizer", value="x"), "the state's optimizer is 'x'"),
}

# config.json, tokenizer.json, tokenizer_config.json of a Hugging Face folder.
DEEP = "[" * 100_000
FOLDERS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "endless layers": (
        "config.json",
        lambda text: json.dumps(json.loads(text) | {"num_hidden_layers": 10**9}),
        r"num_hidden_layers 1000000000; the files hold \d+ tensors",
    ),
    "layer_types a number": (
        "config.json",
        lambda text: json.dumps(json.loads(text) | {"layer_types": 3}),
        "layer_types has 3; allowed is full_attention",
    ),
    "layer_types nested": (
        "config.json",
        lambda text: json.dumps(json.loads(text) | {"layer_types": [["a"]]}),
        r"layer_types has \['a'\]; allowed",
    ),
    "a config nested deeply": ("config.json", lambda _: DEEP, "config.json cannot be read as JSON"),
    "a config as list": ("config.json", lambda _: "[]", "config.json holds a list"),
    "a tokenizer nested deeply": ("tokenizer.json", lambda _: DEEP, "tokenizer.json: not JSON"),
    "a tokenizer as list": ("tokenizer.json", lambda _: "[]", "tokenizer.json: holds a list"),
    "a tokenizer of nothing": ("tokenizer.json", lambda _: "{}", "not a tokenizer.json"),
    "tokenizer settings as list": (
        "tokenizer_config.json",
        lambda _: "[]",
        r"tokenizer_config.json: eos_token is \[\]; expected a text",
    ),
    "tokenizer settings nested deeply": (
        "tokenizer_config.json",
        lambda _: DEEP,
        "tokenizer_config.json: not JSON",
    ),
    "eos_token a list": (
        "tokenizer_config.json",
        lambda _: '{"eos_token": ["x"]}',
        r"eos_token is \['x'\]; expected a text",
    ),
    "eos_token of numbers": (
        "tokenizer_config.json",
        lambda _: '{"eos_token": {"content": 3}}',
        "eos_token is 3; expected a text",
    ),
}
# Entries of a safetensors header, in the place of one that fits.
ENTRIES: dict[str, tuple[Any, str]] = {
    "dtype a list": ({"dtype": ["F32"]}, r"is of type \['F32'\]; allowed are F64"),
    "dtype an object": ({"dtype": {}}, "is of type {}; allowed are F64"),
    "shape a number": ({"shape": 3}, "the entry of"),
    "shape negative": ({"shape": [-1, -52]}, "the entry of"),
    "offsets beyond": ({"data_offsets": [0, 2**62]}, "has 4611686018427387904 bytes"),
    "no offsets": ({"data_offsets": None}, "the entry of"),
}

# Configurations: what is put in the place of a key, and what is said.
LONG = "9" * 4_000
SETTINGS: dict[str, tuple[str, str]] = {
    "digits": (
        f"training.steps={LONG}",
        "training.steps is an integer of 13288 bits; ",
    ),
    "more digits": (f"training.steps={LONG * 2}", "training.steps"),
    "a seed beyond": (
        "training.seed=99999999999999999999",
        "training.seed is 99999999999999999999; ",
    ),
    "nested deeply": (f"training.steps={DEEP}", "training.steps"),
    "in a list": (f"data.sources=[{{name='a', prefix='a', weight={LONG}}}]", "weight"),
}

# Lines of metrics.jsonl, which a resumed run reads.
METRICS: dict[str, str] = {
    "no step": '{"loss": 1.0}\n',
    "a step as text": '{"step": "1"}\n',
    "a list": "[1]\n",
    "nested deeply": DEEP + "\n",
    "not JSON": "nonsense\n",
}
