"""config.json of Hugging Face <-> ModelConfig.

transformers 5 keeps the rotary settings under `rope_parameters`, earlier ones under `rope_theta`
and `rope_scaling`; published files have either. Both are read, and both are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarlx.config.model import ModelConfig
from megarlx.hf.errors import ConversionError
from megarlx.hf.families import CONFIG_KEYS, HUGGING_FACE, ONLY, HuggingFaceFamily, family_of

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


def read_family(content: Mapping[str, Any], source: str) -> HuggingFaceFamily:
    model_type, classes = content.get("model_type"), content.get("architectures")
    family = HUGGING_FACE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConversionError(
            f"{source}: model_type is {model_type!r} (architectures {classes!r}); allowed are "
            f"{', '.join(HUGGING_FACE)}"
        )
    if classes and classes != [family.architecture]:
        raise ConversionError(
            f"{source}: architectures is {classes!r}; allowed is ['{family.architecture}']"
        )
    return family


def model_config(content: Mapping[str, Any], source: str) -> ModelConfig:
    """Of a parsed config.json; what has no place in ModelConfig is refused, not dropped."""
    family = read_family(content, source)
    for key, allowed in ONLY.items():
        if content.get(key, allowed[0]) not in allowed:
            raise ConversionError(
                f"{source}: {key} is {content[key]!r}; allowed is {json.dumps(allowed[0])}"
            )
    types = content.get("layer_types") or ()
    kinds = set(map(str, types if isinstance(types, list) else (types,))) - {"full_attention"}
    if types and kinds:
        raise ConversionError(
            f"{source}: layer_types has {', '.join(sorted(kinds))}; allowed is full_attention"
        )
    values: dict[str, Any] = {"family": family.family}
    for ours, theirs in CONFIG_KEYS.items():
        value = content.get(theirs)
        value = family.default(theirs) if value is None else value
        if value is not None:  # what is None has a default on our side, or is missing there too
            values[ours] = value
    if not values["init_std"] > 0:
        del values["init_std"]
    values |= _rotary(content, family, source)
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(
            f"{_their_key(str(detail['loc'][0])) if detail['loc'] else 'the whole'}: "
            f"{detail['msg']} (given: {detail['input']!r})"
            for detail in error.errors(include_url=False)
        )
        raise ConversionError(f"{source}: {wrong}") from None


def _their_key(ours: str) -> str:
    return CONFIG_KEYS.get(ours, ours)


def _rotary(content: Mapping[str, Any], family: HuggingFaceFamily, source: str) -> dict[str, Any]:
    nested = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ConversionError(f"{source}: rope_parameters is {nested!r}; expected an object")
    theta = nested.get("rope_theta", content.get("rope_theta"))
    values = {"rope_theta": family.default("rope_theta") if theta is None else theta}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        raise ConversionError(
            f"{source}: the rotary embedding is of type {kind!r}; allowed are default, llama3"
        )
    missing = [theirs for theirs in SCALING_KEYS.values() if theirs not in nested]
    if missing:
        raise ConversionError(f"{source}: the rotary scaling lacks {', '.join(missing)}")
    return values | {"rope_scaling": {o: nested[theirs] for o, theirs in SCALING_KEYS.items()}}


def hugging_face_config(
    config: ModelConfig, dtype: str, ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a model; `ids` are those of special tokens, absent ones are null.

    (Null on purpose: the classes have defaults of their own, ids of somebody else's tokenizer.)
    """
    family = family_of(config)
    values = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()}
    scaling = config.rope_scaling
    nested: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        nested = {theirs: getattr(scaling, ours) for ours, theirs in SCALING_KEYS.items()}
        nested["rope_type"] = "llama3"
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **values,
        **family.written,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(nested),
        "rope_parameters": {**nested, "rope_theta": config.rope_theta},
        **{key: (ids or {}).get(key) for key in SPECIAL_IDS},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
