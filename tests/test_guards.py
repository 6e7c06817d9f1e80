"""Before an optimizer step: gradients that are not finite, spikes, and what is left out."""

import json

import pytest
import torch

from trsd.guards import LEAST_STEPS, WINDOW, NonFiniteError, StepGuard


def parameters(*gradients):
    made = [torch.nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return made


def admitted(guard, step, *, norm=0.5, loss=0.5):
    return guard.admit(parameters([norm]), step=step, loss=loss)


def settled(**options):
    """A guard that has seen enough steps to know a spike."""
    guard = StepGuard(1.0, **options)
    for step in range(LEAST_STEPS):
        assert not admitted(guard, step).is_spike
    return guard


def test_gradients_are_scaled_to_the_norm_and_the_old_one_returned():
    made = parameters([3.0, 0.0], [4.0])
    assert StepGuard(1.0).admit(made, step=1, loss=0.5).norm == pytest.approx(5.0)
    assert torch.cat([p.grad for p in made]).norm() == pytest.approx(1.0, rel=1e-5)


def test_a_small_norm_is_left_alone():
    made = parameters([0.3, 0.4])
    StepGuard(1.0).admit(made, step=1, loss=0.5)
    assert torch.equal(made[0].grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_11_a_norm_that_is_not_finite_raises_before_anything_is_scaled(bad):
    made = parameters([3.0, bad], [4.0])
    with pytest.raises(NonFiniteError, match="step 7"):
        StepGuard(1.0).admit(made, step=7, loss=0.5)
    assert made[1].grad.item() == 4.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_raises(loss):
    with pytest.raises(NonFiniteError, match="loss"):
        StepGuard(1.0).admit(parameters([1.0]), step=1, loss=loss)


@pytest.mark.parametrize("what", [dict(norm=5.1), dict(loss=5.1)])
def test_fault_12_a_spike_is_counted_and_passes(what):
    guard = settled()
    assert not admitted(guard, 50, norm=4.9, loss=4.9).is_spike
    verdict = admitted(guard, 51, **what)
    assert (verdict.is_spike, verdict.is_skipped, guard.num_spikes) == (True, False, 1)


def test_fault_12_a_spike_is_left_out_where_the_recipe_says_so():
    guard = settled(max_skipped_steps=1)
    verdict = admitted(guard, 50, norm=100.0)
    assert verdict.is_spike and verdict.is_skipped and guard.num_skipped == 1
    assert not admitted(guard, 51).is_skipped  # and the next one begins a new count
    assert admitted(guard, 52, norm=float("nan")).is_skipped
    with pytest.raises(NonFiniteError, match="after 1 steps that were left out"):
        admitted(guard, 53, norm=float("nan"))


def test_a_rise_that_lasts_is_no_spike_for_ever():
    guard = settled()
    spikes = [admitted(guard, step, norm=6.0).is_spike for step in range(WINDOW)]
    assert spikes[0] and not spikes[-1]


def test_losses_of_zero_have_no_spikes():
    guard = StepGuard(1.0)
    for step in range(LEAST_STEPS):
        admitted(guard, step, loss=0.0)
    assert not admitted(guard, 50, loss=1e-6).is_spike


def test_a_restored_guard_decides_as_the_one_that_was_stored():
    guard = settled(max_skipped_steps=2)
    admitted(guard, 20, norm=100.0)
    other = StepGuard(1.0, max_skipped_steps=2)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    for one in (guard, other):
        assert admitted(one, 21, norm=float("nan")).is_skipped
        with pytest.raises(NonFiniteError):
            admitted(one, 22, norm=100.0)
