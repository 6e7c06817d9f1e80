import pytest
from conftest import make_traces
from test_decoding import Scripted

from trsd import generate
from trsd.data import NO_ANSWER, Question
from trsd.decoding import Decoder
from trsd.generate import generate_traces, select_traces
from trsd.models import tokenizer_fingerprint
from trsd.traces import read_traces


def questions(*golds):
    return [
        Question(id=f"q{i}", question=f"q{i}", messages=[{"role": "user", "content": f"q{i}"}], gold=gold)
        for i, gold in enumerate(golds)
    ]


def generate_with(tokenizer, think, thought, answer="unused", **options):
    decoder = Decoder(Scripted(tokenizer, thought, answer), tokenizer, think)
    limits = dict(max_thinking_tokens=40, max_answer_tokens=24)
    return generate_traces(decoder, questions("3", "4", None), **limits, **options)


def test_traces_are_what_the_model_wrote_and_graded(tokenizer, think):
    traces, dropped = generate_with(tokenizer, think, "3 it is.\n</think>\n\nThe answer is 3.")
    assert not dropped and [trace.correct for trace in traces] == [True, False, None]
    trace = traces[0]
    text = tokenizer.decode(trace.prompt_ids + trace.reasoning_ids + trace.close_ids + trace.answer_ids)
    assert text.endswith(
        "q0<|im_end|>\n<|im_start|>assistant\n<think>\n3 it is.\n</think>\n\nThe answer is 3.<|im_end|>"
    )
    assert trace.closed and trace.sampling["temperature"] == 0.0 and trace.sampling["max_thinking_tokens"] == 40
    assert trace.tokenizer == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    "thought,reason",
    [
        ("3 " * 40, "no close tag"),
        ("3", "no close tag"),
        ("3\n</think>\n\n", NO_ANSWER),
        ("3\n</think>\n\n" + "3 " * 30, "answer cut off by max_answer_tokens"),
    ],
)
def test_what_cannot_be_learnt_from_is_dropped_by_reason(tokenizer, think, thought, reason):
    traces, dropped = generate_with(tokenizer, think, thought)
    assert traces == [] and len(dropped) == 1
    assert next(iter(dropped)).startswith(reason) and dropped.total() == 3


def test_unfinished_thinking_can_be_closed(tokenizer, think):
    traces, dropped = generate_with(tokenizer, think, "3 " * 40, "The answer is 3.", close_unfinished=True)
    assert not dropped and all(not trace.closed and len(trace.reasoning_ids) == 40 for trace in traces)
    assert traces[0].close_ids == list(think.closer_ids) and traces[0].correct


def test_select_keeps_correct_short_thoughtful_traces(tokenizer, think):
    from dataclasses import replace

    one, two, three, four, five = make_traces(tokenizer, think, 5)
    traces = [one, replace(two, correct=False), replace(three, correct=None), replace(four, reasoning_ids=[])]
    kept, dropped = select_traces([*traces, five], keep="correct_only", max_length=five.num_tokens + 2, closer_length=3)
    assert five not in kept
    assert dropped["wrong answer"] == dropped["no reference answer to compare with"] == dropped["empty reasoning"] == 1
    assert sum(dropped.values()) + len(kept) == 5
    everything, none_dropped = select_traces([one, five, traces[1]], keep="none")
    assert len(everything) == 3 and not none_dropped


def test_command_writes_a_trace_file_that_reads_back(tmp_path, capsys, tokenizer):
    output = tmp_path / "traces.jsonl"
    argv = ["--max_samples", "6", "--max_thinking_tokens", "300", "--output", str(output)]
    generate.main(argv)
    traces = read_traces(output, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    assert len(traces) == 6 and all(trace.correct and trace.closed for trace in traces)
    assert f"6 traces in {output}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        generate.main(argv)
    assert exit_.value.code == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--output", "t.txt"], "expected a .jsonl or .parquet"),
        (["--output", "t.jsonl", "--data", "none.jsonl"], "no data file at none.jsonl"),
        (["--output", "t.jsonl", "--max_thinking_tokens", "5000"], "context holds 2048"),
    ],
)
def test_command_refuses_before_it_works(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        generate.main(words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
