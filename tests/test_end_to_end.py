"""The whole story on the bundled reasoner: every stage at tiny size, and the demo's figures among the slow tests."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from trsd import evaluate, report, train
from trsd.metrics import read_metrics

TINY = [
    *("--max_train_samples", "24", "--max_eval_samples", "12", "--max_steps", "6", "--train_batch_size", "12"),
    *("--save_steps", "3", "--eval_budgets", "0,50%,100%"),
]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The demo, no argument about model or data, at tiny size."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    train.main([*TINY, "--output_dir", str(folder)])
    return folder


def read(folder, name):
    return json.loads((folder / "eval" / f"{name}.json").read_text())


def test_the_teacher_wrote_the_traces_itself(tiny_run):
    traces = [json.loads(line) for line in (tiny_run / "traces" / "train.jsonl").read_text().splitlines()]
    assert len(traces) == 24
    assert all(trace["closed"] and trace["sampling"] and trace["correct"] for trace in traces)


def test_training_brings_the_loss_down(tiny_run):
    losses = [row["loss"] for row in read_metrics(tiny_run / "metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]


def test_both_curves_meet_the_same_budgets(tiny_run):
    before, after = read(tiny_run, "before"), read(tiny_run, "after")
    assert [row["tokens"] for row in before["budgets"]] == [row["tokens"] for row in after["budgets"]]
    assert before["unconstrained"]["accuracy"] > 0.9 > before["budgets"][1]["accuracy"]


def test_checkpoints_of_both_steps_are_there(tiny_run):
    assert {path.name for path in tiny_run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


class Page(HTMLParser):
    """Collects the tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_well_formed_page_that_needs_nothing_else(tiny_run):
    text = (tiny_run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.addresses) == 3 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    for wanted in (
        "Accuracy against thinking budget",
        "area under the curve",
        "learning_rate:",
        "torch",
        "Side by side",
        "How long it thinks",
        "Memory by part",
    ):
        assert wanted in text
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_report_command_writes_it_again_and_refuses_other_folders(tiny_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    (copy / "report.html").unlink()
    report.main([str(copy)])
    assert (copy / "report.html").exists()
    for argv in ([str(tmp_path)], [], ["a", "b"]):
        with pytest.raises(SystemExit) as exit_:
            report.main(argv)
        assert exit_.value.code == 2
    assert "is no run folder" in capsys.readouterr().err


def test_report_escapes_what_models_write(tiny_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    for name in ("before", "after"):
        path = copy / "eval" / f"{name}.json"
        path.write_text(path.read_text().replace("How many", "<script>alert(1)</script>"))
    assert "<script>" not in report.write_report(copy).read_text()


def test_evaluate_command_measures_a_checkpoint(tiny_run, tmp_path, capsys):
    argv = ["--model", str(tiny_run / "checkpoint-6"), "--max_samples", "8", "--budgets", "0,100%"]
    evaluate.main([*argv, "--output_dir", str(tmp_path / "eval")])
    result = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert result["num_questions"] == 8 and len(result["budgets"]) == 2
    assert (tmp_path / "eval" / "curve.png").stat().st_size > 1000
    assert "area under the curve" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--budgets", "half"], "expected token counts or percents"),
        (["--model", "/no/model"], "no model folder at /no/model"),
        (["--data", "none.jsonl"], "no data file at none.jsonl"),
    ],
)
def test_evaluate_command_refuses_with_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_reaches_its_figures(tmp_path, seed):
    train.main(["--output_dir", str(tmp_path / "run"), "--seed", str(seed)])
    before, after = read(tmp_path / "run", "before"), read(tmp_path / "run", "after")

    def mean(result):
        return sum(row["accuracy"] for row in result["budgets"] if row["budget"] in ("50%", "60%", "80%")) / 3

    assert mean(before) < 0.4 and mean(after) > 0.9
    assert after["auc"] - before["auc"] >= 0.2
    assert after["unconstrained"]["accuracy"] >= before["unconstrained"]["accuracy"] - 0.01
    assert after["unconstrained"]["mean_thinking_tokens"] <= before["unconstrained"]["mean_thinking_tokens"]
    totals = json.loads((tmp_path / "run" / "totals.json").read_text())
    assert totals["peak_memory_gib"] <= 3
