from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsd.errors import InputError
from trsd.grading import as_fraction, check_grader, extract_answer, grade, last_boxed


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
        ("My answer is below. It must be 7.", "7"),
        ("so 8-3=5", "5"),
        ("we have 8-3", "3"),
        ("it is -3", "-3"),
        ("no number here", None),
        ("", None),
    ],
)
def test_extract_answer_knows_the_common_forms(text, answer):
    assert extract_answer(text) == answer


def test_last_boxed_balances_braces():
    assert last_boxed(r"\boxed{a{b}c}d}") == "a{b}c"
    assert last_boxed(r"\boxed{a{b}") is None


@pytest.mark.parametrize(
    "text,value",
    [
        ("1,200", 1200),
        ("$3.50", Fraction(7, 2)),
        ("7/8", Fraction(7, 8)),
        ("-4.", -4),
        ("12%", 12),
        ("1/0", None),
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
    ],
)
def test_grade_compares_by_value(text, gold, right):
    assert grade(text, gold) is right


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
