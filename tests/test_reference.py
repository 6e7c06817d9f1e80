"""The oracle itself, against sums written out in numpy float64."""

import math

import numpy as np
import pytest
import torch

from trsd_kernels.reference import distillation_rows, jensen_shannon, kl_divergence


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def direct_divergence(student, teacher, name, beta, temperature):
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    if name == "forward_kl":
        return (p * np.log(p / q)).sum(-1)
    if name == "reverse_kl":
        return (q * np.log(q / p)).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_distillation_rows_equal_the_written_out_sums(name, temperature, scale):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 37)) * scale
    labels = rng.integers(0, 37, 5)
    rows = distillation_rows(
        torch.tensor(student),
        torch.tensor(teacher),
        torch.tensor(labels),
        alpha=0.5,
        divergence=name,
        beta=0.3,
        temperature=temperature,
    )
    np.testing.assert_allclose(rows.divergence, direct_divergence(student, teacher, name, 0.3, temperature), rtol=1e-9)
    np.testing.assert_allclose(
        rows.cross_entropy, -np.log(softmax(student)[np.arange(5), labels]), rtol=1e-9, atol=1e-12
    )


def test_jsd_at_its_ends_is_forward_and_reverse_kl():
    log_p, log_q = torch.randn(2, 4, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(log_p, log_q, 0.0), kl_divergence(log_p, log_q))
    torch.testing.assert_close(jensen_shannon(log_p, log_q, 1.0), kl_divergence(log_q, log_p))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_is_zero_with_zero_gradient_when_both_agree(name):
    logits = torch.randn(3, 11, dtype=torch.float64)
    student = logits.clone().requires_grad_()
    rows = distillation_rows(
        student, logits, torch.zeros(3, dtype=torch.int64), alpha=1.0, divergence=name, beta=0.5, temperature=2.0
    )
    rows.divergence.sum().backward()
    assert rows.divergence.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_impossible_tokens_of_both_models_count_nothing(name):
    student, teacher = torch.randn(2, 3, 6, dtype=torch.float64)
    cut = torch.full((3, 2), -math.inf, dtype=torch.float64)
    wide = torch.cat([student, cut], 1).requires_grad_()
    options = dict(alpha=1.0, divergence=name, beta=0.5, temperature=1.0)
    labels = torch.zeros(3, dtype=torch.int64)
    with_inf = distillation_rows(wide, torch.cat([teacher, cut], 1), labels, **options).divergence
    with_inf.sum().backward()
    torch.testing.assert_close(with_inf, distillation_rows(student, teacher, labels, **options).divergence)
    assert wide.grad.isfinite().all()
    assert (wide.grad[:, 6:] == 0).all()


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.randn(4, 50, dtype=torch.bfloat16)
    labels = torch.zeros(4, dtype=torch.int64)
    options = dict(alpha=0.5, divergence="forward_kl", beta=0.5, temperature=1.0)
    rows = distillation_rows(logits, logits.flip(0), labels, **options)
    exact = distillation_rows(logits.double(), logits.flip(0).double(), labels, **options)
    assert rows.divergence.dtype == torch.float32
    torch.testing.assert_close(rows.divergence.double(), exact.divergence, rtol=1e-5, atol=1e-7)


def test_unknown_divergence_names_the_known_ones():
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="forward_kl"):
        distillation_rows(x, x, torch.tensor([0]), alpha=1.0, divergence="hellinger", beta=0.5, temperature=1.0)
