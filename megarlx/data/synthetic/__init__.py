"""Synthetic worlds, small enough for a laptop: word problems with several solution styles and
kinds of documents, facts with their own tests, stories, and prompts with a behaviour to follow.

    world = World(WorldSettings(seed=1, quantities=2))
    write_world(world.settings, "data/world")
"""

from megarlx.data.synthetic.behaviours import follows
from megarlx.data.synthetic.problems import guessing_pass_at_k
from megarlx.data.synthetic.settings import Operation, WorldError, WorldSettings
from megarlx.data.synthetic.world import World, is_correct
from megarlx.data.synthetic.write import Sizes, write_world

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
