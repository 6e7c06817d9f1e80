"""Hugging Face ``Trainer`` on rows of ``cut_rows``: the step of this package's own trainer."""

import json

import pytest
import torch
from integration_cases import own_loss, padded_model
from test_models import small_model
from transformers import AutoModelForCausalLM, TrainingArguments

from trsd.cuts import uniform
from trsd.errors import InputError
from trsd.integrations import hf_trainer
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.integrations.hf_trainer import CutRowLoss, DistillTrainer
from trsd.integrations.row_loss import RowCounts, RowLoss
from trsd.methods.trsd import TRSD

pytest.importorskip("accelerate")

SHARED = dict(
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    max_steps=1,
    save_strategy="no",
    logging_steps=1,
    lr_scheduler_type="constant",
)


@pytest.fixture
def method(traces, think):
    return TRSD(traces, think, uniform, seed=3, branches_per_trace=2, keep_thinking=True)


def trainer_of(tokenizer, folder, rows, *, options=None, teacher=True, **settings):
    return DistillTrainer(
        padded_model(tokenizer, seed=0),
        padded_model(tokenizer, seed=1) if teacher else None,
        TrainingArguments(str(folder), **(SHARED | settings)),
        thinking_weight=0.5,
        distill_options=options,
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


@pytest.mark.parametrize(
    "options", [{}, dict(alpha=0.6, divergence="jsd", beta=0.3, temperature=2.0)], ids=["forward_kl", "jsd"]
)
@pytest.mark.parametrize("accumulated", [1, 7])
def test_a_step_is_the_step_of_our_trainer(tokenizer, tmp_path, traces, method, options, accumulated):
    """One batch of 14 rows, or 7 micro-batches of 2 with unequal numbers of tokens."""
    students = padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)
    members = [(0, index) for index in range(len(traces))]
    loss, terms, wanted = own_loss(*students, method, members, thinking_weight=0.5, **options)
    settings = dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=14 // accumulated)
    trainer = trainer_of(tokenizer, tmp_path, cut_rows(method), options=options, **settings)
    gradients, clip = {}, trainer.accelerator.clip_grad_norm_

    def keep(*args, **kwargs):
        gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return clip(*args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = keep
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    names = ("cross_entropy", "divergence", "thinking_cross_entropy")
    assert [logged[name] for name in names] == pytest.approx(terms[1:].tolist(), rel=1e-6, abs=1e-7)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_run_learns_evaluates_and_saves_the_student_alone(tokenizer, tmp_path, method):
    trainer = trainer_of(
        tokenizer, tmp_path, cut_rows(method), max_steps=8, learning_rate=3e-3, per_device_train_batch_size=5,
        eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=4, save_strategy="steps", save_steps=8,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    measured = [row for row in history if "eval_loss" in row]
    wanted = trainer.row_loss(trainer.model, CutRowCollator()(cut_rows(method)[:4]))
    assert measured[-1]["eval_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert measured[-1]["eval_divergence"] == pytest.approx(wanted.divergence.item(), rel=1e-5)
    folder = tmp_path / "checkpoint-8"
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_without_a_teacher_the_labels_are_learnt(tokenizer, tmp_path, traces, think):
    rows = cut_rows(TRSD(traces, think, uniform, seed=3))
    trainer = trainer_of(tokenizer, tmp_path, rows, teacher=False, options={"alpha": 0.0}, per_device_eval_batch_size=4)
    batch = CutRowCollator()(rows[:4])
    with torch.no_grad():
        whole = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_what_would_change_the_loss_is_refused(tokenizer, tmp_path, method):
    with pytest.raises(InputError, match="label_smoothing_factor"):
        trainer_of(tokenizer, tmp_path, cut_rows(method), label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="alpha=0"):
        trainer_of(tokenizer, tmp_path, cut_rows(method), teacher=False)


def dtypes_of_layers(trainer):
    """Filled with what the student's and the teacher's layers compute in, from now on."""
    seen = {"student": set(), "teacher": set()}
    for name, model in (("student", trainer.model), ("teacher", trainer.row_loss.teacher)):
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda *args, name=name: seen[name].add(args[2].dtype))
    return seen


@pytest.mark.parametrize("bf16", [True, False])
def test_mixed_precision_is_that_of_the_arguments(tokenizer, tmp_path, method, bf16):
    """In training and in evaluation; accelerate's autocast is around a forward that is not what is run."""
    trainer = trainer_of(
        tokenizer, tmp_path, cut_rows(method), bf16=bf16, eval_strategy="steps", eval_steps=1, learning_rate=0.0
    )
    seen = dtypes_of_layers(trainer)
    wanted = trainer.row_loss(trainer.model, CutRowCollator()(cut_rows(method)[:4])).loss.item()
    assert seen.pop("student") == seen.pop("teacher") == {torch.float32}
    seen.update(dtypes_of_layers(trainer))
    trainer.train()
    used = torch.bfloat16 if bf16 else torch.float32
    assert seen == {"student": {used}, "teacher": {used}}
    (measured,) = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert measured == pytest.approx(wanted, rel=2e-2 if bf16 else 1e-5)
    assert bf16 == (abs(measured - wanted) > 1e-6 * wanted)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_labels_are_counted_where_the_batches_are(monkeypatch):
    """As on a GPU, by tensors of one, without content: those of the CPU may not be added to them."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    class Batches:
        args = TrainingArguments(use_cpu=True, average_tokens_across_devices=False)

        def get_batch_samples(self, iterator, num_batches, device):
            return list(iterator), None

    class Counting(CutRowLoss, Batches):
        pass

    # Slices of such a tensor ask for the device; its sum stands for the counts.
    monkeypatch.setattr(hf_trainer, "row_counts", lambda batch: RowCounts(batch["labels"].sum(), batch["labels"].sum()))
    with FakeTensorMode() as mode:
        labels = FakeTensor(mode, torch.zeros(2, 5, dtype=torch.int64, device="meta"), torch.device("cuda"))
        trainer = Counting()
        trainer.get_batch_samples(iter([{"labels": labels}] * 3), 3, torch.device("cpu"))
    assert len(trainer._step_counts) == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_is_a_mean_over_tokens_whatever_the_batches(tokenizer, tmp_path, method, size):
    rows = cut_rows(method)
    trainer = trainer_of(tokenizer, tmp_path, rows, options={"alpha": 0.7}, per_device_eval_batch_size=size)
    trainer.predict(rows[4:])  # what it measured is no part of what comes next
    found = trainer.evaluate(metric_key_prefix="held_out")
    wanted = trainer.row_loss(trainer.model, CutRowCollator()(rows[:4]))
    names = ("loss", "cross_entropy", "divergence", "thinking_cross_entropy")
    for name, value in zip(names, wanted, strict=True):
        assert found[f"held_out_{name}"] == pytest.approx(value.item(), rel=1e-5)
    assert not any(name.startswith("eval_") for name in found)


def test_several_sets_are_evaluated_each_by_its_name(tokenizer, tmp_path, method):
    rows = cut_rows(method)
    trainer = trainer_of(tokenizer, tmp_path, rows)
    found = trainer.evaluate({"a": rows[:4], "b": rows[4:9]})
    for name, part in (("a", rows[:4]), ("b", rows[4:9])):
        wanted = trainer.row_loss(trainer.model, CutRowCollator()(part))
        assert found[f"eval_{name}_divergence"] == pytest.approx(wanted.divergence.item(), rel=1e-5)
        assert found[f"eval_{name}_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_what_is_made_for_logits_is_refused(tokenizer, tmp_path, method, name):
    students = padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)
    arguments = TrainingArguments(str(tmp_path), **SHARED)
    with pytest.raises(InputError, match=f"{name}: made for logits"):
        DistillTrainer(*students, arguments, train_dataset=cut_rows(method), **{name: lambda *_: {}})


def test_a_training_run_that_was_broken_off_is_no_part_of_the_next(tokenizer, tmp_path, method, monkeypatch):
    rows, settings = cut_rows(method), dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainers = [trainer_of(tokenizer, tmp_path, rows[start:][:4], **settings) for start in (4, 0)]
    broken, backward, seen = trainers[0], trainers[0].accelerator.backward, []

    def too_big(loss, **kwargs):
        seen.append(loss)
        if len(seen) == 2:
            raise RuntimeError("CUDA out of memory.")
        backward(loss, **kwargs)

    monkeypatch.setattr(broken.accelerator, "backward", too_big)
    with pytest.raises(RuntimeError):
        broken.train()
    monkeypatch.setattr(broken.accelerator, "backward", backward)
    broken.train_dataset = rows[:4]
    for trainer in trainers:
        trainer.train()
    found, wanted = (trainer.state.log_history[0] for trainer in trainers)
    for name in ("loss", "cross_entropy", "divergence", "thinking_cross_entropy"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)


def test_an_evaluation_that_was_broken_off_is_no_part_of_the_next(tokenizer, tmp_path, method):
    rows = cut_rows(method)
    trainer = trainer_of(tokenizer, tmp_path, rows, per_device_eval_batch_size=1)
    with pytest.raises(InputError, match="no label to learn"):
        trainer.evaluate([*rows[4:6], rows[0] | {"labels": [-100] * len(rows[0]["labels"])}])
    wanted = trainer.row_loss(trainer.model, CutRowCollator()(rows[:4]))
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(wanted.divergence.item(), rel=1e-5)


def test_a_compiled_student_is_refused(tokenizer, tmp_path, method, monkeypatch):
    for name in ("BACKEND", "MODE"):  # which the arguments set
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    with pytest.raises(InputError, match="torch_compile compiles the model's forward"):
        trainer_of(tokenizer, tmp_path, cut_rows(method), torch_compile=True, torch_compile_backend="eager")


def test_a_routers_auxiliary_loss_is_refused():
    student = small_model("mixtral", num_local_experts=4, output_router_logits=True)
    with pytest.raises(InputError, match="auxiliary loss is not part of this loss: set output_router_logits=False"):
        RowLoss(student, None, alpha=0.0)
