"""Cached targets: top k and tail against the coarse-grained loss in float64, vectors against the whole loss."""

from dataclasses import replace

import pytest
import torch
from distillation_cases import (
    BF16_BOUND,
    DIVERGENCES,
    FP32_BOUND,
    NUM_TOKENS,
    REGIMES,
    exact_loss,
    gradient_errors,
    make_case,
    not_interpreted,
    poisoned_memory,
    whole_logits,
)

from trsd.live_bytes import LiveBytes
from trsd_kernels import DistillOptions, fused_linear_distillation
from trsd_kernels.reference import divergence_of, transform_logits
from trsd_kernels.teacher_targets import (
    distill_from_top_k,
    distill_from_vectors,
    teacher_vectors,
    top_k_targets,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
VOCAB = 61


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request):
    return request.param


@pytest.mark.parametrize("make", ["top k", "vectors"])
def test_autocast_changes_no_target(make):
    """A loss subtracts what these are: entropy and products of the whole vocabulary."""
    case = make_case(vocab=VOCAB, bias=True)
    how = {"top k": lambda: top_k_of(case, 5), "vectors": lambda: vectors_of(case)}[make]
    expected = how()
    with torch.autocast("cpu", torch.bfloat16):
        found = how()
    for name in expected._fields[:-1]:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)


def top_k_of(case, k, **options):
    return top_k_targets(
        case.teacher_hidden_states,
        case.teacher_lm_head_weight,
        k,
        teacher_lm_head_bias=case.teacher_lm_head_bias,
        **options,
    )


def vectors_of(case, **options):
    return teacher_vectors(
        case.teacher_hidden_states,
        case.teacher_lm_head_weight,
        case.student_lm_head_weight,
        teacher_lm_head_bias=case.teacher_lm_head_bias,
        student_lm_head_bias=case.student_lm_head_bias,
        **options,
    )


def distill(loss, case, targets, **options):
    return loss(
        case.student_hidden_states,
        case.student_lm_head_weight,
        targets,
        case.labels,
        student_lm_head_bias=case.student_lm_head_bias,
        **options,
    )


def coarse_loss(case, token_ids, **options):
    """The loss over k + 1 outcomes, written out on whole float64 logits."""
    settings = DistillOptions(**options)
    student, teacher = whole_logits(case)
    z = transform_logits(student, settings.student_transform)
    log_q = torch.log_softmax(z / settings.temperature, -1)
    log_p = torch.log_softmax(transform_logits(teacher, settings.teacher_transform) / settings.temperature, -1)

    def coarse(log):
        tail = log.scatter(1, token_ids, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([log.gather(1, token_ids), tail], 1)

    value = divergence_of(
        coarse(log_p), coarse(log_q), divergence=settings.divergence, beta=settings.beta, skew=settings.skew
    )
    kept = case.labels != settings.ignore_index
    cross_entropy = torch.nn.functional.cross_entropy(z, case.labels, reduction="none")
    losses = (1 - settings.alpha) * cross_entropy + settings.divergence_scale * value
    return losses[kept].mean()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("extra", [{}, dict(temperature=2.0, student_logit_softcap=15.0, student_logit_scale=0.9)])
def test_top_k_and_tail_is_the_exact_coarse_loss(device, divergence, regime, k, extra):
    options = dict(divergence=divergence, **extra)
    case = make_case(vocab=VOCAB, dtype=torch.float32, regime=regime, bias=True, ignored=[4]).on(device)
    exact = case.double()
    targets = top_k_of(case, k, temperature=options.get("temperature", 1.0))
    expected = coarse_loss(exact, targets.token_ids.cpu(), **options)
    expected.backward()
    with poisoned_memory():
        out = distill(distill_from_top_k, case, targets, chunk_size=5, **options)
        out.loss.backward()
    assert abs(out.loss.item() - expected.item()) <= 1e-5 * max(1.0, abs(expected.item()))
    for name, error in gradient_errors(case, exact).items():
        assert error <= FP32_BOUND, name


@not_interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_are_the_whole_loss_and_fewer_never_more(divergence, temperature):
    case = make_case(vocab=VOCAB)
    options = dict(divergence=divergence, temperature=temperature, alpha=1.0)
    whole = fused_linear_distillation(**case.tensors(), **options).per_token
    before = torch.zeros_like(whole.divergence)
    for k in (1, 5, 30, VOCAB):
        terms = distill(distill_from_top_k, case, top_k_of(case, k, temperature=temperature), **options).per_token
        assert (terms.divergence >= before - 1e-12).all() and (terms.divergence <= whole.divergence + 1e-12).all()
        torch.testing.assert_close(terms.student_entropy, whole.student_entropy)
        torch.testing.assert_close(terms.top1_agreement, whole.top1_agreement)
        before = terms.divergence
    torch.testing.assert_close(before, whole.divergence)


def test_all_tokens_give_the_whole_gradient():
    options = dict(alpha=0.5, divergence="jsd")
    case, same = make_case(vocab=VOCAB), make_case(vocab=VOCAB)
    fused_linear_distillation(**case.tensors(), **options).loss.backward()
    distill(distill_from_top_k, same, top_k_of(same, VOCAB), **options).loss.backward()
    for name, tensor in case.trained().items():
        torch.testing.assert_close(getattr(same, name).grad, tensor.grad)


@not_interpreted
def test_top_k_gradients_by_finite_differences():
    case = make_case(6, 9, 4, bias=True, ignored=[2])
    targets = top_k_of(case, 3, temperature=1.7)

    def loss(hidden, weight, bias):
        return distill_from_top_k(
            hidden, weight, targets, case.labels, student_lm_head_bias=bias, temperature=1.7, chunk_size=4
        ).loss

    assert torch.autograd.gradcheck(loss, list(case.trained().values()))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("alpha,temperature", [(0.5, 1.0), (1.0, 1.0), (1.0, 2.0), (0.5, 2.0)])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, FP32_BOUND), (torch.bfloat16, BF16_BOUND)])
def test_vectors_give_the_whole_loss_of_a_frozen_head(device, regime, alpha, temperature, dtype, bound):
    options = dict(alpha=alpha, temperature=temperature, student_logit_scale=0.8, teacher_logit_softcap=30.0)
    trained = ["student_hidden_states"]
    case = make_case(vocab=VOCAB, dtype=dtype, regime=regime, bias=True, ignored=[4], trained=trained).on(device)
    exact = case.double()
    expected = exact_loss(exact, **options)
    expected.backward()
    with poisoned_memory():
        targets = vectors_of(case, temperature=temperature, teacher_logit_softcap=30.0)
        out = distill(distill_from_vectors, case, targets, chunk_size=5, **options)
        out.loss.backward()
    assert abs(out.loss.item() - expected.item()) <= 2e-5 * max(1.0, abs(expected.item()))
    assert gradient_errors(case, exact)["student_hidden_states"] <= bound
    whole = fused_linear_distillation(**case.tensors(), **options).per_token
    for name, value in out.per_token._asdict().items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=3e-5, msg=name)


@not_interpreted
@pytest.mark.parametrize("loss,make", [(distill_from_top_k, top_k_of), (distill_from_vectors, vectors_of)])
def test_ignored_rows_weights_and_counts_behave_as_in_the_whole_loss(loss, make):
    case = make_case(vocab=VOCAB, trained=["student_hidden_states"], ignored=[4])
    targets = make(case, VOCAB) if make is top_k_of else make(case)
    weights = torch.linspace(0, 2, NUM_TOKENS)
    options = dict(token_weights=weights, num_items_in_batch=7.0)
    out = distill(loss, case, targets, **options)
    out.loss.backward()
    got, case.student_hidden_states.grad = case.student_hidden_states.grad, None
    whole = fused_linear_distillation(**case.tensors(), **options)
    whole.loss.backward()
    torch.testing.assert_close(out.loss, whole.loss)
    torch.testing.assert_close(got, case.student_hidden_states.grad)
    ignored = replace(case, labels=torch.full_like(case.labels, -100))
    assert distill(loss, ignored, targets).loss == 0


@not_interpreted
@pytest.mark.parametrize("loss,make", [(distill_from_top_k, top_k_of), (distill_from_vectors, vectors_of)])
def test_alpha_zero_is_the_cross_entropy_alone(loss, make):
    case = make_case(vocab=VOCAB, trained=["student_hidden_states"])
    targets = make(case, 5) if make is top_k_of else make(case)
    out = distill(loss, case, targets, alpha=0.0)
    whole = fused_linear_distillation(**case.tensors(), alpha=0.0)
    torch.testing.assert_close(out.loss, whole.loss)
    assert out.divergence == 0 and (out.per_token.divergence == 0).all()


@not_interpreted
def test_the_makers_keep_to_their_byte_budget():
    case = make_case(256, 4096, 8, dtype=torch.float32)
    budget = 2**20
    with LiveBytes() as memory:
        top_k_of(case, 4, chunk_bytes=budget)
    assert memory.peak <= 1.3 * budget
    with LiveBytes() as memory:
        vectors_of(case, chunk_bytes=budget)
    assert memory.peak <= 1.3 * budget


@not_interpreted
def test_compiles_whole():
    torch.compiler.reset()
    case = make_case(vocab=VOCAB, dtype=torch.float32, trained=["student_hidden_states"])
    top_k, vectors = top_k_of(case, 5), vectors_of(case)

    @torch.compile(fullgraph=True)
    def compiled(hidden):
        first = distill_from_top_k(hidden, case.student_lm_head_weight, top_k, case.labels).loss
        return first + distill_from_vectors(hidden, case.student_lm_head_weight, vectors, case.labels).loss

    loss = compiled(case.student_hidden_states)
    loss.backward()
    got, case.student_hidden_states.grad = case.student_hidden_states.grad, None
    eager = distill(distill_from_top_k, case, top_k).loss + distill(distill_from_vectors, case, vectors).loss
    eager.backward()
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(got, case.student_hidden_states.grad)


@not_interpreted
def test_what_cannot_be_right_is_refused():
    case = make_case(vocab=VOCAB)
    frozen = make_case(vocab=VOCAB, trained=["student_hidden_states"])
    top_k, vectors = top_k_of(case, 5), vectors_of(case)
    for message, call in {
        "freeze it": lambda: distill(distill_from_vectors, case, vectors),
        "forward KL only": lambda: distill(distill_from_vectors, frozen, vectors, divergence="jsd"),
        "linear": lambda: distill(distill_from_vectors, frozen, vectors, student_logit_softcap=30.0),
        "temperature 1.0, the loss asks for 2.0": lambda: distill(distill_from_top_k, case, top_k, temperature=2.0),
        "scalar loss": lambda: distill(distill_from_top_k, case, top_k, reduction="none"),
        "another student head": lambda: distill(
            distill_from_vectors, frozen, vectors._replace(vectors=vectors.vectors[:, :3])
        ),
        "holds 2 tokens": lambda: distill(
            distill_from_top_k, case, top_k._replace(tail_log_mass=top_k.tail_log_mass[:2])
        ),
        "another vocabulary": lambda: distill(
            distill_from_top_k, case, top_k._replace(token_ids=top_k.token_ids + VOCAB)
        ),
        "a token twice": lambda: distill(
            distill_from_top_k, case, top_k._replace(token_ids=torch.zeros_like(top_k.token_ids))
        ),
        "outside": lambda: distill(distill_from_top_k, replace(case, labels=case.labels + VOCAB), top_k),
        "chunk_size": lambda: distill(distill_from_top_k, case, top_k, chunk_size=-5),
        "chunk_bytes": lambda: distill(distill_from_vectors, frozen, vectors, chunk_bytes=0),
        "expected one value a token": lambda: distill(
            distill_from_vectors, frozen, vectors._replace(entropy=vectors.entropy[:, None])
        ),
        "k: expected 1 to": lambda: top_k_of(case, VOCAB + 1),
        "student_lm_head_weight: expected": lambda: teacher_vectors(
            case.teacher_hidden_states, case.teacher_lm_head_weight, case.student_lm_head_weight[:5]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_vectors_of_a_student_that_may_not_write_some_tokens():
    torch.manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (torch.randn(*shape) for shape in ((4, 8), (16, 8)) * 2)
    labels, bias = torch.randint(12, (4,)), torch.zeros(16)
    bias[12:] = -torch.inf
    both = dict(student_lm_head_bias=bias)
    for theirs in (bias, None):  # where the teacher may write them, no student is near enough
        targets = teacher_vectors(teacher_hidden, teacher_weight, weight, teacher_lm_head_bias=theirs, **both)
        got = distill_from_vectors(hidden, weight, targets, labels, **both, alpha=1.0).loss
        want = fused_linear_distillation(
            hidden, weight, teacher_hidden, teacher_weight, labels, teacher_lm_head_bias=theirs, **both, alpha=1.0
        ).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert want.isfinite() == (theirs is not None)
