import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trsd.benchmarks import BENCHMARKS
from trsd.data import load_data, source_rows
from trsd.errors import InputError
from trsd.grading import grade

SHARED = Path(__file__).parents[2] / "shared" / "data"
# What the repositories' rows look like.
COLUMNS = {
    "openai/gsm8k": {"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
    "HuggingFaceH4/MATH-500": {"problem": "2+2?", "solution": "s", "answer": "4", "subject": "Algebra", "level": 1},
    "HuggingFaceH4/aime_2024": {"id": 60, "problem": "2+2?", "solution": "s", "answer": "004", "year": "2024"},
    "math-ai/aime25": {"problem": "2+2?", "answer": "4", "id": "0"},
    "math-ai/amc23": {"id": 0, "question": "2+2?", "answer": 4.0, "url": "u"},
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the ``datasets`` package: ``hub.rows`` is what is there, ``hub.asked`` what was asked for."""
    hub = SimpleNamespace(rows=[], asked=None, error=None, fetched=0)

    def load_dataset(path, name=None, *, split, streaming):
        hub.asked = (path, name, split)
        assert streaming
        if hub.error:
            raise hub.error

        def stream():
            for row in hub.rows:
                hub.fetched += 1
                if isinstance(row, Exception):
                    raise row
                yield row

        return stream()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return hub


@pytest.mark.parametrize(
    "name,asked",
    [
        ("gsm8k", ("openai/gsm8k", "main", "test")),
        ("gsm8k:train", ("openai/gsm8k", "main", "train")),
        ("math500", ("HuggingFaceH4/MATH-500", None, "test")),
        ("aime24", ("HuggingFaceH4/aime_2024", None, "train")),
        ("aime25", ("math-ai/aime25", None, "test")),
        ("amc23", ("math-ai/amc23", None, "test")),
    ],
)
def test_short_names_fetch_the_questions_of_a_benchmark(hub, tokenizer, think, name, asked):
    hub.rows = [COLUMNS[asked[0]]]
    (question,) = load_data(name, tokenizer=tokenizer, think=think).questions
    assert hub.asked == asked and question.question == "2+2?" and grade("4", question.gold)


@pytest.mark.parametrize(
    "source,asked",
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:hard:test", ("owner/name", "hard", "test")),
        ("owner/name::test[:10]", None),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_any_part_of_any_data_set_can_be_named(hub, tokenizer, think, source, asked):
    hub.rows = [{"problem": "2+2?", "answer": "4"}]
    if asked is None:
        with pytest.raises(InputError, match="OWNER/NAME:CONFIG:SPLIT"):
            list(source_rows(source))
        return
    assert load_data(source, tokenizer=tokenizer, think=think).questions[0].gold == "4" and hub.asked == asked


@pytest.mark.parametrize("source", ["owner/name:test", "owner/name:main:", "/name:a:b", "gsm8k:main:test", "gsm8k:"])
def test_a_name_that_is_half_of_one_is_refused_with_the_form(hub, source):
    with pytest.raises((InputError, FileNotFoundError), match="expected|no data file"):
        list(source_rows(source))
    assert hub.asked is None


def test_a_limit_fetches_no_more_rows_than_it_needs(hub, tokenizer, think):
    hub.rows = [{"question": f"{n}?", "answer": "1"} for n in range(100)]
    load_data("gsm8k", tokenizer=tokenizer, think=think, max_rows=3)
    assert hub.fetched == 3


def test_a_local_file_comes_before_a_benchmark_and_a_folder_does_not(hub, tokenizer, think, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").mkdir()
    hub.rows = [{"question": "hub?", "answer": "1"}]
    assert load_data("gsm8k", tokenizer=tokenizer, think=think).questions[0].question == "hub?"
    Path("gsm8k").rmdir()
    Path("gsm8k").write_text('{"question": "mine?", "answer": "1"}\n')
    with pytest.raises(InputError, match="expected a .jsonl or .parquet file"):
        load_data("gsm8k", tokenizer=tokenizer, think=think)
    Path("owner").mkdir()
    Path("owner/name").mkdir()
    with pytest.raises(InputError, match="owner/name is a folder: expected a .jsonl or .parquet file"):
        load_data("owner/name", tokenizer=tokenizer, think=think)


def test_what_the_hub_cannot_give_is_an_error_that_says_what_was_asked(hub):
    hub.error = ConnectionError("offline")
    with pytest.raises(InputError, match=r"the test split of the data set openai/gsm8k, main, could not.*offline"):
        list(source_rows("gsm8k"))
    hub.error, hub.rows = None, [{"question": "a", "answer": "1"}, ConnectionError("lost")]
    with pytest.raises(InputError, match="could not be read .lost."):
        list(source_rows("gsm8k"))
    hub.rows = [{"question": "a", "solution": "1"}]
    with pytest.raises(InputError, match=r"gsm8k:1: openai/gsm8k has no answer, but \['question', 'solution'\]"):
        list(source_rows("gsm8k"))


def test_without_the_datasets_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("gsm8k", "owner/name"):
        with pytest.raises(ImportError, match=r"pip install 'trsd\[data\]'"):
            list(source_rows(source))


@pytest.mark.parametrize("word,suggestion", [("gsm8", "did you mean gsm8k"), ("nonsense", "one of gsm8k, math500")])
def test_a_word_that_names_nothing_is_refused_with_the_names_there_are(word, suggestion):
    with pytest.raises(InputError, match=f"{word} is neither a file nor a benchmark.*{suggestion}"):
        list(source_rows(word))


def test_every_benchmark_is_tested_here():
    assert {benchmark.repository for benchmark in BENCHMARKS.values()} == set(COLUMNS)


@pytest.mark.skipif(not SHARED.exists(), reason="the benchmarks' copies are not beside the checkout")
@pytest.mark.parametrize(
    "file,rows",
    [("gsm8k/test", 659), ("gsm8k/train", 7473), ("math/math500", 500), ("math/aime24", 30), ("math/amc23", 83)],
)
def test_every_reference_of_a_benchmark_is_right_in_every_form(tokenizer, think, file, rows):
    loaded = load_data(str(SHARED / f"{file}.jsonl"), tokenizer=tokenizer, think=think)
    golds = [question.gold for question in loaded.questions]
    assert len(golds) == rows and not loaded.dropped and None not in golds
    wrong = [
        (text, gold)
        for gold in golds
        for text in (rf"so it is \boxed{{{gold}}}.", f"thus\n#### {gold}")
        if not grade(text, gold)
    ]
    assert not wrong
    assert sum(grade(rf"\boxed{{{gold}}}", "123456789") for gold in golds) == 0
