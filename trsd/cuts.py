"""Cut policies: after how many of its reasoning tokens a trace is cut.

A policy is a function (trace, random generator) -> cut, with 0 <= cut <= the number of its reasoning tokens. The
generator is made from (seed, epoch, trace), so a draw never depends on order, workers or where a run was resumed. A new
policy is one function here and one entry in ``build_policy``.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

from trsd.derivations import first_derivation_tokens
from trsd.traces import Trace

CutPolicy = Callable[[Trace, random.Random], int]


def uniform(trace: Trace, rng: random.Random) -> int:
    """floor(f * length) with f drawn uniformly from [0, 1)."""
    return math.floor(rng.random() * len(trace.reasoning_ids))


def log_uniform(trace: Trace, rng: random.Random) -> int:
    """floor(length^u) with u drawn uniformly from [0, 1): every scale of budget equally often."""
    length = len(trace.reasoning_ids)
    return min(length, math.floor(length ** rng.random())) if length else 0


def fractions(choices: Sequence[float]) -> CutPolicy:
    """floor(f * length) with f drawn from ``choices``, each in [0, 1]."""
    return lambda trace, rng: math.floor(rng.choice(choices) * len(trace.reasoning_ids))


def budgets(choices: Sequence[int]) -> CutPolicy:
    """A number of tokens drawn from ``choices``; a shorter reasoning stays whole."""
    return lambda trace, rng: min(rng.choice(choices), len(trace.reasoning_ids))


def first_derivation(texts: Sequence[str]) -> CutPolicy:
    """Right behind the first derivation of the final answer; the whole reasoning where none is found.

    HCC (arXiv 2605.29288) finds such cuts better than random ones of the same length. ``texts`` are the ``token_texts``
    of the tokenizer.
    """
    found: dict[str, int | None] = {}

    def cut(trace: Trace, rng: random.Random) -> int:
        if trace.id not in found:
            found[trace.id] = first_derivation_tokens(trace, texts)
        place = found[trace.id]
        return len(trace.reasoning_ids) if place is None else place

    return cut


def judged(cuts: Mapping[str, int]) -> CutPolicy:
    """Where a judge found each trace's shortest sufficient prefix to end (``judging.py``), by trace id."""
    return lambda trace, rng: cuts[trace.id]


def with_anchor(policy: CutPolicy, share: float) -> CutPolicy:
    """``policy``, but in ``share`` of the draws the whole reasoning, which anchors the full-length behaviour."""

    def anchored(trace: Trace, rng: random.Random) -> int:
        return len(trace.reasoning_ids) if rng.random() < share else policy(trace, rng)

    return anchored


def snap(cut: int, ends: Sequence[int]) -> int:
    """The last sentence end at or before ``cut`` (0 when there is none); ``ends`` are ascending token counts."""
    return max((end for end in ends if end <= cut), default=0)


def build_policy(
    name: str,
    *,
    cut_fractions: Sequence[float] = (),
    cut_budgets: Sequence[int] = (),
    texts: Sequence[str] = (),
    judged_cuts: Mapping[str, int] | None = None,
    anchor: float = 0.0,
) -> CutPolicy:
    """The policy a recipe names."""
    policies: dict[str, Callable[[], CutPolicy]] = {
        "uniform": lambda: uniform,
        "log_uniform": lambda: log_uniform,
        "fractions": lambda: fractions(cut_fractions),
        "budgets": lambda: budgets(cut_budgets),
        "first_derivation": lambda: first_derivation(texts),
        "judged": lambda: judged(judged_cuts or {}),
    }
    if name not in policies:
        raise ValueError(f"cut: expected one of {', '.join(policies)}, got {name!r}")
    return with_anchor(policies[name](), anchor)


def cut_generator(seed: int, epoch: int, trace_id: str) -> random.Random:
    """The generator that decides one trace's cut in one epoch."""
    return random.Random(f"{seed}:{epoch}:{trace_id}")
