"""The sweep: which points it has, what it says of them, and that it goes on where it stopped."""

import contextlib
import json
import shutil
import subprocess

import bare_reports
import pytest
from conftest import make_tiny_model, make_traces

from trsd import sweep, sweeping, train
from trsd.recipe import Recipe
from trsd.recipe_file import parse_recipe
from trsd.sweep_report import knee, loss_gap, markdown, summarise
from trsd.traces import write_traces


def point(fraction, side="left", accuracy=0.5, losses=(2.0, 1.0)):
    values = dict(low=0.4, high=0.6, accuracy_of_whole_text=accuracy, termination_rate=1.0, mean_thinking_tokens=9.0)
    cost = dict(num_steps=2, tokens_per_step=100 * fraction, step_seconds=fraction, peak_memory_gib=1.0)
    return dict(
        fraction=fraction, side=side, accuracy=accuracy, teraflops_per_step=fraction, losses=losses, **values, **cost
    )


def test_the_whole_sequence_is_run_once_whatever_the_sides():
    names = [s.name for s in sweep.settings_of([0.5, 1.0, 0.1], ["left", "right"])]
    assert names == ["left-0.1", "left-0.5", "right-0.1", "right-0.5", "left-1"]


def test_the_knee_of_a_curve_that_saturates_is_where_it_bends():
    fractions = [i / 10 for i in range(1, 11)]
    assert knee(fractions, [min(share, 0.4) for share in fractions]) == pytest.approx(0.4)
    assert knee(fractions[:2], [0.1, 0.2]) is None and knee(fractions, [0.3] * 10) is None


def test_the_knee_of_a_curve_that_rises_late_is_its_shoulder_and_a_convex_one_has_none():
    fractions = [i / 10 for i in range(1, 11)]
    late = [0.03, 0.03, 0.13, 0.47, 0.72, 0.73, 0.75, 0.75, 0.75, 0.76]
    assert knee(fractions, late) == 0.5
    assert knee(fractions, [share**3 for share in fractions]) is None


def test_loss_gap_is_relative_and_over_the_steps_both_have():
    gap = loss_gap([2.0, 3.0, 9.0], [1.0, 2.0])
    assert gap == {"mean": pytest.approx(0.75), "last": pytest.approx(0.5)}


def test_summary_relates_every_point_to_the_whole_and_left_to_right():
    points = [
        point(0.5, accuracy=0.45, losses=(1.0, 1.0)),
        point(0.5, "right", accuracy=0.09, losses=(2.0, 2.0)),
        point(1.0, accuracy=0.5),
    ]
    found = summarise(points, {"accuracy": 0.02, "termination_rate": 1.0})
    assert [row["retention"] for row in found["points"]] == pytest.approx([0.9, 0.18, 1.0])
    assert found["curves"]["left"]["retention"] == pytest.approx({"mean": 0.9, "min": 0.9, "max": 0.9})
    assert found["curves"]["right"]["retention"]["mean"] == pytest.approx(0.18)
    assert found["points"][0]["loss_gap_to_whole"] == pytest.approx({"mean": -0.25, "last": 0.0})
    (versus,) = found["sides"]
    assert (versus["accuracy_left"], versus["accuracy_right"]) == (0.45, 0.09)
    assert versus["loss_gap"] == pytest.approx({"mean": -0.5, "last": -0.5})
    text = markdown(found, Recipe(method="lsp"))
    assert "| left 0.5 | 0.450 [0.400, 0.600] | 90.0% |" in text and "| 0.5 | 0.450 | right 0.090 | -50.0%" in text


def test_the_recipe_of_a_point_is_the_sweeps_but_for_what_is_kept(tmp_path):
    recipe = Recipe(method="lsp", teacher_model_name_or_path="t", learning_rate=0.5, max_train_samples=9, eval_data="e")
    one = sweeping.run_recipe(recipe, sweep.Setting(fraction=0.3, side="right"), tmp_path / "r", tmp_path / "t.jsonl")
    assert (one.keep_fraction, one.keep_side, one.data) == (0.3, "right", str(tmp_path / "t.jsonl"))
    assert (one.learning_rate, one.max_train_samples, one.eval_data) == (0.5, None, None)


def test_a_sweep_without_the_whole_says_nothing_of_retention():
    found = summarise([point(0.5), point(0.7)], {"accuracy": 0.0, "termination_rate": 0.0})
    assert found["curves"]["left"]["retention"] is None and "retention" not in found["points"][0]
    markdown(found, Recipe())


@pytest.fixture
def words(tmp_path, tokenizer, think, tiny_folder):
    """A sweep of the tiny model over given traces."""
    write_traces(tmp_path / "traces.jsonl", make_traces(tokenizer, think, 6))
    teacher = tmp_path / "teacher"
    make_tiny_model(tokenizer, seed=3).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    rows = [{"question": "How many are 2 and 3?", "answer": "5"}, {"question": "And 1 and 1?", "answer": "2"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(
        model_name_or_path=tiny_folder,
        teacher_model_name_or_path=teacher,
        method="lsp",
        data=tmp_path / "traces.jsonl",
        eval_data=tmp_path / "questions.jsonl",
        eval_budgets="",
        max_thinking_tokens=8,
        max_answer_tokens=4,
        max_steps=2,
        train_batch_size=3,
        max_tokens_per_batch=512,
        max_length=512,
        output_dir=tmp_path / "sweep",
    )
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def without_processes(monkeypatch, request):
    """Trainings run in this process, without a report unless asked for: a process of its own takes seconds to begin."""

    def run(command, *, stdout, stderr):
        assert command[1:3] == ["-m", "trsd.train"] and stderr == subprocess.STDOUT
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            try:
                train.main(command[3:])
            except SystemExit as exit_:
                return subprocess.CompletedProcess(command, exit_.code)
        return subprocess.CompletedProcess(command, 0)

    if "whole_report" not in request.fixturenames:
        bare_reports.leave_out(monkeypatch.setattr)
    monkeypatch.setattr(sweeping.subprocess, "run", run)


@pytest.mark.usefixtures("whole_report", "without_processes")
def test_a_sweep_trains_evaluates_reports_and_resumes(words, tmp_path, capsys, monkeypatch):
    options = ["--fractions", "0.5,1.0", "--sides", "left,right"]
    sweep.main([*words, *options])
    folder = tmp_path / "sweep"
    found = json.loads((folder / "sweep.json").read_text())
    assert [(p["side"], p["fraction"]) for p in found["points"]] == [("left", 0.5), ("right", 0.5), ("left", 1.0)]
    half, _, whole = found["points"]
    assert half["num_steps"] == 2 and half["tokens_per_step"] < 0.55 * whole["tokens_per_step"]
    assert half["teraflops_per_step"] < 0.55 * whole["teraflops_per_step"]
    assert all((folder / name).stat().st_size > 100 for name in ("sweep.md", "sweep.png", "before/evaluation.json"))
    assert "| left 0.5 |" in capsys.readouterr().out

    shutil.rmtree(folder / "right-0.5")  # the only one that is not done
    trained = []
    true = sweeping.subprocess.run
    monkeypatch.setattr(sweeping.subprocess, "run", lambda command, **k: trained.append(command) or true(command, **k))
    sweep.main([*words, *options])
    assert len(trained) == 1 and "right-0.5.yaml" in trained[0][4]
    assert json.loads((folder / "sweep.json").read_text())["points"][0] == half

    with pytest.raises(SystemExit):
        sweep.main([*words, *options, "--learning_rate", "0.5"])
    assert "sweep was made with other learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,value", [("data", "/nowhere.jsonl"), ("eval_data", "x.jsonl"), ("max_train_samples", "1")]
)
def test_a_sweep_never_passes_old_results_off_for_other_data(words, tmp_path, capsys, without_processes, name, value):
    (tmp_path / "x.jsonl").write_text('{"question": "And 2 and 2?", "answer": "4"}\n')
    value = str(tmp_path / value) if name == "eval_data" else value
    sweep.main([*words, "--fractions", "1.0"])
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*words, "--fractions", "1.0", f"--{name}", value])
    assert exit_.value.code == 2 and f"was made with other {name}" in capsys.readouterr().err


def test_a_model_or_data_of_ones_own_does_not_inherit_the_demos_limits(capsys, tmp_path):
    mine = ["--model_name_or_path", "m", "--teacher_model_name_or_path", "t", "--data", "d.jsonl", "--method", "lsp"]
    sweep.main(["--output_dir", str(tmp_path), "--dry_run", *mine])
    assert "bundled" not in capsys.readouterr().out


def test_a_fraction_that_leaves_nothing_to_learn_is_left_out_and_said(words, tmp_path, capsys, without_processes):
    sweep.main([*words, "--fractions", "0.1,1.0", "--loss_sections", "a"])
    assert "left-0.1    left out: the cut leaves nothing to learn" in capsys.readouterr().out
    assert [p["fraction"] for p in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]] == [1.0]
    with pytest.raises(SystemExit):
        sweep.main([*words, "--fractions", "0.1", "--loss_sections", "a"])
    assert "no fraction leaves anything to learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--fractions", "0.5,1.5"], "--fractions: expected more than 0 and at most 1, got [1.5]"),
        (["--fractions", "half"], "--fractions: expected numbers"),
        (["--num_samples", "0"], "--num_samples: expected at least 1"),
        (["--num_samples", "4"], "--num_samples: expected at least 1, and more than 1 only with --temperature_eval"),
        (["--temperature_eval", "-1"], "--temperature_eval"),
        (["--sides", "left,top"], "--sides: expected some of left, middle, right, got top"),
        (["--truncation", "first_derivation"], "a truncation with a fraction"),
        (["--truncation", "endpoints", "--sides", "right"], "keeps both ends"),
        (["--max_steps", "-1"], "max_steps"),
    ],
)
def test_what_cannot_be_swept_exits_2_with_what_to_do(words, capsys, extra, message):
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*words, *extra])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_the_end_of_its_log(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*words, "--fractions", "0.5", "--learning_rate", "1e30"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "left-0.5" in error and "not finite" in error


def test_the_demo_is_what_a_sweep_takes_when_nothing_is_named(tmp_path, capsys):
    sweep.main(["--output_dir", str(tmp_path / "s"), "--dry_run"])
    said = capsys.readouterr().out
    assert said.startswith("left-0.1\n") and "bundled:student" in said
    assert parse_recipe(["--config", "demo-lsp"])[0].method == "lsp"
