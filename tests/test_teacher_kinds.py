"""All kinds of teacher against the online one, through the training step: the same loss and the same gradients."""

import pytest
import torch
from conftest import make_tiny_model

from trsd.job import Job
from trsd.loop import Loop
from trsd.prepare import build_method, prepare_traces
from trsd.prepare_teacher import prepare_teacher, student_as_teacher
from trsd.recipe import Recipe, with_method_defaults

pytest.importorskip("peft")


@pytest.fixture
def step(tiny_folder, trace_file, tmp_path, monkeypatch):
    """Loss terms and gradients of the first step of a student whose adapter is already in effect."""
    gradients = {}

    def step(name, moved=0.1, **fields):
        shared = dict(alpha=0.7, temperature=1.5, train_batch_size=6, max_tokens_per_batch=600, max_length=512)
        recipe = with_method_defaults(
            Recipe(model_name_or_path=str(tiny_folder), data=str(trace_file), max_steps=1, **(shared | fields))
        )
        assert not recipe.problems()
        job = Job(recipe, tmp_path / name)
        method = build_method(job, prepare_traces(job))
        teacher = prepare_teacher(job, method)
        model = job.student()
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=moved)
        loop = Loop(job, model, teacher or student_as_teacher(job, model, method), method)

        admit = loop.guard.admit

        def kept(parameters, **options):
            gradients.update({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
            return admit(parameters, **options)

        monkeypatch.setattr(loop.guard, "admit", kept)
        gradients.clear()
        return loop.step(0), dict(gradients)

    return step


@pytest.fixture
def other_teacher(tokenizer, tmp_path):
    """A model of its own, wider than the student and its head padded further."""
    model = make_tiny_model(tokenizer, seed=3, tie=False)
    model.resize_token_embeddings(len(tokenizer) + 64)
    model.save_pretrained(tmp_path / "teacher_model")
    tokenizer.save_pretrained(tmp_path / "teacher_model")
    return str(tmp_path / "teacher_model")


def assert_same(one, other):
    (row, gradients), (other_row, other_gradients) = one, other
    for name in ("loss", "cross_entropy", "divergence", "thinking_cross_entropy", "grad_norm"):
        assert row[name] == pytest.approx(other_row[name], rel=1e-5), name
    assert row["divergence"] > 0.01 and gradients.keys() == other_gradients.keys() and len(gradients) > 0
    for name, gradient in gradients.items():
        bound = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=bound, msg=name)


KINDS = ("hidden_cache", "top_k_cache", "vector_cache")


@pytest.mark.parametrize("method", ["trsd", "lsp"])
def test_every_kind_gives_the_loss_and_gradients_of_the_online_teacher(step, other_teacher, tokenizer, method):
    fields = dict(method=method, teacher_model_name_or_path=other_teacher, lora_rank=4, teacher_top_k=len(tokenizer))
    online = step("online", teacher="online", **fields)
    for kind in KINDS:
        assert_same(online, step(kind, teacher=kind, **fields))


@pytest.mark.parametrize("method", ["trsd", "lsp"])
def test_the_adapter_off_is_the_base_model_as_an_online_teacher(step, tiny_folder, method):
    itself = dict(teacher_model_name_or_path=str(tiny_folder)) if method == "lsp" else {}
    online = step("online", method=method, teacher="online", lora_rank=4, **itself)
    off = step("off", method=method, teacher="adapter_off", lora_rank=4)
    assert_same(online, off)
    assert all(torch.equal(gradient, off[1][name]) for name, gradient in online[1].items())  # to the bit


@pytest.mark.parametrize("kind", ["hidden_cache", "top_k_cache"])
def test_kinds_for_a_trained_head_give_its_gradients_too(step, tokenizer, kind):
    online = step("online", teacher="online")
    assert_same(online, step(kind, teacher=kind, teacher_top_k=len(tokenizer)))
    assert "model.embed_tokens.weight" in online[1]


def test_half_precision_vectors_would_spoil_the_gradient_that_fp32_ones_keep(step, monkeypatch):
    """Why a vector cache is twice as large as hidden states of half precision: near agreement it must be fp32."""
    from trsd import teacher_cache

    near = dict(lora_rank=4, alpha=1.0, thinking_weight=0.0, anchor_share=1.0, moved=1e-3)
    online, fine = step("online", teacher="online", **near), step("fine", teacher="vector_cache", **near)
    layout = teacher_cache.vector_layout
    monkeypatch.setattr(
        teacher_cache, "vector_layout", lambda size: layout(size) | {"vectors": (torch.bfloat16, (size,))}
    )
    coarse = step("coarse", teacher="vector_cache", **near)

    def error(found):
        squares = [(found[1][k] - g).double().square().sum() / g.double().square().sum() for k, g in online[1].items()]
        return float(sum(squares) / len(squares)) ** 0.5

    assert error(fine) < 1e-3 and error(coarse) > 0.1, (error(fine), error(coarse))
