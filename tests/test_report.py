import json
import shutil
import subprocess
from pathlib import Path

import pytest
from scripted import Scripted
from test_evaluate import questions

from trsd import training
from trsd.decoding import Decoder
from trsd.evaluation import evaluate
from trsd.files import write_json, write_text
from trsd.report import summary, write_report
from trsd.run import ENVIRONMENT_FILE, RECIPE_FILE


@pytest.fixture
def unconstrained(tokenizer, think):
    """An evaluation without budgets."""
    decoder = Decoder(Scripted(tokenizer, "2+1\n</think>\n\n3", "unused"), tokenizer, think)
    return evaluate(decoder, questions("3", "4"), (), max_thinking_tokens=50, max_answer_tokens=20)


def test_report_without_budgets_holds_numbers_and_no_curve(unconstrained, tmp_path):
    for name in ("before", "after"):
        write_json(tmp_path / "eval" / f"{name}.json", unconstrained)
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / name, "{}\n")
    text = write_report(tmp_path).read_text()
    assert not (tmp_path / "curve.png").exists() and text.count("<img") == 1  # the histogram alone
    assert "http" not in text and "<script" not in text  # it needs nothing else, and opens without a network
    assert "unconstrained accuracy<b>0.500" in text and "<td>free</td>" in text
    assert "area under the curve" not in text


def test_report_of_the_current_folder_has_its_name(tmp_path, monkeypatch):
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / "mine" / name, "{}\n")
    monkeypatch.chdir(tmp_path / "mine")
    assert "<title>mine</title>" in write_report(Path(".")).read_text()


def test_summary_without_budgets_has_no_empty_table(unconstrained):
    assert summary(unconstrained, unconstrained).split("\n")[:2] == ["", "unconstrained accuracy: 0.500 -> 0.500"]


def test_traces_stand_side_by_side_those_that_stop_earlier_first_and_as_text(unconstrained, tmp_path):
    first, second = unconstrained["examples"]
    shorter = second | {"thinking_tokens": 1, "reasoning": "<script>alert(1)</script>"}
    after = unconstrained | {"examples": [first, shorter]}
    for name, result in (("before", unconstrained), ("after", after)):
        write_json(tmp_path / "eval" / f"{name}.json", result)
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / name, "{}\n")
    text = write_report(tmp_path).read_text()
    assert "Of the first 2 questions the trained model stops thinking earlier in 1 and is right at more" in text
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert text.index("after: 1 tokens") < text.index(f"after: {first['thinking_tokens']} tokens")


def test_an_evaluation_that_kept_no_lengths_has_no_histogram(unconstrained, tmp_path):
    free = {name: value for name, value in unconstrained["unconstrained"].items() if name != "thinking_lengths"}
    for name in ("before", "after"):
        write_json(tmp_path / "eval" / f"{name}.json", unconstrained | {"unconstrained": free})
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / name, "{}\n")
    assert "How long it thinks" not in write_report(tmp_path).read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_the_page(unconstrained, tmp_path):
    for name in ("before", "after"):
        write_json(tmp_path / "eval" / f"{name}.json", unconstrained)
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / name, "{}\n")
    page, picture = write_report(tmp_path), tmp_path / "page.png"
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1400"]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=2**20)
    assert len(colours) > 50  # text and a picture, not an empty page


def test_memory_is_shown_by_part_largest_first(unconstrained, tmp_path):
    for name in (RECIPE_FILE, ENVIRONMENT_FILE):
        write_text(tmp_path / name, "{}\n")
    parts = {"teacher": 0.25, "activations": 2.0}
    write_json(tmp_path / "totals.json", {"seconds": 1.0, "peak_memory_gib": 3.5, "memory_parts_gib": parts})
    text = write_report(tmp_path).read_text()
    assert text.index("<td>activations</td><td>2,048.0</td>") < text.index("<td>teacher</td><td>256.0</td>")
    assert "3.50 GiB were measured of the whole process" in text


def test_parts_of_a_run_are_those_of_its_plan(run, whole_report, capsys):
    folder = run(max_steps=1)
    parts = json.loads((folder / "totals.json").read_text())["memory_parts_gib"]
    tiny = sum(file.stat().st_size for file in folder.glob("checkpoint-1/*.safetensors"))
    assert parts["student weights"] * 2**30 == pytest.approx(tiny, rel=0.1)
    assert parts["optimizer state"] == pytest.approx(2 * parts["student weights"], rel=0.01)
    assert "Memory by part" in (folder / "report.html").read_text()


def test_parts_that_cannot_be_counted_cost_no_finished_run(run, whole_report, monkeypatch, capsys):
    def fail(*_, **__):
        raise KeyError("odd")

    monkeypatch.setattr(training, "memory_by_part", fail)
    text = (run(max_steps=1) / "report.html").read_text()
    assert "Memory by part" not in text and "Traces left out" in text
    assert "note: the report has no memory by part" in capsys.readouterr().out
