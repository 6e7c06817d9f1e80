import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from conftest import REASONER
from transformers import AutoTokenizer

from trsd.data import NO_ANSWER, NO_CLOSE, NO_THINKING, RowReader, describe_drops, load_data
from trsd.errors import InputError
from trsd.thinking import ThinkFormat, token_texts
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
        {"role": "assistant", "content": "It is 4.", "reasoning": "2+2=4.", "reasoning_content": None},
        {"role": "assistant", "content": "It is 4.", "thinking": "2+2=4.", "reasoning_content": ""},
        {"role": "assistant", "content": "<think>2+2=4.</think>It is 4.", "reasoning_content": ""},
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_with_thinking_become_a_trace(load, column, last):
    (trace,) = load({column: [{"role": "user", "content": "How many?"}, last]}).traces
    assert (trace.reasoning, trace.answer, trace.correct) == ("2+2=4.", "It is 4.", None)


def test_messages_that_end_with_the_user_become_a_question(load):
    loaded = load({"messages": [{"role": "user", "content": "How many?"}], "answer": "4"})
    assert loaded.questions[0].gold == "4"


def test_rows_without_use_are_dropped_and_counted_by_reason(load):
    def talk(content):
        return {"messages": [{"role": "user", "content": "Q" + content}, {"role": "assistant", "content": content}]}

    good = talk("so\n</think>\n4")
    loaded = load(good, good, talk("no thinking at all"), talk("<think>\n4, or"), talk("only thinking</think>\n \n"))
    assert len(loaded.traces) == 1
    assert loaded.dropped == {"exact duplicate": 1, NO_THINKING: 1, NO_CLOSE: 1, NO_ANSWER: 1}
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


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"prompt": "b", "reasoning": "x<|im_end|>", "answer": "y"}, "special token inside the text"),
        ({"prompt": "b", "reasoning": "x", "answer": "y<|im_end|> z"}, "special token inside the text"),
        ({"prompt": "b", "reasoning": "x", "answer": "y </think> z"}, "close tag inside the reasoning or the answer"),
    ],
)
def test_text_that_would_end_early_is_dropped_by_reason(tokenizer, think, row, reason):
    assert RowReader(tokenizer, think).read(row, where="f:1") == reason


def test_a_tag_or_an_end_that_a_corpus_writes_itself_is_not_doubled(tokenizer, think):
    reader = RowReader(tokenizer, think)
    plain = reader.read({"prompt": "b", "reasoning": "x", "answer": "y"}, where="f:1")
    written = reader.read({"prompt": "b", "reasoning": "<think>\nx", "answer": "y<|im_end|>"}, where="f:1")
    assert written == plain


def stored_row(traces, **changes):
    return json.loads(json.dumps(asdict(traces[0]))) | changes


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"answer_ids": [999999]}, "token 999999 is none of the tokenizer's"),
        ({"answer_ids": [10**30]}, "answer_ids must be a list of token ids"),
        ({"answer_ids": [True]}, "answer_ids must be a list of token ids"),
        ({"close_ids": [9]}, "without the close_tag '</think>'"),
        ({"closed": "no"}, "closed must be true or false"),
        ({"sampling": "{broken"}, "sampling is no JSON"),
        ({"sampling": 5}, "sampling an object"),
    ],
)
def test_a_stored_trace_that_is_damaged_is_refused_by_its_row(tokenizer, think, traces, changes, message):
    with pytest.raises(InputError, match=f"f:1: .*{message}"):
        RowReader(tokenizer, think).read(stored_row(traces, **changes), where="f:1")


@pytest.mark.parametrize("line", [b'"a": ' + b"1" * 5000, b"[" * 200_000, b'{"a": ' + b"7" * 5000 + b"}"])
def test_a_line_that_breaks_the_parser_is_refused_by_its_number(tmp_path, tokenizer, think, line):
    (tmp_path / "d.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match="d.jsonl:1: not a JSON row"):
        load_data(str(tmp_path / "d.jsonl"), tokenizer=tokenizer, think=think)


def test_half_a_character_is_refused_by_its_row(tokenizer, think):
    with pytest.raises(InputError, match="f:1: reasoning holds half a character"):
        RowReader(tokenizer, think).read({"prompt": "b", "reasoning": "b\ud800", "answer": "y"}, where="f:1")


def test_a_file_that_is_no_parquet_is_refused(tmp_path, tokenizer, think):
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(InputError, match="is no parquet file"):
        load_data(str(tmp_path / "d.parquet"), tokenizer=tokenizer, think=think)


TAGGED = "<think>2 and 2</think>It is \\boxed{4}"
TURN = {"role": "user", "content": "2+2?"}


@pytest.mark.parametrize(
    "row,prompt,gold",
    [
        (dict(prompt="2+2?", response=TAGGED), "2+2?", None),
        (dict(question="2+2?", response=TAGGED, answer="4"), "2+2?", "4"),
        (dict(problem="2+2?", answer=TAGGED), "2+2?", None),
        (dict(problem="2+2?", answer=TAGGED, final_answer=4), "2+2?", "4"),
        (dict(problem="2+2?", reasoning="2 and 2", response="It is \\boxed{4}"), "2+2?", None),
        (dict(problem="2+2?", reasoning="2 and 2", response="It is \\boxed{4}", answer="4"), "2+2?", "4"),
        (dict(problem="2+2?", reasoning="2 and 2", response=TAGGED, answer="4"), "2+2?", "4"),
        (dict(problem="2+2?", reasoning="2 and 2", answer="It is \\boxed{4}", final_answer=4), "2+2?", "4"),
        (dict(problem="2+2?", reasoning="2 and 2", answer="It is \\boxed{4}", final_answer=["4"]), "2+2?", None),
        (dict(prompt="2+2?", completion=TAGGED), "2+2?", None),
        (dict(prompt=[TURN], completion=[TURN | dict(role="assistant", content=TAGGED)]), "2+2?", None),
        (dict(problem="2+2?", generations=[TAGGED, "<think>3"], answer="4"), "2+2?", "4"),
        (dict(problem="2+2?", generated_solution=TAGGED, expected_answer="4"), "2+2?", "4"),
        (dict(instruction="Add.", input="2+2?", output=TAGGED), "Add.\n\n2+2?", None),
        (dict(instruction="Add 2 and 2.", input="", output=TAGGED), "Add 2 and 2.", None),
        (dict(instruction="Add 2 and 2.", output=TAGGED), "Add 2 and 2.", None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_thinking_in_a_response_or_an_answer_is_a_given_trace(load, row, prompt, gold):
    (trace,) = load(row).traces
    assert (trace.question, trace.reasoning, trace.answer, trace.gold) == (prompt, "2 and 2", "It is \\boxed{4}", gold)


def test_a_response_that_never_stops_thinking_is_dropped_by_that_reason(load):
    loaded = load(dict(prompt="2+2?", response=TAGGED), dict(prompt="3+3?", response="<think>3 and"))
    assert len(loaded.traces) == 1 and loaded.dropped == {NO_CLOSE: 1}


FIRST_GUESS = "<think>\nFirst guess \\boxed{1}.\n</think>\n\n"


@pytest.mark.parametrize(
    "row,gold",
    [
        (dict(answer="4", response=TAGGED), "4"),
        (dict(answer=FIRST_GUESS + "The answer is N.", gold="N"), "N"),
        (dict(answer="<think>a \\boxed{9}</think>It is 7.", gold="7"), "7"),
        (dict(answer=TAGGED, final_answer=5), "5"),
        (dict(answer=FIRST_GUESS + "\\boxed{4}"), "4"),
        (dict(answer=FIRST_GUESS + "4"), "4"),
        (dict(answer="<|begin_of_thought|>\\boxed{1}<|end_of_thought|>\n4"), "4"),
        (dict(response=TAGGED), None),
        (dict(generations=[TAGGED], answer="4"), "4"),
        (dict(prompt=[TURN], completion=[dict(role="assistant", content=TAGGED)], answer="4"), "4"),
    ],
)
def test_where_questions_are_wanted_thinking_is_left_aside(load, row, gold):
    (question,) = load(dict(question="2+2?") | row, asking=True).questions
    assert question.gold == gold


@pytest.mark.parametrize(
    "row,gold",
    [
        (dict(problem="?", solution="So \\boxed{12}."), "12"),
        (dict(problem="?", solution="It is 12 or so", answer=None), None),
        (dict(problem="?", solution="So \\boxed{12}.", final_answer="13"), "13"),
        (dict(problem="?", answer=" "), None),
        (dict(problem="?", final_answer=["1", "2"]), None),
    ],
)
def test_the_reference_is_found_wherever_it_stands(load, row, gold):
    (question,) = load(row).questions
    assert question.gold == gold


TALK = [TURN, {"role": "assistant", "content": TAGGED}]
FORMS = [
    dict(question="2+2?"),
    dict(question="2+2?", reasoning="2 and 2", answer="It is \\boxed{4}"),
    dict(question="2+2?", response=TAGGED),
    dict(messages=[TURN]),
    dict(messages=TALK),
    dict(prompt=[TURN], completion=TALK[1:]),
    dict(conversations=TALK),
    dict(conversations=[{"from": "human", "value": "2+2?"}]),
    dict(input="2+2?", output=TAGGED),
    dict(instruction="Add.", output=TAGGED),
    dict(prompt="2+2?", llm_response=TAGGED),
]


@pytest.mark.parametrize("form", FORMS, ids="+".join)
def test_every_form_reads_every_column_of_references(load, form):
    columns = dict(answer="#### 4", gold=4, final_answer=4.0, ground_truth="4", expected_answer="\\boxed{4}")
    columns["solution"] = "So \\boxed{4}."
    for name in columns.keys() - form.keys():
        loaded = load(form | {name: columns[name]})
        (item,) = loaded.questions + loaded.traces
        assert item.gold in ("4", "4.0"), name
    for left_aside in (dict(final_answer=["4", "5"]), dict(ground_truth=True), dict(solution="Add them.")):
        loaded = load(form | left_aside)
        assert [item.gold for item in loaded.questions + loaded.traces] == [None]


def test_columns_that_look_like_reasoning_and_are_not_read_are_named(load, capsys):
    rows = [dict(question=f"{i}?", answer="4", thinking="hm", id=i, problem="B?") for i in range(2)]
    assert load(*rows).unread == {"thinking": 2, "problem": 2}
    said = capsys.readouterr().out
    assert "2 x thinking" in said and "2 x problem" in said and "id" not in said.split("(")[1]
    load(dict(question="A?", answer="4", level=3))
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "row,names",
    [
        (dict(question="2+2?", output=TAGGED), ["output"]),
        (dict(question="2+2?", solution=TAGGED, samples=[None, TAGGED], scores=[1]), ["samples", "solution"]),
        (dict(question="2+2?", thinking_trajectories=["2 and 2"], attempt="4"), ["thinking_trajectories"]),
        (dict(question="2+2?", cot=TAGGED), ["cot"]),
        (dict(question="What is </think>?", thinking=None), []),
        (dict(messages=[TURN], r1_text=TAGGED), ["r1_text"]),
        (dict(prompt="2+2?", response="<think>2 and", better=TAGGED), ["better"]),
        (dict(prompt="2+2?", response=TAGGED, better=TAGGED), []),
        (dict(prompt="2+2?", reasoning="2", answer="4</think>"), []),
    ],
)
def test_a_column_with_a_close_tag_that_is_not_read_is_named_whatever_it_is_called(tokenizer, think, row, names):
    reader = RowReader(tokenizer, think)
    reader.read(row, where="f:1")
    assert sorted(reader.unread.elements()) == names


def test_blanks_are_no_reasoning(load):
    (trace,) = load(dict(prompt="2+4?", reasoning="  \n", answer="6")).traces
    assert trace.reasoning == "" and trace.reasoning_ids == []


QWEN3 = GSM8K.parents[1] / "tokenizers" / "qwen3"
WHOLE = [
    ("2 and 2.", "It is 4."),
    ("So (4).", "\\boxed{4}"),
    ("Is it \u201c4\u201d? \U0001f600", "4"),
    ("a\n\nb ", "Four"),
]


@cache
def tokenizer_and_texts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or "{{ messages[0].content }}"
    return tokenizer, token_texts(tokenizer, len(tokenizer))


@pytest.mark.parametrize("tags", [{}, dict(open_tag="<Begin_of_Draft>", close_tag="<End_of_Draft>")], ids=str)
@pytest.mark.parametrize("folder", [REASONER, QWEN3], ids=lambda folder: folder.name)
def test_a_trace_given_as_text_has_the_tokens_of_the_whole_text(folder, tags):
    if not folder.exists():
        pytest.skip("Qwen3's tokenizer is not beside the checkout")
    tokenizer, texts = tokenizer_and_texts(folder)
    think = ThinkFormat.of(tokenizer, **tags)
    for reasoning, answer in WHOLE:
        trace = RowReader(tokenizer, think).read(dict(prompt="2+2?", reasoning=reasoning, answer=answer), where="f:1")
        ids = [*trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
        written = tokenizer(reasoning + think.natural_close + answer, add_special_tokens=False).input_ids
        assert ids == [*written, tokenizer.eos_token_id]
        assert think.close_tag in tokenizer.decode(trace.close_ids)
        assert (trace.reasoning, trace.answer) == (reasoning, answer)
        parts = think.split(written, texts)
        assert parts == (trace.reasoning_ids, trace.close_ids, trace.answer_ids[:-1])
