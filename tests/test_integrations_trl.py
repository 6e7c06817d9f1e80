"""TRL's trainers with our loss, held to TRL's own."""

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

from trsd.integrations.cut_rows import DistillCollator

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trsd.integrations.trl_trainer import DistillSFTTrainer, FusedDistillationTrainer  # noqa: E402, after TRL

QUESTIONS = ["Ravi has 27 pears. He buys 5 more.", "Lily has 3 tickets.", "Tom sells 4 of his 9 apples.", "How many?"]


def distillation_trainer(kind, tokenizer, folder, **settings):
    arguments = dict(
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        max_grad_norm=1e9,
        seed=3,
        disable_tqdm=True,
    )
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    return kind(
        model=small_model(tokenizer),
        teacher_model=small_model(tokenizer, hidden_size=48, seed=1),
        args=trl.DistillationConfig(str(folder), **arguments | settings),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )


def one_step(trainer, monkeypatch):
    """(what the step logs, the gradients it is taken on)"""
    found = {}
    trainer.create_optimizer()
    take = lambda *_, **__: found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})  # noqa: E731
    monkeypatch.setattr(trainer.optimizer, "step", take)
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry), found


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.3, 2.0)])
def test_a_step_is_that_of_trls_trainer(tokenizer, tmp_path, monkeypatch, beta, temperature):
    """The student writes the same completions, and every token of them has the same divergence and gradients."""
    logs, gradients = {}, {}
    for kind in (trl.DistillationTrainer, FusedDistillationTrainer):
        trainer = distillation_trainer(kind, tokenizer, tmp_path / kind.__name__, beta=beta, temperature=temperature)
        logs[kind], gradients[kind] = one_step(trainer, monkeypatch)
    theirs, ours = logs.values()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["loss"] > 0.01
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    assert_same_gradients(*gradients.values())


def test_a_run_comes_closer_to_its_teacher(tokenizer, tmp_path):
    trainer = distillation_trainer(
        FusedDistillationTrainer,
        tokenizer,
        tmp_path,
        max_steps=30,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def sft_trainer(tokenizer, rows, folder, **settings):
    arguments = dict(
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        max_grad_norm=1e9,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return DistillSFTTrainer(
        small_model(tokenizer),
        teacher=small_model(tokenizer, hidden_size=48, seed=1),
        distill_options=OPTIONS,
        args=trl.SFTConfig(str(folder), **arguments | settings),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DistillCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_rows_of_cut_traces_have_the_loss_and_gradients_of_the_trainers_own_loop(
    tokenizer, think, tmp_path, monkeypatch, accumulation
):
    rows = trsd_rows(tokenizer, think)
    trainer = sft_trainer(
        tokenizer,
        rows,
        tmp_path,
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    log, gradients = one_step(trainer, monkeypatch)
    student = small_model(tokenizer)
    expected = loss_of_the_loop(trsd_method(tokenizer, think), student, trainer.teacher, **OPTIONS)
    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, gradients_of(student))


def test_fine_tuning_with_a_teacher_learns(tokenizer, think, tmp_path):
    trainer = sft_trainer(
        tokenizer,
        trsd_rows(tokenizer, think),
        tmp_path,
        max_steps=12,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()
