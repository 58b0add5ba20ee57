"""config.json of Hugging Face <-> ModelConfig.

transformers 5 keeps the rotary settings under `rope_parameters`, earlier ones under `rope_theta`
and `rope_scaling`; published files have either. Both are read, and both are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarlx.config.families import ACTIVATIONS, Published
from megarlx.config.model import ModelConfig
from megarlx.hf.errors import ConversionError
from megarlx.hf.families import families, published_as

# Our field: the key in config.json. Rotary settings are nested there, in two forms.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "max_sequence_length": "max_position_embeddings",
}
# What a config.json that leaves a key out means; a key without a default must be there.
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
# Where null says that there is none, and is no default.
NONE_OF_IT = ("attn_logit_softcapping", "final_logit_softcapping")
# Keys that, where they are there, must have one of these values: we have no other form of them.
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "clip_qkv": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_THETA = "rope_local_base_freq"
ROTARY = ("rope_theta", WINDOW_THETA)  # read with what is nested
# Ours: theirs, of Llama 3's rotary scaling.
SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def read_family(content: Mapping[str, Any], source: str) -> tuple[str, Published]:
    """Our name of it, and what it is called there."""
    model_type, classes = content.get("model_type"), content.get("architectures")
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        raise ConversionError(
            f"{source}: model_type is {model_type!r} (architectures {classes!r}); allowed are "
            f"{', '.join(known)}"
        )
    name, _, published = known[model_type]
    if classes and classes != [published.architecture]:
        raise ConversionError(
            f"{source}: architectures is {classes!r}; allowed is ['{published.architecture}']"
        )
    return name, published


def model_config(content: Mapping[str, Any], source: str) -> ModelConfig:
    """Of a parsed config.json; what has no place in ModelConfig is refused, not dropped."""
    family, published = read_family(content, source)
    for key, allowed in ONLY.items():
        if content.get(key, allowed[0]) not in allowed:
            raise ConversionError(
                f"{source}: {key} is {content[key]!r}; allowed is {json.dumps(allowed[0])}"
            )
    given = _Given(content, published, source)
    values: dict[str, Any] = {"family": family, "activation": _activation(given)}
    for ours, theirs in {**CONFIG_KEYS, **published.keys}.items():
        if theirs in ROTARY:
            continue
        value = given(theirs)
        if value is not None or theirs in NONE_OF_IT:
            # what is None else has a default here, or is missing there too
            values[ours] = 0.0 if value is None else value
    if not values["init_std"] > 0:
        del values["init_std"]
    values |= _rotary(given)
    if "window" in published.keys:
        values["full_attention_every"] = _full_attention_every(given, values["layers"])
    elif set(content.get("layer_types") or ()) - {FULL}:
        raise _wrong_layer_types(given, FULL)
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(
            f"{_their_key(str(detail['loc'][0])) if detail['loc'] else 'the whole'}: "
            f"{detail['msg']} (given: {detail['input']!r})"
            for detail in error.errors(include_url=False)
        )
        raise ConversionError(f"{source}: {wrong}") from None


@dataclass(frozen=True)
class _Given:
    """A config.json, and what it means where it leaves a key out."""

    content: Mapping[str, Any]
    published: Published
    source: str

    def __call__(self, key: str) -> Any:
        if self.content.get(key) is not None or (key in NONE_OF_IT and key in self.content):
            return self.content[key]
        return self.published.defaults.get(key, DEFAULTS.get(key))


def _their_key(ours: str) -> str:
    return CONFIG_KEYS.get(ours, ours)


def _activation(given: _Given) -> str:
    key = given.published.activation
    name = given(key)
    for ours, (theirs, _) in ACTIVATIONS.items():
        if name in theirs:
            return ours
    allowed = ", ".join(json.dumps(name) for theirs, _ in ACTIVATIONS.values() for name in theirs)
    raise ConversionError(f"{given.source}: {key} is {name!r}; allowed are {allowed}")


def _layer_types(layers: int, every: int) -> list[str]:
    return [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]


def _full_attention_every(given: _Given, layers: int) -> int:
    """From the list of the layers' kinds or, in older files, from the pattern's length."""
    kinds, pattern = given.content.get("layer_types"), int(given("sliding_window_pattern"))
    if kinds is None or kinds == _layer_types(layers, pattern):
        return pattern
    every = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if kinds != _layer_types(layers, every):
        raise _wrong_layer_types(given, f"{FULL} every so many layers, {SLIDING} between")
    return every


def _wrong_layer_types(given: _Given, allowed: str) -> ConversionError:
    has = ", ".join(sorted(set(map(str, given.content["layer_types"]))))
    return ConversionError(f"{given.source}: layer_types has {has}; allowed is {allowed}")


def _rotary(given: _Given) -> dict[str, Any]:
    """`rope_parameters` holds the settings, or those of each kind of layer by its name."""
    content, source = given.content, given.source
    nested = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ConversionError(f"{source}: rope_parameters is {nested!r}; expected an object")
    values: dict[str, Any] = {}
    if "window_rope_theta" in given.published.keys:
        of_windows = nested.get(SLIDING) or {}
        values["window_rope_theta"] = of_windows.get("rope_theta", given(WINDOW_THETA))
        if of_windows.get("rope_type", "default") != "default":
            raise _wrong_rotary(source, of_windows["rope_type"], "default")
        nested = nested.get(FULL, nested)
    theta = nested.get("rope_theta", content.get("rope_theta"))
    values["rope_theta"] = given("rope_theta") if theta is None else theta
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        raise _wrong_rotary(source, kind, "default, llama3")
    missing = [theirs for theirs in SCALING_KEYS.values() if theirs not in nested]
    if missing:
        raise ConversionError(f"{source}: the rotary scaling lacks {', '.join(missing)}")
    return values | {"rope_scaling": {o: nested[theirs] for o, theirs in SCALING_KEYS.items()}}


def _wrong_rotary(source: str, kind: Any, allowed: str) -> ConversionError:
    return ConversionError(
        f"{source}: the rotary embedding is of type {kind!r}; allowed are {allowed}"
    )


def _written(key: str, value: Any) -> Any:
    if key in NONE_OF_IT and not value:
        return None
    # a class of theirs takes only an integer where published models have one
    return int(value) if key == "query_pre_attn_scalar" and value == int(value) else value


def hugging_face_config(
    config: ModelConfig, dtype: str, ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a model; `ids` are those of special tokens, absent ones are null.

    (Null on purpose: the classes have defaults of their own, ids of somebody else's tokenizer.)
    """
    published = published_as(config)
    keys = {**CONFIG_KEYS, **published.keys}
    values = {theirs: _written(theirs, getattr(config, ours)) for ours, theirs in keys.items()}
    if "window" in published.keys:
        values["layer_types"] = _layer_types(config.layers, config.full_attention_every)
        values["sliding_window_pattern"] = config.full_attention_every
    scaling = config.rope_scaling
    nested: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        nested = {theirs: getattr(scaling, ours) for ours, theirs in SCALING_KEYS.items()}
        nested["rope_type"] = "llama3"
    rotary: dict[str, Any] = {**nested, "rope_theta": config.rope_theta}
    if "window_rope_theta" in published.keys:
        base = config.window_rope_theta or config.rope_theta
        values[WINDOW_THETA] = base
        rotary = {FULL: rotary, SLIDING: {"rope_type": "default", "rope_theta": base}}
    return {
        "architectures": [published.architecture],
        "model_type": published.model_type,
        **values,
        **published.written,
        published.activation: ACTIVATIONS[config.activation][0][0],
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(nested),
        "rope_parameters": rotary,
        **{key: (ids or {}).get(key) for key in SPECIAL_IDS},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
