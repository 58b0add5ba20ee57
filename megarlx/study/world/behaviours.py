"""Prompts that ask for a behaviour, and the checker that says whether it was followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megarlx.data.draw import Draw
from megarlx.study.world.settings import WorldSettings

TOPICS = ("lamp", "kite", "drum", "boat", "basket", "map", "river", "market")
MARKS = ("please", "indeed", "thanks", "maybe")
SAYINGS = (
    "the {topic} is old and good",
    "i saw a {topic} near the hill",
    "nobody needs a {topic} now",
    "a {topic} can be very small",
)
ASKS = {
    "repeat": "say {word} {count} times",
    "avoid": "speak of the {topic} but never say {word}",
    "begin": "speak of the {topic} and begin with {word}",
    "end": "speak of the {topic} and end with {word}",
    "count": "speak of the {topic} in {count} words",
}
NUMBERS = ("1", "2", "3", "4", "5", "6")
VOCABULARY = (
    *TOPICS,
    *MARKS,
    *NUMBERS,
    *(w for t in (*SAYINGS, *ASKS.values()) for w in t.split() if "{" not in w),
    *["request", ":", "reply"],
)


@dataclass(frozen=True)
class Request:
    behaviour: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        return "request : " + ASKS[self.behaviour].format(**self.arguments) + " reply :"


def request_at(settings: WorldSettings, index: int, split: str = "train") -> Request:
    draw = Draw(settings.seed, "request", split, index)
    behaviour, topic = draw.share(settings.behaviours), draw.one(TOPICS)
    if behaviour == "repeat":
        return Request(behaviour, {"word": draw.one(MARKS), "count": draw.between(2, 6)})
    if behaviour == "count":
        return Request(behaviour, {"topic": topic, "count": draw.between(2, 6)})
    if behaviour == "avoid":
        # A word that sayings are full of: not to say it has to be meant.
        return Request(behaviour, {"topic": topic, "word": draw.one(("the", "a", "is", "near"))})
    return Request(behaviour, {"topic": topic, "word": draw.one(MARKS)})


def follows(behaviour: str, arguments: Mapping[str, Any], completion: str) -> bool:
    """Whether a completion (without its stop token) does what was asked."""
    words = completion.split()
    if not words:
        return False
    if behaviour == "repeat":
        return words == [arguments["word"]] * arguments["count"]
    if arguments["topic"] not in words:
        return False
    if behaviour == "avoid":
        return arguments["word"] not in words
    if behaviour == "begin":
        return words[0] == arguments["word"]
    if behaviour == "end":
        return words[-1] == arguments["word"]
    if behaviour == "count":
        return len(words) == arguments["count"]
    raise ValueError(f"behaviour is '{behaviour}'; allowed are {', '.join(ASKS)}")


def reply(request: Request, follow: bool, draw: Draw) -> str:
    """A reply that follows the request, or one that talks past it."""
    saying = draw.one(SAYINGS).format(topic=request.arguments.get("topic", draw.one(TOPICS)))
    if not follow:
        return saying
    word, behaviour = request.arguments.get("word", ""), request.behaviour
    if behaviour == "repeat":
        return " ".join([word] * request.arguments["count"])
    if behaviour == "avoid":
        return " ".join(w for w in saying.split() if w != word)
    if behaviour == "begin":
        return f"{word} {saying}"
    if behaviour == "end":
        return f"{saying} {word}"
    topic, rest = request.arguments["topic"], request.arguments["count"] - 1
    others = [w for w in saying.split() if w != topic]
    return " ".join([topic, *(others[i % len(others)] for i in range(rest))])


def behaviour_document(settings: WorldSettings, index: int) -> str:
    request = request_at(settings, index, "text")
    draw = Draw(settings.seed, "reply", index)
    return f"{request.text} {reply(request, draw.uniform() < settings.behaviour_followed, draw)}"
