"""Short stories: text with a thread to follow and nothing to know."""

from __future__ import annotations

from megarlx.data.draw import Draw
from megarlx.study.world.settings import WorldSettings

PLACES = ("river", "market", "hill", "garden", "harbor", "forest")
THINGS = ("lamp", "kite", "drum", "boat", "basket", "map")
MOODS = ("happy", "tired", "proud", "afraid")
BEGINNINGS = (
    "one morning {a} went to the {place} with a {thing} .",
    "it was late when {a} came to the {place} with a {thing} .",
)
MIDDLES = (
    "there {b} was waiting and looked at the {thing} .",
    "{a} lost the {thing} and {b} found it near the {place} .",
    "{b} was {mood} and {a} gave the {thing} to {b} .",
    "they sat at the {place} and talked about the {thing} .",
)
ENDINGS = (
    "in the end {a} was {mood} and went home .",
    "{a} and {b} left the {place} and nobody saw the {thing} again .",
    "so {b} kept the {thing} and {a} was {mood} .",
)
WORDS = tuple(
    word
    for text in (*PLACES, *THINGS, *MOODS, *BEGINNINGS, *MIDDLES, *ENDINGS)
    for word in text.split()
    if "{" not in word
)


def story(settings: WorldSettings, index: int, split: str = "train") -> str:
    draw = Draw(settings.seed, "story", split, index)
    a, b = draw.some((*settings.names, "somebody", "nobody"), 2)
    place, thing, mood = draw.one(PLACES), draw.one(THINGS), draw.one(MOODS)
    middles = draw.some(MIDDLES, draw.between(1, 3))
    parts = [draw.one(BEGINNINGS), *middles, draw.one(ENDINGS)]
    return " ".join(parts).format(a=a, b=b, place=place, thing=thing, mood=mood)


VOCABULARY = (*WORDS, "somebody", "nobody")
