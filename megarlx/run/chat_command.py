"""`megarlx chat`: a conversation with a checkpoint, in the model's template."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megarlx import plug
from megarlx.config.arguments import add_overrides, add_trust
from megarlx.printable import complain, printable

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from megarlx.generation.text import TextPiece
    from megarlx.run.answers import Interrupt
    from megarlx.run.conversation import Conversation, Drawing
    from megarlx.run.opened import OpenedRun

ONCE_MORE = "Ctrl-C once more, Ctrl-D or /quit ends"
HELP = """\
/new          begin anew: what was said so far is forgotten
/again        other answers to the last question
/take N       go on from answer N of several
/system TEXT  what stands before the conversation; it begins anew
/quit         end, as do Ctrl-D and two Ctrl-C
A line that ends in a backslash goes on in the next; one that begins with // is said with one /.
Ctrl-C stops an answer; what there is of it stays in the conversation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[@ITER]", help="RUN, RUN@latest, RUN@1000, …")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="ask each line of a text, or each {prompt} or {messages} of a .jsonl, by itself, and "
        "print a line of JSON with its answers; -: standard input",
    )
    parser.add_argument("--samples", type=int, default=1, help="answers to each question; 1")
    parser.add_argument("--system", default="", help="what stands before the conversation")
    parser.add_argument(
        "--raw", action="store_true", help="give each text as it stands, without the template"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability kept")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="of an answer, if the model can take them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--generator",
        default="engine",
        metavar="NAME",
        help=f"what draws the samples: {plug.allowed('generator')}; default: engine",
    )
    add_overrides(parser, "override a key of the run's configuration, as template.user=…")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.comm import launch
    from megarlx.config import ConfigError
    from megarlx.run.opened import open_run
    from megarlx.run.opening import open_config
    from megarlx.run.reference import resolve
    from megarlx.run.session import session

    try:
        processes = launch.read().world_size
        _check(arguments, processes)
        reference = resolve(arguments.run)
        config = open_config(
            reference.run, processes, arguments.overrides, trusted=arguments.trusted
        )
    except ConfigError as error:
        complain(error)
        return 2
    except (ValueError, OSError, launch.LaunchError) as error:
        complain(f"megarlx chat: {error}")
        return 1
    return session(
        "chat",
        config,
        lambda started, device: _talk(arguments, open_run(reference, config, started, device)),
    )


def _check(arguments: argparse.Namespace, processes: int) -> None:
    if processes > 1:
        raise ValueError(
            f"started as {processes} processes; a conversation has 1. `megarlx generate` and "
            "`megarlx.open` take several"
        )
    for name in ("samples", "max_new_tokens"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")


def _talk(arguments: argparse.Namespace, run: OpenedRun) -> int:
    from megarlx.run.asked import answer_all
    from megarlx.run.conversation import Conversation, Drawing

    names = (*("samples", "temperature", "top_p", "max_new_tokens"), "seed", "generator")
    drawing: Drawing = Drawing(**{name: getattr(arguments, name) for name in names})
    plain = arguments.raw or run.template is None
    if plain and arguments.system:
        raise ValueError(
            "--system is written in a template; "
            + ("--raw asks for none" if arguments.raw else f"{run.reference.run} has none")
        )
    for line in _greeting(run, plain=plain):
        complain(line)
    if arguments.prompts is not None:
        answer_all(run, arguments.prompts, drawing, plain=plain)
        return 0
    return _converse(Conversation(run, drawing, plain, arguments.system))


def _greeting(run: OpenedRun, *, plain: bool) -> Iterator[str]:
    """Which model it is, and how it is asked."""
    from megarlx.config.objectives import WRITE_TEMPLATE

    reference, model = run.reference, run.config.model
    yield (
        f"{reference.run} at step {reference.iteration:,}: {model.family}, "
        f"{model.parameters():,} parameters"
    )
    if plain:
        why = "" if run.template is not None else f" (the run has no template: {WRITE_TEMPLATE})"
        yield f"each text is given as it stands, alone, and the model goes on with it{why}"
    else:
        assert run.template is not None
        written = run.template.described.get("user")
        named = f"the run's template, {written!r}" if written else "the model's own chat template"
        yield f"asked in {named}" + (
            "; these weights have seen pre-training only: --raw gives a text as it stands"
            if run.is_base and run.trunk_tokens
            else ""
        )
    if sys.stdin.isatty():
        yield "/help lists what can be typed; Ctrl-C stops an answer, a second one ends"


def _converse(conversation: Conversation) -> int:
    """Until the input ends, /quit, or a second Ctrl-C."""
    from megarlx.run.answers import Interrupt

    typed = sys.stdin.isatty()
    interrupt = Interrupt(at_once=not typed)  # a script is ended by the first
    while True:
        try:
            line = _read()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            interrupt.count()
            complain(f"\n{ONCE_MORE}")
            continue
        interrupt.asked = False
        if not line.strip():
            continue
        try:
            with interrupt.listening():
                goes_on = _did(conversation, line, interrupt)
            if not goes_on:
                return 0
            if interrupt.asked:
                complain(ONCE_MORE)
        except ValueError as error:  # what was typed cannot be asked: the conversation goes on
            complain(error)
            if not typed:
                return 1


def _read() -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")
    import readline  # noqa: F401  (a line can be edited, and the last ones come back)

    text = input("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input("… ")
    return text


def _did(conversation: Conversation, line: str, interrupt: Interrupt) -> bool:
    """Does what a line says; False where it says that this is the end."""
    word, _, rest = line.strip().partition(" ")
    if not word.startswith("/") or word.startswith("//"):
        said = line.replace("//", "/", 1) if word.startswith("//") else line
        _answer(conversation, conversation.ask(said), interrupt)
    elif word == "/quit":
        return False
    elif word == "/help":
        complain(HELP)
    elif word == "/new":
        conversation.begin_anew()
    elif word == "/again" and conversation.turns:
        if conversation.drawing.temperature == 0:
            complain("(the same answer again: at --temperature 0 it is the likeliest)")
        _answer(conversation, conversation.again(), interrupt)
    elif word == "/take" and rest.isdecimal() and 0 < int(rest) <= len(conversation.answers):
        conversation.take(int(rest) - 1)
    elif word == "/system" and not conversation.plain:
        conversation.begin_anew()
        conversation.system = rest
    else:
        raise ValueError(_not_understood(conversation, word))
    return True


def _not_understood(conversation: Conversation, word: str) -> str:
    if word == "/again":
        return "/again: nothing was asked yet"
    if word == "/take":
        count = len(conversation.answers)
        return f"/take: there are {count} answers" + (f"; allowed: 1 to {count}" if count else "")
    if word == "/system":
        return "/system: texts are given as they stand, without a template to write it in"
    return f"{printable(word)} is none of /help, /new, /again, /take, /system, /quit"


def _answer(
    conversation: Conversation,
    pieces: Generator[tuple[int, TextPiece], None, None],
    interrupt: Interrupt,
) -> None:
    from contextlib import closing

    from megarlx.run.answers import show

    with closing(pieces):
        show(pieces, conversation.drawing.samples, interrupt)
    if conversation.forgotten:
        complain(
            f"(the first {conversation.forgotten} turns were left out: the model takes "
            f"{conversation.run.config.model.max_sequence_length:,} tokens)"
        )
