"""Suites that sample: what they ask, what counts, and what they write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import generators_for_tests
import pytest
import torch
from evaluated_models import MADE, TEMPLATE, WORLD, logits_behind, small_model, subject
from hypothesis import given
from hypothesis import strategies as st

from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.data.conversations import Frames, Turn
from megarlx.data.prompts import FewShot
from megarlx.evaluation.questions import SuiteError, check_suites, few_shot_of, questions_of
from megarlx.evaluation.readiness import PROBE
from megarlx.evaluation.results import ResultError, finished, read_result, result_path, results_of
from megarlx.evaluation.sampled import play
from megarlx.evaluation.suites import Parent, described, evaluate, metrics_of
from megarlx.rollouts.rewards.answers import answer_format, marked_answer
from megarlx.rollouts.rewards.process import RewardError
from megarlx.rollouts.rewards.sample import Sample
from megarlx.study.world.maker import WorldMaker
from megarlx.study.world.problems import guessing_pass_at_k

TOKENIZER = WORLD.tokenizer()
EVEN = {"function": "rewards_for_tests:even_letters", "workers": 0}


def suite(**fields: Any) -> SuiteConfig:
    given = {} if "path" in fields else {"made": "problems"}
    short = {"samples": 4, "ks": (1, 4), "max_new_tokens": 6, "questions": 5}
    return SuiteConfig.model_validate(
        {"name": "s", "kind": "pass_at_k", **given, **short, **fields}
    )


def config(*suites: SuiteConfig, **fields: Any) -> EvaluationConfig:
    return EvaluationConfig(suites=suites, slots=16, **fields)


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_reward_of_every_sample_is_counted(tmp_path: Path) -> None:
    chosen = suite(rewards=[EVEN])
    (found,) = evaluate(subject(), config(chosen, kept_samples=4), run=tmp_path)
    kept = [
        json.loads(line)
        for line in (tmp_path / "samples" / "iter_00000007.s.jsonl").read_text().splitlines()
    ]
    assert len(kept) == 5 * 4
    for item in found["items"]:
        own = [line for line in kept if line["id"] == item["id"]]
        assert item["correct"] == sum(len(line["completion"]) % 2 == 0 for line in own)
        assert item["truncated"] == sum(line["finish_reason"] == "length" for line in own)
    assert read_result(result_path(tmp_path, 7, "s")) == json.loads(json.dumps(found))
    assert metrics_of([found])["eval/s/pass_at_1"] == found["metrics"]["pass_at_1"]
    assert "(guessing " in described(found)
    for k in (1, 4):
        expected = guessing_pass_at_k(WORLD.settings, k)
        assert found["guessing"][f"pass_at_{k}"] == pytest.approx(expected, abs=1e-9)


def test_rounds_do_not_change_samples() -> None:
    few = evaluate(subject(), config(suite(rewards=[EVEN])))
    many = evaluate(subject(), config(suite(rewards=[EVEN]), kept_samples=0))
    narrow = evaluate(subject(), EvaluationConfig(suites=(suite(rewards=[EVEN]),), slots=2))
    assert few[0]["items"] == many[0]["items"] == narrow[0]["items"]


def test_greedy_samples_are_what_one_pass_a_token_says() -> None:
    model = small_model()
    chosen = suite(samples=1, ks=(1,), temperature=0.0, questions=2, rewards=[EVEN])
    questions = questions_of(chosen, MADE)
    played = play(model, TOKENIZER, TEMPLATE, chosen, questions, FewShot(), seed=1)
    for one in played:
        ids = TEMPLATE.prompt_ids((Turn("user", one.question.text),), TOKENIZER)
        begin = len(ids)
        while len(ids) < begin + 6 and ids[-1] != TOKENIZER.eos_id:
            ids.append(int(logits_behind(model, ids).argmax()))
        text = TOKENIZER.decode_sampled([i for i in ids[begin:] if i != TOKENIZER.eos_id])
        assert one.episodes[0].turns[0].action == text


def test_another_generator_is_asked_and_gives_the_same_result() -> None:
    generators_for_tests.asked.clear()
    chosen = suite(rewards=[EVEN], stop_strings=("ann",))
    other = suite(**{**chosen.model_dump(), "generator": "generators_for_tests:Counting"})
    one, two = (evaluate(subject(), config(which))[0] for which in (chosen, other))
    assert generators_for_tests.asked == [5]
    assert one["items"] == two["items"]
    assert one["settings"] != two["settings"]  # it may give others


def test_base_models_see_examples_and_trained_ones_do_not() -> None:
    chosen = suite(few_shot=2, options={"style": "calculate"})
    assert few_shot_of(chosen, MADE, 0, is_base=False) == FewShot()
    shots = few_shot_of(chosen, MADE, 0, is_base=True)
    assert len(shots.examples) == 2
    assert shots == few_shot_of(chosen, MADE, 0, is_base=True)
    assert shots != few_shot_of(chosen, MADE, 1, is_base=True)
    ids = shots.ids(TEMPLATE, TOKENIZER)
    text = TOKENIZER.decode(ids)
    assert text.count("question :") == text.count("####") == 2
    assert text.count("<eos>") == 2
    assert ids[-1] == TOKENIZER.eos_id
    tested = {question.text for question in questions_of(suite(questions=200), MADE)}
    assert not tested & {example.turns[0].content for example in shots.examples}


def test_examples_and_questions_of_a_file(tmp_path: Path) -> None:
    demonstrations = lines(
        tmp_path / "d.jsonl",
        *({"question": f"q{i}", "answer": f"a{i}"} for i in range(5)),
    )
    asked = lines(
        tmp_path / "q.jsonl",
        {"question": "how many ?", "answer": "12", "id": "first", "group": "easy"},
        {"question": "and now ?", "answer": 4},
    )
    chosen = suite(path=asked, few_shot=3, few_shot_path=demonstrations, few_shot_separator="\n\n")
    questions = questions_of(chosen, None)
    assert [(q.id, q.reference, q.group) for q in questions] == [
        ("first", "12", "easy"),
        ("q/1", "4", None),
    ]
    shots = few_shot_of(chosen, None, 0, is_base=True)
    assert len({example.turns for example in shots.examples}) == 3
    with pytest.raises(SuiteError, match="holds 5 examples; 6 are to be shown"):
        few_shot_of(
            suite(path=asked, few_shot=6, few_shot_path=demonstrations), None, 0, is_base=True
        )
    double = lines(
        tmp_path / "two.jsonl", *[{"question": "a", "id": 1}, {"question": "b", "id": 1}]
    )
    with pytest.raises(SuiteError, match="uses the id '1' twice"):
        questions_of(suite(path=double), None)


def test_questions_whose_prompts_are_too_long_are_left_out_where_a_limit_says_so(
    tmp_path: Path,
) -> None:
    asked = lines(
        tmp_path / "q.jsonl",
        {"question": "how many ? how many ? how many ?", "answer": "12"},
        {"question": "how many ?", "answer": "4"},
    )
    chosen = suite(path=asked, rewards=[EVEN], max_prompt_tokens=10)
    (found,) = evaluate(subject(), config(chosen))
    assert [item["id"] for item in found["items"]] == ["q/1"]
    with pytest.raises(SuiteError, match="max_prompt_tokens is 3; every prompt has more"):
        evaluate(subject(), config(suite(path=asked, rewards=[EVEN], max_prompt_tokens=3)))


def test_a_result_of_a_version_that_knew_fewer_settings_is_kept(tmp_path: Path) -> None:
    chosen = config(suite(rewards=[EVEN]))
    (first,) = evaluate(subject(), chosen, run=tmp_path)
    (path,) = (tmp_path / "evaluations").iterdir()
    held = json.loads(path.read_text())
    del held["settings"]["suite"]["max_prompt_tokens"]
    path.write_text(json.dumps(held))
    assert finished(path, first["settings"]) == held
    changed = {**first["settings"], "seed": 99}
    assert finished(path, changed) is None


def test_stop_strings_end_a_completion_and_are_cut_off() -> None:
    model = small_model()
    chosen = suite(
        samples=32, ks=(1,), temperature=1.0, max_new_tokens=20, questions=2, rewards=[EVEN]
    )
    questions = questions_of(chosen, MADE)

    def completions(which: SuiteConfig) -> list[tuple[str, str]]:
        played = play(model, TOKENIZER, TEMPLATE, which, questions, FewShot(), seed=1)
        made = [episode for one in played for episode in one.episodes]
        return [(e.turns[0].action, e.trajectory.reasons[0]) for e in made if e.trajectory]

    free = completions(chosen)
    stop = max((w for text, _ in free for w in text.split()), key=lambda w: len(w))
    stopped = completions(chosen.model_copy(update={"stop_strings": (stop,)}))
    assert sum(reason == "stop_string" for _, reason in stopped) >= 1
    for (text, _), (cut, reason) in zip(free, stopped, strict=True):
        assert stop not in cut
        if reason == "stop_string":
            assert cut == text[: text.find(stop)]


def test_behaviour_is_mean_reward_violations_and_drift_from_the_parent(tmp_path: Path) -> None:
    chosen = suite(
        kind="behaviour",
        made="behaviours",
        templated=False,
        rewards=[EVEN],
        violation_below=0.5,
    )
    parent, child = tmp_path / "parent", tmp_path / "child"
    (before,) = evaluate(subject(), config(chosen), run=parent)
    moved = small_model()
    moved.data_parallel.weights.mul_(0.5)
    (after,) = evaluate(
        subject(moved, is_base=False), config(chosen), run=child, parent=Parent(parent, 7)
    )
    rewards = [item["reward"] for item in before["items"]]
    assert before["metrics"]["mean"] == pytest.approx(sum(rewards) / 5)
    assert before["metrics"]["violation_rate"] == pytest.approx(1 - sum(rewards) / 5)
    drift = after["metrics"]["mean"] - before["metrics"]["mean"]
    assert after["metrics"]["drift"] == pytest.approx(drift)
    low, high = after["drift_interval"]
    assert low <= drift <= high
    assert "drift" not in before["metrics"]
    assert before["items"][0]["group"] in {name for name, _ in WORLD.settings.behaviours}


def test_a_parent_that_was_asked_in_another_template_gives_no_drift(tmp_path: Path) -> None:
    asked = lines(tmp_path / "q.jsonl", {"question": "tom has 9 pears"}, {"question": "how many ?"})
    chosen = config(suite(kind="behaviour", path=asked, rewards=[EVEN]))
    other = dataclasses.replace(subject(), template=Frames("{content} answer :"))
    evaluate(other, chosen, run=tmp_path / "parent")
    child = subject(is_base=False)
    (found,) = evaluate(child, chosen, run=tmp_path / "one", parent=Parent(tmp_path / "parent", 7))
    assert "drift" not in found["metrics"]
    assert "s.json was asked in another template" in described(found)
    evaluate(subject(), chosen, run=tmp_path / "parent")
    (found,) = evaluate(child, chosen, run=tmp_path / "two", parent=Parent(tmp_path / "parent", 7))
    assert found["metrics"]["drift"] == 0


def test_no_question_is_asked_behind_its_own_answer(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(9)]
    asked = lines(tmp_path / "q.jsonl", *rows)
    for first in range(8):  # the suite asks as many; the others may be shown
        chosen = suite(path=asked, questions=first + 1, few_shot=8 - first, few_shot_path=asked)
        shots = few_shot_of(chosen, None, 0, is_base=True)
        shown = {example.question[-1].content for example in shots.examples}
        assert shown == {f"q{i}" for i in range(first + 1, 9)}
    whole = suite(path=asked, questions=9, few_shot=1, few_shot_path=asked)
    with pytest.raises(SuiteError, match="0 examples beside questions of the suite itself; 1 are"):
        few_shot_of(whole, None, 0, is_base=True)
    # Where RL begins the probe asks as RL does.
    probe = whole.model_copy(update={"name": f"rl{PROBE}"})
    assert len(few_shot_of(probe, None, 0, is_base=True).examples) == 1


def test_a_parent_that_was_measured_in_another_way_gives_no_drift_and_both_are_said(
    tmp_path: Path,
) -> None:
    asked = lines(tmp_path / "q.jsonl", {"question": "tom has 9 pears"}, {"question": "how many ?"})
    warm, cold = (
        config(suite(kind="behaviour", path=asked, rewards=[EVEN], temperature=t)) for t in (2, 0)
    )
    parent, said = tmp_path / "parent", list[str]()
    evaluate(subject(), warm, run=parent)
    child = subject(is_base=False)
    (found,) = evaluate(child, cold, run=tmp_path / "one", parent=Parent(parent, 7))
    assert "drift" not in found["metrics"]
    assert "measured with temperature 2.0, and this with temperature 0.0" in described(found)
    evaluate(subject(), cold, run=parent, say=said.append)
    assert said[0] == "s: with temperature 0.0; replaces the result with temperature 2.0"
    evaluate(subject(), cold, run=parent, say=said.append)
    assert said[2:] == ["s: there already"]
    (found,) = evaluate(child, cold, run=tmp_path / "two", parent=Parent(parent, 7))
    assert found["metrics"]["drift"] == 0


def test_what_asks_in_a_template_needs_one_and_its_result_says_which(tmp_path: Path) -> None:
    asked = lines(tmp_path / "q.jsonl", {"question": "tom has 9 pears", "answer": "12"})
    without = dataclasses.replace(subject(), template=None)
    with pytest.raises(
        SuiteError, match=r"suite s: it asks in a template, and this model has none"
    ):
        evaluate(without, config(suite(path=asked)))
    (found,) = evaluate(subject(), config(suite(path=asked)))
    assert found["settings"]["template"] == dataclasses.asdict(TEMPLATE)
    # As they stand, or by likelihoods: whatever the template is, and without one.
    raw = config(suite(path=asked, templated=False))
    likelihoods = config(suite(kind="choice", made="facts", questions=3))
    for settings in (raw, likelihoods):
        one, other = (evaluate(who, settings)[0] for who in (without, subject()))
        assert one["settings"] == other["settings"]
        assert one["settings"]["template"] is None
        assert one["items"] == other["items"]


def test_where_the_form_is_all_that_is_asked_every_sample_in_it_is_right() -> None:
    chosen = suite(rewards=[EVEN], form="rewards_for_tests:even_letters", samples=16)
    (found,) = evaluate(subject(), config(chosen))
    metrics = found["metrics"]
    assert 0 < metrics["marked"] == metrics["pass_at_1"] < 1
    assert metrics["right_of_marked"] == 1
    assert [i["marked"] for i in found["items"]] == [i["correct"] for i in found["items"]]


def test_marked_and_right_of_marked_multiply_to_pass_at_1() -> None:
    """Where what is right is in the form: here the longer ones of an even number of letters."""
    long = {"function": "rewards_for_tests:even_and_long", "workers": 0}
    chosen = suite(rewards=[long], form="rewards_for_tests:even_letters", samples=16)
    (found,) = evaluate(subject(), config(chosen))
    (plain,) = evaluate(subject(), config(suite(rewards=[long], samples=16)))
    m, a = found["metrics"]["marked"], found["metrics"]["right_of_marked"]
    assert 0 < a < 1
    assert m * a == pytest.approx(plain["metrics"]["pass_at_1"], rel=1e-12)
    assert found["metrics"]["pass_at_4"] == plain["metrics"]["pass_at_4"]
    marked, right = (
        [item[key] / 16 for item in found["items"]] for key in ("marked", "marked_correct")
    )
    assert a == pytest.approx(sum(right) / sum(marked))
    away = [r - a * one for r, one in zip(right, marked, strict=True)]
    error = (sum(value**2 for value in away) / (5 * 4)) ** 0.5 / m
    assert found["standard_errors"]["right_of_marked"] == pytest.approx(error)


@given(st.lists(st.sampled_from(["####", "1", "8", "so", "."]), max_size=8), st.booleans())
def test_every_answer_that_a_world_counts_as_right_has_the_form(
    words: list[str], finished: bool
) -> None:
    sample = Sample("?", " ".join(words), "1 8", {}, "stop" if finished else "length")
    (right,), (marked,) = marked_answer([sample]), answer_format([sample])
    assert right is not None
    assert right <= marked


def test_where_nothing_has_the_form_there_is_no_share_of_it() -> None:
    (found,) = evaluate(subject(), config(suite(form="answer_format")))
    assert found["metrics"]["marked"] == found["metrics"]["pass_at_1"] == 0
    assert "right_of_marked" not in found["metrics"]


def test_group_size_adds_the_share_of_informative_groups() -> None:
    (found,) = evaluate(subject(), config(suite(rewards=[EVEN], group_size=2)))
    share = 0.0
    for item in found["items"]:
        c, n = item["correct"], item["samples"]
        share += 2 * c * (n - c) / (n * (n - 1)) / len(found["items"])
    assert 0 < share < 1
    assert found["metrics"]["informative_groups"] == pytest.approx(share)


def test_what_a_result_depends_on_makes_it_be_computed_again(tmp_path: Path) -> None:
    asked = lines(tmp_path / "q.jsonl", {"question": "tom has 9 pears", "answer": "12"})
    chosen = config(suite(path=asked))
    said: list[str] = []

    def again(which: Any = None, settings: EvaluationConfig = chosen) -> bool:
        said.clear()
        evaluate(which or subject(), settings, run=tmp_path / "run", say=said.append)
        return not any("there already" in line for line in said)

    assert again()
    assert not again()
    assert again(settings=chosen.model_copy(update={"seed": 4}))
    assert again(settings=chosen)
    one, another = (dataclasses.replace(subject(), digest=name) for name in ("one", "another"))
    assert not again(one)  # weights that were measured in training are that step's checkpoint
    result_path(tmp_path / "run", 7, "s").unlink()
    assert again(one)
    assert again(another)
    assert again(dataclasses.replace(subject(), template=Frames(user="{content}")))
    assert again()
    assert again(dataclasses.replace(subject(), model=small_model(dtype=torch.float64)))
    assert again()
    lines(Path(asked), {"question": "tom has 9 pears", "answer": "13"})
    assert again()
    assert not again()
    assert not again(settings=chosen.model_copy(update={"slots": 8}))
    assert [r["iteration"] for r in results_of(tmp_path / "run", "s")] == [7]


def test_a_broken_reward_stops_the_suite_with_its_reason(tmp_path: Path) -> None:
    bad = suite(rewards=[{**EVEN, "function": "rewards_for_tests:broken"}])
    with pytest.raises(RewardError, match="this reward is broken"):
        evaluate(subject(), config(bad), run=tmp_path)
    assert not (tmp_path / "evaluations").exists()


def test_prompts_too_long_for_the_model_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        SuiteError, match=r"max_new_tokens is 90; model.max_sequence_length allows 96"
    ):
        evaluate(subject(), config(suite(max_new_tokens=90)))


def test_the_world_has_a_suite_of_every_kind_that_reads_or_samples() -> None:
    kinds = {made.kind for made in WorldMaker.evaluated}
    assert kinds == {"pass_at_k", "choice", "cloze", "perplexity", "behaviour"} - {"behaviour"}


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, said in (("{", "is not JSON"), ('{"format": 9}', "has the format 9"), ("[]", "None")):
        path.write_text(text)
        with pytest.raises(ResultError, match=said):
            read_result(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "x", "made": "problems"}, "path: and made cannot be given together"),
        ({"made": None}, "path: or made is needed"),
        ({"path": "x", "options": {"style": "plan"}}, "options: are for what is made"),
        ({"ks": (9,)}, "ks: are [9]; samples = 4 allows none"),
        ({"ks": ()}, "ks: is empty"),
        ({"group_size": 9}, "group_size: is 9; samples is 4"),
        ({"path": "x", "few_shot": 3}, "few_shot_path: is missing; 3 examples"),
        ({"path": "x", "kind": "behaviour"}, "rewards: are missing"),
        (
            {"kind": "behaviour", "made": "behaviours", "form": "answer_format"},
            "form: is for pass_at_k, not for behaviour",
        ),
        ({"kind": "cloze", "made": "facts", "few_shot": 2}, "few_shot: is for pass_at_k and"),
        ({"name": "../x"}, "name: is '../x'; allowed are letters"),
    ],
)
def test_suites_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        suite(**fields)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"made": "chemistry"}, "allowed are problems, facts, held_out_facts"),
        ({"kind": "choice"}, "which is for the kinds pass_at_k, perplexity, not for choice"),
        ({"options": {"stile": "plan"}}, "whose options are style, not stile"),
        ({"kind": "behaviour", "made": "behaviours"}, "as they stand: templated = false"),
    ],
)
def test_what_is_not_made_cannot_be_asked_for(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=rf"suite s: made is '\w+', .*{said}"):
        check_suites(config(suite(**fields)), MADE)
    with pytest.raises(SuiteError, match=r"the run's \[data\] names no maker; give it a path"):
        check_suites(config(suite(**fields)), None)
    check_suites(config(suite()), MADE)


def test_names_of_suites_differ() -> None:
    with pytest.raises(ValueError, match="use the name s more than once"):
        config(suite(), suite())


@pytest.mark.parametrize("section", [SuiteConfig, EvaluationConfig])
def test_every_field_has_a_one_line_description(section: Any) -> None:
    for name, field in section.model_fields.items():
        assert field.description, name
        assert len(field.description) <= 100, name
