"""What a run took in all, whatever number of starts it needed."""

import json

import pytest
import torch

from trsd.totals import Peaks, totals_line, training_peak_gib, write_totals


def metrics(folder, seconds):
    rows = [{"step": step, "step_seconds": value} for step, value in enumerate(seconds, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_one_start_is_what_it_took(tmp_path):
    totals = write_totals(tmp_path, seconds=12.0, peaks=Peaks(), memory_parts={"teacher": 0.5}, resumed_from=None)
    assert totals["seconds"] == 12.0 and not totals["resumed"] and totals["memory_parts_gib"] == {"teacher": 0.5}
    assert json.loads((tmp_path / "totals.json").read_text()) == totals
    assert totals_line(totals).startswith("12 s, peak memory ")


def test_a_run_that_had_ended_keeps_its_time_and_its_peak(tmp_path):
    first = write_totals(tmp_path, seconds=12.0, peaks=Peaks(), memory_parts={}, resumed_from=None)
    (tmp_path / "totals.json").write_text(json.dumps(first | {"peak_memory_gib": 99.0}))
    totals = write_totals(tmp_path, seconds=1.0, peaks=Peaks(), memory_parts={}, resumed_from=tmp_path / "checkpoint-3")
    assert totals["seconds"] == 13.0 and totals["peak_memory_gib"] == 99.0
    assert totals_line(totals) == "13 s in all starts, peak memory 99.00 GiB"


def test_of_a_start_that_was_killed_the_steps_are_counted_that_were_kept(tmp_path):
    metrics(tmp_path, [2.0, 3.0, 100.0])  # the third came after the checkpoint, and is done again
    totals = write_totals(tmp_path, seconds=7.0, peaks=Peaks(), memory_parts={}, resumed_from=tmp_path / "checkpoint-2")
    assert totals["seconds"] == pytest.approx(12.0)


def test_on_a_gpu_training_has_a_peak_of_its_own(monkeypatch, tmp_path):
    held = [5 * 2**30]  # since the last reset
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.__setitem__(0, 2**30))
    peaks = Peaks()  # 5 GiB were held for generation
    with peaks.training():
        held[0] = 3 * 2**30
    held[0] = 4 * 2**30  # evaluation
    totals = write_totals(tmp_path, seconds=1.0, peaks=peaks, memory_parts={}, resumed_from=None)
    assert totals["peak_gpu_memory_gib"] == 5 and totals["training_peak_gpu_memory_gib"] == 3
    assert training_peak_gib(totals) == (3, "on the GPU") and totals_line(totals).endswith("on the GPU 5.00 GiB")


def test_a_finished_run_that_is_resumed_says_what_it_took_before(run, capsys):
    folder = run(max_steps=1)
    before = json.loads((folder / "totals.json").read_text())
    run(max_steps=1, resume_from_checkpoint="latest")
    after = json.loads((folder / "totals.json").read_text())
    assert after["seconds"] > before["seconds"] and after["peak_memory_gib"] >= before["peak_memory_gib"]
    assert " in all starts" in capsys.readouterr().out and " in all starts" in (folder / "report.html").read_text()
