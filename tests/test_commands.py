"""``python -m trsd``: what it lists, what it runs, and how soon it answers."""

import json
import os
import resource
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import trsd
from trsd import __main__ as commands
from trsd import recipe_file
from trsd.recipe import Recipe
from trsd.recipe_file import parse_recipe

ROOT = Path(__file__).parent.parent
# Modules that run as commands and that no user starts.
INTERNAL = {"__main__", "math_checker", "recipe_reference"}


def python(*words, **options):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def user_seconds(*words, runs=3):
    """The least processor time of some runs: other processes make it longer, none makes it shorter."""
    taken = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert python(*words).returncode == 0
        taken.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return min(taken)


def test_every_command_is_listed_in_a_line_of_its_own(capsys):
    commands.main([])
    lines = capsys.readouterr().out.splitlines()
    for name, line in commands.COMMANDS.items():
        assert [each.split() for each in lines].count([name, *line.split()]) == 1
    assert all(len(line) <= 100 for line in lines)


def test_every_module_that_runs_is_a_command_and_every_command_runs():
    guard = 'if __name__ == "__main__":\n    main()'
    runs = {path.stem for path in (ROOT / "trsd").glob("*.py") if guard in path.read_text(encoding="utf-8")}
    assert runs - INTERNAL == set(commands.COMMANDS)


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_is_the_list(word, capsys):
    commands.main([word])
    assert capsys.readouterr().out == commands.overview()


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version_is_that_of_the_package(word, capsys):
    commands.main([word])
    assert capsys.readouterr().out == f"trsd {trsd.__version__}\n"


@pytest.mark.parametrize(
    "word,hint", [("trian", "did you mean train?"), ("Evaluate", "did you mean evaluate?"), ("xyz", "train, plan")]
)
def test_an_unknown_command_exits_2_with_a_suggestion(word, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        commands.main([word, "--learning_rate", "1"])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and not printed.out
    assert word in printed.err and hint in printed.err


@pytest.fixture
def started(monkeypatch):
    """(module, its command line) of what would run."""
    found = []
    monkeypatch.setattr(sys, "argv", ["trsd-train", "--max_steps", "2"])
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: found.append((name, options, sys.argv)))
    return found


def test_a_command_gets_the_words_behind_its_name(started):
    commands.main(["evaluate", "--model", "train", "--help"])
    [(module, options, argv)] = started
    assert module == "trsd.evaluate" and options["run_name"] == "__main__"
    assert argv[1:] == ["--model", "train", "--help"]


def test_the_shells_trsd_train_is_the_command_train(started):
    commands.train()
    [(module, _, argv)] = started
    assert module == "trsd.train" and argv[1:] == ["--max_steps", "2"]


def test_the_module_and_the_command_print_the_same_recipe():
    words = ["--method", "lsp", "--seed", "3", "--dry_run"]
    one, other = python("-m", "trsd", "train", *words), python("-m", "trsd.train", *words)
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    assert one.stdout == other.stdout and "method: lsp\n" in one.stdout


def test_a_commands_exit_code_is_its_own():
    result = python("-m", "trsd", "train", "--learning_rte", "1")
    assert result.returncode == 2 and "--learning_rate" in result.stderr + result.stdout


# How soon


@pytest.mark.parametrize(
    "words",
    [
        ["trsd"],
        ["trsd", "--version"],
        ["trsd", "trian"],
        ["trsd", "train", "--help"],
        ["trsd.train", "--help"],
        ["trsd.train", "--dry_run"],
        ["trsd.train", "--learning_rte", "1"],
        *([f"trsd.{name}", "--help"] for name in commands.COMMANDS if name not in ("evaluate", "compare", "report")),
        ["trsd.generate", "--output", "t.jsonl", "--modle", "m"],
        ["trsd.plan", "--modle", "m"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_is_answered_before_torch_is_imported(words):
    assert not {"torch", "transformers", "numpy"} & imported_by("-m", *words)


def test_comparing_two_evaluations_needs_no_torch(tmp_path):
    results = {"question_ids": ["a", "b"], "unconstrained": {"correct": [[True], [False]]}}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps(results))
    words = ["trsd.compare", *map(str, paths), "--output_dir", str(tmp_path / "out")]
    assert not {"torch", "transformers"} & imported_by("-m", *words)
    assert (tmp_path / "out" / "comparison.html").is_file()


def imported_by(*words):
    """The modules that a run of Python imports."""
    result = python("-X", "importtime", *words)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "trsd" in imported
    return imported


def test_packages_beside_transformers_say_nothing_at_the_start_of_a_command(tmp_path):
    """torchao, where it is installed, warns of libraries that were built for another Python or another GPU."""
    (tmp_path / "questions.jsonl").write_text('{"question": "And 2 and 2?", "answer": "4"}\n')
    model = "--model", "bundled:student", "--max_thinking_tokens", "2", "--max_answer_tokens", "2", "--budgets", "0"
    paths = "--data", str(tmp_path / "questions.jsonl"), "--output_dir", str(tmp_path / "out")
    said = python("-m", "trsd.evaluate", *model, *paths)
    assert (said.returncode, said.stderr) == (0, "")


def test_what_packages_log_after_they_were_imported_is_not_hidden():
    code = (
        "import logging; from trsd.command import import_quietly; from trsd.quiet import TALKATIVE; import_quietly(); "
        "[logging.getLogger(name).warning('said by %s', name) for name in TALKATIVE]"
    )
    said = python("-c", code).stderr
    assert "said by torchao" in said and "said by torch.utils._pytree" in said and "Failed" not in said


def test_the_list_takes_less_than_300_milliseconds():
    assert user_seconds("-m", "trsd") < 0.3


def test_help_of_training_takes_less_than_3_seconds_and_less_than_importing_torch():
    assert user_seconds("-m", "trsd.train", "--help") < min(3, user_seconds("-c", "import torch", runs=1))


# Renamed fields


@pytest.fixture
def renamed(monkeypatch):
    """A version in which ``learning_rate`` was called ``step_size`` before."""
    monkeypatch.setattr(recipe_file, "RENAMED", {"step_size": "learning_rate"})


def recipe_of(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return ["--config", str(path)]


@pytest.mark.parametrize("words", [["--step_size", "0.5"], ["--step_size=0.5"], ["--step-size", "0.5"]])
def test_a_former_name_of_a_field_works_as_a_flag_and_is_said(words, renamed, capsys):
    assert parse_recipe(words)[0].learning_rate == 0.5
    assert "step_size is called learning_rate now" in capsys.readouterr().err


def test_a_former_name_of_a_field_works_in_yaml_and_in_its_base_and_is_said(renamed, tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("step_size: 0.5\nseed: 4\n")
    recipe, _, _ = parse_recipe(recipe_of(tmp_path, "base: base.yaml\nmax_steps: 3\n"))
    assert (recipe.learning_rate, recipe.seed, recipe.max_steps) == (0.5, 4, 3)
    assert "base.yaml: step_size is called learning_rate now" in capsys.readouterr().err


def test_a_present_name_overrides_a_bases_former_one(renamed, tmp_path):
    (tmp_path / "base.yaml").write_text("step_size: 0.5\n")
    assert parse_recipe(recipe_of(tmp_path, "base: base.yaml\nlearning_rate: 0.25\n"))[0].learning_rate == 0.25


def test_a_former_and_a_present_name_together_are_refused(renamed, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(recipe_of(tmp_path, "step_size: 0.5\nlearning_rate: 0.5\n"))
    assert exit_.value.code == 2 and "learning_rate is given twice" in capsys.readouterr().err


def test_a_value_that_looks_like_a_former_name_stays_as_it_is(renamed, capsys):
    recipe, _, _ = parse_recipe(["--model_name_or_path", "step_size"])
    assert recipe.model_name_or_path == "step_size" and not capsys.readouterr().err


def test_every_former_name_leads_to_a_field():
    names = {entry.name for entry in fields(Recipe)}
    assert set(recipe_file.RENAMED.values()) <= names and not names & set(recipe_file.RENAMED)
