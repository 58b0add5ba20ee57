"""The suite kind that asks for single facts of a world of tables."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
from evaluated_models import MADE, MADE_OF_TABLES, TABLES, TOLD, logprob, small_model, subject

from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.data.making import Line, Made
from megarlx.evaluation.questions import SuiteError, made_lines
from megarlx.evaluation.suites import evaluate
from megarlx.study.world.files import Sizes, write_world
from megarlx.study.world.kept import KeptFacts
from megarlx.study.world.lookups import band
from megarlx.study.world.maker import WorldMaker, WorldOptions
from megarlx.study.world.problems import split_of, table_problem
from megarlx.study.world.settings import WorldError, WorldSettings
from megarlx.study.world.suites import suites_of
from megarlx.study.world.tables import Lookup, tables_of
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World


def suite(**fields: Any) -> SuiteConfig:
    given = {"name": "l", "kind": "lookups", "made": "lookups", "questions": 6, **fields}
    return SuiteConfig.model_validate(given)


def measured(**fields: Any) -> dict[str, Any]:
    config = EvaluationConfig(suites=(suite(**fields),))
    return evaluate(subject(tables=True), config)[0]


def lookups_of(world: World, counts: Counts, facts: str) -> list[Line]:
    asked = suite(questions=None, options={"style": "plan", "facts": facts})
    return list(made_lines(asked, Made("never read", suites=suites_of(world, counts))))


@pytest.mark.parametrize("style", [None, "plan", "terse"])
def test_probabilities_are_those_of_a_plain_forward_pass(style: str | None) -> None:
    options = {} if style is None else {"style": style}
    found, model, tokenizer = measured(options=options), small_model(), TABLES.tokenizer()
    lines = list(made_lines(suite(options=options), MADE_OF_TABLES))
    assert [line["id"] for line in lines] == [item["id"] for item in found["items"]]
    for line, item in zip(lines, found["items"], strict=True):
        assert len(line["contexts"]) == (1 if style else 4)
        plain = [
            math.exp(logprob(model, tokenizer.encode(context), tokenizer.encode(line["answer"])))
            for context in line["contexts"]
        ]
        assert item["probability"] == pytest.approx(sum(plain) / len(plain), abs=1e-5)
    mean = sum(item["probability"] for item in found["items"]) / len(lines)
    assert found["metrics"]["probability"] == pytest.approx(mean)


def test_each_lookup_of_each_question_is_asked_with_its_right_value() -> None:
    tables, at = tables_of(TABLES.settings), 0
    words = {o.words[0]: number for number, o in enumerate(tables.operations)}
    lines = list(made_lines(suite(options={"style": "calculate"}), MADE_OF_TABLES))
    for index in range(6):
        for _ in TABLES.problem("test", index).steps:
            *_, before, word, sign = lines[at]["contexts"][0].split()
            lookup = Lookup(words[word], int(before))
            assert sign == "="
            assert int(lines[at]["answer"]) == tables.result(lookup)
            assert lines[at]["group"] == band(TOLD.right[tables.number(lookup)])
            at += 1
    assert at == len(lines)


def test_bands_are_of_the_counts_of_tellings() -> None:
    found = measured(questions=40)
    by_band = defaultdict(list)
    for item in found["items"]:
        by_band[item["group"]].append(item["probability"])
    assert len(by_band) > 2
    for name, values in by_band.items():
        mean = found["metrics"][f"probability_{name}"]
        assert mean == pytest.approx(sum(values) / len(values))
    for count in range(2, 300):
        _, low, _, high = band(count).split("_")
        assert int(low) <= count <= int(high)
        assert int(high) + 1 == 2 * int(low)
        assert int(low).bit_count() == 1
    assert (band(0), band(1)) == ("told_0", "told_1")


def test_the_error_is_over_questions() -> None:
    found = measured(questions=40)
    sums: dict[str, float] = defaultdict(float)
    for item in found["items"]:
        sums[item["question"]] += item["probability"] - found["metrics"]["probability"]
    spread = sum(value**2 for value in sums.values()) * 40 / 39
    expected = math.sqrt(spread) / len(found["items"])
    assert found["standard_errors"]["probability"] == pytest.approx(expected)


def test_a_written_world_is_asked_with_its_own_counts(tmp_path: Path) -> None:
    settings = {k: v for k, v in TABLES.settings.to_json().items() if k != "seed"}
    for documents in (60, 90):
        options = WorldOptions(
            seed=3, documents=documents, held_out_documents=2, prompts=4, settings=settings
        )
        folder, maker = tmp_path / str(documents), WorldMaker()
        maker.write(folder, options)
        made = maker.made(folder, options).suites["lookups"]
        if documents == 60:
            first = made.identity
    assert made.identity != first


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(SuiteError, match="allowed are problems, facts, held_out_facts, stories"):
        made_lines(suite(), MADE)
    with pytest.raises(SuiteError, match="lookups: style is 'verse'; allowed are narrate"):
        list(made_lines(suite(options={"style": "verse"}), MADE_OF_TABLES))
    with pytest.raises(
        SuiteError, match="lookups: facts is 'all'; allowed are withheld, told_wrongly, be"
    ):
        list(made_lines(suite(options={"facts": "all"}), MADE_OF_TABLES))
    with pytest.raises(SuiteError, match="which is for the kinds lookups, not for cloze"):
        made_lines(suite(kind="cloze"), MADE_OF_TABLES)
    config = EvaluationConfig(suites=(suite(made=None, path=__file__),))
    with pytest.raises(SuiteError, match="kind lookups asks what is made; give it made"):
        evaluate(subject(tables=True), config)


@pytest.mark.parametrize("group", ["withheld", "told_wrongly"])
def test_kept_facts_are_asked_in_compositions_that_training_has_not(
    group: str, tmp_path: Path
) -> None:
    shape = {"tables": 4, "table_values": 5, "slots": 4, "steps": (0.0, 1.0, 1.0, 1.0)}
    made = WorldSettings(
        operation_kind="table",
        quantities=1,
        answer="first_and_last",
        withheld=12,
        told_wrongly=12,
        **shape,
    )
    write_world(made, tmp_path, Sizes({"problems": 1500}, 2, 4, 4))
    world, counts, tables = World(made), Counts.read(tmp_path), tables_of(made)
    kept = tables.withheld | tables.told_wrongly
    words = {o.words[0]: number for number, o in enumerate(tables.operations)}
    trained, facts = set(), set()
    for line in map(json.loads, (tmp_path / f"{group}.jsonl").read_text().splitlines()):
        start, *names = line["question"].removesuffix(" ?").split(" . ")
        problem = table_problem(tables, "tom", int(start.split()[-1]), [words[n] for n in names])
        numbers = [tables.number(at) for at in problem.lookups]
        assert line["answer"] == world.writer.answer(problem)
        assert [number for number in numbers if number in kept] == [line["fact"]]
        assert line["fact"] in (numbers[0], numbers[-1])
        others = [counts.right[number] for number in numbers if number != line["fact"]]
        assert line["least_told"] == min(others) > 0
        assert split_of(made, line["question"]) == "train"
        trained.add(problem.composition)
        facts.add(line["fact"])
    assert facts <= getattr(tables, group)
    assert len(facts) > 8
    asked = SuiteConfig(
        name="l", kind="lookups", made="lookups", options={"style": "plan", "facts": group}
    )
    lines = list(made_lines(asked, Made("never read", suites=suites_of(world, counts))))
    assert len(lines) > 100
    for line in lines:
        question = line["contexts"][0].split(" answer :")[0].removeprefix("question : ")
        composition = tuple(words[n] for n in question.removesuffix(" ?").split(" . ")[1:])
        assert composition not in trained
        assert split_of(made, question) == "test"
        assert line["group"] == "told_0"
        operation = (int(line["answer"]) - tables.in_slot) // 5
        assert any(tables[number].operation == operation for number in getattr(tables, group))


def test_the_other_facts_are_told_as_often_as_is_asked_or_the_world_is_refused(
    tmp_path: Path,
) -> None:
    made = WorldSettings(
        operation_kind="table",
        quantities=1,
        answer="first_and_last",
        tables=6,
        table_values=4,
        steps=(0.0, 1.0, 1.0, 1.0),
        withheld=8,
        kept_ranks=2,
        least_told=8,
    )
    tables = tables_of(made)
    for number in tables.withheld:
        at = tables[number]
        shared = tables.result(at) if at.operation < 6 else at.value
        assert shared % tables.in_slot // 4 < 2
    write_world(made, tmp_path, Sizes({"problems": 6000}, 2, 4, 4))
    counts = Counts.read(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "withheld.jsonl").read_text().splitlines()]
    assert Counter(line["fact"] for line in lines) == dict.fromkeys(tables.withheld, 2)
    assert len({line["question"] for line in lines}) == 16
    assert min(line["least_told"] for line in lines) >= 8
    for _, problem in KeptFacts(World(made), counts, "withheld").test(60):
        numbers = {tables.number(at) for at in problem.lookups} - tables.withheld
        assert min(counts.right[number] for number in numbers) >= 1
    beside = lookups_of(World(made), counts, "beside_withheld")
    steps = sum(line["question"].count(" . ") for line in lines)
    assert len(beside) == steps - len(lines)
    told = [counts.right[number] for number in range(len(tables))]
    assert {line["group"] for line in beside} <= {band(n) for n in told if n >= 8}
    rare = replace(made, least_told=10_000)
    said = "8 of the 8 facts withheld have fewer than 2 questions whose .* least_told = 10000 times"
    with pytest.raises(WorldError, match=said):
        write_world(rare, tmp_path / "rare", Sizes({"problems": 300}, 2, 4, 4))
