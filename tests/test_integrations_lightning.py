"""Our loss in PyTorch Lightning."""

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
from torch.utils.data import DataLoader

from trsd.integrations.cut_rows import DistillCollator

lightning = pytest.importorskip("lightning")

from trsd.integrations.lightning_module import DistillModule  # noqa: E402, after it is known to be there


class Seen(DistillModule):
    """Keeps the gradients that a step is taken on."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: p.grad.clone() for name, p in self.student.named_parameters()}


def fit(module, rows, tokenizer, folder, *, batch_size, **options):
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=DistillCollator(tokenizer.pad_token_id))
    settings = dict(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer = lightning.Trainer(**settings | options)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4), (3, 7)])
def test_a_step_has_the_loss_and_gradients_of_the_trainers_own_loop(tokenizer, think, tmp_path, batch_size, accumulate):
    """Also where micro-batches hold unequal numbers of labels, and where an epoch ends within a step."""
    rows = trsd_rows(tokenizer, think)
    student, teacher = small_model(tokenizer), small_model(tokenizer, hidden_size=48, seed=1)
    module = Seen(small_model(tokenizer), teacher, learning_rate=0.0, **OPTIONS)
    trainer = fit(module, rows, tokenizer, tmp_path, batch_size=batch_size, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 1
    expected = loss_of_the_loop(trsd_method(tokenizer, think), student, teacher, **OPTIONS)
    assert_same_gradients(module.gradients, gradients_of(student))
    if batch_size == len(rows):
        assert trainer.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped_after_they_are_those_of_the_step(tokenizer, think, tmp_path):
    """A limit just above the norm changes nothing, one just below it does."""
    rows = trsd_rows(tokenizer, think)

    class Clipped(DistillModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item()

    def norm_at_the_step(limit):
        module = Clipped(small_model(tokenizer), learning_rate=0.0)
        fit(module, rows, tokenizer, tmp_path, batch_size=2, accumulate_grad_batches=4, gradient_clip_val=limit)
        return module.norm

    norm = norm_at_the_step(None)
    assert norm_at_the_step(1.1 * norm) == norm
    assert norm_at_the_step(0.9 * norm) == pytest.approx(0.9 * norm, rel=1e-4)


def test_a_run_learns_and_its_checkpoint_holds_the_student_alone(tokenizer, think, tmp_path):
    rows = trsd_rows(tokenizer, think)
    teacher = small_model(tokenizer, hidden_size=48, seed=1)
    module = DistillModule(small_model(tokenizer), teacher, learning_rate=3e-3, **OPTIONS)
    losses = []
    module.on_train_epoch_end = lambda: losses.append(module.trainer.callback_metrics["train_loss"].item())
    trainer = fit(module, rows, tokenizer, tmp_path, batch_size=4, max_epochs=6)
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == {f"student.{name}" for name in module.student.state_dict()}


def test_validation_is_the_mean_over_all_labels(tokenizer, think, tmp_path):
    rows = trsd_rows(tokenizer, think)
    student, teacher = small_model(tokenizer), small_model(tokenizer, hidden_size=48, seed=1)
    expected = loss_of_the_loop(trsd_method(tokenizer, think), small_model(tokenizer), teacher, **OPTIONS)
    loader = DataLoader(rows, batch_size=3, collate_fn=DistillCollator(tokenizer.pad_token_id))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    [measured] = trainer.validate(DistillModule(student, teacher, **OPTIONS), loader, verbose=False)
    assert measured["validation_loss"] == pytest.approx(expected, rel=1e-5)
