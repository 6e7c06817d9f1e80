import json
from pathlib import Path

import pytest

from trsd.data import NO_ANSWER, NO_CLOSE, describe_drops, load_data
from trsd.errors import InputError
from trsd.traces import write_traces


@pytest.fixture
def load(tokenizer, think, tmp_path):
    def load(*rows, **kwargs):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_data(str(path), tokenizer=tokenizer, think=think, **kwargs)

    return load


def test_question_and_answer_become_a_question_with_gold(load):
    loaded = load({"question": "How many?", "answer": "2+2 = 4.\n#### 4"}, {"problem": "And now?", "answer": 5})
    assert [(q.question, q.gold) for q in loaded.questions] == [("How many?", "4"), ("And now?", "5")]


def test_prompt_reasoning_answer_become_a_trace(load, tokenizer, think):
    (trace,) = load({"prompt": "How many?", "reasoning": "2+2=4.", "answer": "\\boxed{4}", "gold": "4"}).traces
    text = tokenizer.decode(trace.prompt_ids + trace.reasoning_ids + trace.close_ids + trace.answer_ids)
    assert text.endswith("<think>\n2+2=4.\n</think>\n\n\\boxed{4}<|im_end|>")
    assert trace.correct is True


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": "<think>\n2+2=4.\n</think>\n\nIt is 4."},
        {"role": "assistant", "content": "2+2=4.\n</think>\nIt is 4."},
        {"role": "assistant", "content": "It is 4.", "reasoning_content": "2+2=4."},
    ],
)
def test_messages_with_thinking_become_a_trace(load, last):
    (trace,) = load({"messages": [{"role": "user", "content": "How many?"}, last]}).traces
    assert (trace.reasoning, trace.answer, trace.correct) == ("2+2=4.", "It is 4.", None)


def test_messages_that_end_with_the_user_become_a_question(load):
    loaded = load({"messages": [{"role": "user", "content": "How many?"}], "answer": "4"})
    assert loaded.questions[0].gold == "4"


def test_rows_without_use_are_dropped_and_counted_by_reason(load):
    def talk(content):
        return {"messages": [{"role": "user", "content": "Q" + content}, {"role": "assistant", "content": content}]}

    good = talk("so\n</think>\n4")
    loaded = load(good, good, talk("no thinking at all"), talk("only thinking</think>\n \n"))
    assert len(loaded.traces) == 1
    assert loaded.dropped == {"exact duplicate": 1, NO_CLOSE: 1, NO_ANSWER: 1}
    assert "1 x answer of zero tokens" in describe_drops(loaded.dropped)


def test_nothing_usable_says_why(load):
    with pytest.raises(InputError, match="1 x empty prompt"):
        load({"question": "  ", "answer": "4"})


@pytest.mark.parametrize(
    "row,message",
    [
        ({"text": "hello"}, r"columns \['text'\] fit no known form"),
        ({"question": None, "answer": "4"}, "question must be text, got NoneType"),
        ({"question": ["a"], "answer": "4"}, "question must be text, got list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "role and a content"),
    ],
)
def test_malformed_row_raises_with_its_number(load, row, message):
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{message}"):
        load({"question": "ok", "answer": "1"}, row)


def test_mixed_rows_are_refused(load):
    with pytest.raises(InputError, match="mixes 1 rows with reasoning and 1 without"):
        load({"question": "a", "answer": "1"}, {"prompt": "b", "reasoning": "c", "answer": "d"})


def test_max_rows_stops_early(load):
    assert len(load(*({"question": f"q{i}", "answer": "1"} for i in range(5)), max_rows=3).questions) == 3


def test_stored_trace_file_is_data_too(tokenizer, think, traces, tmp_path):
    write_traces(tmp_path / "t.jsonl", traces)
    assert load_data(str(tmp_path / "t.jsonl"), tokenizer=tokenizer, think=think).traces == traces


def test_missing_source_says_what_was_looked_for(tokenizer, think):
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.jsonl"):
        load_data("no/such/file.jsonl", tokenizer=tokenizer, think=think)
    with pytest.raises(FileNotFoundError, match="nothing is bundled as bundled:nothing"):
        load_data("bundled:nothing.jsonl", tokenizer=tokenizer, think=think)


GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the checkout")
def test_gsm8k_rows_become_questions_with_numeric_gold(tokenizer, think):
    from trsd.grading import as_fraction

    loaded = load_data(str(GSM8K), tokenizer=tokenizer, think=think)
    assert len(loaded.questions) == 659
    assert all(as_fraction(question.gold) is not None for question in loaded.questions)


def test_a_reasoning_column_makes_a_trace_whatever_the_question_is_called(load):
    loaded = load({"question": "How many?", "reasoning": "2+2=4.", "answer": "It is 4.", "gold": 4})
    assert loaded.traces[0].reasoning == "2+2=4." and loaded.traces[0].correct is True


def test_several_samples_of_a_question_are_kept(load):
    row = {"prompt": "How many?", "answer": "It is 4."}
    assert len(load(*({**row, "reasoning": text} for text in ("2+2", "1+3"))).traces) == 2
