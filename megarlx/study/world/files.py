"""A world as files, ready to train on: documents as token files, questions as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megarlx.data.draw import Split
from megarlx.data.token_files import TokenFileWriter, dtype_for, write_atomically
from megarlx.data.tokenizer import WordTokenizer
from megarlx.study.world.kept import GROUPS, KeptFacts
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.tables import tables_of
from megarlx.study.world.tellings import Counts, Telling
from megarlx.study.world.world import World

HELD_OUT_KINDS = ("problems", "facts", "stories")


@dataclass(frozen=True)
class Sizes:
    """How many of each to write."""

    documents: Mapping[str, int] = field(
        default_factory=lambda: {
            "problems": 20_000,
            "facts": 20_000,
            "stories": 4_000,
            "behaviours": 2_000,
        }
    )
    held_out_documents: int = 500
    prompts: int = 1024
    test_questions: int = 256


def write_world(settings: WorldSettings, folder: str | Path, sizes: Sizes | None = None) -> None:
    """
    documents_<kind>            token file                          pre-training
    held_out_<kind>             token file                          validation text
    tokenizer.json              the world's words
    prompts.jsonl               {"question", "answer", "id", …}     RL prompts
    demonstrations.jsonl        {"question", "answers"}             SFT, on the same questions
    validation.jsonl            as prompts.jsonl                    to choose settings by
    test.jsonl                  as prompts.jsonl                    to report
    tellings.json               {"right", "wrong"}: of each fact of tables, how often it is told
    withheld.jsonl              as prompts.jsonl                    RL on what no text tells
    told_wrongly.jsonl          as prompts.jsonl                    RL on what text tells wrongly
    GROUP_demonstrations.jsonl  as demonstrations.jsonl             SFT on the questions of GROUP
    """
    sizes, folder = sizes or Sizes(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = World(settings)
    tokenizer = world.tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    told: list[Telling] = []
    for kind, count in sizes.documents.items():
        texts = _texts(world, kind, count, told)
        _write(folder / f"documents_{kind}", texts, tokenizer)
    if settings.is_of_tables:
        counts = Counts.of(told, len(tables_of(settings)))
        counts.write(folder)
        _write_kept(world, counts, folder)
    for kind in HELD_OUT_KINDS:
        texts = (world.held_out_document(kind, i) for i in range(sizes.held_out_documents))
        _write(folder / f"held_out_{kind}", texts, tokenizer)
    _write_questions(world, folder / "prompts.jsonl", "train", sizes.prompts)
    _write_questions(world, folder / "validation.jsonl", "validation", sizes.test_questions)
    _write_questions(world, folder / "test.jsonl", "test", sizes.test_questions)
    lines = (json.dumps(world.demonstrations(i)) for i in range(sizes.prompts))
    write_atomically(folder / "demonstrations.jsonl", "\n".join(lines) + "\n")


def _write_kept(world: World, counts: Counts, folder: Path) -> None:
    for group in GROUPS:
        if getattr(world.settings, group):
            kept = KeptFacts(world, counts, group)
            for name, lines in ((group, kept.lines()), (f"{group}_demonstrations", kept.solved())):
                text = "".join(f"{json.dumps(line)}\n" for line in lines)
                write_atomically(folder / f"{name}.jsonl", text)


def _texts(world: World, kind: str, count: int, told: list[Telling]) -> Iterator[str]:
    """Documents; what problems tell goes into `told`."""
    for index in range(count):
        if kind != "problems":
            yield world.document(kind, index)
            continue
        document = world.problem_document(index)
        told += document.told
        yield document.text


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
