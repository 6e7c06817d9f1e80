"""A student, a teacher of another width, and rows of cut traces, for the tests of ``forward_distill``."""

import torch
from conftest import make_traces
from transformers import Qwen3Config, Qwen3ForCausalLM

from trsd.batching import pack_examples
from trsd.cuts import fractions
from trsd.integrations.causal_lm import teacher_targets
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.methods import TeacherExamples
from trsd.methods.trsd import TRSD
from trsd.models import PACKED_ATTENTION, packed_hidden_states
from trsd.objective import Objective
from trsd.teachers import OnlineTeacher

OPTIONS = {"alpha": 0.7, "divergence": "jsd", "temperature": 1.5}


def small_model(tokenizer, *, hidden_size=32, vocab_size=None, tie=True, seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,  # large, so that distributions are far from uniform and differences show
    )
    return Qwen3ForCausalLM(config)


def trsd_method(tokenizer, think, num_traces=4, branches=2):
    traces = make_traces(tokenizer, think, num_traces)
    return TRSD(traces, think, fractions((0.3, 0.6, 1.0)), seed=0, branches_per_trace=branches)


def trsd_rows(tokenizer, think, **options):
    return cut_rows(trsd_method(tokenizer, think, **options))


def batch_of(tokenizer, rows):
    return CutRowCollator(pad_token_id=tokenizer.pad_token_id)(rows)


def loss_of_the_loop(method, student, teacher, **options):
    """What the trainer's own loop makes of one step over all traces of ``method``, packed; gradients add up in it."""
    before = [model.config._attn_implementation for model in (student, teacher)]
    for model in (student, teacher):
        model.set_attn_implementation(PACKED_ATTENTION)
    targets = OnlineTeacher(teacher, TeacherExamples(method), max_tokens_per_batch=256)
    batches = pack_examples(method.examples([(0, index) for index in range(len(method.traces))]), 256, "cpu")
    assert len(batches) > 1
    vocab_size = min(model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    objective = Objective(vocab_size=vocab_size, chunk_bytes=None, **options)
    num_items = sum(batch.num_items for batch in batches)
    total = 0.0
    for batch in batches:
        hidden = packed_hidden_states(student, batch.input_ids, batch.layout)[batch.rows]
        found = targets.targets(batch.trace_indices)
        weights = {"token_weights": batch.weights, "num_items_in_batch": num_items}
        out = objective(hidden, student.get_output_embeddings().weight, found, batch.labels, **weights)
        out.loss.backward()
        total += out.loss.item()
    for model, name in zip((student, teacher), before, strict=True):
        model.set_attn_implementation(name)
    return total


def batch_targets(teacher, batch):
    """What ``teacher`` says of a batch, as arguments of ``forward_distill``."""
    mask = batch["teacher_attention_mask"]
    return teacher_targets(teacher, batch["teacher_input_ids"], batch["teacher_labels"], attention_mask=mask)


def gradients_of(model):
    """Gradients by name, taken out of the model."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(one, other):
    """To fp32's rounding of sums in another order."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
