"""Both plans against the whole logits in float64, their properties, and their errors.

The same tests judge the Triton kernels: in the interpreter (started by ``test_interpreted.py``) and on a GPU.
"""

import itertools

import pytest
import torch
from distillation_cases import (
    BF16_BOUND,
    DIVERGENCES,
    FP32_BOUND,
    IGNORE,
    INTERPRETED,
    NUM_TOKENS,
    REGIMES,
    exact_loss,
    exact_token_losses,
    gradient_errors,
    make_case,
    not_interpreted,
    poisoned_memory,
    relative_error,
    whole_logits,
)

from trsd_kernels import fused_linear_distillation

PLANS = ("tokens", "vocab")
CHUNK = {"tokens": 7, "vocab": 24}
SIZES = [
    *itertools.product([1, 3] if INTERPRETED else [1, 3, 257], [1, 2, 127, 1000], [8]),
    (3, 1000, 4096),
    (2, 151936, 16),
    (33 if INTERPRETED else 257, 127, 129),
]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request):
    return request.param


def distill(case, **options):
    return fused_linear_distillation(**case.tensors(), **options)


def backward(case, **options):
    out = distill(case, **options)
    out.loss.sum().backward()
    return out


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha,temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_fp32_loss_and_gradients_stay_within_1e5_of_float64(device, plan, regime, divergence, alpha, temperature):
    options = dict(divergence=divergence, alpha=alpha, temperature=temperature, beta=0.3, skew=0.2)
    case = make_case(dtype=torch.float32, regime=regime, bias=True, ignored=[5, 9]).on(device)
    exact = case.double()
    expected = exact_loss(exact, **options)
    expected.backward()
    with poisoned_memory():
        out = backward(case, plan=plan, chunk_size=CHUNK[plan], **options)
    # The value of a small KL is a difference of numbers near 1, so it is judged against those.
    assert abs(out.loss.item() - expected.item()) <= 1e-5 * max(1.0, abs(expected.item()))
    for name, error in gradient_errors(case, exact).items():
        assert error <= FP32_BOUND, name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_only_the_last_rounding(device, plan, regime, divergence, dtype):
    case = make_case(dtype=dtype, regime=regime, bias=True, ignored=[0]).on(device)
    exact = case.double()
    exact_loss(exact, divergence=divergence).backward()
    with poisoned_memory():
        backward(case, divergence=divergence, plan=plan, chunk_size=CHUNK[plan])
    for name, error in gradient_errors(case, exact).items():
        assert getattr(case, name).grad.dtype == dtype
        assert error <= BF16_BOUND, name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("num_tokens,vocab,hidden", SIZES)
def test_odd_sizes_stay_within_the_bound(device, plan, num_tokens, vocab, hidden):
    case = make_case(num_tokens, vocab, hidden, dtype=torch.float32, bias=True).on(device)
    exact = case.double()
    expected = exact_loss(exact, divergence="jsd")
    expected.backward()
    with poisoned_memory():
        out = backward(case, divergence="jsd", plan=plan)
    assert abs(out.loss.item() - expected.item()) <= 1e-5 * max(1.0, abs(expected.item()))
    for name, error in gradient_errors(case, exact).items():
        if getattr(exact, name).grad.norm() > 0:  # a vocabulary of one token has nothing to learn
            assert error <= FP32_BOUND, name


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 10, None])
def test_float64_equals_whole_logits_with_weights_and_a_global_count(plan, divergence, chunk):
    case = make_case(9, 31, 5, bias=True, ignored=[4])
    weights = torch.rand(9, generator=torch.Generator().manual_seed(1)) + 0.1
    exact = case.double()
    expected = exact_loss(exact, weights=weights, num_items=2.5, divergence=divergence)
    expected.backward()
    out = distill(
        case, token_weights=weights, num_items_in_batch=2.5, chunk_size=chunk, plan=plan, divergence=divergence
    )
    (3 * out.loss).backward()
    torch.testing.assert_close(out.loss, expected)
    for name, tensor in case.trained().items():
        torch.testing.assert_close(tensor.grad, 3 * getattr(exact, name).grad, msg=name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softcap_and_scale_of_both_models(device, plan, divergence):
    options = dict(
        divergence=divergence,
        temperature=1.5,
        student_logit_scale=0.7,
        student_logit_softcap=3.0,
        teacher_logit_scale=1.3,
        teacher_logit_softcap=5.0,
    )
    case = make_case(dtype=torch.float32, bias=True).on(device)
    exact = case.double()
    expected = exact_loss(exact, **options)
    expected.backward()
    out = backward(case, plan=plan, chunk_size=CHUNK[plan], **options)
    assert abs(out.loss.item() - expected.item()) <= 1e-5
    for name, error in gradient_errors(case, exact).items():
        assert error <= FP32_BOUND, name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_tokens_impossible_for_a_model_are_left_out(device, plan, divergence, softcap):
    options = dict(divergence=divergence, student_logit_softcap=softcap, teacher_logit_softcap=softcap)
    case = make_case(dtype=torch.float32, bias=True)
    with torch.no_grad():
        case.student_lm_head_bias[40:] = -torch.inf  # both models: a padded vocabulary
        case.teacher_lm_head_bias[40:] = -torch.inf
        if divergence in ("forward_kl", "jsd", "skew_kl", "skew_reverse_kl"):
            case.teacher_lm_head_bias[7] = -torch.inf  # the teacher alone: finite where q ln(q / p) is not asked for
    case.labels %= 40
    case = case.on(device)
    exact = case.double()
    expected = exact_loss(exact, **options)
    expected.backward()
    out = backward(case, plan=plan, chunk_size=CHUNK[plan], **options)
    assert abs(out.loss.item() - expected.item()) <= 1e-5
    assert (case.student_lm_head_bias.grad[40:] == 0).all()
    for name, error in gradient_errors(case, exact).items():
        assert error <= FP32_BOUND, name


@pytest.mark.parametrize("divergence,impossible", [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_a_token_one_model_needs_and_the_other_forbids_gives_an_infinite_kl(divergence, impossible):
    case = make_case(dtype=torch.float32, bias=True)
    with torch.no_grad():
        getattr(case, f"{impossible}_lm_head_bias")[3] = -torch.inf
    case.labels[:] = 5
    assert distill(case, divergence=divergence).loss == torch.inf


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradcheck_by_finite_differences(plan, divergence):
    case = make_case(6, 9, 4, bias=True, ignored=[2])
    trained = case.trained()

    def loss(*values):
        tensors = case.tensors() | dict(zip(trained, values, strict=True))
        return fused_linear_distillation(
            **tensors, temperature=1.7, chunk_size=4, plan=plan, divergence=divergence, student_logit_softcap=4.0
        ).loss

    assert torch.autograd.gradcheck(loss, list(trained.values()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_token_losses_are_differentiable_one_by_one(device, divergence):
    case = make_case(dtype=torch.float32, ignored=[3]).on(device)
    exact = case.double()
    upstream = torch.linspace(-1, 2, NUM_TOKENS)
    expected = exact_token_losses(*whole_logits(exact), exact.labels, divergence=divergence)
    expected.backward(upstream.double())
    out = distill(case, divergence=divergence, reduction="none", chunk_size=24)
    out.loss.backward(upstream.to(device))
    assert out.loss[3] == 0
    torch.testing.assert_close(out.loss.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for name, error in gradient_errors(case, exact).items():
        assert error <= FP32_BOUND, name


@pytest.mark.parametrize("plan", PLANS)
def test_per_token_terms_are_what_whole_logits_say(device, plan):
    case = make_case(dtype=torch.float32, ignored=[3]).on(device)
    terms = distill(case, temperature=2.0, plan=plan, chunk_size=CHUNK[plan]).per_token
    student, teacher = (x.detach().cpu().double() for x in whole_logits(case))
    kept = (case.labels != IGNORE).cpu()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = dict(
        cross_entropy=torch.nn.functional.cross_entropy(student, case.labels.cpu(), reduction="none"),
        divergence=(p * (p / q).log()).sum(-1),
        student_entropy=-(q * q.log()).sum(-1),
        teacher_entropy=-(p * p.log()).sum(-1),
        top1_agreement=(student.argmax(-1) == teacher.argmax(-1)).double(),
    )
    for name, value in terms._asdict().items():
        assert not value.requires_grad
        torch.testing.assert_close(value.cpu().double(), expected[name] * kept, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("plan", PLANS)
def test_alpha_zero_equals_cross_entropy_and_needs_no_teacher(device, plan):
    case = make_case(dtype=torch.float32, ignored=range(4)).on(device)
    exact = case.double()
    expected = torch.nn.functional.cross_entropy(whole_logits(exact)[0], exact.labels)
    expected.backward()
    out = fused_linear_distillation(
        case.student_hidden_states, case.student_lm_head_weight, None, None, case.labels, alpha=0.0, plan=plan
    )
    out.loss.backward()
    assert abs(out.loss.item() - expected.item()) <= 1e-6
    assert max(gradient_errors(case, exact).values()) <= FP32_BOUND
    assert (out.per_token.divergence == 0).all() and (out.per_token.teacher_entropy == 0).all()


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_alpha_one_reads_labels_as_a_mask_only(plan):
    case = make_case()
    other = make_case()
    other.labels[:] = 0
    assert distill(case, alpha=1.0, plan=plan).loss == distill(other, alpha=1.0, plan=plan).loss


@pytest.mark.parametrize("divergence,options,plain", [
    ("jsd", dict(beta=0.0), "forward_kl"),
    ("jsd", dict(beta=1.0), "reverse_kl"),
    ("skew_kl", dict(skew=0.0), "forward_kl"),
    ("skew_reverse_kl", dict(skew=0.0), "reverse_kl"),
])  # fmt: skip
def test_mixtures_are_the_plain_kls_at_their_ends(divergence, options, plain):
    case = make_case()
    assert distill(case, divergence=divergence, **options).loss == distill(case, divergence=plain).loss


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_loses_nothing(plan, divergence):
    case = make_case(dtype=torch.float32)
    case.teacher_hidden_states = case.student_hidden_states.detach()
    case.teacher_lm_head_weight = case.student_lm_head_weight.detach()
    out = backward(case, alpha=1.0, divergence=divergence, plan=plan)
    assert abs(out.loss.item()) <= 1e-6
    assert case.student_hidden_states.grad.abs().max() <= 1e-7


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_adding_a_number_to_every_logit_changes_nothing(plan, divergence):
    case = make_case(dtype=torch.float32, bias=True)
    shifted = make_case(dtype=torch.float32, bias=True)
    with torch.no_grad():
        shifted.student_lm_head_bias += 8.0
        shifted.teacher_lm_head_bias -= 16.0
    backward(case, divergence=divergence, plan=plan, chunk_size=CHUNK[plan])
    backward(shifted, divergence=divergence, plan=plan, chunk_size=CHUNK[plan])
    assert relative_error(shifted.student_hidden_states.grad, case.student_hidden_states.grad.double()) <= 1e-5


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_micro_batches_with_the_global_count_add_up(plan):
    case = make_case(20, ignored=range(0, 20, 3))
    whole = distill(case, plan=plan).loss
    count = (case.labels != IGNORE).sum()
    total = 0.0
    for part in (slice(0, 3), slice(3, 14), slice(14, 20)):
        rows = ("student_hidden_states", "teacher_hidden_states", "labels")
        tensors = case.tensors() | {name: getattr(case, name)[part] for name in rows}
        total += fused_linear_distillation(**tensors, num_items_in_batch=count, plan=plan).loss
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("plan", PLANS)
def test_ignored_and_weightless_rows_are_inert_even_when_they_are_nan(device, plan):
    case = make_case(dtype=torch.float32, ignored=[3]).on(device)
    weights = torch.ones(NUM_TOKENS, device=device)
    weights[7] = 0
    weights[3] = torch.nan
    clean = distill(case, token_weights=weights, plan=plan)
    with torch.no_grad():
        for row in (3, 7):
            case.student_hidden_states[row] = torch.nan
            case.teacher_hidden_states[row] = torch.nan
    out = backward(case, token_weights=weights, plan=plan)
    assert out.loss == clean.loss
    assert (case.student_hidden_states.grad[[3, 7]] == 0).all()
    assert case.student_lm_head_weight.grad.isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("num_tokens", [0, NUM_TOKENS])
def test_nothing_supervised_gives_zero_loss_and_zero_gradients(device, plan, num_tokens):
    case = make_case(num_tokens, dtype=torch.float32, bias=True, ignored=range(num_tokens)).on(device)
    with poisoned_memory():
        out = backward(case, plan=plan)
    assert out.loss == 0 and out.num_items == 0
    assert all((tensor.grad == 0).all() for tensor in case.trained().values())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_inf_in_a_supervised_row_show_in_the_loss(device, plan, bad, divergence, side):
    case = make_case(dtype=torch.float32).on(device)
    with torch.no_grad():
        getattr(case, f"{side}_hidden_states")[3, 2] = bad
    assert backward(case, plan=plan, divergence=divergence).loss.isnan()


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_zero_items_give_zero_even_with_weights(plan):
    case = make_case()
    out = backward(case, num_items_in_batch=0, plan=plan)
    assert out.loss == 0 and (case.student_hidden_states.grad == 0).all()


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_sum_is_mean_times_items(plan):
    case = make_case(ignored=[2])
    mean, total = distill(case, plan=plan), distill(case, plan=plan, reduction="sum")
    torch.testing.assert_close(total.loss, mean.loss * mean.num_items)
    torch.testing.assert_close(total.divergence, mean.divergence * mean.num_items)


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_only_wanted_gradients_are_made(plan):
    case = make_case(trained=["student_hidden_states"])
    backward(case, plan=plan)
    assert case.student_lm_head_weight.grad is None and case.student_hidden_states.grad is not None
    with torch.no_grad():
        assert not distill(make_case(), plan=plan).loss.requires_grad
    head_only = make_case(trained=["student_lm_head_weight"])
    backward(head_only, plan=plan)
    assert head_only.student_lm_head_weight.grad is not None


@not_interpreted
def test_reported_terms_are_detached_and_make_up_the_loss():
    case = make_case()
    out = distill(case, alpha=0.25, temperature=2.0)
    assert not out.cross_entropy.requires_grad and not out.divergence.requires_grad
    torch.testing.assert_close(out.loss, 0.75 * out.cross_entropy + 0.25 * 4 * out.divergence)
    plain = distill(case, alpha=0.25, temperature=2.0, temperature_squared=False)
    torch.testing.assert_close(plain.loss, 0.75 * out.cross_entropy + 0.25 * out.divergence)


@not_interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_squared_keeps_small_logits_flat_in_temperature(divergence):
    case = make_case()
    with torch.no_grad():
        case.student_hidden_states *= 0.01
        case.teacher_hidden_states *= 0.01
    losses = [distill(case, alpha=1.0, temperature=t, divergence=divergence).loss.item() for t in (1.0, 2.0, 8.0)]
    assert max(losses) / min(losses) - 1 < 0.02


@not_interpreted
@pytest.mark.parametrize("plan", PLANS)
def test_permuting_the_vocabulary_changes_nothing(plan):
    case, order = make_case(), torch.randperm(61)
    permuted = case.tensors() | dict(
        student_lm_head_weight=case.student_lm_head_weight[order],
        teacher_lm_head_weight=case.teacher_lm_head_weight[order],
        labels=order.argsort()[case.labels],
    )
    permuted = fused_linear_distillation(**permuted, divergence="jsd", plan=plan, chunk_size=9)
    torch.testing.assert_close(permuted.loss, distill(case, divergence="jsd").loss)


@pytest.mark.parametrize("plan", PLANS)
def test_non_contiguous_inputs_give_the_same(device, plan):
    case = make_case(dtype=torch.float32, bias=True).on(device)
    strided = {
        name: torch.stack([tensor.detach()] * 2, -1)[..., 0].requires_grad_(tensor.requires_grad)
        for name, tensor in case.tensors().items()
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    out = fused_linear_distillation(**strided, plan=plan, chunk_size=CHUNK[plan])
    out.loss.backward()
    torch.testing.assert_close(out.loss, backward(case, plan=plan, chunk_size=CHUNK[plan]).loss)
    for name, tensor in case.trained().items():
        torch.testing.assert_close(strided[name].grad, tensor.grad, msg=name)
