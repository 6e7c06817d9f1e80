"""``python -m trsd.analyze``: what it reads, measures and writes, and the judge behind a server."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REASONER, make_traces

from trsd.analysis import tokenizer_folder
from trsd.analyze import main
from trsd.data import NO_CLOSE
from trsd.derivation_judge import DerivationJudge, read_number
from trsd.errors import InputError
from trsd.selection import dataset_ratio, rank_surprisal
from trsd.thinking import token_texts
from trsd.trace_measures import coverage, measure_trace
from trsd.traces import write_traces
from trsd.worked_rows import NO_FINAL_ANSWER, NO_REASONING, load_traces

SHARED = Path(__file__).parents[2] / "shared" / "data"
QWEN3 = SHARED / "tokenizers" / "qwen3"
DRAFTS = SHARED / "long_traces" / "aime24_drafts.jsonl"
SOLUTION = {"question": "What is twice 12?", "answer": "Twice 12 is 12*2=24.\n#### 24"}


@pytest.fixture
def load(tokenizer, think, tmp_path):
    def load(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_traces(str(path), tokenizer=tokenizer, think=think, **options)

    return load


@pytest.fixture
def trace_file(tokenizer, think, tmp_path):
    """Four traces: their reasoning derives, then checks."""
    reasoning = "Twelve twice is 12*2=24.\nWait, let me double-check. 24/2=12. So it is 24."
    ids = tokenizer(reasoning, add_special_tokens=False).input_ids
    traces = [
        replace(trace, question="What is twice 12?", gold="24", reasoning=reasoning, reasoning_ids=ids)
        for trace in make_traces(tokenizer, think, 4)
    ]
    path = tmp_path / "traces.jsonl"
    write_traces(path, traces)
    return path, traces


def analyze(*argv):
    main([str(word) for word in argv])


def read(folder):
    return json.loads((folder / "analysis.json").read_text())


def test_solutions_are_split_at_the_last_mark(load, tokenizer):
    loaded = load(SOLUTION, SOLUTION, SOLUTION | {"answer": "no mark"}, SOLUTION | {"answer": "#### 3"}, solutions=True)
    (trace,) = loaded.traces
    assert trace.reasoning == "Twice 12 is 12*2=24." and trace.gold == trace.answer == "24" and trace.correct
    assert loaded.dropped == {"exact duplicate": 1, NO_FINAL_ANSWER: 1, NO_REASONING: 1}


def test_responses_are_split_at_the_tags(load):
    row = {"problem": "What is twice 12?", "answer": 24, "response": "<think>\n12*2=24\n</think>\n\nIt is \\boxed{24}."}
    loaded = load(row, row | {"response": "<think>\n12*2="})
    (trace,) = loaded.traces
    assert (trace.reasoning, trace.answer, trace.gold) == ("12*2=24", "It is \\boxed{24}.", "24")
    assert loaded.dropped == {NO_CLOSE: 1}


@pytest.mark.parametrize(
    "row,options,message",
    [
        (SOLUTION, {}, "rows.jsonl holds questions without reasoning.*--solutions True"),
        ({"answer": "x #### 3"}, {"solutions": True}, "rows.jsonl:1: --solutions expects question"),
        ({"problem": "?", "response": ["hm"]}, {}, "rows.jsonl:1: response must be text, got list"),
        (SOLUTION | {"answer": "none"}, {"solutions": True}, "no usable row .1 x no ####"),
    ],
)
def test_rows_that_cannot_be_analysed_raise(load, row, options, message):
    with pytest.raises(InputError, match=message):
        load(row, **options)


def test_a_trace_is_measured_as_defined(trace_file, tokenizer):
    trace = trace_file[1][0]
    texts = token_texts(tokenizer, len(tokenizer))
    measured = measure_trace(trace, texts)
    count = measured.derivation_tokens
    assert "".join(texts[i] for i in trace.reasoning_ids[:count]).endswith("12*2=24")
    prompt, reasoning = len(trace.prompt_ids), len(trace.reasoning_ids)
    assert measured.cot_tokens == reasoning + len(trace.close_ids)
    assert measured.prompt_tokens + measured.cot_tokens + measured.answer_tokens == trace.num_tokens
    assert measured.derivation_in_cot == count / reasoning
    assert measured.derivation_in_full == (prompt + count) / trace.num_tokens
    assert measured.reflections == {"wait": 1, "double-check": 1} and measured.reflections_before == {}


def test_coverage_counts_distinct_content_words_and_numbers():
    assert coverage("Ann has 1,200 red eggs and 7 eggs.", "1200 eggs - ann") == pytest.approx(3 / 5)
    assert coverage("How is it?", "anything") is None


def test_the_summary_of_known_traces_is_exact(trace_file, tmp_path, capsys):
    path, traces = trace_file
    analyze("--data", path, "--tokenizer", REASONER, "--output_dir", tmp_path / "out")
    summary = read(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "measures.jsonl").read_text().splitlines()]
    assert summary["num_traces"] == len(rows) == 4 and summary["dropped"] == {}
    shares = [section["mean_share"] for name, section in summary["sections"].items() if name != "full"]
    assert sum(shares) == pytest.approx(1.0)
    assert summary["sections"]["full"]["max"] == max(trace.num_tokens for trace in traces)
    assert summary["sections"]["cot"]["mean"] == sum(row["cot_tokens"] for row in rows) / 4
    assert summary["first_derivation"]["num_found"] == 4
    assert summary["first_derivation"]["in_cot"]["median"] == rows[0]["derivation_in_cot"]
    assert summary["reflections"]["by_cue"] == {"wait": 4, "double-check": 4}
    assert summary["reflections"]["with_derivation"]["before"] == 0
    assert sum(summary["histograms"]["cot"]["counts"]) == 4
    assert (tmp_path / "out" / "analysis.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "analysis.md").read_text()
    assert "| first derivation found | 4 of 4 |" in table and table in capsys.readouterr().out


def test_a_student_adds_its_rank_surprisal_ratio(trace_file, tmp_path, tiny_folder):
    from trsd.models import load_for_decoding

    path, traces = trace_file
    analyze("--data", path, "--student", tiny_folder, "--output_dir", tmp_path / "out", "--max_tokens_per_batch", 300)
    found = rank_surprisal(load_for_decoding(tiny_folder), traces)
    summary = read(tmp_path / "out")
    assert summary["rank_surprisal"]["ratio"] == pytest.approx(dataset_ratio(found), rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "measures.jsonl").read_text().splitlines()]
    assert [row["rank_surprisal_ratio"] for row in rows] == pytest.approx([one.ratio for one in found], rel=1e-4)


def test_traces_without_derivation_answer_or_cues_are_counted(tokenizer, think, tmp_path):
    traces = [
        replace(trace, gold=None, correct=None, answer="no idea", reasoning_ids=[5, 6], reasoning="x")
        for trace in make_traces(tokenizer, think, 2)
    ]
    write_traces(tmp_path / "traces.jsonl", traces)
    analyze("--data", tmp_path / "traces.jsonl", "--tokenizer", REASONER, "--output_dir", tmp_path / "out")
    summary = read(tmp_path / "out")
    assert summary["num_unknown_answer"] == 2 and summary["first_derivation"]["in_cot"] is None
    assert summary["reflections"]["total"] == 0


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--data", "absent.jsonl", "--tokenizer", REASONER], "no data file at absent.jsonl"),
        (["--data", "absent.jsonl"], "name the traces' tokenizer"),
        (["--data", "absent.jsonl", "--tokenizer", "./absent"], "no model folder at ./absent"),
        (["--data", "x.jsonl", "--tokenizer", REASONER, "--judge_url", "here"], "judge_url: expected http"),
        (["--data", "x.jsonl", "--tokenizer", REASONER, "--judge_url", "http://h:1"], "judge_model: name the model"),
        (["--data", "x.jsonl", "--tokenizer", REASONER, "--judge_model", "m"], "judge_model: only judge_url reads it"),
    ],
)
def test_input_that_cannot_be_used_exits_with_2(extra, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze(*extra, "--output_dir", tmp_path / "out")
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not (QWEN3.exists() and DRAFTS.exists()), reason="needs shared/data/long_traces and tokenizers")
def test_long_drafts_are_read_with_a_tokenizer_that_has_no_weights(tmp_path, capsys):
    tags = ["--open_tag", "<Begin_of_Draft>", "--close_tag", "<End_of_Draft>"]
    assert tokenizer_folder(str(QWEN3)) == QWEN3
    analyze("--data", DRAFTS, "--tokenizer", QWEN3, "--output_dir", tmp_path, *tags)
    summary = read(tmp_path)
    assert summary["num_traces"] == 63 and summary["dropped"] == {NO_CLOSE: 27}
    assert f"dropped: 27 x {NO_CLOSE}" in capsys.readouterr().out
    assert summary["reflections"]["mean_per_trace"] > 10


class Server(ThreadingHTTPServer):
    """Answers with what ``reply(number of the request)`` returns: (status, text), or waits first."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests = reply, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, text = self.server.reply(len(self.server.requests))
        self.send_response(status)
        self.end_headers()
        for part in [text] if isinstance(text, bytes) else text:
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:
                return

    def log_message(self, *_):
        pass


def chat(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextmanager
def serving(reply):
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def judge_of(server, **options):
    return DerivationJudge(url=server.url, model="judge", **{"backoff_seconds": 0.0, "timeout_seconds": 5.0} | options)


SENTENCES = ["There are 12. ", "12*2=24. ", "So it is 24."]


def test_the_judge_is_shown_numbered_sentences_and_its_number_is_read(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda n: chat("<think>1 or 3?</think>Sentence [2].")) as server:
        assert judge_of(server).first_derivation("What?", "24", SENTENCES).sentence == 2
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge" and "[2] 12*2=24.\n[3] So" in body["messages"][0]["content"]


def test_no_key_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda n: chat("0")) as server:
        assert judge_of(server).first_derivation("What?", "24", SENTENCES).sentence == 0
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_form_of_the_address_leads_to_one_endpoint(suffix):
    assert DerivationJudge(url="http://h:1" + suffix, model="m").endpoint == "http://h:1/v1/chat/completions"


def test_a_server_that_recovers_is_asked_again():
    with serving(lambda n: (500, b"busy") if n < 3 else chat("3")) as server:
        assert judge_of(server).first_derivation("What?", "24", SENTENCES).sentence == 3
    assert len(server.requests) == 3


@pytest.mark.parametrize("reply", [(500, b"broken"), (200, b"not json"), (200, b'{"choices": []}')])
def test_a_server_that_stays_broken_is_given_up_with_its_words(reply):
    with (
        serving(lambda n: reply) as server,
        pytest.raises(InputError, match=f"failed 3 times.*({reply[1][:6].decode()}|choices)"),
    ):
        judge_of(server).first_derivation("What?", "24", SENTENCES)
    assert len(server.requests) == 3


def test_a_refusal_is_not_repeated():
    with serving(lambda n: (401, b"bad key")) as server, pytest.raises(InputError, match="refuses: HTTP 401 bad key"):
        judge_of(server).first_derivation("What?", "24", SENTENCES)
    assert len(server.requests) == 1


def test_a_prompt_beyond_the_judges_context_is_that_traces_problem():
    with serving(lambda n: (400, b"maximum context length is 4096 tokens")) as server:
        verdict = judge_of(server).first_derivation("What?", "24", SENTENCES)
    assert verdict.sentence is None and verdict.problem == "longer than the judge's context"


def test_a_silent_server_is_given_up():
    release = threading.Event()

    def silent(n):
        release.wait(5)
        return chat("1")

    start = time.perf_counter()
    with serving(silent) as server:
        with pytest.raises(InputError, match="failed 2 times.*timed out"):
            judge_of(server, timeout_seconds=0.2, attempts=2).first_derivation("What?", "24", SENTENCES)
        release.set()
    assert time.perf_counter() - start < 4


def test_a_reply_that_trickles_in_is_given_up():
    def trickle(n):
        return 200, (time.sleep(0.05) or b" " for _ in range(100))

    start = time.perf_counter()
    with serving(trickle) as server, pytest.raises(InputError, match="the reply took more than 0.3 s"):
        judge_of(server, timeout_seconds=0.3, attempts=1).first_derivation("What?", "24", SENTENCES)
    assert time.perf_counter() - start < 3


def test_nobody_at_the_address_is_an_error():
    with serving(lambda n: chat("1")) as server:
        pass
    with pytest.raises(InputError, match="failed 3 times.*refused"):
        judge_of(server).first_derivation("What?", "24", SENTENCES)


@pytest.mark.parametrize(
    "reply,number",
    [
        ("2", 2),
        ("**2**", 2),
        ("Sentence 2.", 2),
        ("[2]", 2),
        ("2 (sentence 2)", 2),
        ("0", 0),
        ("between 2 and 3", None),
        ("the second", None),
        ("", None),
        ("2.5", None),
        ("-2", None),
        ("<think>I think 1</think> 4", 4),
    ],
)
def test_a_reply_names_one_number_or_none(reply, number):
    assert read_number(reply) == number


def test_a_sentence_that_does_not_exist_is_no_verdict():
    with serving(lambda n: chat("4")) as server:
        verdict = judge_of(server).first_derivation("What?", "24", SENTENCES)
    assert verdict.sentence is None and verdict.problem == "no sentence number in the reply"


def test_the_judges_verdicts_stand_beside_the_finders(trace_file, tmp_path):
    replies = {1: "1", 2: "2", 3: "0", 4: "I cannot say"}
    with serving(lambda n: chat(replies[n])) as server:
        judge = ["--judge_url", server.url, "--judge_model", "m"]
        analyze("--data", trace_file[0], "--tokenizer", REASONER, "--output_dir", tmp_path / "out", *judge)
    summary = read(tmp_path / "out")["judge"]
    assert (summary["num_asked"], summary["num_readable"], summary["num_same"]) == (4, 3, 1)
    assert (summary["num_within_one"], summary["num_none"]) == (2, 1)
    assert summary["problems"] == {"no sentence number in the reply": 1}
    rows = [json.loads(line) for line in (tmp_path / "out" / "measures.jsonl").read_text().splitlines()]
    assert [row["finder_sentence"] for row in rows] == [1] * 4
    assert [row["judge_sentence"] for row in rows] == [1, 2, 0, None]


def test_a_broken_judge_stops_the_command_with_2(trace_file, tmp_path, capsys):
    with serving(lambda n: (404, b"no such model")) as server, pytest.raises(SystemExit) as stopped:
        judge = ["--judge_url", server.url, "--judge_model", "m"]
        analyze("--data", trace_file[0], "--tokenizer", REASONER, "--output_dir", tmp_path / "out", *judge)
    assert stopped.value.code == 2 and "no such model" in capsys.readouterr().err
