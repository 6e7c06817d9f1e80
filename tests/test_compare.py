import html
import json
from pathlib import Path

import pytest
from conftest import refusal
from scripted import Scripted
from test_evaluate import questions

from trsd.compare import compare, main, read_evaluation, table
from trsd.comparison_page import _shortened
from trsd.decoding import Decoder
from trsd.evaluate import main as evaluate_main
from trsd.evaluation import evaluate
from trsd.files import write_json
from trsd.statistics import paired_difference

ONE = [[True, False], [False, False], [True, True], [False, True]]
OTHER = [[True, True], [True, False], [True, True], [False, True]]


def evaluation(correct, *, ids="abcd", model="m", **budgets):
    """An evaluation.json with per-question results; ``budgets`` are name=(tokens, correct)."""
    return {
        "model": model,
        "question_ids": list(ids),
        "unconstrained": {"correct": correct, "mean_tokens": 100.5},
        "budgets": [
            {"budget": name, "tokens": tokens, "correct": rows, "mean_tokens": float(tokens)}
            for name, (tokens, rows) in budgets.items()
        ],
    }


@pytest.fixture
def write(tmp_path):
    def write(name, stored):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored))
        return path

    return write


def test_compare_shows_both_models_at_every_common_setting(write):
    first = write("a.json", evaluation(ONE, half=(8, ONE), whole=(16, OTHER), alone=(3, ONE)))
    second = write("b.json", evaluation(OTHER, half=(8, OTHER), whole=(20, OTHER), other=(99, ONE)))
    found = compare(read_evaluation(first), read_evaluation(second))
    assert [(row["setting"], row["tokens"]) for row in found["rows"]] == [
        ("free", [None, None]),
        ("half", [8, 8]),
        ("whole", [16, 20]),
    ]
    free = found["rows"][0]
    assert free["accuracy"] == [0.5, 0.75] and free["mean_tokens"] == [100.5, 100.5]
    assert {name: free[name] for name in paired_difference(ONE, OTHER)} == paired_difference(ONE, OTHER)
    assert free["difference"] == 0.25 and free["num_differing"] == 2 and free["p_value"] == 0.5
    assert "16/20" in table(found) and "--percent_of" in table(found)


def test_budgets_of_the_same_tokens_pair_whatever_they_are_called(write):
    first, second = (write(f"{name}.json", evaluation(ONE, **{name: (64, ONE)})) for name in ("100%", "64"))
    assert [row["setting"] for row in compare(read_evaluation(first), read_evaluation(second))["rows"]] == [
        "free",
        "100%",
    ]


def test_questions_pair_by_id_in_whatever_order_they_stand(write):
    first = write("a.json", evaluation(ONE))
    second = write("b.json", evaluation(ONE[::-1], ids="dcba"))
    (row,) = compare(read_evaluation(first), read_evaluation(second))["rows"]
    assert row["num_differing"] == 0 and row["p_value"] == 1.0 and row["low"] == -row["high"] < 0


def test_other_questions_are_refused_unless_the_common_ones_are_asked_for(write):
    first = read_evaluation(write("a.json", evaluation(ONE)))
    second = read_evaluation(write("b.json", evaluation(OTHER[1:] + [[True]], ids="bcde")))
    with pytest.raises(
        ValueError, match=r"share 3 questions; 1 are in the first alone, 1 in the second.*--common True"
    ):
        compare(first, second)
    found = compare(first, second, common=True)
    assert found["num_questions"] == 3 and found["num_left_out"] == [1, 1] and "left out: 1" in table(found)
    assert found["rows"][0]["accuracy"] == pytest.approx([0.5, 2 / 3])
    third = read_evaluation(write("c.json", evaluation([[True]], ids="z")))
    with pytest.raises(ValueError, match="share 0 questions"):
        compare(first, third, common=True)


def test_folders_of_evaluations_and_runs_stand_for_their_files(write, tmp_path):
    write("out/evaluation.json", evaluation(ONE, model="alone"))
    write("run/eval/before.json", evaluation(ONE, model="before"))
    write("run/eval/after.json", evaluation(ONE, model="after"))
    assert [read_evaluation(tmp_path / name).model for name in ("out", "run", "run/eval/before.json")] == [
        "alone",
        "after",
        "before",
    ]


def test_command_prints_and_writes_the_comparison(write, tmp_path, capsys):
    first, second = write("a.json", evaluation(ONE)), write("b.json", evaluation(OTHER, model="better"))
    main([str(first), str(second), "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][0]["difference"] == 0.25
    assert (tmp_path / "out" / "table.txt").read_text() in capsys.readouterr().out
    assert "better" in (tmp_path / "out" / "table.txt").read_text()


def test_command_compares_on_common_questions_when_told_to(write, capsys):
    paths = [str(write("a.json", evaluation(ONE))), str(write("b.json", evaluation(OTHER, ids="bcde")))]
    assert "share 3 questions" in refusal(capsys, lambda: main(paths))
    main([*paths, "--common", "True"])
    assert "3 questions, paired" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change,message",
    [
        ({"question_ids": None}, "different texts"),
        ({"question_ids": ["a", "a", "b", "c"]}, "different texts"),
        ({"question_ids": ["a"]}, "each of 1 questions"),
        ({"unconstrained": {"mean_tokens": 1.0}}, r"row free holds no per-question results \(correct\)"),
        ({"unconstrained": {"correct": [[True], [], [True], [True]]}}, "list of true and false"),
        ({"unconstrained": {"correct": [[1], [0], [1], [1]]}}, "list of true and false"),
        ({"budgets": [{"budget": "8", "tokens": 8}]}, "row 8 holds no per-question results"),
    ],
)
def test_files_without_per_question_results_are_refused_with_the_remedy(write, change, message):
    path = write("a.json", evaluation(ONE) | change)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}.*evaluate again"):
        read_evaluation(path)


@pytest.mark.parametrize("text,message", [("{", "is no JSON file"), ("[]", "no question_ids"), ('{"auc": 1}', "again")])
def test_command_refuses_files_that_are_no_evaluation(tmp_path, capsys, text, message):
    (tmp_path / "a.json").write_text(text)
    assert message in refusal(capsys, lambda: main([str(tmp_path / "a.json")] * 2))


def test_command_refuses_a_folder_without_an_evaluation(tmp_path, capsys):
    assert "holds neither" in refusal(capsys, lambda: main([str(tmp_path)] * 2))
    assert "no such file" in refusal(capsys, lambda: main([str(tmp_path / "no.json")] * 2))


def test_graded_responses_compare_with_an_evaluation_of_the_same_questions(write, tmp_path, tokenizer, think):
    from trsd.data import load_data
    from trsd.responses import Response, measure_responses

    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_data(str(tmp_path / "q.jsonl"), tokenizer=tokenizer, think=think)
    responses = measure_responses([Response(row["question"], row["answer"], "</think>1") for row in rows])
    first = write("a.json", evaluation(ONE, ids=[question.id for question in loaded.questions]))
    found = compare(read_evaluation(first), read_evaluation(write("b.json", responses)))
    assert found["num_questions"] == 4 and found["rows"][0]["accuracy"] == [0.5, 0.25]
    assert found["rows"][0]["mean_tokens"] == [100.5, None] and "100, -" in table(found)


def test_evaluations_made_otherwise_are_warned_of_and_lone_budgets_named(tmp_path):
    def written(name, answer_tokens, budgets):
        rows = [{"budget": b, "tokens": int(b), "correct": [[True], [False]], "mean_tokens": 9.0} for b in budgets]
        stored = {"question_ids": ["a", "b"], "max_answer_tokens": answer_tokens, "num_samples": 1, "budgets": rows}
        stored["unconstrained"] = {"correct": [[True], [True]], "mean_tokens": 20.0}
        (tmp_path / name).write_text(json.dumps(stored))
        return read_evaluation(tmp_path / name)

    found = compare(written("a.json", 32, ["5", "7"]), written("b.json", 64, ["5", "9"]))
    assert found["made_otherwise"] == {"max_answer_tokens": [32, 64]} and found["not_shared"] == [["7"], ["9"]]
    said = table(found)
    assert "warning: max_answer_tokens differs, 32 and 64" in said and "only A has the budgets 7" in said
    same = compare(written("a.json", 32, ["5"]), written("b.json", 32, ["5"]))
    assert same["made_otherwise"] == {} and same["not_shared"] == [[], []]


@pytest.fixture
def evaluated(tmp_path, tokenizer, think):
    """Two evaluations with budgets, in folders."""
    folders = []
    for name, answer in (("a", "3"), ("b", "4")):
        decoder = Decoder(Scripted(tokenizer, f"2+1\n</think>\n\n{answer}", answer), tokenizer, think)
        result = evaluate(decoder, questions("3", "4"), ("0", "2"), max_thinking_tokens=50, max_answer_tokens=20)
        write_json(tmp_path / name / "evaluation.json", {"model": name} | result)
        folders.append(tmp_path / name)
    return folders


def test_evaluate_compares_what_two_words_name_and_draws_both_curves(evaluated, tmp_path, capsys):
    evaluate_main(["--compare", *map(str, evaluated), "--output_dir", str(tmp_path / "out")])
    assert "B - A" in capsys.readouterr().out
    made = {"comparison.html", "comparison.json", "table.txt", "curve.png", "lengths.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == made
    words = ["--compare", *map(str, evaluated), "--budgets", "0"]
    assert "leave out --budgets" in refusal(capsys, lambda: evaluate_main(words))
    assert "--compare" in refusal(capsys, lambda: evaluate_main(words[:2]))


def page_of(folders, tmp_path):
    main([*map(str, folders), "--output_dir", str(tmp_path / "out")])
    return (tmp_path / "out" / "comparison.html").read_text()


def test_page_shows_table_curves_lengths_and_answers_and_needs_nothing_else(evaluated, tmp_path, capsys):
    page = page_of(evaluated, tmp_path)
    assert "http" not in page and "<script" not in page and page.count("<img") == 2
    assert "2 questions, paired.<br>A: a (" in page and "unconstrained accuracy<b>0.500 → 0.500" in page
    # One is right of "3" and the other of "4", so all differ and none is better.
    assert "<td>free</td><td></td><td>0.500</td><td>0.500</td><td>+0.000</td>" in page
    assert "Of the first 2 questions B stops thinking earlier in 0 and is right at more budgets in 1;" in page
    assert '<td>2 (2)</td><td class="right">3</td><td class="wrong">4</td>' in page


def test_page_shows_the_budgets_and_questions_that_both_have(evaluated, tmp_path, capsys):
    path = evaluated[1] / "evaluation.json"
    stored = json.loads(path.read_text())
    first, second = stored["examples"]
    second["at_budgets"][0] |= {"budget": "elsewhere"}
    path.write_text(json.dumps(stored | {"model": "<b>", "examples": [second, first | {"question": "another"}]}))
    page = page_of(evaluated, tmp_path)
    assert "Of the first 1 questions" in page and "elsewhere" not in page and page.count("(answer 4)") == 1
    assert "B: &lt;b&gt; (" in page


def test_page_of_per_question_results_alone_is_the_table(write, tmp_path, capsys):
    page = page_of([write("a.json", evaluation(ONE)), write("b.json", evaluation(OTHER, half=(8, ONE)))], tmp_path)
    assert "<td>+0.250</td>" in page and "only B has the budgets half" in page
    assert "<img" not in page and "Side by side" not in page


def test_table_and_page_say_the_same(write, tmp_path, capsys):
    first = evaluation(ONE, half=(8, ONE))
    second = evaluation(OTHER, half=(12, OTHER)) | {"closer": "other"}
    page = page_of([write("a.json", first), write("b.json", second)], tmp_path)
    told = (tmp_path / "out" / "table.txt").read_text().strip().split("\n")
    assert "4 questions, paired" in told and "warning: closer differs, None and other" in " ".join(told)
    assert all(html.escape(line) in page for line in told[told.index("4 questions, paired") :])


def test_questions_gained_at_budgets_come_before_those_that_are_not(evaluated, tmp_path, capsys):
    page = page_of(evaluated, tmp_path)
    gained, lost = page.index("(answer 4)"), page.index("(answer 3)")
    assert gained < lost


def test_names_too_long_for_a_legend_keep_their_ends():
    assert _shortened("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    shown = _shortened("/a/very/very/long/way/to/one/of/the/runs/mine/checkpoint-200")
    assert len(shown) == 48 and shown.startswith("…") and shown.endswith("/of/the/runs/mine/checkpoint-200")


def test_page_of_questions_in_common_shows_no_curve_of_the_others(evaluated, tmp_path, capsys):
    path = evaluated[1] / "evaluation.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"question_ids": [stored["question_ids"][0], "elsewhere"]}))
    main([*map(str, evaluated), "--common", "True", "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "left out: 1 questions of A and 1 of B" in page and "<img" not in page and "area under" not in page
    assert "Side by side" in page


def test_mean_tokens_of_other_questions_are_not_shown(write, capsys):
    paths = [str(write("a.json", evaluation(ONE))), str(write("b.json", evaluation(OTHER, ids="bcde")))]
    found = compare(*(read_evaluation(Path(path)) for path in paths), common=True)
    assert found["rows"][0]["mean_tokens"] == [None, None]


def test_page_of_evaluations_without_budgets_has_no_curve(tmp_path, tokenizer, think, capsys):
    decoder = Decoder(Scripted(tokenizer, "2+1\n</think>\n\n3", "3"), tokenizer, think)
    result = evaluate(decoder, questions("3", "4"), (), max_thinking_tokens=50, max_answer_tokens=20)
    for name in "ab":
        write_json(tmp_path / name / "evaluation.json", {"model": name} | result)
    page = page_of([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert "Accuracy against thinking budget" not in page and "unconstrained accuracy" in page


@pytest.mark.parametrize("change", [{"budgets": None}, {"budgets": 5}])
def test_budgets_that_are_no_list_are_refused(write, change):
    with pytest.raises(ValueError, match=r"a\.json: budgets must be a list.*evaluate again"):
        read_evaluation(write("a.json", evaluation(ONE) | change))


def test_a_page_needs_no_accuracy_that_is_not_there(write, tmp_path, capsys):
    """Another program's file with more than per-question results, and less than ours."""
    more = {"auc": 0.5, "unconstrained": {"correct": ONE, "mean_thinking_tokens": 3.0}}
    page = page_of([write("a.json", evaluation(ONE) | more), write("b.json", evaluation(OTHER) | more)], tmp_path)
    assert "Is the difference real?" in page


def test_a_question_that_stands_twice_is_shown_as_each_time_it_was_answered(evaluated, tmp_path, capsys):
    for place, folder in enumerate(evaluated):
        path = folder / "evaluation.json"
        stored = json.loads(path.read_text())
        first, _ = stored["examples"]
        again = first | {"reasoning": f"the second time, by {'AB'[place]}"}
        path.write_text(json.dumps(stored | {"examples": [first, again]}))
    page = page_of(evaluated, tmp_path)
    assert "Of the first 2 questions" in page
    assert page.count("the second time, by A") == page.count("the second time, by B") == 1


def test_an_evaluations_folder_is_left_alone(evaluated, tmp_path, capsys):
    stored = (evaluated[0] / "evaluation.json").read_text()
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, evaluated), "--output_dir", str(evaluated[0])])
    assert exit_.value.code == 2 and "holds an evaluation already" in capsys.readouterr().err
    assert (evaluated[0] / "evaluation.json").read_text() == stored and len(list(evaluated[0].iterdir())) == 1
