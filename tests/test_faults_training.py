"""What goes wrong while one process trains: signals, numbers that are not finite, spikes, loggers, steps that hang."""

import json
import shutil

import pytest
import torch
from conftest import losses, read_metrics, refusal
from safetensors.torch import load_file

from trsd.batching import TraceStream
from trsd.guards import LEAST_STEPS, StepGuard
from trsd.loop import Loop
from trsd.manifest import write_manifest
from trsd.metrics import MetricsLog
from trsd.run import alone_in


def state(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "state" / "optimizer.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fault_08_every_step_has_the_rows_that_it_has_in_a_run_never_stopped(run, tmp_path, monkeypatch):
    """Resumed before every step, across two epochs, each row once an epoch: what is read is compared, not its loss."""
    seen = []
    true = Loop.rows_of

    def rows_of(self, step):
        found = true(self, step)
        seen.append((step, [batch.input_ids.tolist() for batch in found.batches]))
        return found

    monkeypatch.setattr(Loop, "rows_of", rows_of)
    flags = dict(max_steps=6, save_steps=1, max_tokens_per_batch=512)
    whole = run("whole", **flags)
    wanted = dict(seen)
    assert sorted(wanted) == list(range(6)) and len(seen) == 6
    for step in range(1, 6):
        seen.clear()
        part = tmp_path / f"part{step}"
        shutil.copytree(whole, part)
        for later in range(step + 1, 7):
            shutil.rmtree(part / f"checkpoint-{later}")
        run(part.name, **flags, resume_from_checkpoint="latest")
        assert dict(seen) == {number: rows for number, rows in wanted.items() if number >= step}


def test_fault_08_no_row_comes_twice_in_an_epoch_and_none_is_left_out():
    stream = TraceStream(10, batch_size=4, seed=3)
    members = [member for step in range(5) for member in TraceStream(10, batch_size=4, seed=3).step(step)]
    assert members == [member for step in range(5) for member in stream.step(step)]
    assert sorted(members) == [(epoch, index) for epoch in range(2) for index in range(10)]


@pytest.mark.parametrize("accident", ["nan", "nan loss"])
def test_fault_10_what_is_not_finite_stops_the_run_and_changes_nothing(launch, words, tmp_path, accident):
    (code,), (log,), _ = launch(words("run", save_steps=1), 1, accident=accident)
    assert code == 1 and "step 3: loss" in log and "max_skipped_steps leaves such steps out" in log
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_fault_11_an_infinite_norm_leaves_gradients_unscaled():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([float("inf"), 3.0])
    verdict = StepGuard(1.0, max_skipped_steps=1).admit([parameter], step=1, loss=1.0)
    assert verdict.is_skipped and parameter.grad.tolist() == [float("inf"), 3.0]


def test_fault_12_a_step_left_out_leaves_weights_and_optimizer_state_as_they_were(launch, words, tmp_path):
    (code,), (log,), _ = launch(words("run", save_steps=1, max_skipped_steps=1, max_steps=4), 1, accident="nan")
    assert code == 0, log
    assert_equal(state(tmp_path / "run", 2), state(tmp_path / "run", 3))
    assert [row["skipped"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [False, False, True, False]
    assert "0 spikes of loss or gradient, 1 steps left out" in log


@pytest.mark.parametrize("max_skipped_steps", [0, 1])
def test_fault_12_a_spike_is_counted_and_left_out_where_the_recipe_says_so(run, monkeypatch, max_skipped_steps, capsys):
    true, spiked = Loop._backward, LEAST_STEPS + 2

    def backward(self, batch, rows, **options):
        totals = true(self, batch, rows, **options)
        if len(self.guard._norms) == spiked and not self.guard.num_spikes:
            for parameter in self.model.parameters():
                parameter.grad *= 1000.0
        return totals

    monkeypatch.setattr(Loop, "_backward", backward)
    folder = run("run", max_steps=spiked + 3, max_skipped_steps=max_skipped_steps, learning_rate=1e-5)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["spike"]] == [spiked + 1]
    assert sum(row["skipped"] for row in rows) == max_skipped_steps
    assert f"1 spikes of loss or gradient, {max_skipped_steps} steps left out" in capsys.readouterr().out


def test_fault_12_a_resumed_run_counts_and_decides_on(run, monkeypatch):
    """What the guard has seen is in the checkpoint: a resumed run knows its spikes and how many steps it left out."""
    run("run", max_steps=4, save_steps=2)
    seen = {}
    restore = StepGuard.restore

    def restored(self, state):
        restore(self, state)
        seen["norms"] = list(self._norms)

    monkeypatch.setattr(StepGuard, "restore", restored)
    folder = run("run", max_steps=4, save_steps=2, resume_from_checkpoint="latest")
    assert seen["norms"] == [row["grad_norm"] for row in read_metrics(folder / "metrics.jsonl")]


def test_fault_27_a_guard_that_is_none_is_refused(run, capsys):
    folder = run("run", max_steps=1) / "checkpoint-1"
    trainer = json.loads((folder / "state" / "trainer.json").read_text())
    for guard in ({"losses": 3}, None, {}):
        (folder / "state" / "trainer.json").write_text(json.dumps(trainer | {"guard": guard}))
        (folder / "manifest.json").unlink()
        write_manifest(folder)
        error = refusal(capsys, lambda: run("run", max_steps=1, resume_from_checkpoint="latest"))
        assert "expected the state of the guard" in error


@pytest.mark.parametrize(("accident", "code"), [("term", 143), ("interrupt", 130)])
def test_fault_24_a_signal_in_a_step_saves_it_and_the_resumed_run_is_the_one_never_stopped(
    launch, words, tmp_path, accident, code
):
    (ended,), (log,), _ = launch(words("run"), 1, accident=accident)
    assert ended == code, log
    assert "saving after this step" in log and "checkpoint-3 is complete" in log and "latest goes on" in log
    assert launch(words("run", resume_from_checkpoint="latest"), 1)[0] == [0]
    assert launch(words("whole"), 1)[0] == [0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_equal(state(tmp_path / "run", 6), state(tmp_path / "whole", 6))


def test_fault_24_a_signal_in_a_save_lets_it_end(launch, words, tmp_path):
    (code,), (log,), _ = launch(words("run", save_steps=2), 1, accident="term in a save")
    assert code == 143, log
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3"]
    assert all((tmp_path / "run" / name / "manifest.json").exists() for name in found)


@pytest.mark.parametrize(("accident", "code"), [("term in evaluation", 143), ("interrupt in generation", 130)])
def test_fault_24_a_signal_in_evaluation_or_generation_ends_at_once_and_can_be_gone_on_with(
    launch, words, accident, code
):
    flags = dict(
        model_name_or_path="bundled:reasoner",
        data="bundled:questions/train.jsonl",
        max_train_samples=4,
        eval_data="bundled:questions/evaluation.jsonl",
        max_eval_samples=2,
        eval_budgets="0",
        max_thinking_tokens=240,
        max_answer_tokens=24,
        max_steps=1,
    )
    (ended,), (log,), _ = launch(words("run", **flags), 1, accident=accident)
    assert ended == code and "latest goes on" in log and "Traceback" not in log
    (ended,), (log,), _ = launch(words("run", resume_from_checkpoint="latest", **flags), 1)
    assert ended == 0, log


def test_fault_24_a_terminal_that_hangs_up_ends_the_run_with_its_checkpoint(launch, words, tmp_path):
    (code,), (log,), _ = launch(words("run", save_steps=2), 1, accident="hang up in a save")
    assert code == 129, log
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").exists()


def test_one_command_begins_a_run_and_goes_on_with_it(run, tmp_path):
    whole = run("whole", save_steps=2)
    again = run("again", save_steps=2, resume_from_checkpoint="latest")
    shutil.rmtree(again / "checkpoint-6")
    run("again", save_steps=2, resume_from_checkpoint="latest")
    assert losses(again) == losses(whole)


def test_a_second_process_in_the_folder_of_a_run_is_refused(run, tmp_path, capsys):
    with alone_in(tmp_path / "run"):
        assert "another process works in output_dir" in refusal(capsys, lambda: run("run"))
        error = refusal(capsys, lambda: run("run", resume_from_checkpoint="latest"))
        assert "another process works in output_dir" in error
    run("run")
    assert not list(tmp_path.glob(".*.lock"))


def test_fault_24_the_second_signal_ends_at_once(launch, words, tmp_path):
    (code,), (log,), _ = launch(words("run", save_steps=1), 1, accident="term twice")
    assert code == 143 and "again: ending at once" in log
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_fault_29_a_log_that_cannot_be_written_is_one_warning(run, monkeypatch, capsys):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = close = write

    true = MetricsLog.__init__

    def broken(self, *arguments, **options):
        true(self, *arguments, **options)
        self._stream = Full()

    Full.close = lambda self: None
    monkeypatch.setattr(MetricsLog, "__init__", broken)
    folder = run("run", max_steps=3)
    assert (folder / "checkpoint-3").exists()
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1


def test_a_step_that_hangs_ends_the_run_with_every_stack(launch, words):
    (code,), (log,), seconds = launch(words("run", timeout_seconds=5), 1, accident="hang", seconds=60)
    assert code == 1 and seconds < 50
    assert "Timeout" in log and "in backward" in log
