"""A world's files on disk, written line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlx.data.synthetic.settings import WorldSettings
from megarlx.data.synthetic.world import World
from megarlx.data.token_files import write_atomically


@dataclass(frozen=True)
class Sizes:
    """How many of each to write."""

    documents: dict[str, int] = field(
        default_factory=lambda: {
            "problems": 20_000,
            "facts": 20_000,
            "stories": 4_000,
            "behaviours": 2_000,
        }
    )
    held_out_documents: int = 500
    train_questions: int = 2048
    validation_questions: int = 256
    test_questions: int = 256
    behaviour_prompts: int = 256


def write_world(settings: WorldSettings, folder: str | Path, sizes: Sizes | None = None) -> None:
    """
    documents_<kind>.jsonl      {"text"}                        pre-training
    held_out_<kind>.jsonl       {"text"}                        validation text
    demonstrations.jsonl        {"question", "answers"}         SFT
    questions_<split>.jsonl     {"prompt", "reference", …}      RL prompts; evaluation
    behaviours_<split>.jsonl    {"prompt", "behaviour", …}
    capability.jsonl            {"suite", "context", "choices", "answer"}
    world.words                 the tokenizer's words
    world.json                  the settings; last, so that a folder that has it is complete
    """
    sizes = sizes or Sizes()
    world, place = World(settings), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    done = place / "world.json"
    done.unlink(missing_ok=True)
    for kind, count in sizes.documents.items():
        texts = ({"text": world.document(kind, i)} for i in range(count))
        _write(place / f"documents_{kind}.jsonl", texts)
    for kind in ("problems", "facts", "stories"):
        held_out = range(sizes.held_out_documents)
        texts = ({"text": world.held_out_document(kind, i)} for i in held_out)
        _write(place / f"held_out_{kind}.jsonl", texts)
    train = range(sizes.train_questions)
    _write(place / "demonstrations.jsonl", (world.demonstrations(i) for i in train))
    _write(place / "questions_train.jsonl", (world.question("train", i) for i in train))
    validation, test = range(sizes.validation_questions), range(sizes.test_questions)
    rows = (world.question("validation", i) for i in validation)
    _write(place / "questions_validation.jsonl", rows)
    _write(place / "questions_test.jsonl", (world.question("test", i) for i in test))
    for split in ("train", "test"):
        prompts = (world.behaviour_prompt(i, split) for i in range(sizes.behaviour_prompts))
        _write(place / f"behaviours_{split}.jsonl", prompts)
    _write(place / "capability.jsonl", world.capability_tests())
    write_atomically(place / "world.words", "".join(f"{word}\n" for word in world.words))
    write_atomically(done, json.dumps(settings.to_json(), indent=1) + "\n")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
