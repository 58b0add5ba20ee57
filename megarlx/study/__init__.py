"""The study: a synthetic world, its environments, and claims about what its runs show.

It is a user of megarlx like any other: plug.py names its parts by string, and nothing else of
megarlx imports it.
"""
