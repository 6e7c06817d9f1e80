"""Everything in one go for a GPU machine: the order, the time each stage gets, and what is said at the end."""

import sys
import time

import pytest

from bench import run_all
from bench.lines import StepLine
from bench.record import Results
from bench.run_all import Stage

ROOT = run_all.ROOT


def test_every_suite_and_every_gpu_test_is_in_one_stage():
    named = [argument for stage in run_all.stages() for argument in stage.arguments if argument.startswith("bench/")]
    assert sorted(named) == sorted(f"bench/{path.name}" for path in (ROOT / "bench").glob("test_bench_*.py"))
    tests = run_all.stages()[0].arguments
    assert tests[:2] == ("-m", "gpu") and any(path.endswith("test_branch_attention.py") for path in tests)
    assert not any(path.endswith("test_compare.py") for path in tests)
    assert sum(stage.seconds for stage in run_all.stages()) <= run_all.SECONDS < 540


def test_gpu_tests_compile_in_as_many_processes_as_there_may_be(monkeypatch):
    monkeypatch.setattr(run_all.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(run_all.importlib.util, "find_spec", lambda name: name)
    assert run_all.in_parallel() == ("-n", str(run_all.MOST_PROCESSES), "--dist", "worksteal")
    assert set(run_all.in_parallel()) <= set(run_all.stages()[0].arguments)
    monkeypatch.setattr(run_all.importlib.util, "find_spec", lambda name: None)
    assert run_all.in_parallel() == () and "-n" not in run_all.stages()[0].arguments


def test_what_runs_too_long_is_interrupted_and_then_killed(monkeypatch):
    monkeypatch.setattr(run_all, "GRACE", 0.5)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); print('ready', flush=True); time.sleep(60)"
    )
    for code in ("import time; time.sleep(60)", stubborn):
        begun = time.monotonic()
        assert run_all.run([sys.executable, "-c", code], 1.0, {}) != 0
        assert time.monotonic() - begun < 20
    assert run_all.run([sys.executable, "-c", "raise SystemExit(3)"], 30.0, {}) == 3


@pytest.fixture
def calls(monkeypatch):
    """The stages that are run, each for half a second whatever it may take."""
    made, clock = [], [0.0]
    monkeypatch.setattr(run_all.time, "monotonic", lambda: clock[0])

    def run(command, seconds, environment):
        made.append((command[-1], seconds, environment))
        clock[0] += 10.0
        return len(made) - 1

    monkeypatch.setattr(run_all, "run", run)
    return made


def test_time_that_is_left_goes_to_the_next_stages(calls):
    chosen = [Stage("one", 20, ("a",)), Stage("two", 30, ("b",)), Stage("three", 50, ("c",))]
    assert run_all.run_stages(chosen, 100.0) == {"one": 0, "two": 1, "three": 2}
    assert [seconds for _, seconds, _ in calls] == [20, 40, 80]
    assert [environment["TRSD_BENCH_SECONDS"] for *_, environment in calls] == ["15", "30", "60"]
    assert str(ROOT / "kernels") in calls[0][2]["PYTHONPATH"]


def test_processes_side_by_side_have_a_thread_each(calls, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    run_all.run_stages([Stage("tests", 20, ("-n", "4", "a")), Stage("suite", 30, ("b",))], 100.0)
    assert [environment["OMP_NUM_THREADS"] for *_, environment in calls] == ["1", "8"]


def test_a_stage_without_time_is_left_out_and_said(calls, capsys):
    chosen = [Stage("one", 9, ("a",)), Stage("two", 3, ("b",))]
    found = run_all.run_stages(chosen, 12.0)
    assert found == {"one": 0}
    run_all.summarize(chosen, found | {"one": 1})
    said = capsys.readouterr().out
    assert "exit status 1" in said and "no time was left" in said


def test_the_summary_ends_with_headlines(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    results = Results("trsd_step", "steps")
    group = "a model, 4 traces, 8 even cuts"
    shared = dict(group=group, milliseconds=10.0, reference_milliseconds=10.0, rounds=3)
    results.add(StepLine(contender="branches", **shared))
    results.add(StepLine(contender="separate sequences", **(shared | dict(milliseconds=30.0))))
    run_all.summarize([], {})
    said = capsys.readouterr().out
    assert str(results.path) in said and "0.33" in said
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    run_all.summarize([], {})
    assert f"{broken}: not JSON" in capsys.readouterr().out


@pytest.mark.parametrize("only", ["0", "9", "x", "1,,2", "²"])
def test_stages_are_chosen_by_their_numbers(only, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_all.main(["--only", only])
    assert exit_.value.code == 2 and "1 to 6" in capsys.readouterr().err


def test_the_exit_code_says_whether_all_passed(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    for only, code in (("2", 0), ("2,3", 1)):
        with pytest.raises(SystemExit) as exit_:
            run_all.main(["--only", only])
        assert exit_.value.code == code
        calls.clear()


@pytest.mark.parametrize("seconds", ["nan", "0", "-3", "inf"])
def test_a_limit_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_all.main(["--seconds", seconds])
    assert exit_.value.code == 2 and "--seconds" in capsys.readouterr().err
