"""The chunked loss against the whole logits in float64, its properties, its memory and its errors."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trsd_kernels import FusedLinearDistillation, fused_linear_distillation
from trsd_kernels.reference import distillation_rows

IGNORE = -100


def make_inputs(num_tokens=23, vocab=61, hidden=16, teacher_hidden=24, *, dtype=torch.float64, regime="random", seed=0):
    """Inputs of one of the three regimes: random teacher, teacher near the student, saturated distributions."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_h, student_w = randn(num_tokens, hidden), randn(vocab, hidden) * 0.5
    teacher_h, teacher_w = randn(num_tokens, teacher_hidden), randn(vocab, teacher_hidden) * 0.5
    if regime == "near":
        # Logits about 0.1 apart: rounding them to bf16 would put the gradient of the KL off by some percent.
        teacher_h = torch.cat([student_h, randn(num_tokens, teacher_hidden - hidden) * 0.2], 1)
        teacher_w = torch.cat([student_w, randn(vocab, teacher_hidden - hidden) * 0.2], 1)
    if regime == "saturated":
        student_h, teacher_h = student_h * 4, teacher_h * 4
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    tensors = [t.to(dtype) for t in (student_h, student_w, teacher_h, teacher_w)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3], labels]


def whole_logits_loss(student_h, student_w, teacher_h, teacher_w, labels, *, weights=None, num_items=None, **options):
    """Equation (1) on whole float64 logits, with autograd."""
    kept = labels != IGNORE
    alpha, temperature = options.get("alpha", 0.5), options.get("temperature", 1.0)
    rows = distillation_rows(
        (student_h @ student_w.T)[kept],
        (teacher_h @ teacher_w.T)[kept],
        labels[kept],
        alpha=alpha,
        divergence=options.get("divergence", "forward_kl"),
        beta=options.get("beta", 0.5),
        temperature=temperature,
    )
    weights = torch.ones(len(labels), dtype=torch.float64)[kept] if weights is None else weights[kept].double()
    num_items = weights.sum() if num_items is None else num_items
    return (weights * ((1 - alpha) * rows.cross_entropy + alpha * temperature**2 * rows.divergence)).sum() / num_items


def as_double(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in inputs[:4]] + inputs[4:]


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("regime", ["random", "near", "saturated"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("alpha,temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_fp32_loss_and_gradients_stay_within_1e5_of_float64(regime, divergence, alpha, temperature):
    options = dict(divergence=divergence, alpha=alpha, temperature=temperature, beta=0.3)
    inputs = make_inputs(dtype=torch.float32, regime=regime)
    inputs[4][5] = IGNORE
    exact_inputs = as_double(inputs)
    exact = whole_logits_loss(*exact_inputs, **options)
    exact.backward()
    out = fused_linear_distillation(*inputs, chunk_size=7, **options)
    out.loss.backward()
    # The value of a small KL is a difference of numbers near 1, so it is judged against those.
    assert abs(out.loss.item() - exact.item()) <= 1e-5 * max(1.0, abs(exact.item()))
    assert relative_error(inputs[0].grad, exact_inputs[0].grad) <= 1e-5
    assert relative_error(inputs[1].grad, exact_inputs[1].grad) <= 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_bf16_inputs_lose_only_the_last_rounding(divergence):
    inputs = make_inputs(dtype=torch.bfloat16, regime="near")
    exact_inputs = as_double(inputs)
    whole_logits_loss(*exact_inputs, divergence=divergence).backward()
    fused_linear_distillation(*inputs, divergence=divergence, chunk_size=5).loss.backward()
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.bfloat16
    assert relative_error(inputs[0].grad, exact_inputs[0].grad) <= 4e-3
    assert relative_error(inputs[1].grad, exact_inputs[1].grad) <= 4e-3


@pytest.mark.parametrize("num_tokens,vocab,chunk", list(itertools.product([1, 3, 57], [1, 2, 127], [1, 4, None])))
def test_float64_equals_whole_logits_for_odd_sizes(num_tokens, vocab, chunk):
    inputs = make_inputs(num_tokens, vocab, 5, 3)
    weights = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) + 0.1
    exact_inputs = as_double(inputs)
    exact = whole_logits_loss(*exact_inputs, weights=weights, num_items=2.5)
    exact.backward()
    out = fused_linear_distillation(*inputs, token_weights=weights, num_items_in_batch=2.5, chunk_size=chunk)
    (3 * out.loss).backward()
    torch.testing.assert_close(out.loss, exact)
    torch.testing.assert_close(inputs[0].grad, 3 * exact_inputs[0].grad)
    torch.testing.assert_close(inputs[1].grad, 3 * exact_inputs[1].grad)


def test_gradcheck_by_finite_differences():
    inputs = make_inputs(6, 9, 4, 3)
    inputs[4][2] = IGNORE

    def loss(student_h, student_w):
        return fused_linear_distillation(student_h, student_w, *inputs[2:], temperature=1.7, chunk_size=4).loss

    assert torch.autograd.gradcheck(loss, inputs[:2])


def test_alpha_zero_equals_cross_entropy_and_needs_no_teacher():
    student_h, student_w, _, _, labels = make_inputs()
    labels[:4] = IGNORE
    out = fused_linear_distillation(student_h, student_w, None, None, labels, alpha=0.0)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(student_h @ student_w.T, labels))


def test_micro_batches_with_the_global_count_add_up():
    inputs = make_inputs(20)
    inputs[4][::3] = IGNORE
    whole = fused_linear_distillation(*inputs).loss
    count = (inputs[4] != IGNORE).sum()
    student_h, student_w, teacher_h, teacher_w, labels = inputs
    parts = [
        fused_linear_distillation(
            student_h[s], student_w, teacher_h[s], teacher_w, labels[s], num_items_in_batch=count
        ).loss
        for s in (slice(0, 3), slice(3, 14), slice(14, 20))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_ignored_and_weightless_rows_are_inert_even_when_they_are_nan():
    inputs = make_inputs()
    inputs[4][3] = IGNORE
    weights = torch.ones(23)
    weights[7] = 0
    clean = fused_linear_distillation(*inputs, token_weights=weights)
    with torch.no_grad():
        inputs[0][3] = inputs[2][3] = float("nan")
        inputs[0][7] = inputs[2][7] = float("nan")
    out = fused_linear_distillation(*inputs, token_weights=weights)
    out.loss.backward()
    assert out.loss == clean.loss
    assert (inputs[0].grad[[3, 7]] == 0).all() and inputs[1].grad.isfinite().all()


def test_all_ignored_gives_zero_loss_and_zero_gradients():
    inputs = make_inputs()
    inputs[4][:] = IGNORE
    out = fused_linear_distillation(*inputs)
    out.loss.backward()
    assert out.loss == 0 and out.num_items == 0
    assert (inputs[0].grad == 0).all() and (inputs[1].grad == 0).all()


def test_nan_in_a_supervised_row_shows_in_the_loss():
    inputs = make_inputs()
    with torch.no_grad():
        inputs[0][3, 2] = float("nan")
    assert fused_linear_distillation(*inputs).loss.isnan()


def test_zero_items_give_zero_even_with_weights():
    inputs = make_inputs()
    out = fused_linear_distillation(*inputs, num_items_in_batch=0)
    out.loss.backward()
    assert out.loss == 0 and (inputs[0].grad == 0).all()


def test_no_gradient_is_computed_when_none_is_wanted():
    inputs = make_inputs(96, 512, 4, 4)
    with torch.no_grad(), LargestTensor() as largest:
        out = fused_linear_distillation(*inputs, chunk_size=1)
    assert not out.loss.requires_grad
    assert largest.numel <= inputs[1].numel()


def test_frozen_head_gets_no_gradient():
    inputs = make_inputs()
    inputs[1].requires_grad_(False)
    fused_linear_distillation(*inputs).loss.backward()
    assert inputs[1].grad is None and inputs[0].grad is not None


def test_reported_terms_are_detached_and_make_up_the_loss():
    inputs = make_inputs()
    out = fused_linear_distillation(*inputs, alpha=0.25, temperature=2.0)
    assert not out.cross_entropy.requires_grad and not out.divergence.requires_grad
    torch.testing.assert_close(out.loss, 0.75 * out.cross_entropy + 0.25 * 4 * out.divergence)
    plain = fused_linear_distillation(*inputs, alpha=0.25, temperature=2.0, temperature_squared=False)
    torch.testing.assert_close(plain.loss, 0.75 * out.cross_entropy + 0.25 * out.divergence)


def test_temperature_squared_keeps_small_logits_flat_in_temperature():
    inputs = [t * 0.01 if t.is_floating_point() else t for t in make_inputs()]
    losses = [fused_linear_distillation(*inputs, alpha=1.0, temperature=t).loss.item() for t in (1.0, 2.0, 8.0)]
    assert max(losses) / min(losses) - 1 < 1e-3


def test_permuting_the_vocabulary_changes_nothing():
    student_h, student_w, teacher_h, teacher_w, labels = make_inputs()
    order = torch.randperm(61)
    permuted = fused_linear_distillation(
        student_h, student_w[order], teacher_h, teacher_w[order], order.argsort()[labels]
    )
    torch.testing.assert_close(
        permuted.loss, fused_linear_distillation(student_h, student_w, teacher_h, teacher_w, labels).loss
    )


def test_autocast_does_not_round_the_logits():
    inputs = make_inputs(dtype=torch.float32, regime="near")
    plain = fused_linear_distillation(*inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_linear_distillation(*inputs).loss == plain


def test_non_contiguous_inputs_give_the_same():
    inputs = make_inputs()
    strided = [t.T.contiguous().T for t in inputs[:4]] + [torch.stack([inputs[4]] * 2, 1)[:, 0]]
    torch.testing.assert_close(fused_linear_distillation(*strided).loss, fused_linear_distillation(*inputs).loss)


def test_module_is_the_function():
    inputs = make_inputs()
    module = FusedLinearDistillation(alpha=0.3, divergence="jsd", beta=0.7, temperature=1.5, chunk_size=3)
    expected = fused_linear_distillation(*inputs, alpha=0.3, divergence="jsd", beta=0.7, temperature=1.5)
    torch.testing.assert_close(module(*inputs).loss, expected.loss)
    assert "divergence='jsd'" in repr(module)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_whole_logits_tensor_ever_exists():
    num_tokens, vocab, chunk = 96, 512, 8
    inputs = make_inputs(num_tokens, vocab, 4, 4, dtype=torch.float32)
    with LargestTensor() as largest:
        fused_linear_distillation(*inputs, chunk_size=chunk).loss.backward()
    assert chunk * vocab <= largest.numel < num_tokens * vocab


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(labels=torch.full((23,), 61)), r"labels\[0\] = 61 is outside \[0, 61\)"),
        (dict(labels=torch.full((23,), -1)), "outside"),
        (dict(labels=torch.zeros(22, dtype=torch.int64)), "one per hidden state"),
        (dict(labels=torch.zeros(23, dtype=torch.int32)), "int64"),
        (dict(student_hidden_states=torch.randn(2, 3, 16)), "flatten"),
        (dict(student_hidden_states=torch.randn(23, 8)), "hidden size 8"),
        (dict(student_hidden_states=torch.zeros(23, 16, dtype=torch.int64)), "floating"),
        (dict(teacher_hidden_states=torch.randn(22, 24)), "22 tokens"),
        (dict(teacher_lm_head_weight=torch.randn(64, 24)), "teacher vocabulary 64"),
        (dict(teacher_lm_head_weight=None), "together"),
        (dict(teacher_hidden_states=None, teacher_lm_head_weight=None), "teacher tensors are needed"),
        (dict(token_weights=torch.ones(22)), "token_weights"),
        (dict(token_weights=torch.ones(23, dtype=torch.int64)), "floating"),
        (dict(labels=torch.zeros(23, dtype=torch.int64, device="meta")), "one device"),
        (dict(alpha=1.5), "alpha"),
        (dict(beta=-0.1), "beta"),
        (dict(temperature=0.0), "temperature"),
        (dict(divergence="kl"), "forward_kl"),
        (dict(chunk_size=0), "chunk_size"),
    ],
)
def test_wrong_input_raises_a_value_error_that_says_what_to_do(change, message):
    names = [
        "student_hidden_states",
        "student_lm_head_weight",
        "teacher_hidden_states",
        "teacher_lm_head_weight",
        "labels",
    ]
    inputs = dict(zip(names, make_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation(**inputs)
