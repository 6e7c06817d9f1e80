"""Data that is malformed, met at the command line: its row is named and the exit code is 2, or it is a counted drop."""

import json
import time

import pytest
from conftest import make_traces, refusal, write_rows

from trsd.traces import write_traces

TALK = {"prompt": "How many?", "reasoning": "2+2=4.", "answer": "It is 4."}
GOOD = json.dumps(TALK).encode()


@pytest.mark.parametrize(
    "line,message",
    [
        (b'{"prompt": "\xff\xfe", "reasoning": "a", "answer": "b"}', ":2: not a JSON row in UTF-8"),
        (b'{"prompt": NaN, "reasoning": "a", "answer": "b"}', ":2: prompt must be text, got float"),
        (b'{"prompt": Infinity, "reasoning": "a", "answer": {}}', ":2: "),
        (b'{"prompt": null, "reasoning": "a", "answer": "b"}', ":2: prompt must be text, got NoneType"),
        (b'{"prompt": ["a"], "reasoning": "a", "answer": "b"}', ":2: prompt must be text, got list"),
        (b'{"prompt": "a", "reasoning": {"a": 1}, "answer": "b"}', ":2: reasoning must be text, got dict"),
        (b'{"prompt": "a", "reasoning": "a", "answer": true}', ":2: answer must be text, got bool"),
        (b'{"prompt": "\\ud800", "reasoning": "a", "answer": "b"}', ":2: prompt holds half a character"),
        (b'{"prompt": "a", "reasoning": "a"', ":2: not a JSON row"),
        (b'["a", "b"]', ":2: expected a JSON object, got list"),
        (b"[" * 100_000, ":2: not a JSON row"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", ":2: not a JSON row"),
        (b'{"messages": null}', ":2: messages must be a list"),
        (b'{"messages": [{"role": "user", "content": 3}]}', ":2: every message needs a role and a content of text"),
        (b'{"prompt_ids": "a"}', ":2: not a trace row"),
        (b"{}", ":2: columns [] fit no known form"),
    ],
)  # fmt: skip
def test_fault_22_a_malformed_line_is_refused_with_its_number(run, trace_file, capsys, line, message):
    trace_file.write_bytes(GOOD + b"\n" + line + b"\n")
    assert f"{trace_file}{message}" in refusal(capsys, lambda: run("run"))


@pytest.mark.parametrize("content", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_fault_22_a_file_without_rows_is_refused(run, trace_file, capsys, content):
    trace_file.write_bytes(content)
    assert "holds no usable row (it is empty)" in refusal(capsys, lambda: run("run"))


def test_fault_22_a_byte_order_mark_and_windows_line_ends_train(run, trace_file, capsys):
    rows = [json.dumps(TALK | {"prompt": f"How many are {i}?"}) for i in range(4)]
    trace_file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    run("run", max_steps=1)
    assert "4 traces" in capsys.readouterr().out


def test_fault_22_ten_megabytes_that_nobody_reads_train_and_half_of_them_are_refused(run, trace_file, capsys):
    rows = [TALK | {"prompt": f"{i}?", "notes": "so " * 3_500_000 * (i == 3)} for i in range(4)]
    write_rows(trace_file, *rows)
    run("run", max_steps=1)
    assert "4 traces" in capsys.readouterr().out
    trace_file.write_bytes(trace_file.read_bytes()[:-20])
    error = refusal(capsys, lambda: run("half"))
    assert f"{trace_file}:4: not a JSON row" in error and len(error) < 1000


@pytest.mark.slow
def test_fault_22_a_row_of_ten_megabytes_is_dropped_and_counted(run, trace_file, capsys):
    write_rows(trace_file, *({**TALK, "prompt": f"{i}?"} for i in range(4)), {**TALK, "reasoning": "so " * 3_500_000})
    start = time.perf_counter()
    run("run", max_steps=1)
    assert "1 x longer than max_length=512" in capsys.readouterr().out and time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "columns,message",
    [
        (dict(prompt=["a", None], reasoning=["b", "b"], answer=["c", "c"]), ":2: prompt must be text, got NoneType"),
        (dict(prompt=["a", "a"], reasoning=[["b"], ["b"]], answer=["c", "c"]), ":1: reasoning must be text, got list"),
        (dict(question=[1.5, float("nan")], answer=["c", "c"]), ":2: question must be text, got float"),
        (dict(prompt=[b"\xff", b"a"], reasoning=["b", "b"], answer=["c", "c"]), ":1: prompt must be text, got bytes"),
        (dict(prompt=[], reasoning=[], answer=[]), " holds no usable row (it is empty)"),
    ],
)
def test_fault_22_malformed_parquet_is_refused_with_its_row(run, tmp_path, capsys, columns, message):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert f"{path}{message}" in refusal(capsys, lambda: run("run", data=path))


def test_fault_22_half_a_parquet_file_is_refused(run, tmp_path, capsys, tokenizer, think):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    write_traces(path, make_traces(tokenizer, think, 3))
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:3], b"", b"PAR1" + b"\x00" * 50 + b"PAR1"):
        path.write_bytes(part)
        assert f"{path} is no parquet file that can be read" in refusal(capsys, lambda: run("run", data=path))


def test_fault_22_parquet_whose_text_is_no_utf8_is_refused(run, tmp_path, capsys):
    """Other writers do not check what they call text."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    text = pyarrow.array([b"a", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(dict(prompt=text, reasoning=["b", "b"], answer=["c", "c"])), path)
    error = refusal(capsys, lambda: run("run", data=path))
    assert str(path) in error and "utf-8" in error
