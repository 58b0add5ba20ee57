"""Synthetic worlds, small enough for a laptop: word problems with several solution styles and
kinds of documents, facts with their own tests, stories, and prompts with a behaviour to follow.

    world = World(WorldSettings(seed=1, quantities=2))
    write_world(world.settings, "data/world")
"""

from megarlx.study.world.behaviours import follows
from megarlx.study.world.problems import guessing_pass_at_k
from megarlx.study.world.settings import Operation, WorldError, WorldSettings
from megarlx.study.world.world import World, is_correct
from megarlx.study.world.files import Sizes, write_world

__all__ = [
    "Operation",
    "Sizes",
    "World",
    "WorldError",
    "WorldSettings",
    "follows",
    "guessing_pass_at_k",
    "is_correct",
    "write_world",
]
