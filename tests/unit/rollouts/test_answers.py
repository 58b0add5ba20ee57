"""Final answers in text."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.rollouts.rewards.answers import (
    answer_format,
    final_answer,
    final_number,
    length_penalty,
    math_equal,
    number,
)
from megarlx.rollouts.rewards.sample import Sample


def sample(completion: str, reference: str | None = None, **rest: object) -> Sample:
    return Sample("q", completion, reference, **rest)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 12.\n#### 42", "42"),
        ("#### 1\nno: #### 1,200 \nbye 7", "1,200"),
        (r"\boxed{3} or rather \boxed{\frac{1}{2}} at 9", r"\frac{1}{2}"),
        (r"#### 5 then \boxed{6}", "6"),
        (r"\boxed{6} then #### 5", "5"),
        (r"never closed \boxed{1", "1"),
        ("from 10 to 12 apples.", "12"),
        ("it is 10-5", "5"),
        ("it is -5", "-5"),
        ("$1,234.50 in all", "$1,234.50"),
        ("three quarters, 3/4", "3/4"),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_last_marked_answer_is_taken_or_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_style_looks_for_nothing_else() -> None:
    text = r"\boxed{1} #### 2 and 3"
    found = {style: final_answer(text, style) for style in ("boxed", "hashes", "last_number")}
    assert found == {"boxed": "1", "hashes": "2 and 3", "last_number": "3"}
    assert final_answer("3", "boxed") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("42.", 42), ("1,234,567.5", Fraction("1234567.5")), ("-3", -3), ("−3", -3),
        ("$ 5", 5), ("50%", 50), ("12 apples", 12), ("3/4", Fraction(3, 4)), (".5", Fraction(1, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{1}{2}", Fraction(-1, 2)), ("1e3", 1000),
        ("0.30000000000000001", Fraction("0.30000000000000001")),
        ("x^2", None), (r"\sqrt{2}", None), (r"\frac12", None), ("= 5 km", 5),
        ("1/0", None), (r"\frac{1}{0}", None), ("2 or 3", None), ("x", None), ("", None),
        ("9" * 5000, None), ("1e999999999", None),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789.,/-+$#\\boxedfrac{} \n%e", max_size=60))
def test_any_text_has_an_answer_or_none_and_never_an_error(text: str) -> None:
    for style in ("any", "boxed", "hashes", "last_number"):
        answer = final_answer(text, style)
        assert answer is None or isinstance(number(answer), Fraction | None)
    assert final_number([sample(text, "#### 12345678")]) in ([0.0], [1.0])
    for style in ("boxed", "hashes"):
        assert answer_format([sample(text)], style) in ([0.0], [1.0])


def test_long_text_is_read_in_time_that_grows_with_its_length() -> None:
    for text in ("1," * 50_000, "\\boxed{" * 2_000, "{" * 50_000, "1" * 100_000, "-$ " * 30_000):
        assert final_number([sample(text, "7")]) == [0.0]


def test_final_number_compares_values_with_the_end_of_the_reference() -> None:
    reference = "2 + 3 = 5 and so on\n#### 1,200"
    right = ["#### 1200", r"\boxed{1200.0}", "it is 1200", "costs $1,200"]
    wrong = ["1201", "#### 1200\n#### 7", "", "1200 or 1300"]
    rewards = final_number([sample(text, reference) for text in right + wrong])
    assert rewards == [1.0] * 4 + [0.0] * 4
    assert final_number([sample("it is 1200", reference)], style="boxed") == [0.0]
    with pytest.raises(ValueError, match="the reference 'none' has no number"):
        final_number([sample("1", "none")])
    with pytest.raises(ValueError, match="style is 'latex'; allowed are any, marked, boxed"):
        final_number([sample("1", "1")], style="latex")


def test_format_wants_one_answer_at_the_end_of_what_stopped_by_itself() -> None:
    cases = [
        ("because\n#### 5", 1), ("#### 5\n", 1), ("#### 5\nand more", 0), ("5", 0),
        ("#### 1 #### 2", 0), ("####", 0),
    ]  # fmt: skip
    for text, expected in cases:
        assert answer_format([sample(text)]) == [expected], text
    assert answer_format([sample("#### 5", finish_reason="length")]) == [0]
    box = [(r"so \boxed{5}.", 1), (r"\boxed{\frac{1}{2}}$", 1), (r"\boxed{5} yes", 0)]
    box += [(r"\boxed{5", 0), (r"\boxed{}", 0), (r"\boxed{1}\boxed{2}", 0)]
    for text, expected in box:
        assert answer_format([sample(text)], "boxed") == [expected], text


def test_length_penalty_grows_in_the_buffer_only() -> None:
    samples = [sample("", tokens=n) for n in (1, 80, 90, 100)]
    assert length_penalty(samples, max_tokens=100, buffer=0.2) == [0, 0, -0.5, -1]


def test_math_equal_sees_through_notation() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    right = [(r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed{x^2+2x+1}", "$(x+1)^2$"), ("#### 7", "7")]
    right += [(r"\boxed{\sqrt{8}}", r"2\sqrt{2}"), (r"\boxed{(1,2)}", "(1, 2)")]
    right += [(r"\boxed{0.5}", r"\boxed{\frac12}")]
    wrong = [(r"\boxed{\frac{1}{3}}", "0.5"), (r"\boxed{x}", "$(x+1)^2$"), ("no idea", "7")]
    wrong += [(r"\boxed{x^2}", r"\sqrt{2}"), (r"\boxed{2x}", "2")]
    assert math_equal([sample(*pair) for pair in right]) == [1.0] * 6
    assert math_equal([sample(*pair) for pair in wrong]) == [0.0] * 5


def test_math_equal_never_evaluates_what_the_model_wrote(tmp_path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    trap = tmp_path / "trap"
    call = f"__import__('pathlib').Path('{trap}').touch()"
    texts = [call, rf"\boxed{{{call}}}", f"#### {call}", f"${call}$", f"The answer is {call}"]
    rewards = math_equal([sample(text, r"x^2") for text in texts])
    assert rewards == [0.0] * 5
    assert not trap.exists()
