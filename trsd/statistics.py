"""Figures of graded samples: accuracy, its interval, pass@k, and the area under an accuracy-budget curve.

pass@k is the chance that at least one of k samples is right, by the unbiased estimator of Chen et al. 2021
(arXiv 2107.03374, section 2.1): with c of a question's n samples right, 1 - C(n - c, k) / C(n, k), averaged over the
questions. pass@1 by it is the mean over samples, so it equals the accuracy, which others call acc@n.
"""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 1000


def accuracy_figures(correct: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Accuracy, its interval and pass@k of graded samples.

    Args:
        correct: one sequence per question, an entry per sample; a question counts once, however many samples it has.

    Returns:
        ``accuracy`` (the mean over questions of their mean over samples: acc@n, equal to pass@1), ``low`` and ``high``
        of its 95 % bootstrap interval, and ``pass_at``, by k as text: 1, 3 and n, n being the fewest samples that a
        question has.
    """
    per_question = np.array([np.mean(samples) for samples in correct])
    low, high = bootstrap_interval(per_question)
    fewest = min(len(samples) for samples in correct)
    return {
        "accuracy": float(per_question.mean()),
        "low": low,
        "high": high,
        "pass_at": {
            str(k): float(np.mean([pass_at_k(sum(samples), len(samples), k) for samples in correct]))
            for k in sorted({1, 3, fewest})
            if k <= fewest
        },
    }


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """The unbiased estimate of the chance that one of ``k`` samples is right, from one question's samples."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"expected 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got k={k}, "
            f"num_samples={num_samples}, num_correct={num_correct}"
        )
    ways = comb(num_samples, k)
    return (ways - comb(num_samples - num_correct, k)) / ways


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [num_questions], by resampling questions (seeded)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def area_under_curve(tokens: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Mean accuracy over the budget range, trapezoids between budgets; None for fewer than two budgets."""
    if len(set(tokens)) < 2:
        return None
    return float(np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]))
