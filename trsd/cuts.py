"""Cut policies: after how many of its reasoning tokens a trace is cut.

A policy is a function (number of reasoning tokens, random generator) -> cut, with 0 <= cut <= number. The generator is
made from (seed, epoch, trace), so a draw never depends on order, workers or where a run was resumed.
"""

import math
import random
from collections.abc import Callable, Sequence

CutPolicy = Callable[[int, random.Random], int]


def uniform(length: int, rng: random.Random) -> int:
    """floor(f * length) with f drawn uniformly from [0, 1)."""
    return math.floor(rng.random() * length)


def log_uniform(length: int, rng: random.Random) -> int:
    """floor(length^u) with u drawn uniformly from [0, 1): every scale of budget equally often."""
    return min(length, math.floor(length ** rng.random())) if length else 0


def fractions(choices: Sequence[float]) -> CutPolicy:
    """floor(f * length) with f drawn from ``choices``, each in [0, 1]."""
    return lambda length, rng: math.floor(rng.choice(choices) * length)


def budgets(choices: Sequence[int]) -> CutPolicy:
    """A number of tokens drawn from ``choices``; a shorter reasoning stays whole."""
    return lambda length, rng: min(rng.choice(choices), length)


def with_anchor(policy: CutPolicy, share: float) -> CutPolicy:
    """``policy``, but in ``share`` of the draws the whole reasoning, which anchors the full-length behaviour."""

    def anchored(length: int, rng: random.Random) -> int:
        return length if rng.random() < share else policy(length, rng)

    return anchored


def snap(cut: int, ends: Sequence[int]) -> int:
    """The last sentence end at or before ``cut`` (0 when there is none); ``ends`` are ascending token counts."""
    return max((end for end in ends if end <= cut), default=0)


def build_policy(name: str, *, cut_fractions: Sequence[float], cut_budgets: Sequence[int], anchor: float) -> CutPolicy:
    """The policy a recipe names."""
    policies: dict[str, Callable[[], CutPolicy]] = {
        "uniform": lambda: uniform,
        "log_uniform": lambda: log_uniform,
        "fractions": lambda: fractions(cut_fractions),
        "budgets": lambda: budgets(cut_budgets),
    }
    if name not in policies:
        raise ValueError(f"cut: expected one of {', '.join(policies)}, got {name!r}")
    return with_anchor(policies[name](), anchor)


def cut_generator(seed: int, epoch: int, trace_id: str) -> random.Random:
    """The generator that decides one trace's cut in one epoch."""
    return random.Random(f"{seed}:{epoch}:{trace_id}")
