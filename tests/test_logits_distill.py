"""The loss on logits that already exist: against float64, with every upstream gradient, in place, and its errors."""

import importlib.util

import pytest
import torch
from distillation_cases import (
    DIVERGENCES,
    IGNORE,
    REGIMES,
    exact_token_losses,
    make_case,
    not_interpreted,
    relative_error,
    whole_logits,
)

from trsd_kernels import fused_distillation

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request):
    return request.param


def make_logits(regime="random", dtype=torch.float32, device="cpu", ignored=(3,), vocab=61):
    case = make_case(vocab=vocab, regime=regime, ignored=ignored)
    student, teacher = (logits.detach().to(dtype).to(device) for logits in whole_logits(case))
    return student.requires_grad_(), teacher, case.labels.to(device)


def exact_gradient(student, teacher, labels, upstream, **options):
    exact = student.detach().cpu().double().requires_grad_()
    losses = exact_token_losses(exact, teacher.cpu().double(), labels.cpu(), **options)
    losses.backward(upstream.cpu().double())
    return losses.detach(), exact.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_and_gradients_stay_within_the_bound(device, divergence, regime, dtype, inplace):
    student, teacher, labels = make_logits(regime, dtype, device)
    upstream = torch.linspace(-1, 2, len(labels), device=device)
    options = dict(divergence=divergence, temperature=1.5, student_logit_softcap=20.0, teacher_logit_scale=0.9)
    losses, gradient = exact_gradient(student, teacher, labels, upstream, **options)
    logits = student.clone()
    out = fused_distillation(logits, teacher, labels, reduction="none", inplace_backward=inplace, **options)
    torch.testing.assert_close(out.loss.detach().cpu().double(), losses, rtol=1e-5, atol=1e-5)
    out.loss.backward(upstream)
    assert student.grad.dtype == dtype
    assert (student.grad[3] == 0).all()
    assert relative_error(student.grad, gradient) <= BOUND[dtype]
    assert torch.equal(logits, student.grad if inplace else student)


@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 5000])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_rows_that_are_views_of_wider_ones(device, vocab, divergence):
    student, teacher, labels = make_logits(vocab=vocab)
    wide = torch.full((len(labels), vocab + 7), torch.nan)
    wide[:, :vocab] = student.detach()
    wide = wide.to(device)
    view = wide[:, :vocab].requires_grad_()
    upstream = torch.ones(len(labels))
    losses, gradient = exact_gradient(student, teacher, labels, upstream, divergence=divergence)
    columns = torch.stack([teacher, teacher], -1)[..., 0].to(device)  # no unit stride
    out = fused_distillation(view, columns, labels.to(device), reduction="sum", divergence=divergence)
    out.loss.backward()
    assert abs(out.loss.item() - losses.sum().item()) <= 1e-5 * max(1.0, losses.sum().item())
    assert (view.grad.cpu().double() - gradient).norm() <= 1e-5 * max(gradient.norm().item(), 0.1)  # one token: 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_and_weightless_rows_are_inert_even_when_they_are_nan(device, divergence):
    student, teacher, labels = make_logits(device=device)
    weights = torch.ones(len(labels), device=device)
    weights[5] = 0
    options = dict(token_weights=weights, divergence=divergence)
    clean = fused_distillation(student, teacher, labels, **options)
    clean.loss.backward()
    expected, student.grad = student.grad, None
    with torch.no_grad():
        student[[3, 5]] = torch.nan
        teacher[[3, 5]] = torch.nan
    out = fused_distillation(student, teacher, labels, **options)
    out.loss.backward()
    assert out.loss == clean.loss
    assert torch.equal(student.grad, expected)


def test_teacher_of_another_dtype(device):
    student, teacher, labels = make_logits(device=device)
    half = fused_distillation(student, teacher.half(), labels).loss
    torch.testing.assert_close(half, fused_distillation(student, teacher.half().float(), labels).loss)


def test_in_place_gradient_is_refused_where_the_logits_are_needed_again():
    student, teacher, labels = make_logits()
    logits = torch.tanh(student)  # tanh keeps its result for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused_distillation(logits, teacher, labels, inplace_backward=True).loss.backward()
    hidden, weight = torch.randn(len(labels), 4, requires_grad=True), torch.randn(61, 4, requires_grad=True)
    losses = []
    for inplace in (False, True):
        hidden.grad = None
        fused_distillation(hidden @ weight.T, teacher, labels, inplace_backward=inplace).loss.backward()
        losses.append(hidden.grad)
    torch.testing.assert_close(*losses)


@not_interpreted
def test_compiles_whole_with_the_same_numbers(device):
    student, teacher, labels = make_logits(device=device)
    compiled = torch.compile(fused_distillation, fullgraph=True)
    out = compiled(student, teacher, labels, divergence="jsd", temperature=2.0)
    out.loss.backward()
    got, student.grad = student.grad, None
    expected = fused_distillation(student, teacher, labels, divergence="jsd", temperature=2.0)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(got, student.grad)
    labels = labels.clone()
    labels[0] = 61
    assert compiled(student, teacher, labels, divergence="jsd", temperature=2.0).loss.isnan()


@not_interpreted
def test_the_ops_pass_torchs_own_checks():
    student, teacher, labels = make_logits(dtype=torch.float64)
    from trsd_kernels import DistillOptions

    options = DistillOptions(divergence="jsd").encode()
    torch.library.opcheck(torch.ops.trsd.distill_logits.default, (student, teacher, labels, options, False))


@not_interpreted
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
def test_logits_that_a_graph_makes_itself_have_the_gradients_of_eager_ones(divergence):
    """Scaled in fp32, for a compiler does not round to bf16 between two operations; written over in place."""
    student, teacher, labels = make_logits(dtype=torch.bfloat16, device="cuda", vocab=4096)
    options = dict(divergence=divergence, temperature=2.0, student_logit_softcap=20.0, inplace_backward=True)

    def loss(student, teacher):
        return fused_distillation(student.float() * 1.5, teacher.float() * 1.5, labels, **options).loss

    grads = []
    for call in (torch.compile(loss, fullgraph=True), loss):
        call(student, teacher).backward()
        grads, student.grad = [*grads, student.grad], None
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_gradient_that_is_wider_than_the_logits_is_never_written_over_them():
    from trsd_kernels import DistillOptions
    from trsd_kernels.triton_rows import TritonRows

    student, teacher, labels = make_logits(dtype=torch.bfloat16)
    rows = TritonRows(DistillOptions(), student.detach(), teacher, labels)
    with pytest.raises(RuntimeError, match="does not fit into the bytes of torch.bfloat16 logits"):
        rows.gradient(torch.zeros(16, len(labels)), torch.zeros(2, len(labels)), torch.float32)


def test_double_backward_is_refused():
    student, teacher, labels = make_logits()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused_distillation(student, teacher, labels).loss, student, create_graph=True)


def test_alpha_zero_needs_no_teacher(device):
    student, _, labels = make_logits(device=device)
    out = fused_distillation(student, None, labels, alpha=0.0)
    expected = torch.nn.functional.cross_entropy(student, labels, ignore_index=IGNORE)
    torch.testing.assert_close(out.loss, expected)


@not_interpreted
@pytest.mark.parametrize(
    "change,message",
    [
        (dict(teacher_logits=torch.zeros(2, 4)), "same vocabulary"),
        (dict(teacher_logits=None), "teacher_logits are needed"),
        (dict(student_logits=torch.zeros(2, 3, 4)), "flatten"),
        (dict(student_logits=torch.zeros(5, 7, dtype=torch.int32)), "floating"),
        (dict(labels=torch.full((5,), 7)), r"labels\[0\] = 7 is outside \[0, 7\)"),
        (dict(labels=torch.zeros(4, dtype=torch.int64)), "one per hidden state"),
        (dict(token_weights=torch.ones(4)), "token_weights"),
        (dict(reduction="batchmean"), "mean, sum, none"),
        (dict(reduction="none", num_items_in_batch=2), "num_items_in_batch"),
        (dict(labels=torch.zeros(5, dtype=torch.int64, device="meta")), "one device"),
    ],
)
def test_wrong_input_raises_a_value_error_that_says_what_to_do(change, message):
    inputs = dict(
        student_logits=torch.randn(5, 7), teacher_logits=torch.randn(5, 7), labels=torch.zeros(5, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=message):
        fused_distillation(**inputs | change)
