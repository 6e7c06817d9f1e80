"""Rows in the exact form of the corpora that the methods' papers train on."""

import json

import pytest

from trsd.corpora import as_conversation
from trsd.data import NO_ANSWER, NO_CLOSE, NO_THINKING, load_data
from trsd.errors import InputError

QUESTION = "What is 2+2?"
SYSTEM = (
    "Your role as an assistant involves thoroughly exploring questions. Please structure your response into two main "
    "sections: Thought and Solution, using <|begin_of_thought|> {thought} <|end_of_thought|>."
)
TAGGED = (
    "<|begin_of_thought|>\n\nTwo and two.\n\nThat makes 4.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>"
)
THOUGHT = "<think>\nTwo and two.\n\nThat makes 4.\n</think>\n\nIt is \\boxed{4}."
ROWS = {
    "OpenThoughts": {
        "system": SYSTEM,
        "conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": TAGGED}],
    },
    "Bespoke-Stratos": {
        "system": SYSTEM,
        "conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": TAGGED}],
    },
    "Sky-T1": {
        "system": SYSTEM,
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": TAGGED},
        ],
    },
    "Llama-Nemotron": {
        "input": [{"role": "user", "content": QUESTION}],
        "output": THOUGHT,
        "category": "math",
        "license": "cc-by-4.0",
        "reasoning": "on",
        "generator": "DeepSeek-R1",
        "used_in_training": ["Ultra"],
        "version": "v1",
        "system_prompt": "detailed thinking on",
    },
    "SYNTHETIC-1": {
        "response_id": "vfm_0",
        "problem_id": "vfm_0",
        "task_type": "verifiable_math",
        "score": 1.0,
        "prompt": QUESTION,
        "llm_response": THOUGHT,
        "verification_info": json.dumps({"ground_truth": "4"}),
    },
    "SYNTHETIC-1-SFT-Data": {
        "task_type": "verifiable_math",
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": THOUGHT}],
    },
}


@pytest.fixture
def load(tokenizer, think, tmp_path):
    def load(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_data(str(path), tokenizer=tokenizer, think=think)

    return load


@pytest.mark.parametrize("corpus", ROWS)
def test_every_corpus_gives_the_same_trace(corpus, load, tokenizer, think):
    (trace,) = load(ROWS[corpus]).traces
    assert trace.reasoning == "Two and two.\n\nThat makes 4."
    assert trace.answer == "It is \\boxed{4}." and trace.question == QUESTION
    assert trace.prompt_ids == think.prompt_ids(tokenizer, [{"role": "user", "content": QUESTION}])
    assert "begin_of" not in tokenizer.decode(trace.prompt_ids + trace.reasoning_ids + trace.answer_ids)


def test_the_corpora_may_be_mixed_and_their_duplicates_are_counted(load):
    loaded = load(*ROWS.values())
    assert len(loaded.traces) == 1 and loaded.dropped == {"exact duplicate": len(ROWS) - 1}


def test_rows_without_thinking_or_answer_are_dropped_by_reason(load):
    off = ROWS["Llama-Nemotron"] | {"reasoning": "off", "output": "It is 4."}
    unfinished = {"conversations": [{"from": "user", "value": "?"}, {"from": "gpt", "value": TAGGED[:30]}]}
    thought = TAGGED.split("<|begin_of_solution|>")[0] + "<|begin_of_solution|>\n\n<|end_of_solution|>"
    empty = {"conversations": [{"from": "user", "value": "?"}, {"from": "gpt", "value": thought}]}
    loaded = load(ROWS["OpenThoughts"], off, unfinished, empty)
    assert loaded.dropped == {NO_THINKING: 1, NO_CLOSE: 1, NO_ANSWER: 1} and len(loaded.traces) == 1


def test_an_input_of_text_is_a_user_turn(load):
    (trace,) = load(ROWS["Llama-Nemotron"] | {"input": QUESTION}).traces
    assert trace.question == QUESTION


@pytest.mark.parametrize(
    "row,message",
    [
        ({"conversations": []}, "conversations must be a list"),
        ({"conversations": "hello"}, "conversations must be a list"),
        ({"conversations": [{"from": "user"}]}, "needs a from and a value of text"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn from 'tool'; known: human, user"),
        ({"input": [1], "output": "x"}, "input must be a list"),
        ({"input": "x", "output": None}, "output must be text, got NoneType"),
        ({"prompt": "x", "llm_response": 3}, "llm_response must be text, got int"),
    ],
)
def test_malformed_rows_raise_with_their_number(row, message):
    with pytest.raises(InputError, match=f"rows:7: .*{message}"):
        as_conversation(row, where="rows:7")


def test_other_rows_are_left_to_others():
    assert as_conversation({"question": "x", "answer": "y"}, where="rows:1") is None
