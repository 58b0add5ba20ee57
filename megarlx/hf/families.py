"""The family that Hugging Face has for a model, and what a class of theirs cannot say of it.

What a family is and is called stands in megarlx/config/families.py, the names of its tensors in
megarlx/config/parameters.py.
"""

from __future__ import annotations

import re
from typing import Any

from megarlx import plug
from megarlx.config.families import ACTIVATIONS, ON_NO_DEVICE, PLAIN, Published, listed
from megarlx.config.model import ModelConfig
from megarlx.hf.errors import ConversionError
from megarlx.model.features import features_of

# Old files hold these beside the weights; they follow from the configuration.
NOT_WEIGHTS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# What makes two transformers different programs.
FORM = ("norm_position", "norm_plus_one", "qk_norm", "qkv_bias", "scaled_embedding")
# Keys that only some classes have, and the value that says nothing.
EXTRA: dict[str, Any] = {
    "attention_cap": 0.0,
    "final_cap": 0.0,
    "window_rope_theta": None,
}


def families() -> dict[str, tuple[str, dict[str, Any], Published]]:
    """By their model_type: our name, the values of its keys, and what Hugging Face calls it."""
    found = {}
    for name in plug.ours("family"):
        family = plug.resolve("family", name)
        if family.published is not None:
            values = {**PLAIN, **family.values}
            found[family.published.model_type] = (name, values, family.published)
    return found


def published_as(config: ModelConfig) -> Published:
    """By the form of the transformer: any key of a family can have been overridden."""
    every = sorted(families().values(), key=lambda one: one[0] != config.family)
    known = [(values, published) for _, values, published in every]
    reasons = []
    for values, published in known:
        lacks = _lacks(config, values, published)
        if not lacks:
            _check_built(config, published)
            return published
        reasons.append(f"{published.model_type}: {lacks}")
    raise ConversionError(
        f"no Hugging Face class has this form; {'; '.join(dict.fromkeys(reasons))}"
    )


def _lacks(config: ModelConfig, values: dict[str, Any], published: Published) -> str:
    """What this class does not have of the model."""
    wrong = [
        f"{key} is {values[key]} and not {getattr(config, key)}"
        for key in FORM
        if values[key] != getattr(config, key)
    ]
    extra = EXTRA | {"query_scalar": config.head_dim}
    given = [key for key, plain in extra.items() if getattr(config, key) != plain]
    given += ["window"] if "window" in config.needs_of_attention else []
    wrong += [
        f"it has no {key} (the model's is {getattr(config, key)})"
        for key in given
        if key not in published.keys
    ]
    return ", ".join(wrong)


def _check_built(config: ModelConfig, published: Published) -> None:
    """That the layers, as they are built now, compute what the class of theirs does."""
    said = listed(
        MLP=f"activation={ACTIVATIONS[config.activation][1]}",
        RMSNorm=f"plus_one={config.norm_plus_one}",
        Layer=f"norm_position={config.norm_position}",
        Attention=f"qk_norm={config.qk_norm}",
    )
    places = {feature.partition("=")[0] for feature in said}
    known = {f for f in ON_NO_DEVICE if f.partition("=")[0] not in places} | said
    unknown = features_of(config) - known
    if unknown:
        raise ConversionError(
            f"{published.architecture} does not compute what the layers do: "
            f"{', '.join(sorted(unknown))}"
        )
