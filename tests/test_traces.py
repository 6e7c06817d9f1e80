import json
from dataclasses import asdict

import pytest

from trsd.errors import InputError
from trsd.traces import read_rows, read_traces, write_traces


@pytest.mark.parametrize("name", ["traces.jsonl", "deep/traces.parquet", "TRACES.JSONL", "traces.Parquet"])
def test_traces_come_back_as_they_were_written(tmp_path, traces, name):
    assert write_traces(tmp_path / name, traces) == len(traces)
    assert read_traces(tmp_path / name, tokenizer_fingerprint=traces[0].tokenizer) == traces
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [name.split("/")[-1]]


def test_traces_of_another_tokenizer_are_refused(tmp_path, traces):
    write_traces(tmp_path / "t.jsonl", traces)
    with pytest.raises(InputError, match=r"t\.jsonl:1: these ids were made by tokenizer"):
        read_traces(tmp_path / "t.jsonl", tokenizer_fingerprint="0" * 16)


@pytest.mark.parametrize(
    "line,message",
    [
        (b'{"question": "a"', "not a JSON row"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"question": "\xff"}', "not a JSON row in UTF-8"),
        (b"NaN", "expected a JSON object, got float"),
    ],
)
def test_malformed_row_names_file_and_row(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "ok"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as error:
        list(read_rows(path))
    assert f"{path}:3" in str(error.value)


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n{"question": "b"}\r\n')
    assert [row["question"] for _, row in read_rows(path)] == ["a", "b"]


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        list(read_rows(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"answer_ids": []}, "must not be empty"),
        ({"prompt_ids": ["a"]}, "prompt_ids must be a list of token ids"),
        ({"reasoning_ids": [-1]}, "reasoning_ids"),
        ({"surprise": 1}, r"unknown \['surprise'\]"),
    ],
)
def test_broken_trace_row_is_refused_by_field(tmp_path, traces, change, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(asdict(traces[0]) | change) + "\n")
    with pytest.raises(InputError, match=message):
        read_traces(path, tokenizer_fingerprint=traces[0].tokenizer)
