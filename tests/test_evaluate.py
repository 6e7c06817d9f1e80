import itertools
import json

import pytest
from conftest import make_tiny_model, refusal
from scripted import Scripted, engine_of

from trsd.data import Loaded, Question
from trsd.decoding import Decoder
from trsd.errors import InputError
from trsd.evaluate import main
from trsd.evaluation import evaluate, graded_questions
from trsd.evaluation_table import table
from trsd.statistics import accuracy_figures, area_under_curve, pass_at_k


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
        Decoder(engine_of(make_tiny_model(tokenizer), tokenizer), tokenizer, think),
        questions("3", "4"),
        ("0",),
        max_thinking_tokens=4,
        max_answer_tokens=4,
        num_samples=3,
    )
    assert result["num_questions"] == 2 and result["num_samples"] == 3
    for row in (result["unconstrained"], *result["budgets"]):
        assert list(row["pass_at"]) == ["1", "3"] and row["pass_at"]["1"] == row["accuracy"]
    assert table(result).splitlines()[0].endswith("terminated   pass@3")


def evaluate_free(tokenizer, think, thought, *golds, budgets=()):
    """Unconstrained results of a model that writes ``thought``."""
    decoder = Decoder(Scripted(tokenizer, thought, "nothing"), tokenizer, think)
    return evaluate(decoder, questions(*golds), budgets, max_thinking_tokens=60, max_answer_tokens=20)


def test_unclosed_thinking_counts_wrong_but_its_whole_text_is_graded(tokenizer, think):
    result = evaluate_free(tokenizer, think, "So the answer is 3. " * 30, "3", "4")
    free = result["unconstrained"]
    assert free["accuracy"] == 0.0 and free["accuracy_of_whole_text"] == 0.5
    assert free["unclosed_rate"] == free["no_box_rate"] == free["no_answer_rate"] == 1.0
    assert "never closed: 100.0%" in table(result) and "whole text 0.500" in table(result)


def test_closed_thinking_is_not_counted_as_unclosed(tokenizer, think):
    result = evaluate_free(tokenizer, think, "2+1\n</think>\n\n\\boxed{3}", "3", "4", budgets=("0",))
    free, (zero,) = result["unconstrained"], result["budgets"]
    assert free["unclosed_rate"] == free["no_box_rate"] == 0.0 and zero["no_box_rate"] == 1.0
    assert free["accuracy"] == free["accuracy_of_whole_text"] == 0.5
    assert "never closed" not in table(result)


def test_whole_text_keeps_reasoning_and_answer_apart(tokenizer, think):
    assert evaluate_free(tokenizer, think, "so 2</think>7", "7")["unconstrained"]["accuracy_of_whole_text"] == 1.0


def test_no_budgets_leave_unconstrained_thinking_alone(tokenizer, think):
    result = evaluate_free(tokenizer, think, "2+1\n</think>\n\n3", "3", "4")
    assert result["budgets"] == [] and result["auc"] is None
    assert result["unconstrained"]["accuracy"] == 0.5 and result["examples"][0]["at_budgets"] == []
    header, free, count = table(result).splitlines()
    assert header.startswith("budget") and free.startswith("free") and count == "2 questions"


def test_evaluate_command_without_budgets_writes_results_and_no_curve(tiny_folder, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "2+1?", "answer": "3"}\n')
    argv = [
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--budgets",
        "",
        "--max_thinking_tokens",
        "8",
        "--max_answer_tokens",
        "8",
    ]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["budgets"] == []
    assert not (tmp_path / "out" / "curve.png").exists() and "1 questions" in capsys.readouterr().out


def test_a_nucleus_of_greedy_samples_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--top_p", "0.5"])
    assert exit_.value.code == 2 and "top_p: only a temperature above 0 reads it" in capsys.readouterr().err


def test_several_greedy_samples_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--num_samples", "3"])
    assert exit_.value.code == 2 and "with a temperature above 0" in capsys.readouterr().err


@pytest.mark.parametrize("n,c", [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (5, 5)])
def test_pass_at_k_equals_the_share_of_draws_with_a_right_sample(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    assert pass_at_k(c, n, 1) == c / n


@pytest.mark.parametrize("c,n,k", [(0, 3, 0), (0, 3, 4), (4, 3, 1), (-1, 3, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(c, n, k):
    with pytest.raises(ValueError, match="expected 1 <= k <= num_samples"):
        pass_at_k(c, n, k)


@pytest.mark.parametrize("n,names", [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "3"]), (8, ["1", "3", "8"])])
def test_accuracy_figures_hold_pass_at_one_three_and_all(n, names):
    figures = accuracy_figures([[True] + [False] * (n - 1), [False] * n])
    assert list(figures["pass_at"]) == names
    assert figures["pass_at"]["1"] == figures["accuracy"] == pytest.approx(0.5 / n)
    assert figures["pass_at"][str(n)] == 0.5


def test_accuracy_figures_count_questions_alike_when_samples_differ():
    figures = accuracy_figures([[True], [False, False, False]])
    assert figures["accuracy"] == 0.5 and list(figures["pass_at"]) == ["1"]


def test_area_is_the_mean_accuracy_over_the_budget_range():
    assert area_under_curve([0, 10, 20], [0.0, 0.5, 1.0]) == pytest.approx(0.5)
    assert area_under_curve([0, 10, 40], [1.0, 1.0, 0.0]) == pytest.approx((10 + 15) / 40)
    assert area_under_curve([7], [1.0]) is None


def test_questions_without_gold_cannot_be_evaluated():
    with pytest.raises(InputError, match="1 of 2 have none, the first: 'q1'"):
        graded_questions(Loaded(questions=questions("3", None)))


def test_traces_are_no_evaluation_data(traces):
    with pytest.raises(InputError, match="holds traces"):
        graded_questions(Loaded(traces=traces))


def test_results_say_which_samples_were_right(tokenizer, think):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "maybe 4")
    asked = questions("3", "4")
    decoder = Decoder(model, tokenizer, think)
    result = evaluate(decoder, asked, ("0",), max_thinking_tokens=50, max_answer_tokens=20)
    assert result["question_ids"] == ["0", "1"]
    assert result["unconstrained"]["correct"] == [[True], [False]]
    (zero,) = result["budgets"]
    assert zero["correct"] == [[False], [True]]
    assert zero["format_failure_rate"] == 1.0 and zero["no_answer_rate"] == 0.0
    assert result["unconstrained"]["format_failure_rate"] == 0.0 and result["unconstrained"]["no_box_rate"] == 1.0


def test_the_direct_baseline_shows_the_cut_thinking_as_a_draft(tokenizer, think):
    model = Scripted(tokenizer, "3 it is, says Mia.\n</think>\n\nThe answer is 3.", "The answer is 4.")
    model.context_limit = None
    decoder = Decoder(model, tokenizer, think)
    limits = dict(max_thinking_tokens=50, max_answer_tokens=20)
    result = evaluate(decoder, questions("3", "4"), ("0", "4", "40"), direct_baseline=True, **limits)
    zero, four, forty = result["direct"]["budgets"]
    assert zero["correct"] == four["correct"] == [[False], [True]] and forty["correct"] == [[True], [False]]
    drafts = [c for c in model.contexts if "# Draft\n" in c]
    plain = [c for c in model.contexts if c.endswith("assistant\n<think>\n\n</think>\n\n") and "# Draft" not in c]
    assert len(drafts) == 2 and len(plain) == 4  # the close forced at once reads like the empty thinking
    first = tokenizer("3 it is, says Mia.", add_special_tokens=False).input_ids[:4]
    assert f"# Draft\n{tokenizer.decode(first)}\n\n# Your task" in drafts[0] and "q0" in drafts[0]
    assert "q0" in plain[0] and "draft" in table(result)


def test_early_exit_is_measured_with_what_it_cost(tokenizer, think):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "The answer is 4.")
    decoder = Decoder(model, tokenizer, think)
    limits = dict(max_thinking_tokens=50, max_answer_tokens=20)
    never = evaluate(decoder, questions("3", "4"), ("0", "2"), exit_confidence=0.99, **limits)["early_exit"]
    once = evaluate(decoder, questions("3", "4"), ("0", "2"), exit_confidence=0.5, **limits)["early_exit"]
    assert never["correct"] == [[True], [False]] and once["correct"] == [[False], [True]]
    assert never["mean_tried_tokens"] > 0 == once["mean_tried_tokens"] == once["mean_thinking_tokens"]


def test_budgets_in_tokens_and_in_percents_give_the_same_answers(tokenizer, think):
    decoder = Decoder(engine_of(make_tiny_model(tokenizer), tokenizer), tokenizer, think)
    limits = dict(max_thinking_tokens=20, max_answer_tokens=4)
    asked = questions("3", "4", "5")
    percents = evaluate(decoder, asked, ("0%", "50%", "100%"), **limits)
    tokens = tuple(str(row["tokens"]) for row in percents["budgets"])
    same = evaluate(decoder, asked, tokens, **limits)
    for one, other in zip(percents["budgets"], same["budgets"], strict=True):
        assert {**one, "budget": 0} == {**other, "budget": 0}


def test_a_question_that_does_not_fit_is_named_before_anything_is_written(tokenizer, think):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "3")
    asked = questions("3", "4")
    asked[1].messages[0]["content"] = asked[1].messages[0]["content"] + " Why?" * 200
    decoder = Decoder(model, tokenizer, think)
    with pytest.raises(InputError, match=r"the question 'q1' has a prompt of \d+ tokens.*has room for 436"):
        evaluate(decoder, asked, ("0",), max_thinking_tokens=50, max_answer_tokens=20)
    assert not model.contexts


def test_confidence_is_asked_for_before_anything_else_is_written(tokenizer, think):
    class Silent(Scripted):
        def write(self, wish):
            return super().write(wish)._replace(log_probs=[float("nan")] * wish.max_new_tokens)

    model = Silent(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "3")
    with pytest.raises(InputError, match="exit_confidence: this engine gives no log-probabilities"):
        limits = dict(max_thinking_tokens=50, max_answer_tokens=20)
        evaluate(Decoder(model, tokenizer, think), questions("3"), ("0",), exit_confidence=0.5, **limits)
    assert len(model.contexts) == 1


@pytest.mark.parametrize("flag", [["--direct_baseline", "True"], ["--exit_confidence", "0.5"]])
def test_what_is_measured_at_budgets_needs_some(capsys, flag):
    assert "both are measured at budgets, and there are none" in refusal(capsys, lambda: main(["--budgets", "", *flag]))


@pytest.mark.parametrize("budgets", ["", "0,64"])
def test_a_count_that_no_budget_is_a_percentage_of_is_refused(budgets, capsys):
    error = refusal(capsys, lambda: main(["--budgets", budgets, "--percent_of", "90"]))
    assert "percent_of: budgets in percent are of it, and there are none" in error


def test_a_budget_beyond_the_thinking_limit_is_refused_and_a_percent_held_to_it(tokenizer, think):
    decoder = Decoder(Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "3"), tokenizer, think)
    with pytest.raises(InputError, match="budgets: expected at most max_thinking_tokens 50, got 51"):
        evaluate(decoder, questions("3"), ("0", "51"), max_thinking_tokens=50, max_answer_tokens=20)
    result = evaluate(decoder, questions("3"), ("0%", "900%"), max_thinking_tokens=50, max_answer_tokens=20)
    assert [row["tokens"] for row in result["budgets"]] == [0, 50]
    assert result["max_thinking_tokens"] == 50 and result["max_answer_tokens"] == 20


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trsd.evaluation.open_reader", lambda args: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    words = ["--output_dir", str(tmp_path / "file")]
    assert "cannot be written to" in refusal(capsys, lambda: main(words))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "evaluation.json").write_text("{}")
    assert "holds an evaluation already" in refusal(capsys, lambda: main(["--output_dir", str(tmp_path / "old")]))


def test_the_draft_of_the_baseline_must_fit_too(tokenizer, think):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "3")
    decoder, limits = Decoder(model, tokenizer, think), dict(max_thinking_tokens=300, max_answer_tokens=20)
    evaluate(decoder, questions("3"), ("0",), **limits)
    model.contexts.clear()
    with pytest.raises(InputError, match="the question 'q0' has a prompt of"):
        evaluate(decoder, questions("3"), ("0",), direct_baseline=True, **limits)
    assert not model.contexts
