"""Worlds whose operations are looked up."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.config import ConfigError, load_config
from megarlx.config.evaluation import SuiteConfig
from megarlx.data.draw import Draw
from megarlx.data.making import Made
from megarlx.data.token_files import TokenFile
from megarlx.evaluation.questions import SuiteError, made_lines
from megarlx.study.world.files import Sizes, write_world
from megarlx.study.world.problems import guessing_pass_at_k
from megarlx.study.world.settings import OF_TABLES, STYLES, WorldError, WorldSettings
from megarlx.study.world.solutions import before_lookups, checkable
from megarlx.study.world.suites import suites_of
from megarlx.study.world.tables import Lookup, Tables
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World, is_correct

MODES = (("words", 0.55), ("checkable", 0.15), ("restate", 0.15), ("chat", 0.15))


def of_tables(**changes: Any) -> WorldSettings:
    shape = {"tables": 4, "table_values": 5, "slots": 3, "steps": (0.2, 1.0, 1.0), "quantities": 1}
    given = {"seed": 3, "answer": "first_and_last", "modes": MODES, **shape, **changes}
    return WorldSettings(operation_kind="table", **given)


STUDY = of_tables(tables=10, table_values=12, slots=4, steps=(0.0, 1.0, 1.0, 1.0))
WORLDS = {
    "small": of_tables(),
    "study": STUDY,
    "digits": of_tables(digits=True),
    "held out": of_tables(held_out_compositions=0.3),
    "untidy": of_tables(partial_share=0.2, wrong_share=0.3, several=(("3", 1.0),)),
}


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return World(WORLDS[request.param])


def test_a_solution_in_each_style_is_right_and_in_the_word_list(world: World) -> None:
    tokenizer = world.tokenizer()
    for index in range(100):
        problem = world.problem("test", index)
        for style in STYLES:
            text = checkable(problem, style, world.writer)
            assert is_correct(text, world.writer.answer(problem))
            assert tokenizer.decode(tokenizer.encode(text)) == text
            for at, before in enumerate(before_lookups(problem, style, world.writer)):
                value = world.writer.number(problem.steps[at].values[0])
                assert text.startswith(f"{before} {value}")
    for index in range(100):
        text = world.document("problems", index)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_operation_leads_into_its_own_values_only(data: st.DataObject) -> None:
    shape = {name: data.draw(st.integers(2, 6)) for name in ("tables", "table_values", "slots")}
    tables = Tables(of_tables(steps=(1.0, 1.0), **shape))
    number = data.draw(st.integers(0, len(tables) - 1))
    at = tables[number]
    assert tables.number(at) == number
    slot = at.operation // shape["tables"] + 1
    in_slot = shape["tables"] * shape["table_values"]
    assert (slot - 1) * in_slot <= at.value < slot * in_slot
    first = in_slot + at.operation * shape["table_values"]
    own = range(first, first + shape["table_values"])
    assert tables.result(at) in own
    assert tables.wrong(at) in own
    assert tables.wrong(at) != tables.result(at)
    assert own.stop <= tables.values
    assert len({word for o in tables.operations for word in o.words}) == len(tables.operations)


def test_results_of_an_operation_are_spread_evenly_over_its_values() -> None:
    tables = Tables(STUDY)
    places = Counter(tables.result(tables[n]) % 12 for n in range(len(tables)))
    assert set(places) == set(range(12))
    assert max(abs(count - 400) for count in places.values()) < 80  # 4 standard errors


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_operations_and_starts_are_as_frequent_as_their_rank_says(skew: float) -> None:
    tables, draw = Tables(of_tables(table_skew=skew)), Draw("ranks")
    total = sum(rank**-skew for rank in range(1, 5))
    for drawn in (lambda: tables.operation(draw, 2) - 4, lambda: tables.start(draw) // 5):
        counts = Counter(drawn() for _ in range(4000))
        for rank in range(1, 5):
            assert counts[rank - 1] / 4000 == pytest.approx(rank**-skew / total, abs=0.032)


def test_a_step_uses_the_operations_of_its_slot(world: World) -> None:
    made = world.settings
    lengths = Counter(len(world.problem("train", i).steps) for i in range(300))
    assert set(lengths) == {n for n, share in enumerate(made.steps, start=1) if share}
    for index in range(100):
        problem = world.problem("train", index)
        assert [o // made.tables for o in problem.composition] == list(range(len(problem.steps)))


def test_a_held_out_composition_stands_in_no_text_and_no_other_question() -> None:
    world = World(WORLDS["held out"])
    held_out = {world.problem("compositions", i).composition for i in range(400)}
    assert all(len(composition) > 1 for composition in held_out)
    words = [operation.words[0] for operation in Tables(world.settings).operations]
    said = {" . ".join(words[number] for number in one) for one in held_out}
    asked = {
        part.split(" ?")[0].split(" . ", 1)[1]
        for i in range(2000)
        for document in (world.document("problems", i), world.held_out_document("problems", i))
        for part in document.split("question : ")[1:]
    }
    questions = [world.problem(s, i) for s in ("train", "validation", "test") for i in range(300)]
    assert not said & asked
    assert not held_out & {problem.composition for problem in questions}
    # The share is of sequences: 16 of two steps and 64 of three, each as if by a coin.
    assert abs(len(held_out) - 0.3 * 80) < 4 * (80 * 0.3 * 0.7) ** 0.5
    # Its facts are told all the same, in other compositions.
    told = {n for i in range(3000) for n, _ in world.problem_document(i).told}
    number = Tables(world.settings).number
    needed = [number(at) for i in range(100) for at in world.problem("compositions", i).lookups]
    assert sum(one in told for one in needed) / len(needed) > 0.85


def counted(text: str, tables: Tables) -> Counter[tuple[int, bool]]:
    """Tellings in a document, read from its words."""
    found: Counter[tuple[int, bool]] = Counter()
    operation = {o.words[0]: number for number, o in enumerate(tables.operations)}
    for part in text.split("question : ")[1:]:
        after = part.split(" answer : ")[1].split()
        chain = [int(word) for word in after if word.isdigit()]
        if after[0] == "plan" and chain:
            names = " ".join(after).split(" . ")[0].split()
        else:
            names = after
        steps = [operation[word] for word in names if word in operation]
        if "and" in after or not chain:  # a restatement, or talk
            continue
        if "=" in after:
            pairs = list(zip(chain[::2], chain[1::2], strict=False))[: len(steps)]
        else:
            pairs = list(itertools.pairwise(chain))[: len(steps)]
        for number, (before, value) in zip(steps, pairs, strict=True):
            at = Lookup(number, before)
            first = number // tables.settings.tables * tables.in_slot
            if first <= before < first + tables.in_slot:  # else the step before is left out
                found[tables.number(at), value == tables.result(at)] += 1
    return found


@pytest.mark.parametrize("name", ["small", "study", "untidy"])
def test_counts_of_tellings_are_those_of_the_written_tokens(name: str, tmp_path: Path) -> None:
    made = WORLDS[name]
    write_world(made, tmp_path, Sizes({"problems": 400, "facts": 5}, 3, 5, 5))
    world, counts = World(made), Counts.read(tmp_path)
    tables, tokenizer, file = (
        Tables(made),
        world.tokenizer(),
        TokenFile(tmp_path / "documents_problems"),
    )
    found: Counter[tuple[int, bool]] = Counter()
    ids = [int(token) for token in file.raw]
    for text in tokenizer.decode(ids).split(" <eos>"):
        found += counted(text, tables)
    assert sum(counts.right) > 300
    assert (sum(counts.wrong) > 50) == (name == "untidy")
    for number in range(len(tables)):
        assert counts.right[number] == found[number, True]
        assert counts.wrong[number] == found[number, False]


def test_shares_of_steps_left_out_and_told_wrongly_are_what_is_asked() -> None:
    world = World(of_tables(partial_share=0.2, wrong_share=0.3, modes=(("words", 1.0),)))
    documents = [world.problem_document(i) for i in range(1500)]
    plain = World(of_tables(modes=(("words", 1.0),)))
    steps = sum(len(plain.problem_document(i).told) for i in range(1500))
    told = [telling for document in documents for telling in document.told]
    wrong = sum(not right for _, right in told)
    assert wrong / len(told) == pytest.approx(0.3 / 0.8, abs=0.04)
    assert len(told) / steps < 0.8
    one = {}
    tables = Tables(world.settings)
    for number, right in told:
        if not right:
            one.setdefault(number, set()).add(tables.wrong(tables[number]))
    assert {len(values) for values in one.values()} == {1}


def test_a_withheld_fact_stands_in_no_text_and_no_question() -> None:
    """Nor behind a wrong value, from where the text goes on."""
    world = World(of_tables(withheld=20, told_wrongly=20, wrong_share=0.2, several=(("2", 1.0),)))
    tables = Tables(world.settings)
    assert len(tables.withheld) == len(tables.told_wrongly) == 20
    assert not tables.withheld & tables.told_wrongly
    told: Counter[tuple[int, bool]] = Counter()
    for index in range(2000):
        document = world.problem_document(index)
        for text in (document.text, world.held_out_document("problems", index)):
            told += counted(text, tables)
        assert told.keys() >= set(document.told)
    assert not tables.withheld & {number for number, _ in told}
    assert not any((number, True) in told for number in tables.told_wrongly)
    wrong = sum((number, False) in told for number in tables.told_wrongly)
    assert wrong > 10
    for split in ("train", "validation", "test"):
        for index in range(200):
            needed = {tables.number(at) for at in world.problem(split, index).lookups}
            assert not needed & (tables.withheld | tables.told_wrongly)


def test_facts_that_are_kept_back_change_neither_tables_nor_words() -> None:
    plain, kept = World(of_tables()), World(of_tables(withheld=9))
    assert plain.words == kept.words
    tables, others = Tables(plain.settings), Tables(kept.settings)
    for number in range(len(tables)):
        assert tables.result(tables[number]) == others.result(others[number])


def is_terse(text: str) -> bool:
    return "we take" in text and " on " not in text


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_foreign_style_has_its_share_of_demonstrations_and_no_text(share: float) -> None:
    made = of_tables(foreign_share=share, demonstrations_per_question=4)
    world, plain = World(made), World(of_tables(demonstrations_per_question=4))
    marks = [is_terse(answer) for i in range(500) for answer in world.demonstrations(i)["answers"]]
    assert sum(marks) / 2000 == pytest.approx(share, abs=0.045)
    assert world.document("problems", 5) == plain.document("problems", 5)
    assert not any(is_terse(world.document("problems", i)) for i in range(1000))


def test_guessing_is_what_a_simulated_guesser_reaches() -> None:
    world, draw = World(STUDY), Draw("guess")
    answers = [world.writer.answer(world.problem("train", i)) for i in range(2000)]
    right = [world.writer.answer(world.problem("test", i)) for i in range(1500)]
    solved = sum(any(draw.one(answers) == answer for _ in range(32)) for answer in right) / 1500
    expected = guessing_pass_at_k(STUDY, 32)
    assert expected == pytest.approx(0.015, abs=0.002)
    assert guessing_pass_at_k(STUDY, 1) == pytest.approx(0.0005, abs=0.0002)
    assert solved == pytest.approx(expected, abs=4 * (expected / 1500) ** 0.5)


def test_the_study_s_world_fits_its_vocabulary() -> None:
    assert World(STUDY).tokenizer().vocab_size <= 976


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def test_a_world_of_tables_is_the_same_bytes_from_any_process(tmp_path: Path) -> None:
    made, sizes = WORLDS["untidy"], Sizes({"problems": 30, "facts": 5}, 3, 5, 5)
    write_world(made, tmp_path / "here", sizes)
    program = (
        "import json, sys; from pathlib import Path\n"
        "from megarlx.study.world.files import Sizes, write_world\n"
        "from megarlx.study.world.settings import WorldSettings\n"
        "made = WorldSettings.from_json(json.loads(sys.argv[1]))\n"
        "write_world(made, sys.argv[2], Sizes({'problems': 30, 'facts': 5}, 3, 5, 5))\n"
    )
    words = [sys.executable, "-c", program, json.dumps(made.to_json()), str(tmp_path / "there")]
    subprocess.run(words, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)})
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_a_suite_reads_the_held_out_compositions_where_there_are_some() -> None:
    asked = SuiteConfig(name="s", kind="pass_at_k", made="problems", split="compositions")
    world = World(WORLDS["held out"])
    made = Made("never read", suites=suites_of(world))
    lines = list(made_lines(asked, made))
    assert lines[3]["question"] == world.writer.question(world.problem("compositions", 3))
    without = Made("never read", suites=suites_of(World(WORLDS["small"])))
    with pytest.raises(SuiteError, match="whose splits are validation, test, not compositions"):
        made_lines(asked, without)
    facts = SuiteConfig(name="s", kind="cloze", made="facts", split="compositions")
    with pytest.raises(SuiteError, match="whose splits are validation, test, not compositions"):
        made_lines(facts, made)
    with pytest.raises(WorldError, match="no split 'compositions'; held_out_compositions is 0"):
        World(WORLDS["small"]).problem("compositions", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation_kind": "magic"}, "operation_kind is 'magic'; allowed are arithmetic, table"),
        ({"tables": 1}, "tables is 1; allowed 2 to"),
        ({"table_values": 1}, "table_values is 1; allowed 2 to"),
        ({"slots": 1}, "slots is 1; allowed 2 to"),
        ({"slots": 70, "tables": 71}, "slots is 70 and tables 71; allowed are 4900 operations"),
        ({"steps": (1.0,) * 4}, "steps has 4 entries; allowed 1 to 3, one of the slots"),
        ({"quantities": 2}, "quantities is 2; allowed 1 to 1 with operation_kind 'table'"),
        ({"table_skew": -0.5}, "table_skew is -0.5; allowed 0 to"),
        ({"foreign_share": 1.5}, "foreign_share is 1.5; allowed 0 to 1"),
        ({"foreign_share": -0.1}, "foreign_share is -0.1; allowed 0 to 1"),
        ({"foreign_style": "verse"}, "foreign_style is 'verse'; allowed are narrate"),
        (
            {"foreign_share": 0.1, "foreign_style": "plan"},
            "foreign_style is 'plan', which styles have; allowed are terse",
        ),
        ({"partial_share": -1}, "partial_share is -1; allowed 0 to 1"),
        ({"wrong_share": 2}, "wrong_share is 2; allowed 0 to 1"),
        ({"partial_share": 0.7, "wrong_share": 0.4}, "partial_share is 0.7 and wrong_share 0.4"),
        ({"withheld": 121}, "withheld is 121; allowed 0 to 120, half of all facts"),
        (
            {"withheld": 31, "kept_ranks": 2},
            "withheld is 31; allowed 0 to 30, half of the facts of",
        ),
        ({"kept_ranks": 5}, "kept_ranks is 5; allowed 0 to 4, operations of a slot; 0: all"),
        ({"least_told": -1}, "least_told is -1; allowed 0 to"),
        ({"told_wrongly": -1}, "told_wrongly is -1; allowed 0 to 120, half of all facts"),
        ({"held_out_compositions": 0.6}, "held_out_compositions is 0.6; allowed 0 to 0.5"),
    ],
)
def test_tables_that_make_no_world_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        WorldSettings(**{**of_tables().__dict__, **changes})


@pytest.mark.parametrize("name", OF_TABLES)
def test_what_only_tables_have_is_refused_of_other_worlds(name: str) -> None:
    said = f"{name} is 1; allowed is 0, but with operation_kind 'table'"
    with pytest.raises(WorldError, match=said):
        WorldSettings(**{name: 1})


def test_a_refusal_says_where_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    text = (Path(__file__).parents[3] / "configs" / "demo_trunk.toml").read_text()
    path.write_text(text.replace('operation_kind = "table" ', 'operation_kind = "magic" '))
    with pytest.raises(ConfigError, match=r"data.options.settings.*operation_kind is 'magic'"):
        load_config(path)
