import numpy as np
import pytest
from conftest import make_tiny_model
from test_decoding import Scripted

from trsd.data import Loaded, Question
from trsd.decoding import Decoder
from trsd.errors import InputError
from trsd.evaluate import area_under_curve, bootstrap_interval, evaluate, graded_questions, table


def questions(*golds):
    return [
        Question(id=str(i), question=f"q{i}", messages=[{"role": "user", "content": f"q{i}"}], gold=gold)
        for i, gold in enumerate(golds)
    ]


def test_evaluate_counts_what_happened(tokenizer, think):
    # Free thinking answers 3 and is right for one of two questions; forced answers say nothing and never end.
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "nothing " * 50)
    result = evaluate(
        Decoder(model, tokenizer, think),
        questions("3", "4"),
        ("0", "50%", "100%"),
        max_thinking_tokens=50,
        max_answer_tokens=20,
    )
    free, (zero, half, full) = result["unconstrained"], result["budgets"]
    assert free["accuracy"] == full["accuracy"] == 0.5
    assert free["termination_rate"] == 1.0 and free["forced_close_rate"] == 0.0 and free["no_answer_rate"] == 0.0
    assert zero["accuracy"] == half["accuracy"] == 0.0
    assert zero["forced_close_rate"] == 1.0 and zero["no_answer_rate"] == 1.0 and zero["termination_rate"] == 0.0
    assert full["tokens"] == free["median_thinking_tokens"] and half["tokens"] == round(full["tokens"] / 2)
    assert zero["mean_tokens"] == len(think.closer_ids) + 20
    assert [entry["budget"] for entry in result["examples"][0]["at_budgets"]] == ["0", "50%", "100%"]
    assert "free" in table(result)


def test_percents_can_be_taken_of_another_models_median(tokenizer, think):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\n3", "3")
    result = evaluate(
        Decoder(model, tokenizer, think),
        questions("3"),
        ("50%",),
        max_thinking_tokens=50,
        max_answer_tokens=20,
        median_thinking_tokens=60.0,
    )
    assert result["budgets"][0]["tokens"] == 30 and result["auc"] is None


def test_samples_of_a_question_are_averaged(tokenizer, think):
    result = evaluate(
        Decoder(make_tiny_model(tokenizer), tokenizer, think),
        questions("3", "4"),
        ("0",),
        max_thinking_tokens=4,
        max_answer_tokens=4,
        num_samples=3,
    )
    assert result["num_questions"] == 2 and result["num_samples"] == 3


def test_area_is_the_mean_accuracy_over_the_budget_range():
    assert area_under_curve([0, 10, 20], [0.0, 0.5, 1.0]) == pytest.approx(0.5)
    assert area_under_curve([0, 10, 40], [1.0, 1.0, 0.0]) == pytest.approx((10 + 15) / 40)
    assert area_under_curve([7], [1.0]) is None


def test_bootstrap_interval_covers_the_mean_and_shrinks():
    small, large = ((np.arange(n) % 4 == 0).astype(float) for n in (40, 4000))
    (low, high), (low2, high2) = bootstrap_interval(small), bootstrap_interval(large)
    assert low < 0.25 < high and low2 < 0.25 < high2
    assert high2 - low2 < (high - low) / 5
    assert bootstrap_interval(small) == (low, high)


def test_questions_without_gold_cannot_be_evaluated():
    with pytest.raises(InputError, match="1 of 2 have none, the first: 'q1'"):
        graded_questions(Loaded(questions=questions("3", None)))


def test_traces_are_no_evaluation_data(traces):
    with pytest.raises(InputError, match="holds traces"):
        graded_questions(Loaded(traces=traces))
