"""A Hugging Face folder of a checkpoint: what AutoModelForCausalLM and AutoTokenizer load."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint.files import sync_folder, write_new
from megarlx.config.families import TYPE_NAMES
from megarlx.config.model import ModelConfig
from megarlx.config.objectives import PRETRAINING, TemplateConfig
from megarlx.data.tokenizer import Tokenizer
from megarlx.hf.config_map import SPECIAL_IDS, hugging_face_config, read_json
from megarlx.hf.conversion import Conversion
from megarlx.hf.errors import ConversionError
from megarlx.hf.sources import INDEX
from megarlx.hf.tokenizer_files import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    chat_template,
    hugging_face_tokenizer,
)

TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in TYPE_NAMES}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def types_of_origin(dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """As JSON, the types that converted tensors had: the usual one, and the exceptions."""
    counted = Counter(dtypes.values())
    usual = counted.most_common(1)[0][0]
    others = {name: NAMES[dtype] for name, dtype in dtypes.items() if dtype != usual}
    return {"dtype": NAMES[usual], "other_dtypes": others}


def export_types(
    asked: str | None, state: Mapping[str, Any], held: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The types to write: as asked; or those that the tensors came in, where nothing has changed
    them since; or those that the checkpoint holds. Only the first can round."""
    if asked is not None:
        return dict.fromkeys(held, TYPES[asked])
    converted = state.get("run", {}).get("converted")
    if not converted:
        return dict(held)
    usual, others = converted["dtype"], converted["other_dtypes"]
    return {name: TYPES[others.get(name, usual)] for name in held}


def learned_template(run: Path, state: Mapping[str, Any]) -> TemplateConfig | None:
    """How questions were put to a model, if it was trained on any here: a model that has seen
    nothing but pre-training knows no template."""
    tokens = state.get("run", {}).get("tokens", {})
    if not any(count for name, count in tokens.items() if name != PRETRAINING):
        return None
    given = read_json(run / "resolved.json").get("template")
    return None if given is None else TemplateConfig.model_validate(given)


def _ends_as_learned(generation: dict[str, Any], eos: int) -> dict[str, Any]:
    """With the token that ends the answers learned here among those that end one."""
    known = generation.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    return generation if eos in ends else {**generation, "eos_token_id": [*ends, eos]}


def write_beside_tensors(
    job: Conversion,
    model: ModelConfig,
    kept: Path | None,
    tokenizer: Tokenizer | None,
    template: TemplateConfig | None = None,
) -> None:
    """Index, config, generation config and tokenizer, into the folder of the new files.

    `kept` is what the model came with, if it came from Hugging Face; else our tokenizer is written
    in their form. So is the `template` of a model that has learned one here, in place of its own.
    """
    files: dict[str, Any] = {}
    usual = Counter(b.entry.dtype for f in job.files for b in f.blocks).most_common(1)[0][0]
    ids: dict[str, Any] = {}
    if kept is not None:
        before = read_json(kept / "config.json")
        ids = {key: before.get(key) for key in SPECIAL_IDS}
        for name in TOKENIZER_FILES:
            if name != CHAT_TEMPLATE and (kept / name).is_file():
                shutil.copyfile(kept / name, job.made / name)
        config = kept / TOKENIZER_CONFIG
        if template is not None and config.is_file():
            about = read_json(config)
            files[TOKENIZER_CONFIG] = {k: v for k, v in about.items() if k != "chat_template"}
        generation = kept / "generation_config.json"
        held = read_json(generation) if generation.is_file() else ids
        files["generation_config.json"] = held
        if template is not None and tokenizer is not None:
            files["generation_config.json"] = _ends_as_learned(held, tokenizer.eos_id)
    else:
        if tokenizer is not None:
            ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
            definition, about = hugging_face_tokenizer(tokenizer)
            about["model_max_length"] = model.max_sequence_length
            files |= {"tokenizer.json": definition, TOKENIZER_CONFIG: about}
        files["generation_config.json"] = ids
    (job.made / CHAT_TEMPLATE).unlink(missing_ok=True)  # of a job that was killed right here
    if template is not None:
        assert tokenizer is not None  # who learned in a template had one
        write_new(job.made / CHAT_TEMPLATE, chat_template(template, tokenizer))
    elif kept is not None and (kept / CHAT_TEMPLATE).is_file():
        shutil.copyfile(kept / CHAT_TEMPLATE, job.made / CHAT_TEMPLATE)
    files["config.json"] = hugging_face_config(model, NAMES[usual], ids)
    if len(job.files) > 1:
        files[INDEX] = _index(job)
    for name, content in files.items():
        (job.made / name).unlink(missing_ok=True)
        write_new(job.made / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    sync_folder(job.made)


def _index(job: Conversion) -> dict[str, Any]:
    place = {block.entry.name: file.name for file in job.files for block in file.blocks}
    return {"metadata": {"total_size": job.bytes}, "weight_map": dict(sorted(place.items()))}


def working_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.converting")


def check_target(target: Path, fresh: bool) -> None:
    if target.exists() and not fresh and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} is there already; --fresh replaces it")


def give_name(job: Conversion, target: Path) -> None:
    """The finished folder gets its name; what had it goes only now."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(job.made, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(job.folder)
