"""Signs of mathematics that are typed without LaTeX are the LaTeX that stands for them."""

import pytest

from trsd.grading import grade
from trsd.plain_math import as_latex


@pytest.mark.parametrize(
    "plain,latex",
    [
        ("3√2", r"3\sqrt{2}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("√x", r"\sqrt{x}"),
        ("2√3.5", r"2\sqrt{3.5}"),
        ("x²+y¹⁰", "x^{2}+y^{10}"),
        ("10⁻³", "10^{-3}"),
        ("x₁₂", "x_{12}"),
        ("½", r"\frac{1}{2}"),
        ("½x", r"\frac{1}{2}x"),
        ("x^½", r"x^{\frac{1}{2}}"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("3 ½", "3 1/2"),
        ("2⅞", "2 7/8"),
        ("π/4", r"\pi /4"),
        ("2pi", r"2\pi "),
        (r"\pi", r"\pi"),
        ("pie", "pie"),
        (r"\text{pi}", r"\text{pi}"),
        ("(-inf, 3)", r"(-\infty , 3)"),
        ("info", "info"),
        ("A ∪ B", r"A \cup  B"),
        ("plain 12", "plain 12"),
    ],
)
def test_each_sign_becomes_its_latex(plain, latex):
    assert as_latex(plain) == latex


@pytest.mark.parametrize(
    "answer,reference",
    [
        ("3√2", r"3\sqrt{2}"),
        ("√2/2", r"\frac{\sqrt{2}}{2}"),
        ("x²+1", "x^2+1"),
        ("2³", "8"),
        ("10⁻³", "0.001"),
        ("½", r"\frac12"),
        ("3½", "7/2"),
        ("−⅓", r"-\frac{1}{3}"),
        ("π/4", r"\frac{\pi}{4}"),
        ("pi/4", r"\frac{\pi}{4}"),
        ("∞", r"\infty"),
        ("(−∞, 3)", r"(-\infty,3)"),
        ("(1,2) ∪ (3,4)", r"(1,2)\cup(3,4)"),
        ("A ∪ B", r"A\cup B"),
        ("5·3", "15"),
        ("10÷2", "5"),
        ("5 ± 2", r"5 \pm 2"),
        ("θ", r"\theta"),
    ],
)
def test_answers_compare_whichever_way_they_are_typed(answer, reference):
    assert grade(rf"So \boxed{{{answer}}}.", reference) and grade(rf"\boxed{{{reference}}}", answer)


@pytest.mark.parametrize("answer", ["3√2", "√2/2", "x²+1", "½", "π/4", "(−∞, 3)", "10⁻³", "√x", "5·3", "x₁"])
def test_they_are_taken_whole_behind_answer_is(answer):
    assert grade(f"The answer is {answer}.", answer)


@pytest.mark.parametrize(
    "answer,reference",
    [("3√2", "3"), ("3√2", "6"), ("x²", "x"), ("2³", "23"), ("3½", "3"), ("2π", "2"), ("x₁", "x_2"), ("10⁻³", "1000")],
)
def test_a_part_or_another_of_them_is_not_right(answer, reference):
    assert not grade(rf"\boxed{{{answer}}}", reference) and not grade(f"The answer is {answer}.", reference)
