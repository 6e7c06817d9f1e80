"""What "answer is" states: the whole of an expression, and nothing of the words and sums around it."""

import time

import pytest

from trsd.expressions import stated_expression
from trsd.grading import extract_answer, grade

DIGITS_OF_18_FACTORIAL = "6402373705728000"


@pytest.mark.parametrize(
    "line,answer",
    [
        ("$18 and she has $3 left.", "18"),
        ("$18. He keeps $3.", "18"),
        ("$18 per day ($9 × 2 = $18)", "18"),
        ("$18 ($9 × 2 = $18)", "18"),
        (r"\$18 and she has \$3 left.", "18"),
        ("$18, which is $3 more.", "18"),
        ("$5/hour.", "5"),
        ("18 a day.", "18"),
        ("5cm.", "5"),
        ("5 m long.", "5"),
        (r"42, because \(6\cdot 7=42\).", "42"),
        ("42 (6 × 7 = 42).", "42"),
        (r"25\% of the students", r"25\%"),
        ("2 * 9 = 18 dollars.", "18"),
        ("9 × 2 = 18.", "18"),
        ("9 x 2 = 18.", "18"),
        ("$2 * $9 = $18.", "18"),
        ("5 eggs * 3 = 15 eggs.", "15"),
        ("22/7 ≈ 3.14.", "22/7"),
        ("x = 5 when y = 3.", "5"),
        ("Janet sells 9 eggs and makes $18 a day.", "18"),
        ("five times that, or 5*44=220 pounds.", "220"),
        ("Number of M&M's: 300+312+150=762 M&M's", "762"),
        ("the interval $[2,5)$.", "[2,5)"),
        ("the interval [2, 5).", "[2, 5)"),
        (r"\frac{1}{2} of the cake.", r"\frac{1}{2}"),
        ("(3, 4).", "(3, 4)"),
        ("3x+2.", "3x+2"),
        ("1 1/2.", "1 1/2"),
        ("$3$ or $5$.", "3, 5"),
        ("y = 3x + 2 for all x.", "y = 3x + 2"),
        ("(B) 12", "12"),
        ("B (12 apples), which is 3 more than A.", "12"),
        (": 7", "7"),
        ("obvious", None),
        ("", None),
    ],
)
def test_an_expression_is_stated_whole_and_alone(line, answer):
    assert stated_expression(line) == answer


@pytest.mark.parametrize(
    "stated,gold",
    [
        ("(3, 4).", "(3,4)"),
        ("3x+2.", "2+3x"),
        ("3(x+2).", "3x+6"),
        ("1 1/2.", "3/2"),
        ("3, 5 and 7.", "3,5,7"),
        ("x = 3 or x = -1.", "3,-1"),
        (r"\left[2, 5\right).", "[2,5)"),
        ("18!", DIGITS_OF_18_FACTORIAL),
        ("5 : 3", "5:3"),
    ],
)
@pytest.mark.parametrize("said", ["The answer is ", "**Answer:** ", "So the answer is: "])
def test_an_expression_behind_answer_is_compares_as_a_whole(said, stated, gold):
    assert grade(said + stated, gold)


@pytest.mark.parametrize(
    "stated,part",
    [
        ("(3, 4).", "3"),
        ("(3, 4).", "4"),
        ("3 or 5.", "3"),
        ("either 3 or 5.", "5"),
        ("3, 5 and 7.", "3"),
        ("$3$ or $5$", "3"),
        ("3x.", "3"),
        ("3 x + 2.", "3"),
        ("3x+2.", "3"),
        ("the polynomial 3x+2.", "2"),
        ("3xy.", "3"),
        ("3(x+2).", "3"),
        ("3 (x+2).", "3"),
        ("3/x", "3"),
        ("3π", "3"),
        ("3 sqrt(2)", "3"),
        ("2 + 3i", "2"),
        ("[2, 5).", "2"),
        ("1 1/2.", "1"),
        ("5!", "5"),
        ("5²", "5"),
        ("10:30.", "10"),
        ("3:2", "3"),
        ("x > 5", "5"),
    ],
)
def test_a_part_of_an_expression_is_not_the_answer(stated, part):
    assert not grade(f"The answer is {stated}", part)


@pytest.mark.parametrize(
    "answer,reference",
    [
        (r"\frac{1}{2}.", r"\frac{1}{2}"),
        ("(2,4).", "(2,4)"),
        (r"\left\{1,2\right\}.", r"\{1,2\}"),
        (r"\mathbf{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\bf 42", "42"),
        (r"{\bf 42}", "42"),
        ("18 dollars", "18"),
        ("18 dollars.", "18"),
        ("$18 a day", "18"),
        ("18 miles per hour", "18"),
        ("1,200 eggs", "1200"),
        ("-5 degrees", "-5"),
        (r"\text{18 dollars}", "18"),
        (r"18\text{ dollars}", "18"),
        (r"42~\text{cm}", "42"),
        (r"20\ \mathrm{km/h}", "20"),
        ("€18", "18"),
        ("£18", "18"),
        ("18¢", "18"),
        (r"18\text{¢}", "18"),
        ("90°", r"90^\circ"),
        ("90°", "90"),
        ("1 1/2", "3/2"),
        ("1 1/2", r"\frac{3}{2}"),
        (r"-2 \le x \le 7", r"x \in [-2,7]"),
        (r"-2 \le x \le 7", "[-2,7]"),
        (r"x > 5", r"(5,\infty)"),
    ],
)
def test_looks_and_units_of_a_boxed_answer_do_not_count(answer, reference):
    assert grade(rf"So \boxed{{{answer}}}.", reference)


@pytest.mark.parametrize(
    "answer,reference",
    [
        ("18 million", "18"),
        ("18 dozen", "18"),
        ("2 thirds", "2"),
        ("2 fifths", "2"),
        ("18 squared", "18"),
        ("18 or 20", "18"),
        ("18 or more", "18"),
        ("18 pi", "18"),
        ("2 sin x", "2"),
        ("18 x", "18"),
        ("19 dollars", "18"),
        ("1 1/2", "1"),
        ("1 1/2", "11/2"),
        ("1 1/2", r"\frac{1}{2}"),
        (r"-2 < x < 7", r"x \in [-2,7]"),
        (r"-2 \le x < 7", r"x \in [-2,7]"),
        (r"-2 \le x \le 7", "(-2,7)"),
        (r"x \ge 5", r"(5,\infty)"),
        ("x < 5", r"(5,\infty)"),
        ("x > 5", "5"),
        (r"-2 \le y \le 7", r"x \in [-2,7]"),
        ("3xy", "3"),
        ("3 xy", "3"),
    ],
)
def test_words_and_signs_that_make_another_answer_count(answer, reference):
    assert not grade(rf"So \boxed{{{answer}}}.", reference)


@pytest.mark.parametrize("loop", ["3 eggs * ", "(", "{", "$3$, ", "3, ", "3 and ", r"\(", "= ", "a ", r"\begin{a}"])
def test_a_line_without_end_takes_no_time(loop):
    start = time.process_time()
    extract_answer("The answer is " + loop * 100_000)
    assert time.process_time() - start < 2
