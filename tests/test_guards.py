import pytest
import torch

from trsd.guards import NonFiniteError, clip_gradients


def parameters(*gradients):
    made = [torch.nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return made


def test_clip_scales_to_the_norm_and_returns_the_old_one():
    made = parameters([3.0, 0.0], [4.0])
    assert clip_gradients(made, 1.0, step=1, loss=0.5) == pytest.approx(5.0)
    assert torch.cat([p.grad for p in made]).norm() == pytest.approx(1.0, rel=1e-5)


def test_a_small_norm_is_left_alone():
    made = parameters([0.3, 0.4])
    clip_gradients(made, 1.0, step=1, loss=0.5)
    assert torch.equal(made[0].grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_before_anything_is_scaled(bad):
    made = parameters([3.0, bad], [4.0])
    with pytest.raises(NonFiniteError, match="step 7"):
        clip_gradients(made, 1.0, step=7, loss=0.5)
    assert made[1].grad.item() == 4.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_raises(loss):
    with pytest.raises(NonFiniteError, match="loss"):
        clip_gradients(parameters([1.0]), 1.0, step=1, loss=loss)
