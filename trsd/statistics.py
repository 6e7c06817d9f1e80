"""Figures of graded samples: accuracy, its interval, pass@k, the difference of two models, the area under a curve.

pass@k is the chance that at least one of k samples is right, by the unbiased estimator of Chen et al. 2021
(arXiv 2107.03374, section 2.1): with c of a question's n samples right, 1 - C(n - c, k) / C(n, k), averaged over the
questions. pass@1 by it is the mean over samples, so it equals the accuracy, which others call acc@n.

Intervals are for questions drawn at random, of which a sample may have few, and nearly all of them right: there
resampling and the normal approximation give intervals much too short (Bowyer et al. 2025, arXiv 2503.01747), of no
length at all where nothing or everything is right.
"""

from collections.abc import Sequence
from math import comb, lcm, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from trsd.errors import InputError

Z = NormalDist().inv_cdf(0.975)
"""Standard deviations on each side of 95 % intervals."""
MOST_SUMS = 10**7  # of signed differences that the exact test tells apart, 8 bytes each


def accuracy_figures(correct: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Accuracy, its interval and pass@k of graded samples.

    Args:
        correct: one sequence per question, an entry per sample; a question counts once, however many samples it has.

    Returns:
        ``accuracy`` (the mean over questions of their mean over samples: acc@n, equal to pass@1), ``low`` and ``high``
        of its ``accuracy_interval``, and ``pass_at``, by k as text: 1, 3 and n, n being the fewest samples that a
        question has.
    """
    low, high = accuracy_interval(correct)
    fewest = min(len(samples) for samples in correct)
    return {
        "accuracy": float(np.mean([np.mean(samples) for samples in correct])),
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


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % interval of the accuracy on questions like these, of which ``correct`` has one sequence each.

    Wilson's score interval (1927) of as many independent answers as would vary by as much as the questions' shares of
    right ones do, as surveys drawn in clusters have it. What they vary by is told with two questions more, one right
    and one wrong: few questions that agree are no proof that all do. With one sample a question it is Wilson's itself.
    """
    shares = np.array([np.mean(samples) for samples in correct])
    mean, more = float(shares.mean()), np.array([*shares, 0.0, 1.0])
    count = len(shares) * float(more.mean() * (1 - more.mean()) / more.var())
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(0.0, min(middle - half, mean)), min(1.0, max(middle + half, mean))


def difference_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired ``differences`` [num_questions] of the shares of right answers.

    Wald's interval with two questions more, one for each side. For one sample a question it is that of Agresti and Min
    (2005, Statistics in Medicine 24), who add half a question to each of the four ways in which two answers are right
    or wrong.
    """
    added = sqrt(0.5)
    values = np.array([*differences, added, -added])
    half = Z * values.std() / sqrt(len(values))
    return float(max(-1.0, values.mean() - half)), float(min(1.0, values.mean() + half))


def area_under_curve(tokens: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Mean accuracy over the budget range, trapezoids between budgets; None for fewer than two budgets."""
    if len(set(tokens)) < 2:
        return None
    return float(np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]))


def paired_difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """How much more accurate ``second`` is than ``first`` on the same questions.

    Args:
        first, second: one sequence per question, in the same order, an entry per sample; the two may differ in how
            many samples they have.

    Returns:
        ``difference`` (the mean over questions of second minus first), ``low`` and ``high`` of its
        ``difference_interval``, ``p_value`` (see ``sign_flip_p_value``) and ``num_differing``, the questions that the
        two do not answer equally well.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"expected the same questions in both, and at least one, got {len(first)} and {len(second)}")
    # Exact, as whole multiples of 1 / scale: rounding would make equal differences unequal.
    scale = lcm(*(len(samples) for samples in (*first, *second)))
    if scale > MOST_SUMS:
        raise InputError(
            f"the questions have too many different numbers of samples for an exact test (least common multiple "
            f"{scale:,}): give every question equally many"
        )
    shares = [
        np.array([sum(samples) * (scale // len(samples)) for samples in side], dtype=np.int64)
        for side in (first, second)
    ]
    differences = shares[1] - shares[0]  # [num_questions]
    low, high = difference_interval(differences / scale)
    return {
        "difference": float(differences.mean() / scale),
        "low": low,
        "high": high,
        "p_value": sign_flip_p_value(differences),
        "num_differing": int(np.count_nonzero(differences)),
    }


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of whole-numbered paired differences [num_questions] under "their signs are chance".

    The share of all sign assignments whose sum is at least as far from zero as the observed one, counted exactly by
    adding one difference after the other to the distribution of sums. With one sample a question this is McNemar's
    exact test.
    """
    sizes = np.abs(differences[differences != 0])
    unit = int(np.gcd.reduce(sizes)) if len(sizes) else 1
    sizes = sizes // unit
    if sizes.sum() > MOST_SUMS:
        raise InputError(
            f"the questions have too many different numbers of samples for an exact test ({sizes.sum():,} sums): give "
            "every question equally many"
        )
    sums = np.zeros(2 * int(sizes.sum()) + 1)  # chance of every sum, from -total to total
    middle = len(sums) // 2
    sums[middle] = 1.0
    reach = 0
    for size in sizes.tolist():
        inside = sums[middle - reach : middle + reach + 1] / 2
        reach += size
        sums[middle - reach : middle + reach + 1] = 0.0
        sums[middle - reach : middle + reach + 1 - 2 * size] += inside
        sums[middle - reach + 2 * size : middle + reach + 1] += inside
    observed = abs(int(differences.sum())) // unit
    far = sums[: middle - observed + 1].sum() + sums[middle + observed :].sum()
    return float(min(1.0, far))
