import re

import pytest

from trsd import command, metrics
from trsd.generate import GenerateArguments
from trsd.metrics import Throughput


def test_a_long_job_says_its_rate_and_what_is_left(monkeypatch, capsys):
    now = iter([0.0, 10.0, 31.0, 40.0, 80.0, 80.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    said = Throughput("traces", 4, every_seconds=30)
    for tokens in (100, 210, 90, 400):
        said.add(tokens)
    said.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "traces: 2 of 4, 10 tokens/s, eta 0:31",
        "traces: 4 of 4, 10 tokens/s",
        "traces: 4 of 4, 10 tokens/s",
    ]


def test_an_interrupt_ends_a_command_without_a_traceback(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        command.run_command(GenerateArguments, interrupted, prog="p", argv=["--output", "t.jsonl"])
    assert exit_.value.code == 130 and re.fullmatch(r"\s*stopped\n", capsys.readouterr().err)


def test_a_first_step_that_compiles_does_not_stretch_what_remains(monkeypatch):
    now = iter([100.0, 130.0, 131.0, 133.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    pace, found = metrics.Pace(), []
    for left in (3, 2, 1):
        pace.step_done()
        found.append(pace.remaining(left))
    assert found == [90.0, 2.0, 1.5]
