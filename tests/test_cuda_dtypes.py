"""What a GPU does with half precision, imitated on the CPU: products of half-precision operands with fp32 results, and
gradients of the logits rounded to the dtype of the operands. Rows are passed by torch, in the interpreter by Triton."""

import pytest
import torch
from distillation_cases import (
    BF16_BOUND,
    DIVERGENCES,
    INTERPRETED,
    NUM_TOKENS,
    REGIMES,
    exact_loss,
    gradient_errors,
    make_case,
    relative_error,
)

from trsd_kernels import (
    distill_from_top_k,
    distill_from_vectors,
    fused_linear_distillation,
    linear_ops,
    products,
    target_plans,
    teacher_targets,
    teacher_vectors,
    token_plan,
    top_k_targets,
    vocab_plan,
)

PLANS = ("tokens", "vocab")
ROWS = NUM_TOKENS if INTERPRETED else 64
CHUNK = {"tokens": 7, "vocab": 70} if INTERPRETED else {"tokens": 30, "vocab": 30}


def operand_dtype(hidden_states, weight, autocast_dtype):
    dtypes = {hidden_states.dtype, weight.dtype}
    if torch.float64 in dtypes:
        return torch.float64
    return autocast_dtype or (hidden_states.dtype if len(dtypes) == 1 else torch.float32)


def fp32_product(left, right):
    return left.float() @ right.float() if left.dtype in products.HALF else left @ right


@pytest.fixture(autouse=True)
def gpu_products(monkeypatch):
    replaced = dict(
        product_dtype=operand_dtype,
        product=fp32_product,
        add_product_=lambda total, left, right: total.add_(fp32_product(left, right)),
    )
    for module in (products, token_plan, vocab_plan, target_plans, teacher_targets, linear_ops):
        for name, function in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_rounded_before_the_products_stay_within_the_bound(divergence, regime, plan, dtype):
    case = make_case(ROWS, 127, 32, dtype=dtype, regime=regime, bias=True, ignored=[0])
    exact = case.double()
    exact_loss(exact, divergence=divergence).backward()
    fused_linear_distillation(
        **case.tensors(), divergence=divergence, plan=plan, chunk_size=CHUNK[plan]
    ).loss.backward()
    for name, error in gradient_errors(case, exact).items():
        assert error <= BF16_BOUND, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_supervised_gives_zero(plan, dtype):
    case = make_case(dtype=dtype, ignored=range(NUM_TOKENS))
    out = fused_linear_distillation(**case.tensors(), plan=plan)
    out.loss.backward()
    assert out.loss == 0 and all((tensor.grad == 0).all() for tensor in case.trained().values())


@pytest.mark.parametrize("plan", PLANS)
def test_fp16_gradients_neither_overflow_nor_vanish(plan):
    case = make_case(ROWS, 127, 32, dtype=torch.float16)
    options = dict(alpha=1.0, temperature=0.1, temperature_squared=False, divergence="forward_kl")
    exact = case.double()
    exact_loss(exact, num_items=1e6, **options).backward()
    out = fused_linear_distillation(**case.tensors(), num_items_in_batch=1e6, plan=plan, **options)
    (out.loss * 2.0**16).backward()
    for name, tensor in case.trained().items():
        wanted = getattr(exact, name).grad * 2.0**16
        assert relative_error(tensor.grad, wanted) <= BF16_BOUND, name


def certain_case(dtype, strength=4.0):
    """Both models nearly certain of the label."""
    case = make_case(ROWS, 61, 16, dtype=dtype, trained=["student_hidden_states"])
    with torch.no_grad():
        case.student_hidden_states.copy_(case.student_lm_head_weight[case.labels] * strength)
        case.teacher_hidden_states.copy_(case.teacher_lm_head_weight[case.labels] * strength)
    return case


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("certain", [False, True])
def test_top_k_rounds_each_logit_gradient_once(alpha, k, certain):
    case = certain_case(torch.bfloat16) if certain else make_case(ROWS, 61, 16, dtype=torch.bfloat16)
    exact = case.double()
    grads = []
    for each in (case, exact):
        targets = top_k_targets(each.teacher_hidden_states, each.teacher_lm_head_weight, k)
        hidden = each.student_hidden_states.detach().requires_grad_()
        distill_from_top_k(
            hidden, each.student_lm_head_weight.detach(), targets, each.labels, alpha=alpha
        ).loss.backward()
        grads.append(hidden.grad)
    assert relative_error(*grads) <= BF16_BOUND


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_keep_what_nearly_cancels(dtype, regime):
    case = make_case(ROWS, 127, 32, dtype=dtype, regime=regime, trained=["student_hidden_states"])
    exact = case.double()
    exact_loss(exact, alpha=1.0).backward()
    targets = teacher_vectors(case.teacher_hidden_states, case.teacher_lm_head_weight, case.student_lm_head_weight)
    distill_from_vectors(
        case.student_hidden_states, case.student_lm_head_weight, targets, case.labels, alpha=1.0
    ).loss.backward()
    assert gradient_errors(case, exact)["student_hidden_states"] <= BF16_BOUND


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("factor", [257 / 256, 1 / 3, 1e-6])
def test_the_upstream_factor_is_not_rounded(plan, factor):
    case = make_case(ROWS, 127, 32, dtype=torch.bfloat16)
    exact = case.double()
    (exact_loss(exact) * factor).backward()
    (fused_linear_distillation(**case.tensors(), plan=plan).loss * factor).backward()
    for name, tensor in case.trained().items():
        assert relative_error(tensor.grad, getattr(exact, name).grad) <= BF16_BOUND, name
