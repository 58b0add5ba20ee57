"""A run's synthetic world, and the tokenizer it keeps."""

from __future__ import annotations

import json
from pathlib import Path

from megarlx.config import Config
from megarlx.config.objectives import WORLD
from megarlx.config.run_sections import DataConfig, WorldConfig
from megarlx.data.synthetic.settings import WorldSettings
from megarlx.data.synthetic.tokens import DESCRIPTION, write_world_files
from megarlx.data.synthetic.world import World
from megarlx.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megarlx.run.directory import RunDirectory, RunError


def world_shares(world: WorldConfig) -> dict[str, float]:
    return {
        "problems": world.problems_share,
        "facts": world.facts_share,
        "stories": world.stories_share,
    }


def world_data(data: DataConfig, world: WorldConfig) -> DataConfig:
    """The same configuration with the world's files in place of the world."""
    folder = Path(world.place)
    shares = world_shares(world)
    changes = {
        "world": None,
        "tokenizer": str(folder / "tokenizer.json"),
        "sources": [
            {"name": kind, "prefix": str(folder / f"documents_{kind}"), "weight": share}
            for kind, share in shares.items()
            if share > 0
        ],
        "validation": [
            {"name": kind, "prefix": str(folder / f"held_out_{kind}")} for kind in shares
        ],
    }
    return DataConfig.model_validate({**data.model_dump(), **changes})


def settings_of(world: WorldConfig) -> WorldSettings:
    return WorldSettings.from_json({"seed": world.seed, **world.settings})


def write_world(world: WorldConfig) -> None:
    shares = world_shares(world)
    total = sum(shares.values())
    documents = {k: max(1, round(world.documents * s / total)) for k, s in shares.items() if s > 0}
    write_world_files(
        settings_of(world),
        Path(world.place),
        documents,
        world.held_out_documents,
        world.prompts,
        world.test_questions,
    )


def data_of(config: Config) -> DataConfig | None:
    """What is read, with a world's files in place of the world."""
    data = config.data
    if data is None or data.world is None:
        return data
    return world_data(data, data.world)


def path_of(text: str, config: Config) -> str:
    """A path of the configuration, with the world's folder put in."""
    if WORLD not in text:
        return text
    if config.data is None or config.data.world is None:
        raise RunError(f"the path {text!r} asks for a world's folder, but there is no [data.world]")
    return text.replace(WORLD, config.data.world.place)


def load_tokenizer_of(config: Config, directory: RunDirectory) -> Tokenizer | None:
    """The one that the run keeps, or else the one that its data name."""
    if directory.tokenizer.exists():
        tokenizer = load_tokenizer(str(directory.tokenizer))
    else:
        data = data_of(config)
        if data is None or data.tokenizer is None:
            return None
        if data.tokenizer == "bytes":
            tokenizer = ByteTokenizer()
        else:
            tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size is {config.model.vocab_size}; the tokenizer has "
            f"{tokenizer.vocab_size} ids"
        )
    return tokenizer


def world_of(config: Config) -> World | None:
    """The synthetic world that the run was trained on, with its tests."""
    if config.data is None or config.data.world is None:
        return None
    written = Path(config.data.world.place) / DESCRIPTION
    if not written.exists():
        return World(settings_of(config.data.world))
    settings = json.loads(written.read_text(encoding="utf-8"))["settings"]
    return World(WorldSettings.from_json(settings))
