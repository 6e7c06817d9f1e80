"""One set of results a suite, kept as JSON and printed at the end of the session."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench import STARTED
from bench.deadline import Deadline
from bench.measure import forget, record_lines
from bench.record import Results

RESULTS = pytest.StashKey[list[Results]]()


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, one_thread: None) -> Results:
    """The lines of the module's suite; the module's SUITE is its (name, title)."""
    suite = Results(*request.module.SUITE)
    request.config.stash.setdefault(RESULTS, []).append(suite)
    return suite


@pytest.fixture(scope="session")
def out_of_time() -> Deadline:
    """Whether TRSD_BENCH_SECONDS, where set, have passed since the process began."""
    return Deadline(float(os.environ.get("TRSD_BENCH_SECONDS", "inf")), start=STARTED)


@pytest.fixture
def record(results: Results, benchmark: Callable, out_of_time: Callable[[], bool]) -> Callable[..., None]:
    """``record_lines`` for this test: takes the lines, what measures them, and what ``pip install`` would take."""
    return partial(record_lines, results, out_of_time=out_of_time, benchmark=benchmark)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On a CPU that does other work, threads waiting for each other would be what is measured."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean_memory():
    forget()


def pytest_terminal_summary(terminalreporter, config):
    for results in config.stash.get(RESULTS, []):
        if not results.lines:
            continue
        terminalreporter.section(results.title)
        environment = ", ".join(f"{name} {value}" for name, value in results.environment.items())
        terminalreporter.write_line(environment)
        terminalreporter.write_line(results.table())
        terminalreporter.write_line(f"\n{results.path}")
