"""A run directory made of converted checkpoints, and checkpoints of runs by name.

    RUN/  config.toml resolved.json lineage.json tokenizer.json huggingface/ checkpoints/

`huggingface/` keeps what came with the model and is neither tensors nor ours.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from megarlx import __version__, plug
from megarlx.checkpoint.files import sync_folder, write_new
from megarlx.checkpoint.folder import (
    checkpoint_name,
    commit,
    complete,
    iterations,
    latest,
    point_latest_at,
    recover,
)
from megarlx.checkpoint.manifest import NAME, Manifest, read_manifest, render
from megarlx.config import load_config
from megarlx.config.families import PLAIN
from megarlx.config.model import ModelConfig, resolved_model
from megarlx.config.objectives import TemplateConfig
from megarlx.data.conversations import ConversationError
from megarlx.data.token_files import write_atomically
from megarlx.data.tokenizer import Tokenizer, load_tokenizer
from megarlx.hf.config_map import model_config, read_json
from megarlx.hf.conversion import Conversion
from megarlx.hf.errors import ConversionError
from megarlx.hf.tokenizer_files import chat_of, keep, tokenizer_of_model

CONVERTING = ".converting-"
COPIED = ("config.toml", "resolved.json", "lineage.json", "tokenizer.json")


def find_checkpoint(text: str, *, newest: bool = False) -> Path:
    """A checkpoint's folder, or RUN, RUN@latest, RUN@1000, RUN@tokens:4B.

    newest   of RUN and RUN@latest no other is taken where the newest is not whole
    """
    run, _, where = text.partition("@")
    path = Path(run)
    if not where and (path / NAME).is_file():
        return path
    checkpoints = path / "checkpoints"
    saved = iterations(checkpoints)
    if not saved:
        what = f"{checkpoints} holds no checkpoint" if path.is_dir() else "there is no such folder"
        raise ConversionError(f"{text}: {what}")
    if where in ("", "latest"):
        if newest:
            complete(checkpoints / checkpoint_name(saved[-1]))
        last = latest(checkpoints)
        assert last is not None
        return last
    if where.isdecimal() and int(where) in saved:
        return checkpoints / checkpoint_name(int(where))
    if where.startswith("tokens:"):
        wanted = parse_tokens(where.removeprefix("tokens:"))
        for iteration in saved:
            checkpoint = checkpoints / checkpoint_name(iteration)
            if tokens_of(read_manifest(checkpoint)) >= wanted:
                return checkpoint
    raise ConversionError(
        f"{text}: no such checkpoint; {checkpoints} has {', '.join(map(str, saved))}"
    )


def parse_tokens(text: str) -> int:
    """`4B`, `2.5M` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text)
    if match is None:
        raise ConversionError(f"tokens is {text!r}; expected a number, or one with K, M, B or T")
    return int(Decimal(match[1]) * 1000 ** " KMBT".index(match[2] or " "))


def tokens_of(manifest: Manifest) -> int:
    """Of pre-training, over all ancestors too."""
    counts = manifest.state.get("run", {}).get("tokens")
    if not isinstance(counts, dict) or type(counts.get("pretraining")) is not int:
        raise ConversionError(
            f"iteration {manifest.iteration}: its state counts tokens as {counts!r}; expected "
            '{"pretraining": a whole number, …}'
        )
    return counts["pretraining"]


def run_of(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def model_of_run(run: Path) -> ModelConfig:
    """From resolved.json; its other sections are not looked at."""
    path = run / "resolved.json"
    try:
        return resolved_model(json.loads(path.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{path} has no model that can be read: {error}") from error


class Trunk:
    """The run that a revision is added to; made when the first one is."""

    def __init__(self, run: Path, iteration: int, tokens: int) -> None:
        if iteration < 0 or tokens < 0:
            raise ConversionError(
                f"iteration is {iteration} and tokens {tokens}; allowed are 0 or more"
            )
        self.run, self.iteration, self.tokens = run, iteration, tokens
        self.checkpoints = run / "checkpoints"

    @property
    def folder(self) -> Path:
        """Where the checkpoint is made."""
        return self.checkpoints / f"{CONVERTING}{checkpoint_name(self.iteration)}"

    @property
    def checkpoint(self) -> Path:
        return self.checkpoints / checkpoint_name(self.iteration)

    def check(
        self, source: Path, model: ModelConfig, tokenizer: Tokenizer | None, fresh: bool
    ) -> bool:
        """Refuses a revision that cannot be a checkpoint of the run, before anything is written.
        False where it is one already."""
        if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
            raise ConversionError(
                f"the tokenizer has {tokenizer.vocab_size} ids; the model's vocab_size is "
                f"{model.vocab_size}"
            )
        if not (self.run / "resolved.json").exists():
            if iterations(self.checkpoints):
                raise ConversionError(f"{self.run} holds checkpoints but no resolved.json")
            return True
        lineage = json.loads((self.run / "lineage.json").read_text(encoding="utf-8"))
        if "converted" not in lineage:
            raise ConversionError(
                f"{self.run} was trained by megarlx; a converted checkpoint among its own would "
                "break its resume. Give another --into"
            )
        self._check_same_model(model, tokenizer)
        for iteration in iterations(self.checkpoints):
            there = tokens_of(read_manifest(self.checkpoints / checkpoint_name(iteration)))
            order = (iteration > self.iteration) - (iteration < self.iteration)
            if order and (there - self.tokens) * order < 0:
                raise ConversionError(
                    f"{self.run}: iteration {iteration} has seen {there} tokens; iteration "
                    f"{self.iteration} cannot have seen {self.tokens}"
                )
        if not self.checkpoint.exists() or fresh:
            return True
        if lineage["converted"].get(str(self.iteration)) != self._revision(source):
            raise ConversionError(
                f"{self.checkpoint} is there already, from another source; --fresh replaces it"
            )
        return False

    def _revision(self, source: Path) -> dict[str, Any]:
        return {"source": str(source), "tokens": self.tokens}

    def _check_same_model(self, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
        before, now = model_of_run(self.run).model_dump(), model.model_dump()
        different = [
            f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]
        ]
        if different:
            raise ConversionError(f"{self.run} holds another model: {'; '.join(different)}")
        path = self.run / "tokenizer.json"
        if tokenizer is not None and path.exists():
            known = load_tokenizer(path)
            if known.fingerprint != tokenizer.fingerprint:
                raise ConversionError(
                    f"{self.run} has another tokenizer: fingerprint {known.fingerprint}, this "
                    f"revision's is {tokenizer.fingerprint}"
                )

    def describe(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        source: Path,
        template: TemplateConfig | None = None,
    ) -> None:
        """Writes what makes the folder a run, as far as it is not there; and this revision's line
        in its lineage."""
        self.run.mkdir(parents=True, exist_ok=True)
        if not (self.run / "huggingface").exists():
            keep(source, self.run / "huggingface")
        if tokenizer is not None and not (self.run / "tokenizer.json").exists():
            tokenizer.save(self.run / "tokenizer.json")
        if not (self.run / "resolved.json").exists():
            write_atomically(self.run / "config.toml", _toml(model, template))
            resolved = load_config(self.run / "config.toml").to_json()
            write_atomically(self.run / "resolved.json", resolved)
        path = self.run / "lineage.json"
        lineage = _new_lineage()
        if path.exists():
            lineage = json.loads(path.read_text(encoding="utf-8"))
        converted = {**lineage["converted"], str(self.iteration): self._revision(source)}
        lineage["converted"] = dict(sorted(converted.items(), key=lambda entry: int(entry[0])))
        write_atomically(path, json.dumps(lineage, indent=2) + "\n")


def copy_description(source: Path, target: Path) -> None:
    """What makes a folder a run, for a checkpoint of it whose files are written anew."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / "huggingface").is_dir() and not (target / "huggingface").exists():
        shutil.copytree(source / "huggingface", target / "huggingface")


def finish(job: Conversion, checkpoints: Path, manifest: Manifest) -> Path:
    """The manifest, then the name, then `latest`, if this is the newest: as a saver ends a save."""
    (job.made / NAME).unlink(missing_ok=True)  # of a job that was killed right here
    write_new(job.made / NAME, render(manifest))
    sync_folder(job.made)
    digest = read_manifest(job.made).digest
    recover(checkpoints)
    path = commit(job.made, checkpoints, manifest.iteration)
    shutil.rmtree(job.folder)
    if manifest.iteration == iterations(checkpoints)[-1]:
        point_latest_at(path, digest)
    return path


def _new_lineage() -> dict[str, Any]:
    return {
        "parent": None,
        "recipe": None,
        "seed": 0,
        "trunk_tokens": 0,
        "restored": [],
        "reset": [],
        "composition": {},
        "converted": {},
        "versions": {
            "megarlx": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def plain_config(folder: Path) -> dict[str, Any]:
    """Of the run that a folder of Hugging Face would become; its weights are not looked at."""
    model = model_config(read_json(folder / "config.json"), str(folder))
    try:
        template = chat_of(folder, tokenizer_of_model(folder))
    except ConversationError:  # converting says why it has none
        template = None
    return tomllib.loads(_toml(model, template))


def _toml(model: ModelConfig, template: TemplateConfig | None = None) -> str:
    """The model, its chat template, and the least that a configuration needs besides; nothing else
    is known."""
    family = {**PLAIN, **plug.resolve("family", model.family).values}
    values = model.model_dump(exclude_none=True)
    scaling = values.pop("rope_scaling", None)
    lines = [
        "# A trunk of converted checkpoints. Its training was somebody else's: [training] says no",
        "# more than how long a sequence may be.",
        "[model]",
        *(f"{k} = {json.dumps(v)}" for k, v in values.items() if k not in family or family[k] != v),
    ]
    if scaling is not None:
        lines += ["", "[model.rope_scaling]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in scaling.items()]
    lines += [
        *("", "[training]", "steps = 1", "sequences_per_step = 1"),
        f"sequence_length = {model.max_sequence_length}",
    ]
    if template is not None:
        said = template.model_dump(include={"chat", "bos"} | ({"date"} if template.date else set()))
        lines += ["", "[template]", *(f"{k} = {_quoted(v)}" for k, v in said.items())]
        lines += [f"tokens.{key} = {_quoted(text)}" for key, text in template.tokens.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As TOML: JSON, but for the one character that it leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
