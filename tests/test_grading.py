import random
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsd import grading, math_checker
from trsd.errors import InputError
from trsd.grading import (
    answer_form,
    as_fraction,
    check_grader,
    extract_answer,
    grade,
    has_format,
    last_boxed,
    num_undecided,
)
from trsd.math_checker import MathChecker


@pytest.mark.parametrize(
    "text,answer",
    [
        (r"Mia has \boxed{42} shells.", "42"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"an unclosed \boxed{12", "12"),
        ("2+2=<<2+2=4>>4\n#### 1,234\n", "1,234"),
        ("The answer is 17 apples.", "17"),
        ("Answer: $3.50", "3.50"),
        ("First 3, then 5 remain", "5"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"the answer is 2\sqrt{3}.", r"2\sqrt{3}"),
        (r"The answer is $\$18.90$.", r"\$18.90"),
        ("My answer is below. It must be 7.", "7"),
        ("so 8-3=5", "5"),
        ("we have 8-3", "3"),
        ("it is -3", "-3"),
        (r"first \boxed{12}, cut off in \boxed{1", "12"),
        ("the point (6,0,0)", "0"),
        ("it is 25/8, then", "25/8"),
        ("it is 12,345.5", "12,345.5"),
        ("#### Step 4: add\n2+3=5. The answer is 5.", "5"),
        ("#### 18\n\nQuestion: what are 2 pens?", "18"),
        ("#### five", "five"),
        ("no number here", None),
        ("", None),
    ],
)
def test_extract_answer_knows_the_common_forms(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text,answer",
    [
        ("The answer is 18 dollars and 50 cents.", "18.50"),
        ("#### 1,200 dollars 5 cents", "1,200.05"),
        (r"\boxed{1 dollar and 1 cent}", "1.01"),
        ("She pays 18 dollars and 50 cents", "18.50"),
        ("It is 0.5 dollars, and 50 cents more.", "50"),
    ],
)
def test_dollars_and_cents_are_one_number(text, answer):
    assert grade(text, answer)
    assert "." not in answer or not grade(text, answer.split(".")[0])


@pytest.mark.parametrize(
    "line,answer",
    [
        ("18 dollars", "18"),
        ("18 (dollars)", "18"),
        ("$18 a day", "18"),
        ("Final Answer: 18", "18"),
        ("Answer: $18", "18"),
        ("The answer is 18", "18"),
        ("Final Answer: 18 dollars\n\nI hope this helps 1 of you.", "18"),
        ("She has 18 left.", "18"),
        ("3x + 2", "3x + 2"),
        ("3 or 5", "3 or 5"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("Answer: five", "five"),
        ("1. Count\nThere are 7.", "7"),
        ("18 eggs\nThere are 7.", "7"),
    ],
)
def test_words_around_the_number_behind_hashes_are_not_part_of_it(line, answer):
    assert extract_answer(f"9 * 2 = 18\n#### {line}") == answer


def test_last_boxed_balances_braces():
    assert last_boxed(r"\boxed{a{b}c}d}") == "a{b}c"
    assert last_boxed(r"\boxed{a{b}") is None
    assert last_boxed(r"\boxed{\left\{1, 2\right.}") == r"\left\{1, 2\right."
    assert last_boxed(r"} \boxed{1 \boxed{2}} {") == "2"
    assert last_boxed(r"\boxed{}") == ""


@pytest.mark.parametrize(
    "text,value",
    [
        ("1,200", 1200),
        ("$3.50", Fraction(7, 2)),
        ("7/8", Fraction(7, 8)),
        ("-4.", -4),
        ("12%", 12),
        (r"12\%", 12),
        (r"$12\%$", 12),
        (r"\$3.50", Fraction(7, 2)),
        ("1/0", None),
        ("58,500", 58500),
        ("300,", 300),
        ("3, 5, 7", None),
        ("-2,1", None),
        ("1, 200", None),
        ("1 200", 1200),
        ("1 / 2", Fraction(1, 2)),
        ("- 4", -4),
        ("3 1/2", Fraction(7, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("3 5/2", None),
        ("1 1/0", None),
        ("1,2345", None),
        ("x+1", None),
        ("", None),
    ],
)
def test_as_fraction_reads_plain_numbers_exactly(text, value):
    assert as_fraction(text) == value


@pytest.mark.parametrize(
    "text,gold,right",
    [
        (r"\boxed{42}", "42", True),
        (r"\boxed{42.0}", "42", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{43}", "42", False),
        ("nothing", "42", False),
        (r"\boxed{\frac{1}{2}}", "1/2", True),
        (r"\boxed{\frac{1}{3}}", "1/2", False),
        (r"\boxed{x^2+1}", "1+x^2", True),
        (r"\boxed{12}", "1,2", False),
        (r"\boxed{7, 5, 3}", "3, 5, 7", True),
    ],
)
def test_grade_compares_by_value(text, gold, right):
    assert grade(text, gold) is right


@pytest.mark.parametrize(
    "answer,reference,right",
    [
        ("52_8", "52_8", True),
        ("52_{8}", "52_8", True),
        ("(52)_8", "52_{8}", True),
        (r"1{,}011_2", "1011_{2}", True),
        ("1A_{16}", "1A_{16}", True),
        ("52", "52_8", True),  # asked for in base 8
        ("52_9", "52_8", False),
        ("4343_7", "4343_6", False),
        ("53_8", "52_8", False),
        ("52_{18}", "52_8", False),
        ("53", "52_8", False),
        ("x_1", "x_2", False),
        ("x_{1}", "x_1", True),
    ],
)
def test_numbers_in_other_bases_are_other_numbers(answer, reference, right):
    assert grade(rf"\boxed{{{answer}}}", reference) is right and grade(f"The answer is {answer}.", reference) is right


@pytest.mark.parametrize("percent", ["50%", r"50\%", r"50 \%"])
def test_a_percentage_is_its_number_and_its_share_in_both_spellings(percent):
    for same in ("50", "0.5", r"\frac{1}{2}", "50%"):
        assert grade(rf"\boxed{{{percent}}}", same) and grade(rf"\boxed{{{same}}}", percent)
    for other in ("5", "5000", "0.005", "0.5%"):
        assert not grade(rf"\boxed{{{percent}}}", other) and not grade(rf"\boxed{{{other}}}", percent)


@pytest.mark.parametrize(
    "loop",
    [
        r"\boxed{",
        "the answer is not ",
        r"the answer is \frac{1}{2}+",
        r"answer is $",
        "{" * 9 + "}",
        "#### step\n",
        "1,000,",
        "3/24=",
    ],
)
def test_a_long_text_that_runs_in_circles_is_graded_in_a_moment(loop):
    text = (loop * 300_000)[:300_000]
    start = time.process_time()
    assert not grade(text, "42") and not grade(text, r"\sqrt{2}")
    assert time.process_time() - start < 5


def test_an_endless_box_is_no_answer():
    assert not grade(rf"\boxed{{{'1+' * 3000}1}}", "3001")


@given(st.text(max_size=200))
def test_extract_answer_never_raises(text):
    extract_answer(text)
    last_boxed(text)
    as_fraction(text)


def test_without_math_verify_numbers_still_compare_and_the_rest_warns(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert grade(r"\boxed{42.0}", "42")
    with pytest.warns(UserWarning, match="math-verify is not installed"):
        assert not grade(r"\boxed{\frac{84}{2}}", "42")


def test_references_that_need_math_verify_are_found_before_any_work(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_grader(["42", None, "1/2"])
    with pytest.raises(InputError, match="trsd\\[eval\\]"):
        check_grader(["42", r"\sqrt{2}"])


@pytest.mark.parametrize("verdict", ["correct as 25/8", "right, 7 of them", "not 12", "incorrect: 9"])
def test_a_verdict_on_an_answer_is_no_answer(verdict):
    assert extract_answer(f"So the answer is 33.\nI think the answer is {verdict}.") == "33"


@pytest.mark.parametrize(
    "text,form",
    [
        (r"so \boxed{3}. The answer is 4", "boxed"),
        ("2+2\n#### 4", "hashes"),
        ("The answer is 5", "stated"),
        ("Answer: B", "stated"),
        ("I take option B", "stated"),
        ("it is 5", "number"),
        (r"\boxed{ the answer is not", None),
        ("", None),
    ],
)
def test_answer_form_names_where_the_answer_was_found(text, form):
    assert answer_form(text) == form
    assert has_format(text) == (form in ("boxed", "hashes", "stated"))
    assert (extract_answer(text) is None) == (form is None)


@pytest.mark.parametrize(
    "answer,reference",
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"11,\!111,\!100", "11,111,100"),
        (r"$x + 1$", "x+1"),
    ],
)
def test_spellings_of_one_expression_are_equal_without_asking_math_verify(answer, reference, monkeypatch):
    monkeypatch.setattr(grading, "_verify", lambda *_: pytest.fail("asked"))
    assert grade(rf"\boxed{{{answer}}}", reference)


@pytest.mark.parametrize("one,other", [("3 1/2", "31/2"), (r"\pi r", r"\pir"), ("a b", "ab"), (r"a\\ b", r"a\ b")])
def test_layout_that_parts_things_is_not_taken_away(one, other):
    assert grading._spelling(one) != grading._spelling(other)


def test_answers_of_nothing_but_layout_are_not_equal():
    assert not grade(r"\boxed{\,}", r"\;") and not grade("\\boxed{3 1/2}", "31/2")


def test_texts_alike_up_to_the_longest_answer_are_not_equal():
    long = "x" * 1500
    assert grade(rf"\boxed{{{long}}}", long) and not grade(rf"\boxed{{{long}y}}", long + "z")


@pytest.fixture
def brief(monkeypatch):
    """A checker that gives up after a quarter of a second."""
    checker = MathChecker(seconds=0.25)
    monkeypatch.setattr(math_checker, "_shared", checker)
    yield checker
    checker.close()


@pytest.mark.filterwarnings("ignore:an answer could not be compared")
def test_an_endless_comparison_counts_as_wrong_and_is_counted(brief):
    assert not grade(r"\boxed{9^{9^{9^{9}}}}", r"\frac{1}{2}") and num_undecided() == 1
    assert grade(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}") and num_undecided() == 1


PIECES = (
    [*"{}{}\\\\$$()[]^_^_+-*/=<>,.;:!?|&%#~'\" \n\t0123456789abxyzABCI"]
    + ["\\frac", "\\sqrt{", "\\boxed{", "\\text{", "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\"]
    + [
        "\\int_0^1",
        "\\sum_{n=1}^{9}",
        "\\cdot",
        "\\pi",
        "\\infty",
        "\\cup",
        "\\in",
        "\\{",
        "\\}",
        "####",
        "answer is ",
        "Answer: ",
    ]
    + [
        "10^{10^{10}}",
        "9^{9^9}",
        "99999!",
        "1e999",
        "option B",
        "(B)",
        "\u0663",
        "\u00b2",
        "\u03c0",
        "\U0001f600",
        "\u202e",
        "\x00",
    ]
    + ["__import__('os')", "exec(", "1,000", "-", "1/0", "0.1", "\ud800"]
)


def strange_text(rng):
    """Braces, backslashes, digits, towers of powers; sometimes deep, sometimes endless."""
    text = "".join(rng.choices(PIECES, k=rng.choice([1, 3, 8, 20, 60])))
    kind = rng.random()
    if kind < 0.01:
        depth = rng.randint(50, 400)
        return rng.choice(["{", "(", "\\sqrt{", "\\frac{1}{"]) * depth + "1" + rng.choice(["}", ")"]) * depth
    if kind < 0.02:
        return text * (200_000 // len(text))
    return text


def grade_strange_texts(count, *, seed):
    rng = random.Random(seed)
    references = [r"\frac{1}{2}", "12", "B", "x^2+1", r"\text{Evelyn}"]
    for _ in range(count):
        answer, reference = strange_text(rng), strange_text(rng)
        text = rng.choice(["{}", "\\boxed{{{}}}", "The answer is ${}$", "#### {}"]).format(answer)
        assert grade(text, reference if rng.random() < 0.5 else rng.choice(references)) in (True, False)
        answer_form(text)


@pytest.mark.filterwarnings("ignore:an answer could not be compared")
@pytest.mark.parametrize("count,seconds", [(500, 60), pytest.param(10_000, 1200, marks=pytest.mark.slow)])
def test_strange_texts_are_graded_without_an_error_or_a_stall(brief, count, seconds):
    start, worst = time.monotonic(), 0.0
    for seed in range(count // 100):
        begin = time.monotonic()
        grade_strange_texts(100, seed=seed)
        worst = max(worst, time.monotonic() - begin)
    print(f"{count} texts: {time.monotonic() - start:.1f} s, {brief.num_undecided} undecided, worst 100: {worst:.1f} s")
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize(
    "text",
    [
        "**The answer is 42**",
        "**Answer: 42**",
        "The answer is **42**.",
        "The final answer is: **42**",
        "The final answer is **x = 42**",
        "#### **42**",
        "The answer is *42*.",
        "**Answer:** **42**",
        "***Answer:*** 42",
        "The answer is `42`.",
        r"The answer is \[42\].",
        "The answer is 42 - that is, three and a half dozen.",
    ],
)
def test_markdown_and_words_around_an_answer_are_not_part_of_it(text):
    assert grade(text, "42") and has_format(text)


@pytest.mark.parametrize(
    "text,answer",
    [
        ("The answer is 2**3 + 1", "2**3 + 1"),
        ("The answer is 12 - x", "12 - x"),
        ("The answer is 3 * 4 * 5", "3 * 4 * 5"),
        ("The answer is \N{MINUS SIGN}5", "-5"),
    ],
)
def test_what_belongs_to_an_expression_stays(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{1\,234}", r"\boxed{1{,}234}", r"\boxed{1\!234}"])
def test_thousands_may_be_parted_as_latex_does(text):
    assert grade(text, "1234") and not grade(text, "234")


def test_stars_without_end_take_no_time():
    start = time.perf_counter()
    extract_answer("*a " * 30_000)
    extract_answer("**a" * 30_000)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        *(
            r"\boxed{true}",
            r"\boxed{TRUE}",
            r"So \boxed{\text{True}}.",
            "The answer is true.",
            "Answer: True",
            "#### true",
        ),
        *("Since 7 is prime, the answer is **True**.", "The answer is true, because 3 < 4.", "I think so.\nTrue."),
        "The answer is no. Wait. The answer is true.",
    ],
)
def test_words_compare_without_their_case(text):
    assert grade(text, "True") and grade(text, r"\text{true}")
    assert not grade(text, "False") and not grade(text, "no")


@pytest.mark.parametrize(
    "text,gold",
    [
        ("The answer is no longer 5.", "no"),
        ("The answer is nowhere.", "no"),
        ("The answer is true. So the answer is false.", "true"),
        ("It is true that nobody knows.", "true"),
        (r"\boxed{untrue}", "true"),
        ("The answer is New York.", "York"),
    ],
)
def test_other_words_are_other_answers(text, gold):
    assert not grade(text, gold)


def test_words_behind_answer_is_are_an_answer_where_there_is_no_number():
    assert extract_answer("The answer is Paris.") == "Paris." and answer_form("Answer: yes") == "stated"
    assert extract_answer("Of 7, the answer is obvious to most of those who know all of it") == "7"
