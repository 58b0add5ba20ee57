"""A world as files, ready to train on: documents as token files, questions as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megarlx.data.synthetic.problems import Split
from megarlx.data.synthetic.settings import WorldError, WorldSettings
from megarlx.data.synthetic.world import World
from megarlx.data.token_files import TokenFileWriter, dtype_for, write_atomically
from megarlx.data.tokenizer import WordTokenizer

HELD_OUT_KINDS = ("problems", "facts", "stories")
DESCRIPTION = "tokens.json"


def write_world_files(
    settings: WorldSettings,
    folder: Path,
    documents: Mapping[str, int],
    held_out: int,
    prompts: int,
    test_questions: int,
) -> None:
    """documents_<kind>, held_out_<kind>, tokenizer.json, prompts.jsonl and demonstrations.jsonl
    (the same questions, with solutions), validation.jsonl and test.jsonl, unless the folder holds
    just these.

    The description is written last, so a folder that has it is complete.
    """
    wanted = {
        "settings": settings.to_json(),
        "documents": dict(documents),
        "held_out": held_out,
        "prompts": prompts,
        "test_questions": test_questions,
    }
    description = folder / DESCRIPTION
    if description.exists():
        if json.loads(description.read_text()) == json.loads(json.dumps(wanted)):
            return
        # Another run may be reading it.
        raise WorldError(f"world: {folder} holds a world of other settings; use another folder")
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
    _write_questions(world, folder / "prompts.jsonl", "train", prompts)
    _write_questions(world, folder / "validation.jsonl", "validation", test_questions)
    _write_questions(world, folder / "test.jsonl", "test", test_questions)
    lines = (json.dumps(world.demonstrations(i)) for i in range(prompts))
    write_atomically(folder / "demonstrations.jsonl", "\n".join(lines) + "\n")
    write_atomically(description, json.dumps(wanted, indent=1) + "\n")


def _write(prefix: Path, texts: Iterator[str], tokenizer: WordTokenizer) -> None:
    with TokenFileWriter(prefix, dtype_for(tokenizer.vocab_size)) as writer:
        for text in texts:
            writer.add([*tokenizer.encode(text), tokenizer.eos_id])


def _write_questions(world: World, path: Path, split: Split, count: int) -> None:
    lines = []
    for index in range(count):
        problem = world.problem(split, index)
        line = {
            "question": world.writer.question(problem),
            "answer": world.writer.answer(problem),
            "id": f"{split}/{index}",
            "steps": len(problem.steps),
        }
        lines.append(json.dumps(line))
    write_atomically(path, "\n".join(lines) + "\n")
