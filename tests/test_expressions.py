"""What "answer is" states: the whole of an expression, and nothing of the words and sums around it."""

import json
import time
from pathlib import Path

import pytest

from trsd import grading
from trsd.expressions import stated_expression
from trsd.grading import grade

COMPETITIONS = Path(__file__).parents[2] / "shared" / "data" / "math"
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
        ("the 5th prime, 11.", "11"),
        ("Janet sells 9 eggs and makes 9 * 2 = $18 a day.", "18"),
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


@pytest.mark.parametrize(
    "text,gold",
    [
        ("The answer is simply 42 (step 3).", "42"),
        ("The answer is exactly 42 when $n = 7$.", "42"),
        ("The answer is therefore 42 out of 50.", "42"),
        ("The final answer is clearly 42, not 24.", "42"),
        ("The answer is thus 42, as found in step 3.", "42"),
        ("The answer is that there are 42 ways to choose 3 of them.", "42"),
        ("The answer is Janet makes $18 a day at the market from 9 eggs.", "18"),
        ("The answer is that she makes 18 dollars, which is 2 dollars per egg.", "18"),
        ("Answer: Tom has 42 apples left (he began with 50).", "42"),
        ("Answer: Tom has 42 apples left after eating 8.", "42"),
        ("Answer: The train takes 42 minutes to travel 30 miles.", "42"),
        ("Answer: The distance is 42 km (26 miles).", "42"),
        ("Answer: John scored **42** points in 3 games.", "42"),
        (r"The answer is equal to $\frac{3}{4}$ for $n = 1$.", "3/4"),
        (r"The answer is the fraction $\frac{3}{4}$, obtained for $x = 2$.", "3/4"),
        ("The answer is [3, ∞).", r"[3,\infty)"),
        ("**Answer:** (5, ∞)", r"(5,\infty)"),
        ("The answer is (3, π/2)", r"(3,\frac{\pi}{2})"),
        ("The answer is (3, pi/2)", r"(3,\frac{\pi}{2})"),
        ("The answer is (1, √3).", r"(1,\sqrt{3})"),
        ("The answer is [0, π].", r"[0,\pi]"),
        ("The answer is (−∞, ∞).", r"(-\infty,\infty)"),
        ("The answer is (-∞, 3) ∪ (5, ∞).", r"(-\infty,3)\cup(5,\infty)"),
        ("The answer is x ∈ [3, ∞).", r"[3,\infty)"),
        ("The answer is 18, 9 from each hen.", "18"),
        ("The answer is 18, $9 for each day.", "18"),
        ("The answer is 18, 3 times more than 6.", "18"),
        ("The answer is 4, and 2 are left.", "4"),
        ("The answer is 5, i.e. five.", "5"),
        ("The answer is 90, or 1.5 hours.", "90"),
        ("The answer is $5$, $x$ being positive.", "5"),
        ("The answer is option B, 12", "12"),
        ("The answer is 20 m^2", "20"),
        ("The answer is 20 m²", "20"),
        ("The answer is 20 °C", "20"),
        ("The answer is 20°C", "20"),
        (r"\boxed{20°C}", "20"),
        ("The answer is 18 m/s", "18"),
        ("The answer is 18!", "18"),
        ("**Answer: 18!**", "18"),
        ("The answer is 75 minutes = 1.25 hours.", "75"),
        ("The answer is 36 inches = 3 feet.", "36"),
        ("The answer is x ≈ 5.2.", "5.2"),
        (r"The answer is $x \approx 5.2$", "5.2"),
        ("The answer is 5 (x = 5).", "5"),
        ("The answer is 18 (n = 3).", "18"),
        ("The answer is $ p - q $.", "p-q"),
        ("The answer is <answer>18</answer>", "18"),
        ("The answer is 18<|im_end|>", "18"),
        ("The answer is 9 * 2 = <<9*2=18>>18 dollars.", "18"),
        (r"\boxed{½x}", r"\frac{x}{2}"),
        (r"\boxed{x^½}", r"\sqrt{x}"),
        ("The answer is 3 sqrt(2).", r"3\sqrt{2}"),
        ("The answer is –5.", "-5"),
        ("The answer is negative 5.", "-5"),
        (r"Answer: Since x > 0, the value is $\frac{3}{4}$.", "3/4"),
        (r"\boxed{\textbf{(B)}\ 12}", "12"),
        (r"\boxed{\text{(B) } 12}", "12"),
        (r"The answer is $\textbf{(E) } 142$.", "142.0"),
        ("The answer is 5 hours x $3/hour = $15", "15"),
        ("The answer is 3 boxes x 5 = 15", "15"),
        ("The answer is 3 eggs/day * 7 days = 21 eggs", "21"),
        ("The answer is $1, 2,$ and $3$.", "1,2,3"),
        ("The answer is:\n\n$$\n\\frac{3}{4}\n$$", "3/4"),
        ("So the answer is:\n\\[\n\\frac{3}{4}\n\\]", "3/4"),
        (r"So the final answer is: \[ \frac{3}{4} \]", "3/4"),
        ("**Final Answer**\n\n$$ \\frac{3}{4} $$", "3/4"),
        ("#### Step 4: Check that the answer is reasonable\n\n9 * 2 = 18, fine. The answer is 18.", "18"),
        ("#### Final Answer: see below\n\nThe answer is 18.", "18"),
        ("#### Why the answer is 12 and not 10\n\nThe final answer is 18.", "18"),
    ],
)
def test_sentences_and_layouts_that_models_end_with_state_their_answer(text, gold):
    assert grade(text, gold)


@pytest.mark.parametrize(
    "text,gold",
    [
        ("The answer is (2,∞).", "2"),
        ("The answer is 2, √3", "2"),
        ("The answer is 3 or √3", "3"),
        (r"\boxed{5 more than x}", "5"),
        (r"\boxed{6 less than a}", "6"),
        (r"\boxed{2 hours thirty minutes}", "2"),
        (r"\boxed{2 arctan x}", "2"),
        (r"\boxed{3 cot x}", "3"),
        (r"\boxed{3 det A}", "3"),
        (r"\boxed{3 mnp}", "3"),
        (r"\boxed{7 lakh}", "7"),
        (r"\boxed{5 below zero}", "5"),
        (r"\boxed{10 base two}", "10"),
        (r"\boxed{½x}", r"\frac{1}{2x}"),
        ("The answer is 18 million dollars.", "18"),
        ("The answer is 3rs.", "3"),
        ("The answer is –5.", "5"),
        ("The answer is negative 5.", "5"),
        ("The answer is John has 5 and Mary has 3.", "3"),
        ("The answer is 9 and 3", "3"),
        ("The answer is 52_8", "52_9"),
        (r"3rs is \boxed{3rs}", "3"),
        ("The answer is:\n\n$$\n\\frac{3}{4}\n$$", "4"),
    ],
)
def test_sentences_state_nothing_else(text, gold):
    assert not grade(text, gold)


@pytest.mark.parametrize(
    "form", [r"\boxed{%s}", "The answer is $%s$.", "The answer is %s.", "#### %s", "**Final Answer**\n$$%s$$"]
)
def test_every_reference_of_competitions_is_right_however_it_is_stated(form):
    rows = [json.loads(line) for path in sorted(COMPETITIONS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    golds = [str(row["answer"]) for row in rows]
    if not golds:
        pytest.skip("the competitions' questions are not beside the checkout")
    assert [gold for gold in golds if not grade(form.replace("%s", gold), gold)] == []


@pytest.mark.parametrize(
    "loop", ["3 eggs * ", "(", "{", "$3$, ", "3, ", "3 and ", r"\(", "= ", "a ", r"\begin{a}", " ", "½"]
)
@pytest.mark.parametrize("opener", ["The answer is ", "#### ", "#### so ", r"\boxed{1"])
def test_a_line_without_end_takes_no_time(opener, loop, monkeypatch):
    monkeypatch.setattr(grading, "_verify", lambda *_: False)  # which has a limit of its own
    start = time.process_time()
    grade(f"{opener}{loop * 50_000}}}", "3")
    assert time.process_time() - start < 2
