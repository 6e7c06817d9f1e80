"""The benchmark's own parts: that every contender computes the same loss, and what is made of the figures."""

import pytest
import torch
from distillation_cases import INTERPRETED, relative_error

from bench import contenders as c
from bench.record import Line, results_path
from bench.shapes import CE_JSD, CE_KL, JSD, KL, REGIMES, Shape, draw

SHAPE = Shape(9, 37, 8, 12)
WITH_CROSS_ENTROPY = (c.VOCAB, c.EAGER, c.LIGER_CHUNKED)
WITHOUT = (c.TRL, *((c.LIGER_FUSED, c.LIGER_FUSED_FP32) if INTERPRETED or torch.cuda.is_available() else ()))


def loss_and_gradients(contender, loss, *, head_is_trained=True):
    inputs = draw(SHAPE, device="cpu", dtype=torch.float32, head_is_trained=head_is_trained)
    try:
        value = contender.step(inputs, loss)()
    except ImportError as error:
        pytest.skip(f"pip install {contender.install} ({error})")
    value.backward()
    return [value, *(tensor.grad for tensor in inputs.trained().values())]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "contender,loss",
    [(contender, loss) for contender in WITH_CROSS_ENTROPY for loss in (CE_KL, CE_JSD, KL)]
    + [(contender, loss) for contender in WITHOUT for loss in (KL, JSD)],
    ids=lambda value: value.name,
)
def test_every_contender_computes_the_same_loss(contender, loss, temperature):
    loss = loss._replace(temperature=temperature)
    for got, wanted in zip(loss_and_gradients(contender, loss), loss_and_gradients(c.TOKENS, loss), strict=True):
        assert relative_error(got, wanted.detach().double()) < 1e-5


@pytest.mark.parametrize("loss", [CE_KL, KL], ids=lambda loss: loss.name)
def test_cached_vectors_compute_the_same_loss(loss):
    cached = loss_and_gradients(c.VECTORS, loss, head_is_trained=False)
    for got, wanted in zip(cached, loss_and_gradients(c.TOKENS, loss, head_is_trained=False), strict=True):
        assert relative_error(got, wanted.detach().double()) < 1e-5


def test_the_bare_products_run_with_and_without_a_trained_head():
    for head_is_trained in (True, False):
        inputs = draw(SHAPE, device="cpu", dtype=torch.float32, head_is_trained=head_is_trained)
        assert c.BARE_GEMMS.step(inputs, CE_KL)() is None
        assert len(inputs.trained()) == 1 + head_is_trained


@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_are_drawn_alike_in_every_dtype(regime):
    exact = draw(SHAPE, device="cpu", dtype=torch.float32, regime=regime, bias=True)
    rounded = draw(SHAPE, device="cpu", dtype=torch.bfloat16, regime=regime, bias=True)
    for name, tensor in vars(exact.to(torch.bfloat16)).items():
        assert torch.equal(tensor, getattr(rounded, name)), name
    assert set(exact.trained()) == {"student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"}


def test_ratios_and_paths(monkeypatch, tmp_path):
    line = Line(
        *SHAPE,
        "float32",
        "kl",
        "trained",
        "somebody",
        milliseconds=3.0,
        bare_gemms_milliseconds=2.0,
        peak_bytes=10,
        bare_gemms_peak_bytes=5,
    )
    assert (line.time_ratio, line.memory_ratio) == (1.5, 2.0)
    assert Line(*SHAPE, "float32", "kl", "trained", "nobody", outcome="out of memory").time_ratio is None
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    assert (
        results_path("errors", "NVIDIA H200 (SXM)", "2026-01-02") == tmp_path / "errors-nvidia-h200-sxm-2026-01-02.json"
    )
