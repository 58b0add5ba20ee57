"""Synthetic worlds, small enough for a laptop: word problems with several solution styles and
kinds of documents, facts with their own tests, stories, and prompts with a behaviour to follow.

    world = World(WorldSettings(seed=1, quantities=2))         # .world, .settings
    write_world(world.settings, "data/world")                  # .files

(Nothing is imported here: a configuration that names this maker is read without numpy.)
"""
