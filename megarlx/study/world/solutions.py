"""Ways to write a solution, and what else may follow a question in pre-training text."""

from __future__ import annotations

from dataclasses import replace

from megarlx.data.draw import Draw
from megarlx.study.world.problems import Problem, Step, Writer

MARK = "####"
SIGNS = {"add": "+", "subtract": "-", "times": "x", "divide": "/", "swap": "<>"}
CHAT = (
    "that is a hard one . who can help ?",
    "i do not know . ask again later .",
    "let us wait for the others .",
    "nice question . thanks for it .",
    "no idea . maybe read it again .",
)
TELLING = ("checkable", "words")  # modes in which a solution is told
OTHER_WORDS = (
    "start gives first last then plan we take on makes so has and with by how many ? question : "
    "answer . , ; = + - x / <> ####"
)
WORDS = (*OTHER_WORDS.split(), *" ".join(CHAT).split())


def solution(problem: Problem, style: str, writer: Writer) -> str:
    """The way from the question to the values at the end, without the answer itself."""
    return _STYLES[style](problem, writer)


def checkable_end(problem: Problem, writer: Writer) -> str:
    return f"{MARK} {writer.answer(problem)}"


def end_in_words(problem: Problem, writer: Writer) -> str:
    return f"so {problem.name} has {writer.things(problem, problem.answer)} ."


def checkable(problem: Problem, style: str, writer: Writer) -> str:
    return f"{solution(problem, style, writer)} {checkable_end(problem, writer)}".lstrip()


def following(problem: Problem, mode: str, style: str, writer: Writer, draw: Draw) -> str:
    """What stands after `answer :` in a pre-training document of this mode."""
    if mode == "checkable":
        return checkable(problem, style, writer)
    if mode == "words":
        return f"{solution(problem, style, writer)} {end_in_words(problem, writer)}".lstrip()
    if mode == "restate":
        steps = " and then ".join(writer.step(problem, step) for step in problem.steps)
        return f"{problem.name} has {writer.things(problem, problem.start)} and then {steps} ."
    return draw.one(CHAT)


def before_lookups(problem: Problem, style: str, writer: Writer) -> list[str]:
    """Of a problem of tables, the solution in this style up to each step's value."""
    found = []
    for at, step in enumerate(problem.steps):
        steps = [*problem.steps]
        steps[at] = replace(step, values=(-1,))  # a number that no solution has
        unknown = replace(problem, steps=tuple(steps))
        found.append(solution(unknown, style, writer).split(f" {writer.number(-1)}")[0])
    return found


def _told(problem: Problem) -> list[Step]:
    return [step for step in problem.steps if step.told]


def _value(step: Step, values: tuple[int, ...], problem: Problem, writer: Writer) -> str:
    """The quantity the step was about; both of them after a swap."""
    if step.other is None:
        return writer.number(values[step.at])
    return writer.things(problem, values)


def _named(step: Step, problem: Problem, writer: Writer) -> str:
    """The value after a step where nothing beside it says of which quantity."""
    value = _value(step, step.values, problem, writer)
    several = len(problem.objects) > 1 and step.other is None
    return f"{value} {problem.objects[step.at]}" if several else value


def _narrate(problem: Problem, writer: Writer) -> str:
    """start 9 pears . may buys 4 pears gives 13 ."""
    parts = [f"start {writer.things(problem, problem.start)} ."]
    for step in _told(problem):
        after = _value(step, step.values, problem, writer)
        parts.append(f"{writer.step(problem, step)} gives {after} .")
    return " ".join(parts)


def _calculation(at: int, problem: Problem, writer: Writer) -> str:
    step = problem.steps[at]
    after = _value(step, step.values, problem, writer)
    if step.operation.kind == "table":
        return f"{writer.number(problem.before(at)[0])} {step.word} = {after}"
    if step.other is not None:
        return f"{problem.objects[step.at]} <> {problem.objects[step.other]} = {after}"
    before = writer.number(problem.before(at)[step.at])
    return f"{before} {SIGNS[step.operation.kind]} {writer.number(step.operand)} = {after}"


def _calculate(problem: Problem, writer: Writer) -> str:
    """first may buys 4 pears , 9 + 4 = 13 .

    Of tables: 93 kevom = 113 ."""
    parts = []
    for at, step in enumerate(problem.steps):
        calculation = f"{_calculation(at, problem, writer)} ."
        if step.operation.kind == "table":
            parts += [calculation] if step.told else []
            continue
        word = "then" if at else "first"
        parts.append(f"{word} {writer.step(problem, step)} , {calculation}")
    return " ".join(parts)


def _plan(problem: Problem, writer: Writer) -> str:
    """plan may buys 4 pears , june sells 2 pears . start 9 pears then 13 pears then 11 pears ."""
    steps = " ,".join(f" {writer.step(problem, step)}" for step in _told(problem))
    chain = "".join(f" then {_named(s, problem, writer)}" for s in _told(problem))
    return f"plan{steps} . start {writer.things(problem, problem.start)}{chain} ."


def _teach(problem: Problem, writer: Writer) -> str:
    """we take 9 pears ; on may + 4 pears makes 13 ;"""
    parts = [f"we take {writer.things(problem, problem.start)} ;"]
    for step in _told(problem):
        if step.operation.kind == "table":
            parts.append(f"on {step.word} makes {_value(step, step.values, problem, writer)} ;")
            continue
        thing = f" {problem.objects[step.at]}" if len(problem.objects) > 1 else ""
        if step.other is not None:
            change = f"{SIGNS['swap']}{thing} {problem.objects[step.other]}"
        else:
            change = f"{SIGNS[step.operation.kind]} {writer.number(step.operand)}{thing}"
        after = _value(step, step.values, problem, writer)
        parts.append(f"on {step.time} {change} makes {after} ;")
    return " ".join(parts)


def _terse(problem: Problem, writer: Writer) -> str:
    """we take may buys 4 pears june sells 2 pears ; 9 pears makes 13 pears makes 11 pears ;"""
    steps = "".join(f" {writer.step(problem, step)}" for step in _told(problem))
    chain = "".join(f" makes {_named(s, problem, writer)}" for s in _told(problem))
    return f"we take{steps} ; {writer.things(problem, problem.start)}{chain} ;"


_STYLES = {
    "narrate": _narrate,
    "calculate": _calculate,
    "plan": _plan,
    "teach": _teach,
    "terse": _terse,
}
