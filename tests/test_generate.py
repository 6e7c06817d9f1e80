import json
import subprocess
import sys
import time
from itertools import islice

import pytest
from conftest import make_tiny_model, make_traces
from scripted import Scripted

from trsd import generate, generation
from trsd.data import NO_ANSWER, Question
from trsd.decoding import Decoder
from trsd.demo.problems import draw_problems
from trsd.generation import generate_traces, select_traces
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


def question_file(path, count=12):
    problems = draw_problems("train", seed=1)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in islice(problems, count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(folder, questions, output, **flags):
    flags = dict(model=folder, data=questions, output=output, max_thinking_tokens=30, max_answer_tokens=40) | flags
    flags = dict(close_unfinished=True, temperature=1.0, num_samples=3, batch_size=2) | flags
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def answering_folder(tokenizer, tmp_path):
    """The tiny model with many EOS tokens, since a random one seldom ends with the one."""
    model = make_tiny_model(tokenizer)
    model.generation_config.eos_token_id = list(range(2, 640, 9))
    model.save_pretrained(tmp_path / "answering")
    tokenizer.save_pretrained(tmp_path / "answering")
    return tmp_path / "answering"


def test_a_killed_job_goes_on_and_ends_as_if_it_had_not_been(answering_folder, tmp_path, capsys):
    questions = question_file(tmp_path / "q.jsonl", 40)
    generate.main(words_of(answering_folder, questions, tmp_path / "whole.jsonl"))
    whole = capsys.readouterr().out
    words, output = words_of(answering_folder, questions, tmp_path / "killed.jsonl"), tmp_path / "killed.jsonl"
    code = "import sys, torch; torch.set_num_threads(1); from trsd.generate import main; main(sys.argv[1:])"
    journal, seen = tmp_path / "killed.jsonl.journal", 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
        while (rows := sum(path.read_bytes().count(b"\n") for path in journal.glob("rows-*"))) < seen + 3:
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        seen = rows
    generate.main(words)
    out = capsys.readouterr().out
    assert "of 120 are written" in out and out.splitlines()[-1] == whole.splitlines()[-1]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def test_samples_differ_and_are_numbered(answering_folder, tmp_path, tokenizer):
    words = words_of(answering_folder, question_file(tmp_path / "q.jsonl", 3), tmp_path / "t.jsonl")
    generate.main(words)
    traces = read_traces(tmp_path / "t.jsonl", tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    assert len({trace.id for trace in traces}) == len(traces) > 3
    assert {trace.sampling["sample"] for trace in traces} == {0, 1, 2}


def test_one_output_is_made_with_one_setting(answering_folder, tmp_path, capsys, monkeypatch):
    questions, output = question_file(tmp_path / "q.jsonl"), tmp_path / "t.jsonl"
    stop_after = generation.Journal.add

    def add(self, key, row):
        stop_after(self, key, row)
        if len(self) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(generation.Journal, "add", add)
    with pytest.raises(SystemExit) as exit_:
        generate.main(words_of(answering_folder, questions, output))
    assert exit_.value.code == 130 and "4 of 36 are kept" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit) as exit_:
        generate.main(words_of(answering_folder, questions, output, temperature=0.5))
    assert exit_.value.code == 2 and "temperature: 1.0 -> 0.5" in capsys.readouterr().err
    generate.main(words_of(answering_folder, question_file(tmp_path / "one.jsonl", 1), output, filter="none"))
    assert "holds 1 rows of questions or samples that were not asked for now" in capsys.readouterr().out
    output.unlink()
    generate.main(words_of(answering_folder, questions, output, filter="none"))
    assert "4 of 36 are written" in capsys.readouterr().out
    assert output.exists() and not output.with_name("t.jsonl.journal").exists()


def test_a_prompt_too_long_for_the_context_is_skipped_and_counted(answering_folder, tmp_path, capsys):
    questions = question_file(tmp_path / "q.jsonl", 3)
    with questions.open("a") as stream:
        stream.write(json.dumps({"question": "Why? " * 300, "answer": "3"}) + "\n")
        stream.write(json.dumps({"question": "  ", "answer": "3"}) + "\n")
    generate.main(words_of(answering_folder, questions, tmp_path / "t.jsonl", num_samples=1))
    dropped = capsys.readouterr().out.splitlines()[-1]
    assert "1 x prompt of more than" in dropped and "1 x empty prompt" in dropped


def test_samples_with_the_same_text_count_once(answering_folder, tmp_path, capsys):
    words = words_of(answering_folder, question_file(tmp_path / "q.jsonl", 3), tmp_path / "t.jsonl", temperature=0.001)
    generate.main(words)
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert f"{2 * len(lines)} x the same text as another sample" in capsys.readouterr().out and lines
