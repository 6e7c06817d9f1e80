"""What the tests of integrations compare with: this package's own objective on packed rows of the same traces."""

import contextlib
import copy

import torch
from conftest import make_tiny_model

from trsd.batching import pack_examples
from trsd.models import PACKED_ATTENTION
from trsd.objective import Objective
from trsd.student_loss import StudentLoss
from trsd.teachers import OnlineTeacher


def padded_model(tokenizer, **shape):
    """The tiny model as other trainers run it."""
    model = make_tiny_model(tokenizer, **shape)
    model.set_attn_implementation("sdpa")
    return model


def own_loss(model, teacher, method, members, *, alpha=1.0, thinking_weight=1.0, **options):
    """(loss, [loss, cross-entropy, divergence, thinking], gradients) of one step of (epoch, trace index) ``members``.

    ``options``: of the divergence. The models stay as they are.
    """
    packed, packed_teacher = copy.deepcopy(model).eval(), copy.deepcopy(teacher)
    for one in (packed, packed_teacher):
        one.set_attn_implementation(PACKED_ATTENTION)
    shared = {"vocab_size": packed.config.vocab_size, "chunk_bytes": None}
    student = StudentLoss(
        packed,
        Objective(alpha=alpha, **shared, **options),
        Objective(alpha=0.0, **shared),
        thinking_weight=thinking_weight,
        backend="auto",
        compute=contextlib.nullcontext,
    )
    examples = [method.teacher_example(index) for index in range(len(method.traces))]
    targets = OnlineTeacher(packed_teacher, examples, max_tokens_per_batch=512).targets
    batches = pack_examples(method.examples(members), 512, "cpu")
    num_items, num_thinking = (sum(getattr(b, name) for b in batches) for name in ("num_items", "num_thinking"))
    packed.zero_grad()
    terms = torch.zeros(4)
    for batch in batches:
        loss, parts = student(batch, num_items, num_thinking, targets)
        loss.backward()
        terms += parts
    return terms[0], terms, {name: p.grad for name, p in packed.named_parameters()}


def assert_same_gradients(model, wanted, bound=1e-5):
    """Every gradient of ``model`` within ``bound`` of the norm of the one wanted."""
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= bound * wanted[name].norm(), name
