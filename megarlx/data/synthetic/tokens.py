"""A world as token files, ready to train on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megarlx.data.synthetic.settings import WorldSettings
from megarlx.data.synthetic.world import World
from megarlx.data.token_files import TokenFileWriter, dtype_for, write_atomically
from megarlx.data.tokenizer import WordTokenizer

HELD_OUT_KINDS = ("problems", "facts", "stories")
DESCRIPTION = "tokens.json"


def write_token_files(
    settings: WorldSettings, folder: Path, documents: Mapping[str, int], held_out: int
) -> None:
    """documents_<kind>, held_out_<kind> and tokenizer.json, unless the folder holds just these.

    The description is written last, so a folder that has it is complete.
    """
    wanted = {
        "settings": settings.to_json(),
        "documents": dict(documents),
        "held_out": held_out,
    }
    description = folder / DESCRIPTION
    if description.exists() and json.loads(description.read_text()) == json.loads(
        json.dumps(wanted)
    ):
        return
    description.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    world = World(settings)
    tokenizer = world.tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    for kind, count in documents.items():
        texts = (world.document(kind, i) for i in range(count))
        _write(folder / f"documents_{kind}", texts, tokenizer)
    for kind in HELD_OUT_KINDS:
        texts = (world.held_out_document(kind, i) for i in range(held_out))
        _write(folder / f"held_out_{kind}", texts, tokenizer)
    write_atomically(description, json.dumps(wanted, indent=1) + "\n")


def _write(prefix: Path, texts: Iterator[str], tokenizer: WordTokenizer) -> None:
    with TokenFileWriter(prefix, dtype_for(tokenizer.vocab_size)) as writer:
        for text in texts:
            writer.add([*tokenizer.encode(text), tokenizer.eos_id])
