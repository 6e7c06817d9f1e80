import itertools
from math import comb

import numpy as np
import pytest

from trsd.errors import InputError
from trsd.statistics import accuracy_interval, paired_difference, sign_flip_p_value


def mcnemar(won, lost):
    """McNemar's exact two-sided p-value of ``won`` against ``lost`` discordant pairs."""
    pairs = won + lost
    tail = sum(comb(pairs, k) for k in range(min(won, lost) + 1)) / 2**pairs
    return min(1.0, 2 * tail)


@pytest.mark.parametrize("won,lost", [(0, 0), (1, 0), (5, 0), (3, 3), (9, 2), (2, 9), (40, 21), (700, 619)])
def test_with_one_sample_a_question_the_p_value_is_mcnemars(won, lost):
    first = [[False]] * won + [[True]] * lost + [[True]] * 7 + [[False]] * 3
    second = [[True]] * won + [[False]] * lost + [[True]] * 7 + [[False]] * 3
    found = paired_difference(first, second)
    assert found["p_value"] == pytest.approx(mcnemar(won, lost), rel=1e-9)
    assert found["difference"] == pytest.approx((won - lost) / len(first)) and found["num_differing"] == won + lost


def test_p_value_of_unequal_differences_counts_every_assignment_of_signs():
    rng = np.random.default_rng(1)
    for _ in range(20):
        differences = rng.integers(-5, 6, 9)
        flips = [np.dot(signs, np.abs(differences)) for signs in itertools.product((-1, 1), repeat=9)]
        share = np.mean(np.abs(flips) >= abs(differences.sum()))
        assert sign_flip_p_value(differences) == pytest.approx(share)


def test_samples_may_differ_in_number_and_equal_shares_do_not_differ():
    found = paired_difference([[True, False, True], [True]], [[True, True, False] * 2, [False]])
    assert found["num_differing"] == 1 and found["difference"] == -0.5 and found["p_value"] == 1.0
    assert -1 < found["low"] < -0.5 and 0 < found["high"] < 0.5


def test_both_directions_mirror_each_other():
    rng = np.random.default_rng(2)
    one, other = (rng.random((50, 4)) < chance for chance in (0.4, 0.6))
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert there["difference"] == -back["difference"] > 0 and there["p_value"] == back["p_value"] < 0.05
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_models_that_do_not_differ_are_called_different_once_in_twenty():
    rng = np.random.default_rng(3)
    small = [
        sign_flip_p_value((rng.random((80, 2)) < 0.5).sum(1) - (rng.random((80, 2)) < 0.5).sum(1)) <= 0.05
        for _ in range(1000)
    ]
    assert 0.02 < np.mean(small) < 0.065  # exact tests of counts stay at or below their level


@pytest.mark.parametrize("num_right,num_questions", [(0, 40), (40, 40), (1, 30), (29, 30), (12, 80), (5000, 9000)])
def test_bounds_of_an_accuracy_are_where_what_was_seen_is_just_not_surprising(num_right, num_questions):
    low, high = accuracy_interval([[i < num_right] for i in range(num_questions)])
    seen = num_right / num_questions
    for bound in (low, high):
        if bound not in (0.0, 1.0):  # a chance of 0 or 1 is what none or all right may come from
            assert abs(seen - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / num_questions), rel=1e-6)
    assert 0 <= low <= seen <= high <= 1 and (low == 0) == (num_right == 0) and (high == 1) == (seen == 1)


@pytest.mark.parametrize("one,other,num_questions", [(0, 0, 40), (3, 9, 60), (12, 0, 12), (40, 41, 300)])
def test_bounds_of_a_difference_are_those_of_half_a_question_more_of_each_kind(one, other, num_questions):
    pairs = [(True, False)] * one + [(False, True)] * other + [(True, True)] * (num_questions - one - other)
    found = paired_difference(*([[side] for side in sides] for sides in zip(*pairs, strict=True)))
    table = np.array([one, other, num_questions - one - other, 0]) + 0.5  # Agresti and Min 2005
    shares = table / table.sum()
    middle = shares[1] - shares[0]
    half = 1.959964 * np.sqrt((shares[0] + shares[1] - middle**2) / table.sum())
    assert found["low"] == pytest.approx(max(-1, middle - half), abs=1e-6)
    assert found["high"] == pytest.approx(min(1, middle + half), abs=1e-6)
    assert found["low"] <= found["difference"] <= found["high"] and found["low"] < found["high"]


@pytest.mark.parametrize("num_samples", [1, 16])
@pytest.mark.parametrize("num_questions", [30, 100])
@pytest.mark.parametrize("truth", [0.5, 0.95])
def test_intervals_cover_the_truth_about_as_often_as_they_say(truth, num_questions, num_samples):
    rng = np.random.default_rng(4)
    covered, paired, widths = [], [], []
    for _ in range(500):
        chances = rng.beta(truth, 1 - truth, num_questions)[:, None]  # questions differ in how hard they are
        first, second = (rng.random((2, num_questions, num_samples)) < chances).tolist()
        low, high = accuracy_interval(first)
        covered.append(low <= truth <= high)
        found = paired_difference(first, second)
        paired.append(found["low"] <= 0 <= found["high"])
        widths.append((high - low, found["high"] - found["low"]))
    assert 0.91 < np.mean(covered) < 0.99 and np.mean(paired) > 0.91
    one, both = np.mean(widths, 0)
    assert both < 1.7 * one < 4 / num_questions**0.5


def test_more_samples_of_a_question_narrow_an_interval_as_far_as_they_differ():
    once = [[i < 20] for i in range(40)]
    assert accuracy_interval([row * 4 for row in once]) == accuracy_interval(once)  # four times the same is no more
    apart = [[j < 2 for j in range(4)] for _ in range(40)]
    assert (
        0.2 * np.ptp(accuracy_interval(once)) < np.ptp(accuracy_interval(apart)) < 0.4 * np.ptp(accuracy_interval(once))
    )
    assert (
        np.ptp(accuracy_interval([[True] * 500 + [False] * 500])) > 0.8
    )  # of other questions one says next to nothing


def test_one_error_among_many_samples_moves_an_interval_by_little():
    none, one = ([[j > 0 or i > 0 or bool(missing) for j in range(16)] for i in range(30)] for missing in (1, 0))
    assert accuracy_interval(none) == accuracy_interval([[True]] * 30)
    assert accuracy_interval(one) == pytest.approx(accuracy_interval(none), abs=0.005)


def test_a_paired_interval_is_narrower_than_the_difference_of_two():
    rng = np.random.default_rng(5)
    hard = rng.random(300)
    one, other = ([[bool(x)] for x in hard < level] for level in (0.50, 0.55))
    found = paired_difference(one, other)
    alone = [np.ptp(accuracy_interval(side)) for side in (one, other)]
    assert found["high"] - found["low"] < 0.6 * np.hypot(*alone)


@pytest.mark.parametrize("first,second", [([], []), ([[True]], [[True], [False]])])
def test_other_questions_are_refused(first, second):
    with pytest.raises(ValueError, match="the same questions"):
        paired_difference(first, second)


def test_uneven_samples_are_tested_exactly_or_refused(monkeypatch):
    rights = np.random.default_rng(0).random((20, 12)) < 0.5
    first = [list(row[: 4 + 2 * (i % 2)]) for i, row in enumerate(rights)]
    second = [list(row[6:10]) for row in rights]
    found = paired_difference(first, second)
    whole = np.array([np.mean(b) - np.mean(a) for a, b in zip(first, second, strict=True)])
    signs = np.random.default_rng(1).choice([-1, 1], (40_000, 20))
    assert found["p_value"] == pytest.approx(np.mean(np.abs(signs @ whole) >= abs(whole.sum()) - 1e-9), abs=0.01)
    ragged = [[True] * n for n in range(58, 65)]
    with pytest.raises(InputError, match="give every question equally many"):
        paired_difference(ragged, [[False] * len(row) for row in ragged])
