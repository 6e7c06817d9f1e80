"""Whole steps of several contenders in turn: each is tried by itself, held against the others, and timed with them.

What happens to one is not the others' fault: one that raises, does not fit, or is refused is a line that says so. When
time is up or somebody interrupts, what has been measured is the result.
"""

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.deadline import TIME_IS_UP, Deadline
from bench.measure import NotMeasured, forget, timed_fields
from bench.training import GRADIENT_TOLERANCE, TOLERANCE, TrainingStep

LEAST_ROUNDS = 2  # of contenders that are ready when little time is left
Makers = dict[str, tuple[Callable[..., TrainingStep], Sequence[bool]]]


def in_turn(
    benchmark: Any, makers: Makers, rounds: int, *, apart: str, deadline: Deadline, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """The fields of every contender's line.

    Args:
        benchmark: pytest-benchmark's fixture, which times the first that runs.
        makers: of each contender's step, and whether it may recompute activations, in the order of trying. The first is
            the reference, and all but ``apart`` must agree with the first that runs.
        rounds: timed ones, fewer where time runs out.
        apart: a contender of another objective.
        deadline: after which nobody begins.
        dtype: of the computation, which tolerances depend on.
    """
    steps, fields = _made_ready(makers, apart, deadline, dtype)
    if steps:
        _time(benchmark, steps, fields, rounds, deadline)
    reference = next(iter(makers))
    for name, step in steps.items():
        fields[name] |= timed_fields(step, steps.get(reference, step))
        fields[name]["reference_peak_bytes"] = fields[reference].get("peak_bytes")
        if reference not in steps:
            fields[name] |= dict(reference_milliseconds=None, reference_quartiles=None)
    return [fields[name] for name in makers]


def _made_ready(
    makers: Makers, apart: str, deadline: Deadline, dtype: torch.dtype
) -> tuple[dict[str, TrainingStep], dict[str, dict[str, Any]]]:
    """(the steps that are to be timed, each with a round; the fields that are known of every contender)."""
    steps: dict[str, TrainingStep] = {}
    fields: dict[str, dict[str, Any]] = {}
    expected, compared = None, 0
    for name, (make, choices) in makers.items():
        step, fields[name] = ready(make, choices, deadline)
        if step is not None and name != apart:
            expected = expected or step
            compared += step is not expected
            if refused := check(step, expected, dtype):
                step, fields[name] = None, dict(outcome=refused)
        if step is not None:
            steps[name] = step
    if steps and not compared:
        fields |= {name: dict(outcome="refused, there is nothing to hold it against") for name in steps}
        steps = {}
    return steps, fields


def ready(
    make: Callable[..., TrainingStep], choices: Sequence[bool], deadline: Deadline
) -> tuple[TrainingStep | None, dict[str, Any]]:
    """(a step that fits, the fields that are known of it): without recomputing activations if that is a choice."""
    for recomputed in choices:
        if deadline():
            return None, dict(outcome=f"not measured: {TIME_IS_UP}")
        step = None
        try:
            step = make(recomputed=recomputed)
            peak = step.peak_bytes()
            step.seconds.clear()
            step.once()  # warmed up
            return step, dict(peak_bytes=peak, num_tokens=step.num_tokens, loss_value=step.loss, recomputed=recomputed)
        except NotMeasured as error:
            return None, dict(outcome=f"not measured: {error}")
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        except KeyboardInterrupt:
            deadline.is_now()
            outcome = "not measured: interrupted"
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {str(error)[:80]!r}"
            traceback.clear_frames(error.__traceback__)
        if step is not None:
            step.clean_up()  # gradients of a backward that was cut short
        del step
        forget()
        if outcome != "out of memory":
            break
    return None, dict(outcome=outcome)


def check(step: TrainingStep, wanted: TrainingStep, dtype: torch.dtype) -> str:
    """Why a step is refused: another loss or gradient than the one that is wanted; empty when it is the same."""
    for what, got, right in (("loss", step.loss, wanted.loss), ("gradient norm", step.norm, wanted.norm)):
        if not abs(got - right) <= TOLERANCE[dtype] * abs(right):
            return f"refused, its {what} is {got:.6g}, and {right:.6g} was expected"
    error = float((step.gradient - wanted.gradient).norm() / wanted.gradient.norm())
    return "" if error <= GRADIENT_TOLERANCE[dtype] else f"refused, its gradient is {error:.1e} off what was expected"


def _time(
    benchmark: Any,
    steps: dict[str, TrainingStep],
    fields: dict[str, dict[str, Any]],
    rounds: int,
    deadline: Deadline,
) -> None:
    """Rounds of all ``steps``; who finds no memory beside the others leaves them, and its fields say so."""
    if deadline.interrupted:  # each has the round that it was tried by
        return
    a_round = sum(step.seconds[-1] for step in steps.values())
    rounds = int(min(rounds, max(LEAST_ROUNDS, deadline.seconds_left / a_round)))
    first = next(iter(steps))

    def attempt(name: str) -> None:
        if name not in steps:
            return
        try:
            steps[name].once()
            return
        except torch.OutOfMemoryError:
            pass
        steps.pop(name).clean_up()
        fields[name] = dict(outcome="out of memory beside the other contenders")
        forget()

    def run_others() -> None:
        for name in [name for name in steps if name != first]:
            attempt(name)

    try:
        warm = {name: step.seconds.copy() for name, step in steps.items()}
        for step in steps.values():
            step.seconds.clear()
        benchmark.pedantic(partial(attempt, first), setup=run_others, rounds=rounds)
    except KeyboardInterrupt:
        deadline.is_now()
    for name, step in steps.items():  # whoever was not timed any more has a round of its own from before
        step.seconds = step.seconds or warm[name]
