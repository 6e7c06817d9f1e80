"""One set of results a session, kept as JSON and printed at its end."""

import os
import time

import pytest
import torch

from bench.measure import forget
from bench.record import Results

RESULTS = pytest.StashKey[Results]()


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config, one_thread: None) -> Results:
    """The session's lines."""
    pytestconfig.stash[RESULTS] = Results("linear_distill")
    return pytestconfig.stash[RESULTS]


@pytest.fixture(scope="session")
def out_of_time():
    """Whether TRSD_BENCH_SECONDS, where set, have passed since the first line began."""
    allowed, start = float(os.environ.get("TRSD_BENCH_SECONDS", "inf")), time.monotonic()
    return lambda: time.monotonic() - start > allowed


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
    if (results := config.stash.get(RESULTS, None)) and results.lines:
        terminalreporter.section("fused_linear_distillation, forward and backward")
        environment = ", ".join(f"{name} {value}" for name, value in results.environment.items())
        terminalreporter.write_line(environment)
        terminalreporter.write_line(results.table())
        terminalreporter.write_line(f"\n{results.path}")
