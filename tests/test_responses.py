import json
from pathlib import Path

import pytest

from trsd.errors import InputError
from trsd.evaluate import main
from trsd.responses import Response, graded_text, measure_responses, read_responses, responses_table

DRAFTS = Path(__file__).parents[2] / "shared" / "data" / "long_traces" / "aime24_drafts.jsonl"
DRAFT_TAGS = {"open_tag": "<Begin_of_Draft>", "close_tag": "<End_of_Draft>"}

RESPONSES = [
    Response("2+1?", "3", "<think>4? No.</think>\n\\boxed{3}"),
    Response("1+1?", "2", "<think>The answer is 2. Wait, the answer is 2."),
    Response("2+1?", "3", "It is 5.</think> Yes, \\boxed{4}"),
    Response("1+1?", "2", "<think>So \\boxed{2}.</think> The answer is 2."),
]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(question="2+1?", answer="3", response="3"):
    return {"question": question, "answer": answer, "response": response}


def test_measure_responses_groups_samples_by_question_wherever_they_stand():
    result = measure_responses(RESPONSES)
    assert result["num_questions"] == 2 and result["num_responses"] == 4 and result["num_samples"] == 2
    assert result["accuracy"] == result["pass_at"]["1"] == 0.75 and result["pass_at"]["2"] == 1.0
    assert result["low"] <= 0.75 <= result["high"]
    assert [entry["correct"] for entry in result["responses"]] == [True, True, False, True]


def test_measure_responses_counts_open_thinking_and_missing_boxes():
    result = measure_responses(RESPONSES)
    assert result["unclosed_rate"] == 0.25 and result["untagged_rate"] == 0.0
    assert result["no_box_rate"] == 0.5 and result["no_answer_rate"] == 0.0  # a box in the thinking is no answer's
    assert result["mean_characters"] == sum(len(response.text) for response in RESPONSES) / 4


def test_measure_responses_counts_answers_in_no_known_form():
    texts = ["</think>\\boxed{3}", "</think>The answer is 3", "</think>so 3", "</think>no idea"]
    result = measure_responses([Response("q", "3", text) for text in texts])
    assert result["format_failure_rate"] == 0.5 and result["no_answer_rate"] == 0.25 and result["accuracy"] == 0.75


def test_measure_responses_keeps_the_verdicts_of_every_question():
    result = measure_responses(RESPONSES)
    assert result["correct"] == [[True, False], [True, True]] and len(set(result["question_ids"])) == 2
    assert result["question_ids"] == measure_responses(RESPONSES[:2])["question_ids"]


def test_measure_responses_counts_what_took_too_long(monkeypatch):
    from trsd import math_checker

    monkeypatch.setattr(math_checker, "_shared", math_checker.MathChecker(seconds=0.2))
    endless = Response("q", r"\frac{1}{2}", "</think>\\boxed{9^{9^{9^{9}}}}")
    with pytest.warns(UserWarning, match="could not be compared"):
        result = measure_responses([endless, Response("q", r"\frac{1}{2}", "</think>0.5")])
    assert result["num_undecided"] == 1 and result["accuracy"] == 0.5 and "took too long" in responses_table(result)
    math_checker.shared_checker().close()


def test_whole_texts_are_graded_beside_what_stands_behind_the_close_tag():
    result = measure_responses([Response("q", "3", "Maybe \\boxed{3}.</think>\nI do not know.")])
    assert result["accuracy"] == 0.0 and result["accuracy_of_whole_text"] == 1.0 and result["no_answer_rate"] == 1.0


def test_questions_with_more_samples_do_not_count_more():
    uneven = measure_responses([*RESPONSES, Response("2+1?", "3", "</think>5")])
    assert uneven["accuracy"] == pytest.approx((1 / 3 + 1) / 2) and list(uneven["pass_at"]) == ["1", "2"]
    assert "acc@" not in responses_table(uneven) and "acc@2" in responses_table(measure_responses(RESPONSES))


def test_graded_text_is_what_follows_the_first_close_tag_or_everything():
    assert graded_text("a</think>b</think>c", close_tag="</think>") == "b</think>c"
    assert graded_text("<think>a", close_tag="</think>") == "<think>a"
    assert graded_text("a</think>", close_tag="</think>") == ""


def test_responses_without_any_tag_say_so_in_the_table():
    result = measure_responses([Response("q", "3", "3")])
    assert result["untagged_rate"] == result["unclosed_rate"] == 1.0
    assert "no response holds <think> or </think>" in responses_table(result)
    assert "no response holds" not in responses_table(measure_responses(RESPONSES))


def test_empty_tags_are_refused():
    with pytest.raises(InputError, match="must not be empty"):
        measure_responses(RESPONSES, close_tag="")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_read_responses_knows_both_file_types_and_names(tmp_path, suffix):
    rows = [{"problem": "2+1?", "answer": "3", "response": "3"}] * 2
    path = tmp_path / f"responses{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_rows(path, *rows)
    assert read_responses(path) == [Response("2+1?", "3", "3")] * 2


def test_read_responses_takes_numbers_as_reference_answers(tmp_path):
    assert read_responses(write_rows(tmp_path / "r.jsonl", row(answer=27.0)))[0].gold == "27.0"


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"question": "q", "answer": "3"}, "columns are"),
        ({"prompt": "q", "answer": "3", "response": "3"}, "columns are"),
        (row(response=None), "response is NoneType"),
        (row(answer=True), "answer is bool"),
        (row(answer="4"), "'4', but '3' to the same problem"),
    ],
)
def test_read_responses_names_the_row_it_cannot_use(tmp_path, bad, message):
    with pytest.raises(InputError, match=rf"r\.jsonl:2: .*{message}"):
        read_responses(write_rows(tmp_path / "r.jsonl", row(), bad))


def test_read_responses_refuses_an_empty_file(tmp_path):
    with pytest.raises(InputError, match="holds no row"):
        read_responses(write_rows(tmp_path / "r.jsonl"))


def test_evaluate_command_grades_a_file_without_loading_a_model(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trsd.evaluation.open_decoder", refuse)
    monkeypatch.setattr("trsd.evaluation.open_reader", refuse)
    path = write_rows(tmp_path / "r.jsonl", row(response="<t>4</t>3"), row(response="<t>3</t>4"))
    main(["--responses", str(path), "--open_tag", "<t>", "--close_tag", "</t>", "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["accuracy"] == 0.5 and result["pass_at"]["2"] == 1.0 and result["data"] == str(path)
    assert "2 responses to 1 questions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--responses", str(path), "--output_dir", str(tmp_path / "out")])
    assert "holds an evaluation already" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result


@pytest.mark.parametrize(
    "words,message",
    [
        (["--budgets", "0", "--model", "x"], "leave out --model, --budgets"),
        ([], "no data file at"),
    ],
)
def test_evaluate_command_refuses_what_responses_cannot_use(tmp_path, capsys, words, message):
    path = tmp_path / "r.jsonl"
    if words:
        write_rows(path, row())
    with pytest.raises(SystemExit) as exit_:
        main(["--responses", str(path), *words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(not DRAFTS.exists(), reason="the AIME24 drafts are not beside the checkout")
def test_published_drafts_are_graded_as_their_labels_say():
    result = measure_responses(read_responses(DRAFTS), **DRAFT_TAGS)
    assert result["num_questions"] == 30 and result["num_responses"] == 90 and result["num_samples"] == 3
    assert result["unclosed_rate"] == 27 / 90 and result["no_box_rate"] == 23 / 90 and result["untagged_rate"] == 0
    # Published (P-ALIGN): acc@3 17.8 %, pass@3 26.7 %.
    assert result["accuracy"] == pytest.approx(16 / 90) == result["accuracy_of_whole_text"]
    assert result["pass_at"]["3"] == pytest.approx(8 / 30)
