"""Final answers in text, and the rewards that compare them. Text is matched, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from megarlx.rollouts.rewards.sample import Sample

Style = Literal["any", "marked", "boxed", "hashes", "last_number"]
STYLES: tuple[Style, ...] = ("any", "marked", "boxed", "hashes", "last_number")

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus behind a word or a bracket is an operator: 10-5 ends in 5.
NUMBER = re.compile(rf"(?:(?<![\w)])[-+−])?\s?\$?\s?(?:{DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?")
QUOTIENT = re.compile(rf"(?P<top>{NUMBER.pattern})(?:\s?/\s?(?P<bottom>\d+))?")
FRAC = re.compile(r"(?P<sign>[-+−]?)\s*\\[dt]?frac\s*\{(?P<top>[^{}]*)\}\s*\{(?P<bottom>[^{}]*)\}")
UNIT = re.compile(r"[A-Za-z\s.,:='°%]*")  # what may stand around a number: "is 12 apples"
LONGEST_NUMBER = 100  # characters: nobody's answer is longer, and digits cost time


def boxed(text: str) -> Iterator[tuple[int, str]]:
    r"""(place, content) of every \boxed{…} that is closed, braces inside it included."""
    at = text.find("\\boxed{")
    while at >= 0:
        depth, start = 1, at + len("\\boxed{")
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield at, text[start:end]
                break
        else:
            return
        at = text.find("\\boxed{", end)


def final_answer(text: str, style: Style = "any") -> str | None:
    r"""The last \boxed{…} or rest of a line behind ####, whichever comes later (`marked`); else
    the last number (`any`). The other styles look for one of these only."""
    found = []
    if style in ("any", "marked", "boxed"):
        found += list(boxed(text))[-1:]
    if style in ("any", "marked", "hashes") and "####" in text:
        at = text.rindex("####")
        found.append((at, text[at + 4 :].lstrip(" \t").split("\n", 1)[0]))
    if found:
        return max(found)[1].strip()
    if style in ("any", "last_number"):
        numbers = [m.group() for m in QUOTIENT.finditer(text)]
        return numbers[-1].strip() if numbers else None
    return None


def number(text: str, words: bool = True) -> Fraction | None:
    r"""The exact value of a text that is one number: 1,234.50, -3, $5, 50%, 3/4, \frac{3}{4}.

    Words around it ("12 apples") are ignored if allowed. With a second number, or mathematics
    around it, it is None.
    """
    text = text.strip().strip("$").strip().rstrip(".")
    if len(text) > LONGEST_NUMBER:
        return None
    if match := FRAC.fullmatch(text):
        top, bottom = number(match["top"], False), number(match["bottom"], False)
        if top is None or not bottom:
            return None
        return top / bottom * (-1 if match["sign"] in ("-", "−") else 1)
    found = list(QUOTIENT.finditer(text))
    if len(found) != 1:
        return None
    around = text[: found[0].start()] + text[found[0].end() :]
    if around.strip("% ") and not (words and UNIT.fullmatch(around)):
        return None
    divisor = int(found[0]["bottom"] or 1)
    plain = re.sub(r"[\s$,]", "", found[0]["top"]).replace("−", "-")
    return Fraction(plain) / divisor if divisor else None


def final_number(samples: list[Sample], style: Style = "any") -> list[float]:
    """1 where the completion's final answer is the reference's number, exactly; else 0."""
    if style not in STYLES:
        raise ValueError(f"final_number: style is {style!r}; allowed are {', '.join(STYLES)}")
    rewards = []
    for sample in samples:
        wanted = number(final_answer(sample.reference or "") or "")
        if wanted is None:
            raise ValueError(f"final_number: the reference {sample.reference!r} has no number")
        answer = final_answer(sample.completion, style)
        rewards.append(float(answer is not None and number(answer) == wanted))
    return rewards


def marked_answer(samples: list[Sample]) -> list[float | None]:
    """1 where a finished completion ends in `#### ` and exactly the reference, said once."""
    return [
        None if sample.reference is None else float(_is_marked(sample, sample.reference))
        for sample in samples
    ]


def _is_marked(sample: Sample, reference: str) -> bool:
    before, mark, after = sample.completion.rpartition("####")
    finished = sample.finish_reason != "length"
    return finished and bool(mark) and "####" not in before and after.split() == reference.split()


def answer_format(
    samples: list[Sample], style: Literal["boxed", "hashes"] = "hashes"
) -> list[float]:
    """1 where the completion stopped by itself, right behind its one answer in this style."""
    if style not in ("boxed", "hashes"):
        raise ValueError(f"answer_format: style is {style!r}; allowed are boxed, hashes")
    marker = "\\boxed{" if style == "boxed" else "####"
    rewards = []
    for sample in samples:
        text = sample.completion
        answer = final_answer(text, style) if text.count(marker) == 1 else None
        good = bool(answer) and sample.finish_reason != "length"
        rewards.append(float(good and _ends(text[text.rindex(marker) :], style)))
    return rewards


def _ends(behind: str, style: str) -> bool:
    """No line follows the answer's; nothing but punctuation follows the brace that closes a box."""
    if style == "hashes":
        return "\n" not in behind.strip("\n")
    ((_, content),) = boxed(behind)
    return not behind[len("\\boxed{") + len(content) + 1 :].strip(" \n\t.$)]")


def length_penalty(samples: list[Sample], max_tokens: int, buffer: float = 0.2) -> list[float]:
    """0 down to -1 over the last `buffer` (a share) of the `max_tokens` a completion may have."""
    width = buffer * max_tokens
    return [-min(max((s.tokens - (max_tokens - width)) / width, 0.0), 1.0) for s in samples]


def math_equal(samples: list[Sample], style: Style = "any") -> list[float]:
    """1 where the final answer equals the reference as mathematics, as math-verify sees it.

    To be run in a worker process: simplifying what a model wrote can take for ever.
    """
    rewards = []
    for sample in samples:
        wanted = final_answer(sample.reference or "", "marked") or sample.reference
        if not wanted:
            raise ValueError(f"math_equal: the reference {sample.reference!r} has no answer")
        answer = final_answer(sample.completion, style)
        rewards.append(float(bool(answer) and _equal(str(answer), wanted)))
    return rewards


def _equal(answer: str, wanted: str) -> bool:
    a, b = number(answer, words=False), number(wanted, words=False)
    if a is not None and b is not None:
        return a == b
    import math_verify

    # LaTeX only: its parser for plain expressions hands the text to Python's eval. And no time
    # limit of its own, which is an alarm signal: the worker process is the limit.
    latex = [math_verify.LatexExtractionConfig()]
    parsed = [
        math_verify.parse(f"${text.strip('$')}$", latex, parsing_timeout=None)
        for text in (wanted, answer)
    ]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))
