"""GPU tests and every suite in order of importance, within a time limit: ``make gpu``, or ``python -m bench.run_all``.

For a machine with a GPU, torch, triton, transformers and pytest-benchmark and without a network: nothing is installed,
everything runs from the tree (``PYTHONPATH=.:kernels``), and peers are measured where the machine has them. Every stage
has a share of the time; what one leaves goes to the later ones, and what does not fit is recorded as not measured. Each
line is on disk as soon as it is measured. The last thing printed is what it all comes to.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.page_headlines import headlines
from bench.record import results_path
from bench.results_files import NotResults, newest_of_each_device, read_suites

ROOT = Path(__file__).parent.parent
SECONDS = 530.0
# Of a stage's time, left to what is running when no new line may begin.
LAST_LINE = 0.25
GRACE = 30.0
MOST_PROCESSES = 12  # on one GPU, where each has a context and memory of its own
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # for each of several processes
# Steps of many sizes follow each other on a nearly full GPU: freed memory must fit whatever comes next.
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class Stage(NamedTuple):
    """One run of pytest."""

    name: str
    seconds: float
    """Of the whole, for it alone."""
    arguments: tuple[str, ...]


def suite(name: str) -> str:
    return f"bench/test_bench_{name}.py"


def gpu_tests() -> tuple[str, ...]:
    """Files that hold GPU tests; others import what such a machine need not have."""
    return tuple(
        str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark." + "gpu" in path.read_text()
    )


def in_parallel() -> tuple[str, ...]:
    """What spreads tests over processes, where pytest-xdist is installed.

    Hundreds of kernels are compiled for the GPU tests, one for each choice of options, dtype and tile.
    """
    if importlib.util.find_spec("xdist") is None:
        return ()
    return "-n", str(min(MOST_PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"


REST = ("teacher_caches", "checkpoints", "overheads", "decoding")
BENCHMARK = ("--benchmark-only", "--benchmark-quiet")


def stages() -> tuple[Stage, ...]:
    """In order of importance; their seconds are shares where the limit is another than ``SECONDS``."""
    return (
        Stage("GPU tests", 150, ("-m", "gpu", *in_parallel(), *gpu_tests())),
        Stage("ceilings", 15, (suite("ceilings"), *BENCHMARK)),
        Stage("whole training steps", 195, (suite("training"), *BENCHMARK)),
        Stage("the loss", 80, (suite("linear_distill"), *BENCHMARK)),
        Stage("attention, branches, packing", 55, (suite("attention"), suite("trsd_step"), *BENCHMARK)),
        Stage("the rest", 35, (*map(suite, REST), *BENCHMARK)),
    )


def run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> int:
    """The exit status of ``command``, interrupted after ``seconds`` and killed a little later."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run_stages(chosen: Sequence[Stage], limit: float) -> dict[str, int]:
    """Each stage's exit status; stages for which no time is left are not in it."""
    scale, end, left_over = limit / sum(stage.seconds for stage in chosen), time.monotonic() + limit, 0.0
    found: dict[str, int] = {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    for stage in chosen:
        allowed = min(stage.seconds * scale + left_over, end - time.monotonic())
        if allowed < 5:
            continue
        print(f"\n=== {stage.name}, at most {allowed:.0f} s", flush=True)
        environment = {**ALLOCATOR, **os.environ, "PYTHONPATH": path}
        environment["TRSD_BENCH_SECONDS"] = f"{(1 - LAST_LINE) * allowed:.0f}"
        if "-n" in stage.arguments:
            environment |= ONE_THREAD
        begun = time.monotonic()
        found[stage.name] = run([sys.executable, "-m", "pytest", *stage.arguments], allowed, environment)
        left_over = max(0.0, allowed - (time.monotonic() - begun))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit code 1 where a stage failed."""
    every = stages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--only", help=f"numbers of stages, such as 2,3: {', '.join(s.name for s in every)}")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"--seconds: expected more than 0, got {arguments.seconds}")
    chosen = every
    if arguments.only:
        numbers = arguments.only.split(",")
        if not all(text.isdecimal() and 1 <= int(text) <= len(every) for text in numbers):
            parser.error(f"--only: expected numbers from 1 to {len(every)}, got {arguments.only}")
        chosen = tuple(every[int(text) - 1] for text in numbers)
    statuses = run_stages(chosen, arguments.seconds)
    summarize(chosen, statuses)
    sys.exit(0 if all(statuses.get(stage.name) == 0 for stage in chosen) else 1)


def summarize(chosen: Sequence[Stage], statuses: dict[str, int]) -> None:
    """What became of the stages, and the page's headlines of the newest results."""
    print("\n=== summary")
    for stage in chosen:
        status = statuses.get(stage.name)
        said = "no time was left" if status is None else "passed" if status == 0 else f"exit status {status}"
        print(f"{stage.name:<32}{said}")
    folder = results_path("", "any").parent
    try:
        for path in newest_of_each_device(folder):
            print(f"\n{path}", *headlines(read_suites(path)), sep="\n")
    except NotResults as error:
        print(f"\n{error}")


if __name__ == "__main__":
    main()
