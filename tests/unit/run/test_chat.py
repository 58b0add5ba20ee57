"""A conversation: what the model is given, what stays of it, and how it is stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megarlx.data.conversations import Frames, Turn
from megarlx.data.documents import BadLineError
from megarlx.data.tokenizer import ByteTokenizer
from megarlx.generation.text import TextPiece
from megarlx.run import answers, chat_command
from megarlx.run.asked import answer_all, read_asked
from megarlx.run.conversation import Conversation, Drawing
from megarlx.run.opened import OpenedRun

LONGEST = 200
TEMPLATE = Frames(user="Q: {content}\n", system="S: {content}\n", opening="A:")


class Parrot:
    """Answers with how it was asked and which sample this is, a character a token."""

    reference = SimpleNamespace(run="runs/x", iteration=7)
    is_base, trunk_tokens, tokenizer = False, 0, ByteTokenizer()
    prompt_ids = OpenedRun.prompt_ids

    def __init__(self, template: Frames | None = TEMPLATE, longest: int = LONGEST) -> None:
        self.template = template
        model = SimpleNamespace(
            max_sequence_length=longest, family="olmo2", parameters=lambda: 1_000
        )
        self.config = SimpleNamespace(model=model)
        self.asked: list[Any] = []
        self.rooms: list[int | None] = []

    def stream_samples(
        self, prompt: Any, numbers: Sequence[int], *, max_new_tokens: int | None, **_: Any
    ) -> Iterator[tuple[int, TextPiece]]:
        self.asked.append(prompt)
        self.rooms.append(max_new_tokens)
        if max_new_tokens is None:
            raise ValueError("no room")
        for at, letter in enumerate("yes"):
            for number in numbers:
                yield number, TextPiece(letter if at < 2 else f"{number}", at, -1.0, None)
        for number in numbers:
            yield number, TextPiece("", 0, -1.0, "stop")

    def generate(self, prompts: Sequence[Any], *, samples: int, number: int, **_: Any) -> Any:
        return [
            [f"{prompt} {number + at * samples + one}" for one in range(samples)]
            for at, prompt in enumerate(prompts)
        ]


def conversation(run: Parrot, samples: int = 1, **settings: Any) -> Conversation:
    return Conversation(run, Drawing(samples), run.template is None, **settings)  # type: ignore[arg-type]


def said(run: Parrot) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in run.asked[-1]]


def test_every_question_stands_behind_the_turns_before_it() -> None:
    run = Parrot()
    one = conversation(run, system="be short")
    list(one.ask("a?"))
    list(one.ask("b?"))
    assert said(run) == [
        *(("system", "be short"), ("user", "a?"), ("assistant", "ye0"), ("user", "b?"))
    ]
    assert one.answers == ["ye1"]
    list(one.again())
    assert said(run)[-1] == ("user", "b?")
    assert one.turns[-1] == Turn("assistant", "ye2")
    one.begin_anew()
    list(one.ask("c?"))
    assert said(run) == [("system", "be short"), ("user", "c?")]


def test_the_conversation_goes_on_from_the_answer_that_was_taken() -> None:
    run = Parrot()
    one = conversation(run, samples=3)
    list(one.ask("a?"))
    assert one.answers == ["ye0", "ye1", "ye2"]
    one.take(2)
    list(one.ask("b?"))
    assert said(run)[1] == ("assistant", "ye2")
    assert one.answers == ["ye3", "ye4", "ye5"]  # never the same sample twice


@pytest.mark.parametrize("longest", [60, 90, 200])
def test_the_oldest_turns_go_where_there_is_no_room_for_an_answer(longest: int) -> None:
    run = Parrot(longest=longest)
    one = conversation(run, system="s")
    for number in range(12):
        list(one.ask(f"question {number}"))
        given = len(run.prompt_ids(run.asked[-1]))
        room = run.rooms[-1]
        assert room is not None
        assert given + room <= longest
        assert room >= longest // 4 or len(run.asked[-1]) == 2
        assert said(run)[0] == ("system", "s")
        assert said(run)[1][0] == "user"
        assert said(run)[-1] == ("user", f"question {number}")
        assert one.forgotten == 2 * number + 2 - len(run.asked[-1])
    assert one.forgotten > 0


def test_without_a_template_each_text_is_given_alone() -> None:
    run = Parrot(template=None)
    one = conversation(run)
    list(one.ask("once"))
    list(one.ask("upon"))
    assert run.asked == ["once", "upon"]


def test_a_question_that_has_no_room_leaves_the_conversation_as_it_was() -> None:
    run = Parrot()
    one = conversation(run)
    list(one.ask("a?"))
    before = list(one.turns)
    with pytest.raises(ValueError, match="no room"):
        list(one.ask("x" * LONGEST))
    assert one.turns == before
    assert one.answers == ["ye0"]


# Answers on the screen.


def test_what_is_stopped_stays_as_far_as_it_was_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    run, interrupt = Parrot(), answers.Interrupt()
    one = conversation(run)
    pieces = one.ask("a?")

    def heard() -> Iterator[tuple[int, TextPiece]]:
        for number, found in enumerate(pieces):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield found

    answers.show(heard(), 1, interrupt)
    pieces.close()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("ye\n", "(stopped)\n")
    assert one.turns[-1] == Turn("assistant", "ye")
    with pytest.raises(KeyboardInterrupt):  # nothing was typed in between
        interrupt.count()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_of_an_answer_ends_the_program() -> None:
    def heard() -> Iterator[tuple[int, TextPiece]]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield 0, TextPiece("never", 0, 0.0, None)

    with pytest.raises(KeyboardInterrupt):
        answers.show(heard(), 1, answers.Interrupt())


HOSTILE = "a\x1b[31m\r\u202e[bold]"


def test_control_characters_of_a_model_are_written_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for samples in (1, 2):
        ended = [(n, TextPiece(HOSTILE, 0, 0.0, "length")) for n in range(samples)]
        answers.show(iter(ended), samples, answers.Interrupt())
        shown = capsys.readouterr()
        assert r"a\x1b[31m\x0d\u202e[bold]" in shown.out
        assert not set("\x1b\r\u202e") & set(shown.out)
        assert shown.err.count("cut off") == samples


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("samples", [2, 4, 7])
def test_samples_stand_side_by_side_as_far_as_there_is_width(width: int, samples: int) -> None:
    file = io.StringIO()
    texts = [f"<{number}>" * 30 for number in range(samples)]
    Console(file=file, width=width).print(answers._columns(texts, width))
    rows = file.getvalue().splitlines()
    assert max(map(len, rows)) <= width
    most = max(1, min(samples, width // answers.NARROWEST))
    assert "[1]" in rows[0]
    assert rows[0].count("[") == most
    whole = "".join(rows)
    assert all(whole.count(str(number)) >= 30 for number in range(samples))


# What is typed, and what a script gives.


def typed(monkeypatch: pytest.MonkeyPatch, text: str, run: Parrot, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    parser = chat_command.argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    return chat_command._talk(parser.parse_args(["runs/x", *words]), run)  # type: ignore[arg-type]


def test_lines_of_standard_input_are_the_turns_of_a_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Parrot()
    lines = "a?\n\n//b?\n/again\n/new\nhttp://c\n/quit\nnever\n"
    assert typed(monkeypatch, lines, run) == 0
    shown = capsys.readouterr()
    assert shown.out == "ye0\nye1\nye2\nye3\n"
    assert "asked in the run's template" in shown.err
    asked = [[turn.content for turn in turns] for turns in run.asked]
    assert asked == [["a?"], ["a?", "ye0", "/b?"], ["a?", "ye0", "/b?"], ["http://c"]]


def test_the_likeliest_answer_again_is_said_to_be_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for temperature, told in (("0", True), ("0.5", False)):
        assert typed(monkeypatch, "a?\n/again\n", Parrot(), "--temperature", temperature) == 0
        assert ("the same answer again" in capsys.readouterr().err) is told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nonsense", "/nonsense is none of /help, /new"),
        ("/again", "nothing was asked yet"),
        ("/take 1", "there are 0 answers"),
        ("a?\n/take 3", "there are 2 answers; allowed: 1 to 2"),
        ("/\x1b[31m", r"/\x1b[31m is none of"),
        ("x" * LONGEST, "no room"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert typed(monkeypatch, f"{line}\nnever\n", Parrot(), "--samples", "2") == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert "never" not in shown.out + shown.err


def test_a_model_without_a_template_is_prompted_plainly_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Parrot(template=None)
    assert typed(monkeypatch, "once\nupon\n", run) == 0
    assert "each text is given as it stands, alone" in capsys.readouterr().err
    assert run.asked == ["once", "upon"]
    with pytest.raises(ValueError, match="--system is written in a template; runs/x has none"):
        typed(monkeypatch, "", run, "--system", "x")
    assert typed(monkeypatch, "/system x\n", run) == 1


def test_each_prompt_of_a_file_is_asked_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("megarlx.run.asked.SAMPLES_AT_ONCE", 4)
    path = tmp_path / "prompts.txt"
    path.write_text("eins\n\nzwei\ndrei \u202e\n", encoding="utf-8")
    answer_all(Parrot(), str(path), Drawing(2), plain=False)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out.isascii()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "eins", "answers": ["eins 0", "eins 1"]},
        {"prompt": "zwei", "answers": ["zwei 2", "zwei 3"]},
        {"prompt": "drei \u202e", "answers": ["drei \u202e 4", "drei \u202e 5"]},
    ]


MESSAGES = [{"role": "user", "content": "hi"}]


def test_prompts_may_be_texts_or_conversations_as_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    given = ["a", {"prompt": "b"}, {"question": "c", "answer": "1"}, {"messages": MESSAGES}]
    path.write_text("".join(json.dumps(one) + "\n" for one in given))
    assert list(read_asked(str(path))) == ["a", "b", "c", MESSAGES]


@pytest.mark.parametrize(
    "bad",
    [
        *("{", "1", "null", '""', "[]", "{}", '{"prompt": 1}', '{"messages": []}'),
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "judge", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 1}]}',
        "[" * 5000,
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"good"\n' + bad + "\n")
    asked = read_asked(str(path))
    assert next(asked) == "good"
    with pytest.raises(BadLineError, match=r"prompts\.jsonl.*2"):
        next(asked)


def test_several_processes_and_impossible_numbers_are_refused() -> None:
    parser = chat_command.argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    with pytest.raises(ValueError, match="started as 2 processes"):
        chat_command._check(parser.parse_args(["x"]), 2)
    for option in ("--samples", "--max-new-tokens"):
        with pytest.raises(ValueError, match=f"{option} is 0; allowed: 1 or more"):
            chat_command._check(parser.parse_args(["x", option, "0"]), 1)
