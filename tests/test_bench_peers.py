"""That every contender of the loss benchmark computes the same, and that one which does not, or cannot, is not timed.

Peers written in Triton run where ``test_interpreted.py`` starts this file in the interpreter. QuACK's kernels need a
GPU, where the suite makes the same check before it times anything.
"""

from dataclasses import replace

import pytest
import torch
from distillation_cases import INTERPRETED, not_interpreted, relative_error

from bench import contenders as c
from bench import test_bench_linear_distill as suite
from bench.correctness import worst_error
from bench.measure import NotMeasured
from bench.shapes import CE, CE_JSD, CE_KL, GPU_SHAPES, JSD, KL, REGIMES, Loss, Shape, draw

if INTERPRETED:
    import triton
    from triton import language as tl

    @triton.jit
    def log1p(x):
        """CCE's is libdevice's, which the interpreter does not have."""
        return tl.log(1.0 + x)


SHAPE = Shape(9, 37, 8, 12)
IN_TORCH = (
    *((contender, loss) for contender in (c.VOCAB, c.EAGER) for loss in (CE_KL, CE_JSD, KL, CE)),
    *((c.LIGER_CHUNKED, loss) for loss in (CE_KL, CE_JSD, KL)),
    *((c.TRL, loss) for loss in (KL, JSD)),
)
IN_TRITON = (
    *((contender, loss) for contender in (c.LIGER_FUSED, c.LIGER_FUSED_FP32) for loss in (KL, JSD)),
    *((contender, KL) for contender in (c.FLA, c.FLA_ROUNDED)),
    *((contender, CE) for contender in (c.LIGER_CE, c.LIGER_CE_FP32)),
)
HERE = (*IN_TORCH, *(IN_TRITON if INTERPRETED else ()))
KNOW_LABELS = ((c.LIGER_CHUNKED, CE_KL), (c.LIGER_FUSED, KL), (c.LIGER_CE, CE), (c.EAGER, CE))
by_name = dict(ids=lambda value: getattr(value, "name", str(value)))


def prepare(contender, inputs, loss):
    try:
        return contender.step(inputs, loss)
    except ImportError as error:
        pytest.skip(f"pip install {contender.install} ({error})")


def loss_and_gradients(contender, loss, *, head_is_trained=True, ignore=slice(0), dtype=torch.float32):
    inputs = draw(SHAPE, device="cpu", dtype=dtype, head_is_trained=head_is_trained)
    inputs.labels[ignore] = -100
    value = prepare(contender, inputs, loss)()
    value.backward()
    return [value, *(tensor.grad for tensor in inputs.trained().values())]


def assert_same_as_ours(contender, loss, **how):
    for got, wanted in zip(loss_and_gradients(contender, loss, **how), ours(loss, **how), strict=True):
        assert relative_error(got, wanted) < 1e-5


def ours(loss, **how):
    return [value.detach().double() for value in loss_and_gradients(c.TOKENS, loss, **how)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("contender,loss", HERE, **by_name)
def test_every_contender_computes_the_same_loss(contender, loss, temperature):
    assert_same_as_ours(contender, loss._replace(temperature=temperature))


@pytest.mark.parametrize("contender,loss", HERE, **by_name)
def test_every_contender_computes_the_same_with_a_frozen_head(contender, loss):
    assert_same_as_ours(contender, loss, head_is_trained=False)


@pytest.mark.parametrize("contender,loss", [case for case in KNOW_LABELS if case in HERE], **by_name)
def test_whoever_takes_labels_leaves_out_the_rows_that_ours_does(contender, loss):
    assert_same_as_ours(contender, loss, ignore=slice(None, None, 4))


@pytest.mark.skipif(not INTERPRETED, reason="kernels in Triton, and no GPU")
@pytest.mark.parametrize("ignore", [slice(0), slice(None, None, 4)], ids=["all labels", "some labels"])
def test_cce_computes_the_same_loss_in_half_precision(monkeypatch, ignore):
    cce = pytest.importorskip("cut_cross_entropy.cce", reason=f"pip install {c.CCE.install}")
    monkeypatch.setattr("cut_cross_entropy.tl_utils.tl_log1p", log1p)
    monkeypatch.setattr(cce, "sort_logit_avg", lambda logits: logits.argsort().int())  # compiled for many seconds
    got = loss_and_gradients(c.CCE, CE, ignore=ignore, dtype=torch.float16)
    for value, wanted in zip(got, ours(CE, ignore=ignore, dtype=torch.float16), strict=True):
        assert relative_error(value, wanted) < 1e-3


@pytest.mark.parametrize("loss", [CE_KL, KL], **by_name)
def test_cached_vectors_compute_the_same_loss(loss):
    assert_same_as_ours(c.VECTORS, loss, head_is_trained=False)


@not_interpreted
@pytest.mark.parametrize("loss", [CE_KL, CE], **by_name)
def test_the_bare_products_run_with_and_without_a_trained_head(loss):
    for head_is_trained in (True, False):
        inputs = draw(SHAPE, device="cpu", dtype=torch.float32, head_is_trained=head_is_trained)
        assert c.BARE_GEMMS.step(inputs, loss)() is None
        assert len(inputs.trained()) == 1 + head_is_trained


@not_interpreted
@pytest.mark.parametrize("contender", [c.TOKENS, c.VOCAB, c.EAGER], **by_name)
def test_cross_entropy_alone_asks_for_no_teacher(contender):
    inputs = draw(SHAPE, device="cpu", dtype=torch.float32)
    inputs = replace(inputs, teacher_hidden_states=None, teacher_lm_head_weight=None)
    assert contender.step(inputs, CE)().isfinite()


@not_interpreted
@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_are_drawn_alike_in_every_dtype(regime):
    exact = draw(SHAPE, device="cpu", dtype=torch.float32, regime=regime, bias=True)
    rounded = draw(SHAPE, device="cpu", dtype=torch.bfloat16, regime=regime, bias=True)
    for name, tensor in vars(exact.to(torch.bfloat16)).items():
        assert torch.equal(tensor, getattr(rounded, name)), name
    assert set(exact.trained()) == {"student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"}


SHORT = Loss("ce+jsd", 0.5, "jsd")


@not_interpreted
@pytest.mark.parametrize("loss", [SHORT, CE], **by_name)
@pytest.mark.parametrize("contender", [c.TOKENS, c.VOCAB, c.EAGER], **by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_are_checked_against_float64(contender, loss, dtype):
    error = worst_error(contender, loss, device="cpu", dtype=dtype, head_is_trained=True)
    assert 0 < error < (1e-5 if dtype == torch.float32 else 1e-2)


@not_interpreted
@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda inputs, loss: c.EAGER.step(inputs, loss._replace(temperature=1.0)), "temperature 2"),
        (lambda inputs, loss: lambda: c.EAGER.step(inputs, loss)() * loss.temperature, "refused, loss"),
        (lambda inputs, loss: c.EAGER.step(inputs, loss._replace(divergence="forward_kl")), "refused, loss"),
        (lambda inputs, loss: lambda: c.EAGER.step(inputs.to(torch.float32), loss)(), "no gradient"),
    ],
    ids=["no temperature", "another factor", "another divergence", "no gradient"],
)
def test_what_computes_something_else_is_refused_before_it_is_timed(wrong, said):
    with pytest.raises(NotMeasured, match=said):
        worst_error(c.Contender("wrong", wrong), SHORT, device="cpu", dtype=torch.float32, head_is_trained=True)


@not_interpreted
def test_what_needs_a_gpu_is_refused_without_one_before_it_computes_and_what_is_missing_before_that():
    how = dict(device="cpu", dtype=torch.float32, head_is_trained=True)
    with pytest.raises(NotMeasured, match="needs a GPU"):
        worst_error(c.Contender("a kernel", lambda inputs, loss: pytest.fail, needs_gpu=True), CE, **how)

    def missing(inputs, loss):
        raise ImportError("nothing here")

    with pytest.raises(ImportError, match="nothing here"):
        worst_error(c.Contender("not there", missing, needs_gpu=True), CE, **how)


def needed(case):
    return any(target.needs(case) for target in suite.targets())


@not_interpreted
@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_peer_is_listed_and_what_the_targets_compare_comes_first(monkeypatch, on_gpu):
    monkeypatch.setattr(suite, "ON_GPU", on_gpu)
    cases = suite.all_cases()
    peers = {contender.name for contender in vars(c).values() if isinstance(contender, c.Contender)}
    listed = {case.contender.name for case in cases}
    assert peers - listed == (set() if on_gpu else {c.SMALL_VOCAB.name})
    assert [needed(case) for case in cases] == sorted(map(needed, cases), reverse=True)
    groups = {}
    for case in cases:
        groups.setdefault(case[:3], []).append(case.contender)
    assert {members[0] for members in groups.values()} == {c.TOKENS}  # whose loss the others' are held against
    assert len(groups) == len(suite.GROUPS) * (len(GPU_SHAPES) if on_gpu else 1)


@not_interpreted
@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_target_finds_its_lines(monkeypatch, on_gpu):
    monkeypatch.setattr(suite, "ON_GPU", on_gpu)
    for target in suite.targets():
        found = {case.contender for case in suite.all_cases() if target.needs(case)}
        assert found == {target.ours, *target.others}
