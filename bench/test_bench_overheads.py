"""What the trainer adds to a step beside computing it: the guard, a checkpoint's save, waiting for its rows.

Each has a promise, which is held on a CPU: the guard's own work beyond norm and clipping takes at most 1 % of a step,
a save keeps the loop waiting for at most 2 steps, rows are there when a step begins.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from bench.lines import OverheadLine
from bench.measure import Rounds, timed_fields
from bench.overheads import NAME, Trainer
from bench.transfers import Transfer
from trsd.models import quieten_transformers

SUITE = ("overheads", "what the trainer adds to a step, in shares of one")
GUARD, SAVE, ROWS = 0.01, 2.0, 0.01  # promised


@pytest.fixture(scope="module")
def trainer(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """The loop, once."""
    quieten_transformers()
    return Trainer(tmp_path_factory.mktemp("overheads"))


def measure_line(results, record, benchmark, group, contender, measure, promised) -> OverheadLine:
    """The line, recorded, its promise held on a CPU."""
    benchmark.group = f"{NAME}, {group}"
    record([partial(OverheadLine, group=benchmark.group, contender=contender, promised=promised)], measure)
    line = results.find(group=benchmark.group, contender=contender)
    assert torch.cuda.is_available() or line.share <= promised
    return line


def in_turn(benchmark, work: Transfer, reference: Transfer, rounds: int) -> dict[str, object]:
    work.warm_up()
    reference.warm_up()
    benchmark.pedantic(work.once, setup=reference.once, rounds=rounds)
    return timed_fields(work, reference)


def test_rows_are_there_when_a_step_begins(trainer, benchmark, results, record):
    def measure() -> list[dict[str, object]]:
        reference = trainer.rows_when_needed()
        reference.warm_up()
        benchmark.pedantic(trainer.step, setup=reference.once, rounds=4)
        waited = Rounds(trainer.step, on_gpu=False)
        waited.seconds = [row["data_seconds"] for row in trainer.metrics]
        fields = timed_fields(waited, reference)
        return [fields | dict(added_milliseconds=waited.milliseconds, step_milliseconds=trainer.step_milliseconds)]

    group = "waiting for rows; the reference makes them when they are needed"
    line = measure_line(results, record, benchmark, group, "rows made one step ahead", measure, ROWS)
    assert line.time_ratio <= 0.5  # or they were not made ahead


def test_the_guard_costs_little_more_than_clipping(trainer, benchmark, results, record):
    def measure() -> list[dict[str, object]]:
        fields = in_turn(benchmark, trainer.guarded(), trainer.clipped(), rounds=100)
        added = fields["milliseconds"] - fields["reference_milliseconds"]
        return [fields | dict(added_milliseconds=added, step_milliseconds=trainer.step_milliseconds)]

    group = "before the optimizer; the reference is torch's clip_grad_norm_, beyond which the guard's share counts"
    measure_line(results, record, benchmark, group, "StepGuard.admit", measure, GUARD)


def test_a_save_keeps_the_loop_waiting_for_less_than_two_steps(trainer, benchmark, results, record):
    def measure() -> list[dict[str, object]]:
        fields = in_turn(benchmark, trainer.save(to_disk=False), trainer.save(to_disk=True), rounds=7)
        added = fields["milliseconds"]
        return [fields | dict(added_milliseconds=added, step_milliseconds=trainer.step_milliseconds)]

    group = "a checkpoint; the reference waits until the disk has it"
    measure_line(results, record, benchmark, group, "Checkpointer.save", measure, SAVE)
