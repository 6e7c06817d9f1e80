"""The experiment on SmolLM2: its stages, its recipes, what it says when a stage fails, and its tables."""

import json
import sys

import pytest

from trsd.demo import smollm2_experiment as experiment
from trsd.demo.gsm_traces import TraceArguments
from trsd.demo.smollm2_experiment import SIZES, ExperimentArguments, Stage, run_stage, stages
from trsd.demo.smollm2_results import baseline_table, comparison, write_results
from trsd.errors import InputError
from trsd.evaluate import EvaluateArguments
from trsd.flags import parse_flags
from trsd.generate import GenerateArguments
from trsd.recipe_file import parse_recipe

COMMANDS = {
    "trsd.demo.gsm_traces": TraceArguments,
    "trsd.generate": GenerateArguments,
    "trsd.evaluate": EvaluateArguments,
}


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    row = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_every_command_of_the_experiment_parses(size, gsm8k, tmp_path):
    seen = []
    for stage in stages(ExperimentArguments(gsm8k=gsm8k, output_dir=tmp_path / "x", size=size)):
        module, *words = stage.command()
        seen.append(module)
        if module == "trsd.train":
            recipe, name, _ = parse_recipe(words)
            assert recipe.output_dir == str(stage.result.parent) and name in vars(SIZES[size]).values()
            assert recipe.method == ("sft" if stage.name == "reasoner" else "trsd")
        elif module in COMMANDS:
            words = ["100" if word == "MEDIAN" else word for word in words]
            parse_flags(COMMANDS[module], words, prog=module)
    assert [seen.count(name) for name in ("trsd.demo.smollm2", "trsd.train", "trsd.generate", "trsd.evaluate")] == [
        *(1, 2, 1, 5)
    ]


def test_evaluation_questions_are_of_the_other_split_and_after_meets_the_budgets_of_before(gsm8k, tmp_path):
    args = ExperimentArguments(gsm8k=gsm8k, output_dir=tmp_path)
    found = {stage.name: stage for stage in stages(args)}

    def flag(name, stage):
        words = found[stage].command()
        return words[words.index(f"--{name}") + 1]

    splits = [flag("split", f"data/{name}") for name in ("sft", "questions", "symbolic")]
    assert splits == ["train", "train", "evaluation"]
    assert flag("seed", "data/sft") != flag("seed", "data/questions")
    before = found["evaluate/symbolic-before"].result
    before.parent.mkdir(parents=True)
    before.write_text('{"percent_of": 93.5}')
    assert flag("percent_of", "evaluate/symbolic-after") == "93.5"
    assert flag("percent_of", "evaluate/symbolic-baseline") == "93.5"
    assert flag("data", "evaluate/gsm8k-after") == str(gsm8k / "test.jsonl")


def test_the_last_checkpoint_of_a_stage_is_the_model_of_the_next(gsm8k, tmp_path):
    for step in (50, 120):
        (tmp_path / "reasoner" / f"checkpoint-{step}").mkdir(parents=True)
    found = {stage.name: stage for stage in stages(ExperimentArguments(gsm8k=gsm8k, output_dir=tmp_path))}
    last = str(tmp_path / "reasoner" / "checkpoint-120")
    assert all(last in found[name].command() for name in ("traces", "trsd", "evaluate/symbolic-before"))


def test_interrupted_training_goes_on(gsm8k, tmp_path):
    stage = next(s for s in stages(ExperimentArguments(gsm8k=gsm8k, output_dir=tmp_path)) if s.name == "reasoner")
    assert "--resume_from_checkpoint" not in stage.command()
    (tmp_path / "reasoner").mkdir()
    (tmp_path / "reasoner" / "recipe.yaml").touch()
    assert stage.command()[-2:] == ["--resume_from_checkpoint", "latest"]


def test_a_finished_stage_is_not_run_again_and_time_adds_up(tmp_path):
    result = tmp_path / "made"
    stage = Stage("make", result, lambda: ["timeit", "-n", "1", "-r", "1", f"open({str(result)!r}, 'a').write('x')"])
    run_stage(stage, tmp_path)
    first = json.loads((tmp_path / "seconds.json").read_text())["make"]
    run_stage(stage, tmp_path)
    assert result.read_text() == "x"
    result.unlink()
    run_stage(stage, tmp_path)
    again = json.loads((tmp_path / "seconds.json").read_text())["make"]
    assert all(more > less > 0 for more, less in zip(again, first, strict=True))


def test_a_failing_stage_ends_the_experiment_by_name(tmp_path):
    stage = Stage("broken", tmp_path / "never", lambda: ["timeit", "raise SystemExit(3)"])
    with pytest.raises(InputError, match="stage broken ended with exit code"):
        run_stage(stage, tmp_path)


def test_dry_run_prints_the_commands_and_makes_nothing(gsm8k, tmp_path, capsys):
    words = ["--gsm8k", str(gsm8k), "--output_dir", str(tmp_path / "x"), "--dry_run", "True"]
    experiment.main(words)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and all(line.startswith("python -m trsd.") for line in said)
    assert not (tmp_path / "x").exists()


def test_a_folder_without_gsm8k_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        experiment.main(["--gsm8k", str(tmp_path), "--output_dir", str(tmp_path / "x")])
    assert end.value.code == 2 and "train.jsonl" in capsys.readouterr().err


def evaluation(accuracy, thinking):
    correct = [[index < 100 * accuracy] for index in range(100)]
    figures = {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "correct": correct}
    figures["mean_tokens"] = thinking + 16
    return {
        "data": "/somewhere/questions.jsonl",
        "num_questions": 100,
        "percent_of": 90.0,
        "budgets": [figures | {"budget": "50%", "tokens": 45}, figures | {"budget": "100%", "tokens": 90}],
        "unconstrained": figures | {"mean_thinking_tokens": thinking, "unclosed_rate": 0.0},
        "auc": accuracy,
        "examples": ["long"],
    }


def test_the_table_sets_before_beside_after():
    lines = comparison(evaluation(0.25, 90.4), evaluation(0.75, 80.0)).splitlines()
    assert lines[2].startswith("| 50% | 45 | 106 → 96 | 0.25 [0.20, 0.30] | 0.75 [0.70, 0.80] | +0.50 [+0.39, +0.59] |")
    assert float(lines[2].split("|")[-2]) < 1e-3
    assert lines[4].startswith("| free | 90 → 80 | 106 → 96 | 0.25 [0.20, 0.30] | 0.75 [0.70, 0.80] | +0.50 ")
    assert lines[-1].startswith("Area under the curve 0.250 → 0.750")
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


def with_baseline(result):
    rows = [row | {"accuracy": 0.5, "termination_rate": 0.8} for row in result["budgets"]]
    return result | {"direct": {"budgets": rows, "auc": 0.5}}


def test_the_baseline_sets_the_draft_beside_the_closed_thinking():
    lines = baseline_table(with_baseline(evaluation(0.25, 90.0))).splitlines()
    assert lines[2] == "| 50% | 45 | 0.25 [0.20, 0.30] | 0.50 [0.20, 0.30] | 80% |"
    assert {line.count("|") for line in lines} == {6}


def test_results_hold_tables_curves_and_evaluations_without_examples(tmp_path):
    for name in ("symbolic", "gsm8k"):
        for model, accuracy in (("before", 0.25), ("after", 0.75)):
            folder = tmp_path / "evaluation" / f"{name}-{model}"
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text(json.dumps(evaluation(accuracy, 90.0)))
    (tmp_path / "evaluation" / "symbolic-baseline").mkdir()
    baseline = json.dumps(with_baseline(evaluation(0.25, 90.0)))
    (tmp_path / "evaluation" / "symbolic-baseline" / "evaluation.json").write_text(baseline)
    (tmp_path / "data").mkdir()
    for name, count in (("sft", 3), ("traces", 2), ("questions", 4)):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"a": 1}\n' * count)
    (tmp_path / "seconds.json").write_text('{"trsd": [12.4, 9.6]}')
    write_results(tmp_path, size="small")
    text = (tmp_path / "results" / "results.md").read_text()
    assert "| trsd | 12 | 10 |" in text and "learnt 3 worked traces" in text and "of 4 fresh questions" in text
    kept = json.loads((tmp_path / "results" / "symbolic-after.json").read_text())
    assert "examples" not in kept and "correct" not in kept["budgets"][0] and kept["data"] == "questions.jsonl"
    assert kept["budgets"][0]["accuracy"] == 0.75
    assert (tmp_path / "results" / "curve-gsm8k.png").stat().st_size > 1000


def test_the_weights_command_is_refused_where_they_are(tmp_path):
    from trsd.demo import smollm2

    with pytest.raises(SystemExit) as end:
        smollm2.main(["--output_dir", str(tmp_path)])
    assert "exists already" in str(end.value) and sys.exc_info()[0] is None
