"""The first derivation of the final answer: computed, not quoted; complete, not a part."""

import json
import re
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from conftest import make_traces

from trsd.demo.problems import draw_problems
from trsd.derivations import find_first_derivation, first_derivation_tokens
from trsd.thinking import token_texts

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


def found(marked, answer, question=""):
    """Where the finder lands, as the text before it; ``@`` in ``marked`` is where it should."""
    text = marked.replace("@", "")
    place = find_first_derivation(text, answer, question=question)
    return marked, None if place is None else text[:place] + "@" + text[place:]


@pytest.mark.parametrize(
    "marked,answer",
    [
        ("She sold 48/2 = 24@ clips.", "24"),
        ("She sold 48/2 = <<48/2=24>>24@ clips. So 24 it is.", "24"),
        ("That is 600*2=$<<600*2=1200>>1,200@.", "1200"),
        ("He pays 2 * 600 = $1,200@ in all", "$1,200.00"),
        ("3000 + 1500 = 4{,}500@", "4500"),
        ("1 000 000 + 500 000 = 1 500 000@ cars", "1,500,000"),
        ("12*2=24.0@", "24"),
        ("12*2=24@.", "24.0"),
        ("10/40 = 25%@ of them", "25\\%"),
        ("3 - 8 = -5@", "-5"),
        ("3 - 8 = −5@", "-5"),
        ("-21/3 = <<-21/3=-7>>-7@ degrees", "-7"),
        ("1 - 1/8 = 7/8@", "\\frac{7}{8}"),
        ("1 - 1/8 = \\frac{7}{8}@", "7/8"),
        ("1 - 1/8 = 0.875@", "7/8"),
        ("half of 48 is 24@, so", "24"),
        ("48 divided by 2 is 24@", "24"),
        ("3 times 8 gives 24@", "24"),
        ("48/2, which is 24@", "24"),
        ("\\[\n\\frac{48}{2}\n= 24@\n\\]", "24"),
        ("48/2 &= 24@ \\\\", "24"),
        ("48/2 \\approx 24@", "24"),
        ("48/2 → 24@", "24"),
        ("48/2 => $24@$", "24"),
        ("2024 \\equiv 24@ \\pmod{1000}", "24"),
        ("x = \\boxed{24}@", "24"),
        ("\\boxed{24}@", "24"),
        ("So she has 24@ clips left", "24"),
        ("The answer is 24@.", "24"),
        ("**Final Answer:** 24@", "24"),
        ("The total is 24@", "24"),
        ("Adding them gives 24@", "24"),
        ("C(8,2) - 4 = 24@", "24"),
        ("m + n = 24@", "024"),
        ("= 3 \\cdot \\sqrt{2} = 3\\sqrt {2}@", "3\\sqrt{2}"),
        ("so the result is $\\left( 1, 2 \\right)@$", "(1,2)"),
        ("Therefore the answer is (B)@", "(B)"),
        ("The answer is Tuesday@.", "\\text{Tuesday}"),
        ("f(x) = (x-1)(x+1) = x^2 - 1@", "x^2-1"),
        ("It is 20 + 4 = 24@ degrees", "24^\\circ"),
    ],
)
def test_a_result_is_found_right_behind_itself(marked, answer):
    assert found(marked, answer)[1] == marked


@pytest.mark.parametrize(
    "text,answer",
    [
        ("x = 24 + 3", "24"),
        ("that is = 24 clips + 3 clips", "24"),
        ("y = 24x", "24"),
        ("y = 24 \\cdot k", "24"),
        ("= 24% of 50", "24"),
        ("12 * 20 = 240", "24"),
        ("1000 + 240 = 1,240", "240"),
        ("12 * 2 = 24.5", "24"),
        ("100 + 24 = 124", "24"),
        ("3 - 8 = -5", "5"),
        ("3 + 2 = 5", "-5"),
        ("it is the 48/2 = 24th", "24"),
        ("x = 48/2", "24"),
        ("x = 8/24", "24"),
        ("2x + 3 = 24", "24"),
        ("n = 24, 25, 26", "24"),
        ("(x, y) = (24, 3)", "24"),
        ("n = 24: 24 mod 5 is 4", "24"),
        ("24 = 12*2", "24"),
        ("x >= 24 and y != 24", "24"),
        ("Let x = 24.", "24"),
        ("Suppose that the total is 24", "24"),
        ("Maybe the answer is 24.", "24"),
        ("Is it true that the answer is 24?", "24"),
        ("The answer is not 24.", "24"),
        ("She began with 24 clips.", "24"),
        ("13\\sqrt{2} is = 13\\sqrt{2}", "3\\sqrt{2}"),
        ("5/0 = 1/0", "0"),
        ("nothing", ""),
        ("", "24"),
    ],
)
def test_what_is_no_result_is_not_found(text, answer):
    assert find_first_derivation(text, answer) is None


def test_a_number_of_the_question_counts_only_where_it_is_computed_or_boxed():
    question = "Ann has 24 eggs. She sells 8 and buys 8. How many has she?"
    assert found("She has 24 eggs. So she has 24 eggs, x = 24. 24-8=16, 16+8=24@.", "24", question)[1].endswith("=24@.")
    assert find_first_derivation("So she has 24 eggs; the total is 24", "24", question=question) is None
    assert find_first_derivation("\\boxed{24}", "24", question=question) is not None
    assert find_first_derivation("So she has 24 eggs", "24", question=question.replace("24", "240")) is not None


def test_a_guess_stated_first_is_passed_over():
    marked = "Perhaps the answer is 24. If x = 24 it fits. Now 48/2 = 24@. Check: 24*2 = 48. Yes, 48/2 = 24."
    assert found(marked, "24")[1] == marked


def test_a_later_verification_is_not_the_derivation():
    marked = "18+6=24@.\nWait, let me double-check: 24-6=18, 18+6=24. So the answer is 24."
    assert found(marked, "24")[1] == marked


def test_an_intermediate_result_of_the_same_value_is_taken_for_the_answer():
    marked = "3*8=24@, 24+6=30, 30-6=24."
    assert found(marked, "24")[1] == marked


def test_demo_problems_are_derived_at_the_end_of_their_first_line():
    """Or at an earlier equation whose result is the answer's number by chance, which a finder by value cannot tell."""
    by_chance = 0
    for problem in islice(draw_problems("train", seed=1), 400):
        results = list(re.finditer(r"=(\d+)", problem.reasoning.split("\n")[0]))
        assert results[-1][1] == problem.answer
        first = next(result for result in results if result[1] == problem.answer)
        by_chance += first is not results[-1]
        assert find_first_derivation(problem.reasoning, problem.answer, question=problem.question) == first.end(), (
            problem
        )
    assert by_chance < 0.1 * 400


def test_tokens_reach_just_over_the_derivation(tokenizer, think):
    texts = token_texts(tokenizer, len(tokenizer))
    problems, num_found = draw_problems("train", seed=0), 0
    for trace in make_traces(tokenizer, think, 30):
        reasoning = next(problems).reasoning
        trace = replace(
            trace, reasoning=reasoning, reasoning_ids=tokenizer(reasoning, add_special_tokens=False).input_ids
        )
        count = first_derivation_tokens(trace, texts)
        offset = find_first_derivation(reasoning, trace.gold, question=trace.question)
        shown = ["".join(texts[i] for i in trace.reasoning_ids[:n]) for n in (count - 1, count)]
        assert len(shown[0]) < offset <= len(shown[1])
        num_found += 1
    assert num_found == 30


def test_the_answer_is_the_gold_or_else_what_is_stated(tokenizer, think):
    texts = token_texts(tokenizer, len(tokenizer))
    (trace,) = make_traces(tokenizer, think, 1)
    reasoning = "2+3=5. 4+5=9."
    trace = replace(trace, question="?", reasoning_ids=tokenizer(reasoning, add_special_tokens=False).input_ids)
    lengths = {
        answer: first_derivation_tokens(replace(trace, gold=gold, answer=answer or "no idea"), texts)
        for gold, answer in (("5", "It is 9."), (None, "So it is \\boxed{9}."), (None, ""))
    }
    first, second, unknown = lengths.values()
    text = ["".join(texts[i] for i in trace.reasoning_ids[:n]) for n in (first, second)]
    assert text[0].endswith("=5") and text[1].endswith("=9") and unknown is None


def test_thinking_that_runs_in_circles_is_searched_in_seconds():
    start = time.process_time()  # beside other tests the clock on the wall runs on
    for unit in ("so 24 is ", "= 24 + 1 ", "24 ", "the answer is not 24 ", "so so so the total is is ", "9"):
        assert find_first_derivation(unit * (30_000 // len(unit)), "24") is None
    assert time.process_time() - start < 8


@pytest.mark.skipif(not GSM8K.exists(), reason="needs shared/data/gsm8k")
def test_nearly_all_worked_solutions_of_gsm8k_are_found_near_their_end():
    late = num_found = num_rows = 0
    for line in islice(GSM8K.open(encoding="utf-8"), 2000):
        row = json.loads(line)
        solution, _, final = row["answer"].rpartition("####")
        solution = solution.rstrip()
        place = find_first_derivation(solution, final.strip(), question=row["question"])
        num_rows += 1
        if place is not None:
            num_found += 1
            late += place > solution.rfind("\n")
            assert re.sub(r"[^\d.]", "", final).strip(".") in re.sub(r"[^\d.]", "", solution[:place])
    assert num_found >= 0.98 * num_rows
    assert late >= 0.93 * num_found  # the rest restate the result, or meet its number by chance
