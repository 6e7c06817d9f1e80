"""The objective on padded rows is the one of packed rows, for every method, divergence and number of cuts."""

import copy

import pytest
import torch
from integration_cases import assert_same_gradients, own_loss, padded_model
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from trsd.cuts import uniform
from trsd.errors import InputError
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.integrations.row_loss import RowCounts, RowLoss, row_counts
from trsd.methods.lsp import LSP
from trsd.methods.trsd import TRSD
from trsd.truncation import endpoints


@pytest.fixture
def student(tokenizer):
    return padded_model(tokenizer, seed=0)


@pytest.fixture
def teacher(tokenizer):
    return padded_model(tokenizer, seed=1)


def method_of(name, traces, think):
    if name == "lsp":
        return LSP(traces, endpoints(0.6), ("p", "cot", "a"))
    return TRSD(traces, think, uniform, seed=3, branches_per_trace=3, keep_thinking=True)


@pytest.mark.parametrize("name", ["trsd", "lsp"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(alpha=0.4, divergence="jsd", beta=0.3, temperature=2.0), dict(alpha=0.7, divergence="reverse_kl")],
    ids=lambda options: options.get("divergence", "forward_kl"),
)
def test_padded_rows_have_the_loss_and_gradients_of_packed_ones(student, teacher, traces, think, name, options):
    method = method_of(name, traces, think)
    members = [(0, index) for index in range(len(traces))]
    _, wanted, gradients = own_loss(student, teacher, method, members, thinking_weight=0.5, **options)
    found = RowLoss(student, teacher, thinking_weight=0.5, **options)(student, CutRowCollator()(cut_rows(method)))
    found.loss.backward()
    assert torch.allclose(torch.stack(found).detach(), wanted, rtol=1e-6, atol=1e-6)
    assert_same_gradients(student, gradients)


def test_batches_of_a_step_add_up_to_it(student, teacher, traces, think):
    rows = cut_rows(method_of("trsd", traces, think))
    loss, collate = RowLoss(student, teacher, alpha=0.5), CutRowCollator()
    whole = loss(student, collate(rows))
    parts = [collate(rows[:2]), collate(rows[2:9]), collate(rows[9:])]
    counts = RowCounts(*(sum(found) for found in zip(*map(row_counts, parts), strict=True)))
    added = [sum(terms) for terms in zip(*(loss(student, part, counts) for part in parts), strict=True)]
    assert torch.allclose(torch.stack(added), torch.stack(whole), rtol=1e-6, atol=1e-6)


def test_without_a_divergence_no_teacher_runs(student, traces, think):
    batch = CutRowCollator()(cut_rows(method_of("trsd", traces, think)))
    found = RowLoss(student, None, alpha=0.0, thinking_weight=0.0)(student, batch)
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6) and found.divergence == 0


def test_the_teacher_learns_nothing_and_stays_in_eval_mode(student, teacher, traces, think):
    before = copy.deepcopy(teacher.state_dict())
    loss = RowLoss(student, teacher.train())
    loss(student, CutRowCollator()(cut_rows(method_of("trsd", traces, think)))).loss.backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_an_adapters_student_learns_by_its_adapter(student, teacher, traces, think):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(student, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = CutRowCollator()(cut_rows(method_of("trsd", traces, think)))
    loss = RowLoss(adapted, teacher)
    before = loss(adapted, batch).loss
    before.backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    assert loss(adapted, batch).loss < before


@pytest.mark.parametrize("kind", ["head", "prompt", "biased", "packed", "itself", "none"])
def test_what_the_loss_would_get_wrong_is_refused(student, teacher, kind):
    if kind in ("head", "prompt"):
        peft = pytest.importorskip("peft")
        config = (
            peft.LoraConfig(target_modules=["lm_head", "q_proj"])
            if kind == "head"
            else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        student = peft.get_peft_model(student, config)
    if kind == "biased":
        student.lm_head.bias = torch.nn.Parameter(torch.zeros(len(student.lm_head.weight)))
    if kind == "packed":
        student.set_attn_implementation("trsd_varlen")
    teacher = {"itself": student, "none": None}.get(kind, teacher)
    message = {
        "head": "leave the head out",
        "prompt": "virtual tokens",
        "biased": "without bias",
        "packed": "set_attn_implementation",
        "itself": "give a copy",
        "none": "give one, or alpha=0",
    }[kind]
    with pytest.raises(InputError, match=message):
        RowLoss(student, teacher)


SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


@pytest.mark.parametrize("config,kind", [(CohereConfig, CohereForCausalLM), (GraniteConfig, GraniteForCausalLM)])
def test_scaled_logits_are_scaled_in_the_loss(tokenizer, traces, think, config, kind):
    """Cohere multiplies its logits, Granite divides them."""
    scale = {"logit_scale": 0.25} if config is CohereConfig else {"logits_scaling": 4.0}
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = kind(config(vocab_size=len(tokenizer), initializer_range=0.5, **SMALL, **scale, **tokens)).eval()
    batch = CutRowCollator()(cut_rows(LSP(traces, endpoints(0.6), ("a", "cot"))))
    found = RowLoss(model, None, alpha=0.0)(model, batch)
    wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_logits_that_are_something_else_are_refused(student, teacher):
    inside = student.forward

    def doubled(*args, **kwargs):
        output = inside(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    student.forward = doubled
    with pytest.raises(InputError, match="its logits are not"):
        RowLoss(student, teacher)


@pytest.mark.parametrize("which", ["base", "another adapter"])
def test_a_teacher_with_the_students_adapter_in_it_is_refused(student, which):
    """PEFT puts its matrices into the base, which is then no longer what it was."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(student, config)
    teacher = student if which == "base" else adapted.base_model
    with pytest.raises(InputError, match="before an adapter is added"):
        RowLoss(adapted, teacher)
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_teacher_may_share_what_is_not_trained(student, teacher):
    student.requires_grad_(False)
    student.model.layers[0].requires_grad_(True)
    teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    RowLoss(student, teacher)


def test_the_teachers_own_scale_is_used(student, tokenizer, traces, think):
    """A Granite teacher divides its logits; the student does not."""
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    config = GraniteConfig(vocab_size=len(tokenizer), initializer_range=0.5, logits_scaling=4.0, **SMALL, **tokens)
    teacher = GraniteForCausalLM(config).eval()
    batch = CutRowCollator()(cut_rows(LSP(traces, endpoints(0.6), ("a", "cot"))))
    wanted = divergence_of_logits(student, teacher, batch)
    assert RowLoss(student, teacher)(student, batch).divergence.item() == pytest.approx(wanted.item(), rel=1e-5)


def divergence_of_logits(student, teacher, batch, vocab_size=None):
    """Forward KL of whole logits, over the first ``vocab_size`` tokens; teacher and student read the same rows."""
    learnt = batch["labels"][:, 1:] != -100
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    q, p = (model(**inputs).logits[:, :-1][learnt][:, :vocab_size].log_softmax(-1) for model in (student, teacher))
    return (p.exp() * (p - q)).sum(-1).mean()


def test_vocab_size_says_over_which_tokens(student, teacher, traces, think):
    batch = CutRowCollator()(cut_rows(LSP(traces, endpoints(0.6), ("a", "cot"))))
    most = int(batch["labels"].max()) + 1
    assert most < student.config.vocab_size
    for size in (most, None):
        wanted = divergence_of_logits(student, teacher, batch, size)
        found = RowLoss(student, teacher, vocab_size=size)(student, batch).divergence
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_shown_reasoning_is_learnt_at_the_students_own_scale(tokenizer, traces, think):
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    config = GraniteConfig(vocab_size=len(tokenizer), initializer_range=0.5, logits_scaling=4.0, **SMALL, **tokens)
    model = GraniteForCausalLM(config).eval()
    batch = CutRowCollator()(cut_rows(method_of("trsd", traces, think)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = model(**inputs, labels=batch["thinking_labels"]).loss
    found = RowLoss(model, None, alpha=0.0)(model, batch).thinking
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
