"""Hugging Face ``Trainer`` with our loss."""

import json

import pytest
import torch
from integration_cases import (
    OPTIONS,
    assert_same_gradients,
    gradients_of,
    loss_of_the_loop,
    small_model,
    trsd_method,
    trsd_rows,
)
from transformers import AutoModelForCausalLM, TrainingArguments

from trsd.integrations.cut_rows import DistillCollator
from trsd.integrations.hf_trainer import DistillTrainer

pytest.importorskip("accelerate")


def trainer_of(tokenizer, rows, folder, *, teacher=True, **settings):
    arguments = dict(
        max_steps=1, learning_rate=0.0, report_to="none", save_strategy="no", max_grad_norm=1e9, use_cpu=True
    )
    return DistillTrainer(
        small_model(tokenizer),
        args=TrainingArguments(str(folder), **arguments | settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DistillCollator(tokenizer.pad_token_id),
        teacher=small_model(tokenizer, hidden_size=48, seed=1) if teacher else None,
        distill_options=OPTIONS if teacher else None,
    )


def loss_and_gradients(trainer, monkeypatch):
    """What one optimizer step of ``trainer`` logs, and the gradients it is taken on."""
    found = {}

    def stepped(*_, **__):
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.create_optimizer()
    monkeypatch.setattr(trainer.optimizer, "step", stepped)
    trainer.args.logging_steps = 1
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), found


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_has_the_loss_and_gradients_of_the_trainers_own_loop(
    tokenizer, think, tmp_path, monkeypatch, accumulation
):
    """Micro-batches of unequal numbers of labels add up to the large one."""
    rows = trsd_rows(tokenizer, think)
    trainer = trainer_of(
        tokenizer,
        rows,
        tmp_path,
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    loss, gradients = loss_and_gradients(trainer, monkeypatch)
    student = small_model(tokenizer)
    expected = loss_of_the_loop(trsd_method(tokenizer, think), student, trainer.teacher, **OPTIONS)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, gradients_of(student))


def test_evaluation_has_the_mean_over_labels_of_a_batch(tokenizer, think, tmp_path):
    rows = trsd_rows(tokenizer, think)
    trainer = trainer_of(tokenizer, rows, tmp_path, per_device_eval_batch_size=len(rows))
    expected = loss_of_the_loop(trsd_method(tokenizer, think), small_model(tokenizer), trainer.teacher, **OPTIONS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_without_a_teacher_the_labels_are_learnt(tokenizer, think, tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trsd_rows(tokenizer, think)]
    trainer = trainer_of(tokenizer, rows, tmp_path, teacher=False, per_device_eval_batch_size=len(rows))
    batch = DistillCollator(tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        expected = trainer.model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_learns_saves_and_leaves_the_teacher_alone(tokenizer, think, tmp_path):
    rows = trsd_rows(tokenizer, think)
    trainer = trainer_of(
        tokenizer,
        rows,
        tmp_path,
        max_steps=12,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=12,
    )
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * start
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())
    folder = tmp_path / "checkpoint-12"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
