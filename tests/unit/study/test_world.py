import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.conversations import read_conversations
from megarlx.data.draw import Draw
from megarlx.data.prompts import read_prompts
from megarlx.data.token_files import TokenFile
from megarlx.data.tokenizer import load_tokenizer
from megarlx.study.world.behaviours import ASKS, follows, reply, request_at
from megarlx.study.world.facts import PARAPHRASES
from megarlx.study.world.files import Sizes, write_world
from megarlx.study.world.problems import Problem, guessing_pass_at_k, split_of
from megarlx.study.world.settings import (
    PLAIN_OPERATIONS,
    STYLES,
    Operation,
    WorldError,
    WorldSettings,
)
from megarlx.study.world.solutions import checkable
from megarlx.study.world.world import World, is_correct

SWAP = Operation("swap", ("trades",), 0.2)
WORLDS = {
    "default": WorldSettings(seed=1),
    "one number": WorldSettings(seed=2, quantities=1),
    "digits": WorldSettings(seed=3, digits=True, largest=999, start=(10, 300), quantities=1),
    "long": WorldSettings(
        seed=4, steps=(1.0,) * 12, quantities=3, operations=(*PLAIN_OPERATIONS, SWAP)
    ),
    "several": WorldSettings(
        seed=5, several=(("1", 0.5), ("3", 0.5)), demonstrations_per_question=3
    ),
}


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return World(WORLDS[request.param])


def texts(world: World, count: int = 60) -> list[str]:
    kinds = ("problems", "facts", "stories", "behaviours")
    found = [world.document(kind, i) for kind in kinds for i in range(count)]
    found += [world.held_out_document(kind, i) for kind in kinds[:3] for i in range(count)]
    found += [text for i in range(count) for text in world.demonstrations(i)["answers"]]
    found += [world.few_shot(3, style) for style in STYLES]
    found += [world.behaviour_prompt(i)["prompt"] for i in range(count)]
    for test in world.capability_tests():
        found += [test["context"] + choice for choice in test["choices"]]
    return found


def test_the_word_list_covers_everything_and_decodes_to_the_text(world: World) -> None:
    tokenizer = world.tokenizer()
    for text in texts(world):
        assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


def test_a_world_is_a_function_of_its_settings() -> None:
    again = World(WorldSettings.from_json(json.loads(json.dumps(WORLDS["long"].to_json()))))
    assert again.settings == WORLDS["long"]
    assert texts(again, 20) == texts(World(WORLDS["long"]), 20)
    other = World(WorldSettings(**{**WORLDS["long"].__dict__, "seed": 9}))
    assert texts(other, 20) != texts(again, 20)


def test_a_document_does_not_depend_on_which_were_made_before() -> None:
    one, two = World(WorldSettings()), World(WorldSettings())
    forwards = [one.document("problems", i) for i in range(20)]
    assert forwards == [two.document("problems", i) for i in reversed(range(20))][::-1]


def solve(world: World, problem: Problem) -> list[int]:
    """The question's text worked out word by word, independently of how it was drawn."""
    number_words = world.writer.question(problem).replace(" how many ?", "")
    if world.settings.digits:
        merged: list[str] = []
        for word in number_words.split():
            if word.isdigit() and merged and merged[-1].isdigit():
                merged[-1] += word
            else:
                merged.append(word)
        number_words = " ".join(merged)
    first, *steps = [part.split() for part in number_words.split(" .")[:-1]]
    kinds = {w: o.kind for o in world.settings.operations for w in o.words}
    amounts = {first[i + 1]: int(first[i]) for i in range(2, len(first), 3)}
    for step in steps:
        kind, rest = kinds[step[1]], [w for w in step[2:] if w not in ("by", "with")]
        if kind == "swap":
            amounts[rest[0]], amounts[rest[1]] = amounts[rest[1]], amounts[rest[0]]
            continue
        operand, thing = int(rest[0]), rest[1] if len(rest) > 1 else next(iter(amounts))
        value = amounts[thing]
        if kind == "divide":
            assert value % operand == 0
        amounts[thing] = {
            "add": value + operand,
            "subtract": value - operand,
            "times": value * operand,
            "divide": value // operand,
        }[kind]
        assert 0 <= amounts[thing] <= world.settings.largest
    return list(amounts.values())


def test_answers_are_what_the_question_says(world: World) -> None:
    for index in range(150):
        problem = world.problem("test", index)
        assert list(problem.answer) == solve(world, problem)
        for style in STYLES:
            assert is_correct(checkable(problem, style, world.writer), world.writer.answer(problem))


def test_no_test_question_stands_in_any_training_text(world: World) -> None:
    kept_out = {
        world.writer.question(world.problem(split, i))
        for split in ("validation", "test")
        for i in range(200)
    }
    seen = {
        part.split(" answer :")[0]
        for i in range(300)
        for part in world.document("problems", i).split("question : ")[1:]
    } | {world.demonstrations(i)["question"] for i in range(300)}
    assert not kept_out & seen
    assert {split_of(world.settings, q) for q in seen} == {"train"}


def test_knobs_move_what_they_say(world: World) -> None:
    problems = [world.problem("train", i) for i in range(600)]
    steps = Counter(len(problem.steps) for problem in problems)
    assert set(steps) == set(range(1, len(world.settings.steps) + 1))
    for problem in problems:
        used = Counter(step.operation.kind for step in problem.steps)
        for operation in world.settings.operations:
            assert operation.at_most is None or used[operation.kind] <= operation.at_most


def test_modes_and_styles_have_their_shares() -> None:
    world = World(WorldSettings(modes=(("checkable", 0.25), ("words", 0.75)), quantities=1))
    documents = [world.document("problems", i) for i in range(2000)]
    checkable_share = sum("####" in d for d in documents) / 2000
    assert abs(checkable_share - 0.25) < 0.04  # 4 standard errors
    teach = sum("we take" in d for d in documents) / 2000
    assert abs(teach - 0.05) < 0.02


def test_correctness_needs_exactly_the_answer_at_the_end() -> None:
    assert is_correct("so 8 ; #### 1 8", "1 8")
    for wrong in ("#### 1", "#### 1 8 .", "#### 1 8 #### 1 8", "1 8", "", "#### 8 1", "####"):
        assert not is_correct(wrong, "1 8")


def test_the_guessing_baseline_is_that_of_a_simulated_guesser() -> None:
    world = World(WorldSettings(quantities=1))
    answers = [world.problem("train", i).answer for i in range(3000)]
    draw, k = Draw("guess"), 4
    right = [world.problem("test", i).answer for i in range(1500)]
    solved = sum(any(draw.one(answers) == answer for _ in range(k)) for answer in right)
    assert abs(solved / 1500 - guessing_pass_at_k(world.settings, k)) < 0.05


def test_two_numbers_bring_guessing_at_32_below_a_tenth() -> None:
    assert guessing_pass_at_k(WorldSettings(quantities=1), 32, 1500) > 0.5
    assert guessing_pass_at_k(WorldSettings(quantities=2), 32, 1500) < 0.1


def test_held_out_paraphrases_never_stand_in_training_text() -> None:
    world = World(WorldSettings(seed=8, entities=6, attributes=2))
    training = " ".join(world.document("facts", i) for i in range(2000))
    for number in range(len(world.facts)):
        fact = world.facts[number]
        for paraphrase, form in enumerate(PARAPHRASES):
            said = form.format(entity=fact.entity, attribute=fact.attribute, value=fact.value)
            assert (said in training) == (paraphrase != fact.held_out)


def test_a_skewed_world_tells_facts_as_often_as_their_rank_says() -> None:
    world = World(WorldSettings(entities=5, attributes=2, fact_skew=1.0))
    places = {}
    for number in range(10):
        places[world.facts[number].entity, world.facts[number].value] = number
    told: Counter[int] = Counter()
    for index in range(4000):
        for sentence in world.document("facts", index).split(" ."):
            said = set(sentence.split())
            told.update(n for names, n in places.items() if set(names) <= said)
    total = sum(1 / rank for rank in range(1, 11))
    for rank, number in enumerate(world.facts.by_frequency, start=1):
        assert told[number] / told.total() == pytest.approx(1 / rank / total, abs=0.012)
    tests = [t for t in world.capability_tests() if t["suite"] == "facts_cloze"]
    rare = {number for number, test in enumerate(tests) if test["group"] == "rare"}
    assert rare == set(world.facts.by_frequency[5:])


def test_skew_changes_how_often_facts_are_told_and_nothing_else() -> None:
    even, skewed = (World(WorldSettings(entities=5, fact_skew=skew)) for skew in (0.0, 1.0))
    assert "group" not in next(iter(even.capability_tests()))
    assert even.held_out_document("facts", 3) == skewed.held_out_document("facts", 3)
    assert even.document("problems", 3) == skewed.document("problems", 3)
    assert even.document("facts", 3) != skewed.document("facts", 3)


def test_capability_tests_have_one_true_choice() -> None:
    world = World(WorldSettings(entities=7))
    tests = list(world.capability_tests())
    assert Counter(test["suite"] for test in tests).keys() == {
        *("facts_cloze", "facts_choice", "facts_held_out_cloze", "facts_held_out_choice")
    }
    assert len(tests) == 4 * len(world.facts) == 4 * 7 * 5
    for test in tests:
        assert (
            len(set(test["choices"]))
            == len(test["choices"])
            == (4 if "choice" in test["suite"] else 12)
        )
    places = Counter(t["answer"] for t in tests if t["suite"] == "facts_choice")
    assert set(places) == {0, 1, 2, 3}
    told = " ".join(world.document("facts", i) for i in range(3000))
    for test in tests[:40]:
        if "held_out" not in test["suite"]:
            assert test["context"] + test["choices"][test["answer"]] in told


@pytest.mark.parametrize("behaviour", list(ASKS))
def test_replies_that_follow_pass_the_checker_and_others_mostly_fail(behaviour: str) -> None:
    made = WorldSettings(behaviours=((behaviour, 1.0),))
    failed = 0
    for index in range(200):
        request = request_at(made, index)
        assert request.behaviour == behaviour
        good = reply(request, True, Draw("good", index))
        assert follows(behaviour, request.arguments, good), (request, good)
        bad = reply(request, False, Draw("bad", index))
        failed += not follows(behaviour, request.arguments, bad)
        assert not follows(behaviour, request.arguments, "")
    assert failed > 50


def test_writing_a_world_gives_files_the_rest_can_read(tmp_path: Path) -> None:
    sizes = Sizes({"problems": 30, "facts": 20}, 5, 12, 6)
    made = WORLDS["several"]
    write_world(made, tmp_path, sizes)
    world, tokenizer = World(made), World(made).tokenizer()
    assert load_tokenizer(tmp_path / "tokenizer.json").to_json() == tokenizer.to_json()
    problems = TokenFile(tmp_path / "documents_problems")
    assert len(problems.lengths) == 30
    text = tokenizer.decode(list(problems.raw[: problems.lengths[0]]))
    assert text.removesuffix(" <eos>") == world.document("problems", 0)
    assert len(TokenFile(tmp_path / "held_out_stories").lengths) == 5
    tests = read_prompts(tmp_path / "test.jsonl")
    assert [prompt.answer for prompt in tests] == [
        world.question("test", i)["reference"] for i in range(6)
    ]
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    conversations = list(read_conversations(tmp_path / "demonstrations.jsonl"))
    assert (len(prompts), len(conversations)) == (12, 12 * 3)
    for conversation, prompt in zip(conversations[::3], prompts, strict=True):
        assert conversation.turns[0].content == prompt.question
        assert is_correct(conversation.turns[-1].content, prompt.answer or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (1.0,) * 13}, "steps has 13 entries; allowed 1 to 12"),
        ({"quantities": 7}, "quantities is 7; allowed 1 to 6 objects"),
        ({"start": (5, 50)}, r"start is \(5, 50\); both must lie in 0 to largest = 40"),
        ({"styles": (("verse", 1.0),)}, "styles: verse; allowed are narrate"),
        ({"modes": (("chat", 0.0),)}, "modes: shares are"),
        ({"operations": (SWAP,)}, "at least one operation other than swap"),
        ({"operations": (SWAP, *PLAIN_OPERATIONS), "quantities": 1}, "swap needs at least 2"),
        ({"operations": (Operation("add", (), 1.0),)}, "operation add has no words"),
        ({"test_percent": 0}, "test_percent 0; allowed at least 1"),
        ({"choices": 13}, "choices is 13; 2 to 12"),
        ({"behaviour_followed": 1.5}, "behaviour_followed is 1.5"),
    ],
)
def test_settings_that_make_no_world_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(WorldError, match=message):
        WorldSettings(**changes)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(WorldError, match="unknown settings colour"):
        WorldSettings.from_json({"colour": 1})


@settings(max_examples=50)
@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_draws_stay_in_range(count: int, key: int) -> None:
    draw = Draw(key)
    assert all(0 <= draw.below(count) < count for _ in range(20))
    assert 3 <= draw.between(3, 3 + count) <= 3 + count


def test_weighted_draws_follow_their_shares_and_never_take_a_zero() -> None:
    draw = Draw(1)
    counts = Counter(draw.weighted("abcd", [0, 1, 3, 0]) for _ in range(4000))
    assert set(counts) == {"b", "c"}
    assert abs(counts["b"] - 1000) < 110  # 4 standard errors
