"""Where a run's memory goes: its parts as ``trsd.plan`` counts them, for a step of traces as long as the run's own."""

from collections.abc import Sequence
from statistics import median

from trsd.ceilings import known
from trsd.planned_lengths import CLOSER
from trsd.planning import placement_of, planned_traces, step_cost
from trsd.recipe import Recipe
from trsd.traces import Trace


def memory_by_part(recipe: Recipe, traces: Sequence[Trace], *, target: str) -> dict[str, float]:
    """GiB of one process by part, at the step's fullest moment.

    Args:
        recipe: of the run.
        traces: those it learns, of whose parts' lengths the medians are taken.
        target: "cpu" or "cuda".

    Raises:
        InputError: a model that cannot be planned.
    """
    prompt, reasoning, answer = (
        int(median(lengths))
        for lengths in zip(
            *((len(t.prompt_ids), len(t.reasoning_ids) + len(t.close_ids), len(t.answer_ids)) for t in traces),
            strict=True,
        )
    )
    lengths = max(1, prompt), max(len(CLOSER), reasoning), max(1, answer)
    resolved = placement_of(recipe, target=target).recipe
    planned = planned_traces(resolved.train_batch_size, lengths)
    cost = step_cost(resolved, planned, known("H100"), target=target)  # of which only the bytes are asked
    return {name: size / 2**30 for name, size in cost.held.items() if size}
