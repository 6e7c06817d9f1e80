"""``forward_distill``: the loss of a batch of any causal LM, without its logits."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from integration_cases import assert_same_gradients, own_loss, padded_model
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from trsd.cuts import fractions
from trsd.errors import InputError
from trsd.integrations.causal_lm import add_forward_distill, run_through, teacher_targets
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.methods.trsd import TRSD
from trsd_kernels.reference import distillation_rows

OPTIONS = {"alpha": 0.7, "divergence": "jsd", "temperature": 1.5}


@pytest.fixture
def models(tokenizer):
    """A student and a wider teacher whose heads are padded to different lengths."""
    teacher = padded_model(tokenizer, hidden_size=48, vocab_size=4096, seed=1)
    return add_forward_distill(padded_model(tokenizer)), teacher


@pytest.fixture
def method(traces, think):
    return TRSD(traces, think, fractions((0.3, 0.6, 1.0)), seed=0, branches_per_trace=2)


def batch_of(rows):
    return CutRowCollator()(rows)


def batch_targets(teacher, batch):
    """What ``teacher`` says of a batch of cut rows, as arguments of ``forward_distill``."""
    mask = batch["teacher_attention_mask"]
    return teacher_targets(teacher, batch["teacher_input_ids"], batch["teacher_labels"], attention_mask=mask)


def same_context_batch(method):
    return {name: tensor for name, tensor in batch_of(cut_rows(method)).items() if not name.startswith("teacher_")}


def gradients_of(model):
    """Gradients by name, taken out of the model."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_loss_and_gradients_are_those_of_whole_logits(models, method):
    student, teacher = (model.double() for model in models)
    batch = same_context_batch(method)
    out = student.forward_distill(
        **batch, **teacher_targets(teacher, batch["input_ids"], attention_mask=batch["attention_mask"]), **OPTIONS
    )
    out.loss.backward()
    found = gradients_of(student)
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        other = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    other = other[:, :-1, : logits.shape[-1]].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    learnt = labels != -100
    terms = distillation_rows(logits[learnt], other[learnt], labels[learnt], **OPTIONS)
    weights = 0.3, 0.7 * OPTIONS["temperature"] ** 2
    expected = weights[0] * terms.cross_entropy.mean() + weights[1] * terms.divergence.mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
    expected.backward()
    for name, gradient in gradients_of(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10)


def test_rows_of_cut_traces_give_the_loss_and_gradients_of_the_trainers_own_loop(models, method):
    student, teacher = models
    batch = batch_of(cut_rows(method))
    out = student.forward_distill(
        batch["input_ids"],
        batch["labels"],
        attention_mask=batch["attention_mask"],
        **batch_targets(teacher, batch),
        **OPTIONS,
    )
    out.loss.backward()
    members = [(0, index) for index in range(len(method.traces))]
    expected, _, gradients = own_loss(student, teacher, method, members, thinking_weight=0.0, **OPTIONS)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(student, gradients)


def test_padding_and_what_is_ignored_change_nothing(models, method):
    student, teacher = models
    rows = cut_rows(method)
    alone = [batch_of([row]) for row in rows]
    sums = [
        student.forward_distill(b["input_ids"], b["labels"], **batch_targets(teacher, b), reduction="sum", **OPTIONS)
        for b in alone
    ]
    batch = batch_of(rows)
    together = student.forward_distill(
        batch["input_ids"],
        batch["labels"],
        attention_mask=batch["attention_mask"],
        **batch_targets(teacher, batch),
        **OPTIONS,
    )
    num_items = sum((row["labels"][1:].__len__() - row["labels"][1:].count(-100)) for row in rows)
    assert together.num_items.item() == num_items
    assert together.loss.item() == pytest.approx(sum(out.loss.item() for out in sums) / num_items, rel=1e-5)


def test_token_weights_stand_where_labels_do(models, method):
    student, _ = models
    batch = same_context_batch(method)
    weights = torch.zeros(batch["labels"].shape)
    place = (batch["labels"] != -100).nonzero()[-1]
    weights[tuple(place)] = 2.0
    out = student.forward_distill(**batch, token_weights=weights, alpha=0.0, reduction="sum")
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    row, column = place.tolist()
    expected = -2 * torch.log_softmax(logits[row, column - 1], dim=-1)[batch["labels"][row, column]]
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)


SHAPE = dict(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

NO_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
        lambda: PhiForCausalLM(PhiConfig(**NO_HEAD_DIM, resid_pdrop=0.0, embd_pdrop=0.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**NO_HEAD_DIM, logits_scaling=4.0)),
    ],
    ids=["soft cap", "bias", "logit scale"],
)
def test_what_a_model_does_to_its_logits_is_in_the_loss(make):
    torch.manual_seed(0)
    model = make()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data.normal_(std=1.0)
    add_forward_distill(model)
    ids = torch.arange(3, 15).view(2, 6)
    found = model.forward_distill(ids, ids, **teacher_targets(model, ids), alpha=0.0).loss
    torch.testing.assert_close(found, model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-6)


def test_a_model_that_does_something_else_to_its_logits_is_refused():
    model = GraniteForCausalLM(GraniteConfig(**NO_HEAD_DIM))
    forward = model.forward

    def tripled(**inputs):
        output = forward(**inputs)
        output.logits = 3 * output.logits
        return output

    model.forward = tripled
    with pytest.raises(InputError, match="its logits are not its hidden states times the lm_head"):
        add_forward_distill(model)


def test_a_model_without_an_lm_head_is_refused():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(InputError, match="BertModel has no lm_head"):
        add_forward_distill(BertModel(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b | {"labels": b["labels"][:, :-1]}, "labels and weights as input_ids"),
        (lambda b: b | {"teacher_hidden_states": torch.zeros(3, 48)}, "has 3 rows for"),
        (lambda b: b | {"teacher_hidden_states": torch.zeros(1, 2, 48)}, r"or \[num_labels, hidden_size\]"),
    ],
)
def test_shapes_that_do_not_fit_are_said(models, method, change, words):
    student, teacher = models
    batch = same_context_batch(method)
    arguments = batch | teacher_targets(teacher, batch["input_ids"])
    with pytest.raises(ValueError, match=words):
        student.forward_distill(**change(arguments))


def test_one_model_is_patched_and_no_other(tokenizer):
    patched, other = add_forward_distill(padded_model(tokenizer)), padded_model(tokenizer)
    assert not hasattr(other, "forward_distill") and not hasattr(type(patched), "forward_distill")
    copied = copy.deepcopy(patched)
    assert copied.forward_distill.args[0] is copied


def test_an_adapter_learns_through_the_model_under_it(tokenizer, method):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(
        padded_model(tokenizer), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    add_forward_distill(student)
    batch = same_context_batch(method)
    student.forward_distill(**batch, alpha=0.0).loss.backward()
    learnt = gradients_of(student)
    assert learnt and all("lora_" in name for name in learnt)
    student(**batch).loss.backward()
    for name, gradient in gradients_of(student).items():
        torch.testing.assert_close(learnt[name], gradient, rtol=1e-4, atol=1e-6)


def test_adapters_that_act_elsewhere_are_refused(tokenizer):
    peft = pytest.importorskip("peft")
    virtual = peft.get_peft_model(
        padded_model(tokenizer), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(InputError, match="virtual tokens"):
        add_forward_distill(virtual)
    head = peft.get_peft_model(padded_model(tokenizer, tie=False), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(InputError, match="leaves its head out"):
        add_forward_distill(head)


def test_a_model_for_packed_rows_is_told_to_change_its_attention(tiny_model):
    with pytest.raises(InputError, match="runs packed rows"):
        add_forward_distill(tiny_model)


def test_compiles_whole(models, method):
    student, teacher = models
    batch = same_context_batch(method)
    targets = teacher_targets(teacher, batch["input_ids"], attention_mask=batch["attention_mask"])

    def loss():
        return student.forward_distill(**batch, **targets, **OPTIONS).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled().backward()
    found = gradients_of(student)
    loss().backward()
    assert_same_gradients(student, found)


def run_rank(folder, wrapping):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    student, batch, targets = torch.load(Path(folder, "case.pt"), weights_only=False)
    add_forward_distill(student)
    half = {name: tensor.chunk(2)[rank] for name, tensor in batch.items()}
    mine = targets | {"teacher_hidden_states": targets["teacher_hidden_states"].chunk(2)[rank]}
    num_items = (batch["labels"][:, 1:] != -100).sum() / 2  # gradients are averaged over the ranks
    if wrapping == "ddp":
        wrapper = DistributedDataParallel(student)
        out = run_through(
            wrapper, student, student.forward_distill, **half, **mine, num_items_in_batch=num_items, **OPTIONS
        )
    else:
        for layer in student.model.layers:
            fully_shard(layer)
        if wrapping == "fsdp2, the head apart":
            fully_shard(student.lm_head)
        fully_shard(student)
        register_fsdp_forward_method(student, "forward_distill")
        out = student.forward_distill(**half, **mine, num_items_in_batch=num_items, **OPTIONS)
    out.loss.backward()
    whole = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in student.named_parameters()
    }
    if rank == 0:
        torch.save(whole, Path(folder, "gradients.pt"))


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2", "fsdp2, the head apart"])
def test_two_ranks_have_the_gradients_of_one(tokenizer, models, method, tmp_path, launch, wrapping):
    student, teacher = models
    if "apart" in wrapping:
        student = add_forward_distill(padded_model(tokenizer, seed=0, tie=False))
    batch = same_context_batch(method)
    targets = teacher_targets(teacher, batch["input_ids"], attention_mask=batch["attention_mask"])
    del student.forward_distill
    torch.save((student, batch, targets), tmp_path / "case.pt")
    launch.call(run_rank, str(tmp_path), wrapping)
    add_forward_distill(student).forward_distill(**batch, **targets, **OPTIONS).loss.backward()
    assert_same_gradients(student, torch.load(tmp_path / "gradients.pt"))


def biased(vocab_size, seed):
    """A model whose lm_head has a bias, as Phi's."""
    torch.manual_seed(seed)
    config = PhiConfig(**(NO_HEAD_DIM | {"vocab_size": vocab_size}), resid_pdrop=0.0, embd_pdrop=0.0)
    model = PhiForCausalLM(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data.normal_(std=1.0)
    return model.double()


@pytest.mark.parametrize("sizes", [(97, 97), (97, 120), (120, 97)], ids=["alike", "teacher padded", "student padded"])
def test_biases_of_both_heads_are_in_the_loss(sizes):
    student, teacher = add_forward_distill(biased(sizes[0], 0)), biased(sizes[1], 1)
    ids = torch.arange(3, 15).view(2, 6)
    found = student.forward_distill(ids, ids, **teacher_targets(teacher, ids), alpha=1.0).loss
    q, p = (m(input_ids=ids).logits[:, :-1, : min(sizes)].log_softmax(-1) for m in (student, teacher))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-10, atol=0)


def test_weights_go_with_the_labels_where_the_teacher_has_only_their_rows(models, method):
    student, teacher = models
    batch = batch_of(cut_rows(method))
    learnt = batch["labels"][:, 1:] != -100
    weights = torch.zeros(batch["labels"].shape)
    weights[:, 1:][learnt] = torch.arange(1.0, learnt.sum() + 1)
    inputs = batch["input_ids"], batch["labels"]
    shared = dict(attention_mask=batch["attention_mask"], **batch_targets(teacher, batch), alpha=1.0, reduction="sum")
    found = student.forward_distill(*inputs, token_weights=weights, **shared)
    wanted = student.forward_distill(*inputs, **shared).per_token.divergence @ weights[:, 1:][learnt]
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_positions_are_those_given(tokenizer, method):
    """Rotary positions are relative, so they are stretched."""
    student = add_forward_distill(padded_model(tokenizer))
    ids = torch.arange(3, 23).view(2, 10)
    positions = 3 * torch.arange(10).expand(2, 10)
    mask = torch.ones_like(ids)  # without one transformers takes a jump of the positions for another sequence's begin
    found = student.forward_distill(ids, ids, attention_mask=mask, position_ids=positions, alpha=0.0).loss
    wanted = student(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.item() != pytest.approx(student(input_ids=ids, labels=ids).loss.item(), rel=1e-3)
    teacher = teacher_targets(student, ids, attention_mask=mask, position_ids=positions)["teacher_hidden_states"]
    assert not torch.allclose(teacher, teacher_targets(student, ids)["teacher_hidden_states"], rtol=1e-3)


def test_a_model_with_the_method_is_saved_and_copied_with_it(tokenizer):
    model = add_forward_distill(padded_model(tokenizer))
    ids = torch.arange(6)[None]
    loss = model.forward_distill(ids, ids, alpha=0.0).loss
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for again in (torch.load(stored, weights_only=False), copy.deepcopy(model)):
        assert again is not model and torch.equal(again.forward_distill(ids, ids, alpha=0.0).loss, loss)
        with torch.no_grad():
            again.get_output_embeddings().weight.zero_()
        assert not torch.equal(again.forward_distill(ids, ids, alpha=0.0).loss, loss)
    assert torch.equal(model.forward_distill(ids, ids, alpha=0.0).loss, loss)
