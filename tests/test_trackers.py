"""What a run reports beside metrics.jsonl."""

import shutil
import sys
import types

import pytest

from trsd import trackers
from trsd.errors import InputError
from trsd.metrics import read_metrics
from trsd.recipe import Recipe
from trsd.trackers import Trackers, evaluation_figures, require_trackers, tracker_problems


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_has_every_step_and_both_evaluations_of_a_run_that_was_resumed(run):
    pytest.importorskip("tensorboard")
    limits = dict(max_eval_samples=2, eval_budgets="0,8", max_thinking_tokens=16, max_answer_tokens=8)
    questions = "bundled:questions/evaluation.jsonl"
    common = dict(report_to="tensorboard", max_steps=4, save_steps=2, eval_data=questions, **limits)
    shutil.rmtree(run(**common) / "checkpoint-4")
    folder = run(**common, resume_from_checkpoint="checkpoint-2")
    found = scalars(folder)
    wanted = {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}
    assert found["loss"] == pytest.approx(wanted, rel=1e-6) and len(wanted) == 4
    assert set(found["eval/accuracy_free"]) == {0, 4}


class Hosted(types.ModuleType):
    """A tracker of wandb's interface that remembers, and fails at one step."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.logged, self.options, self.finished, self.fails_at = [], None, False, fails_at

    def init(self, **options):
        self.options = options

    def log(self, values, *, step):
        if step == self.fails_at:
            raise ConnectionError("no route")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_a_hosted_tracker_gets_recipe_and_steps_and_a_resumed_run_its_name_again(tmp_path, monkeypatch):
    names = []
    for first in (0, 2):
        hosted = Hosted()
        monkeypatch.setitem(sys.modules, "wandb", hosted)
        with Trackers(("wandb",), tmp_path, {"seed": 0}, first_step=first) as found:
            found.log(first + 1, {"loss": 1.5, "note": "no number"})
        assert hosted.logged == [(first + 1, {"loss": 1.5})] and hosted.finished
        assert hosted.options["config"] == {"seed": 0} and hosted.options["resume"] == "allow"
        names.append(hosted.options["id"])
    assert names[0] == names[1]
    with Trackers(("wandb",), tmp_path, {}, first_step=0):  # begun again in the same place, another run
        assert hosted.options["id"] != names[0]


def test_runs_in_folders_of_one_name_are_two_to_trackio(tmp_path, monkeypatch):
    hosted = Hosted()
    monkeypatch.setitem(sys.modules, "trackio", hosted)
    names = []
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run"):
        folder.mkdir(parents=True)
        with Trackers(("trackio",), folder, {}, first_step=0):
            names.append(hosted.options["name"])
    assert names[0] != names[1] and all(name.startswith("run-") for name in names)


def test_a_folder_of_its_name_is_no_installed_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    if trackers.find_spec("trackio").origin:
        pytest.skip("trackio is installed")
    with pytest.raises(ImportError, match=r"trsd\[tracking\]"):
        require_trackers(("trackio",))


def test_one_that_fails_is_said_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    failing, other = Hosted(fails_at=2), Hosted()
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda *_: trackers._Hosted(failing))
    monkeypatch.setitem(trackers.KINDS, "trackio", lambda *_: trackers._Hosted(other))
    with Trackers(("wandb", "trackio"), tmp_path, {}, first_step=0) as found:
        for step in (1, 2, 3):
            found.log(step, {"loss": 0.0})
    assert [step for step, _ in failing.logged] == [1] and [step for step, _ in other.logged] == [1, 2, 3]
    assert capsys.readouterr().err == "warning: wandb fails (no route): nothing more is reported to it\n"


def test_one_that_does_not_open_is_left_out(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("login")

    monkeypatch.setitem(trackers.KINDS, "wandb", refuse)
    with Trackers(("wandb",), tmp_path, {}, first_step=0) as found:
        found.log(1, {"loss": 0.0})
    assert "warning: wandb fails (login)" in capsys.readouterr().err


def test_names_are_checked_and_a_missing_package_is_said_before_any_work(monkeypatch):
    assert not tracker_problems(("tensorboard", "wandb")) and not tracker_problems(("none",))
    assert "expected none, tensorboard, wandb, trackio, got tensorbord" in tracker_problems(("tensorbord",))[0]
    assert "none stands alone" in tracker_problems(("none", "wandb"))[0]
    assert any("report_to" in problem for problem in Recipe(report_to=("x",)).problems())
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises((ImportError, InputError), match=r"trsd\[tracking\]"):
        require_trackers(("wandb",))


def test_an_evaluation_without_budgets_has_free_figures_alone():
    free = {"accuracy": 0.5, "mean_thinking_tokens": 7.0}
    found = evaluation_figures({"unconstrained": free, "auc": None, "budgets": []})
    assert found == {"eval/accuracy_free": 0.5, "eval/thinking_tokens_free": 7.0}
    assert evaluation_figures(None) == {}
