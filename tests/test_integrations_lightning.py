"""The LightningModule takes the steps of this package's trainer, whatever its micro-batches, and saves the student."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from integration_cases import own_loss, padded_model
from torch.utils.data import DataLoader, DistributedSampler

from trsd.cuts import uniform
from trsd.errors import InputError
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.integrations.row_loss import RowCounts, row_counts
from trsd.methods.lsp import LSP, learnable
from trsd.methods.trsd import TRSD
from trsd.truncation import fraction

lightning = pytest.importorskip("lightning")

from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy  # noqa: E402

from trsd.integrations.lightning_module import CutRowModule, _micro_batches  # noqa: E402

OPTIONS = [{}, dict(alpha=0.6, divergence="jsd", beta=0.3, temperature=2.0)]


@pytest.fixture
def method(traces, think):
    return TRSD(traces, think, uniform, seed=3, branches_per_trace=2, keep_thinking=True)


@pytest.fixture
def models(tokenizer):
    return padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)


def trainer_of(**settings):
    defaults = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1)
    return lightning.Trainer(**(defaults | dict(enable_checkpointing=False) | settings))


def loader(rows, **settings):
    return DataLoader(rows, collate_fn=CutRowCollator(), **(dict(batch_size=len(rows)) | settings))


class Kept(CutRowModule):
    """Keeps the gradients that the optimizer finds."""

    def configure_optimizers(self):
        optimizer, self.found = super().configure_optimizers(), []
        optimizer.register_step_pre_hook(
            lambda *_: self.found.append({name: p.grad.clone() for name, p in self.student.named_parameters()})
        )
        return optimizer


@pytest.mark.parametrize("options", OPTIONS, ids=["forward_kl", "jsd"])
@pytest.mark.parametrize("micro_batch_size", [None, 7, 3])
def test_a_step_is_the_step_of_our_trainer(models, traces, method, options, micro_batch_size):
    """Of 14 rows: at once, as two micro-batches of unequal numbers of tokens, and as five of which one is smaller."""
    members = [(0, index) for index in range(len(traces))]
    _, terms, wanted = own_loss(*models, method, members, thinking_weight=0.5, **options)
    settings = dict(micro_batch_size=micro_batch_size, thinking_weight=0.5, max_grad_norm=math.inf)
    module, trainer = Kept(*models, **settings, **options), trainer_of()
    trainer.fit(module, loader(cut_rows(method)))
    names = ("loss", "cross_entropy", "divergence", "thinking_cross_entropy")
    found = [trainer.logged_metrics[name].item() for name in names]
    assert found == pytest.approx(terms.tolist(), rel=1e-6, abs=1e-7)
    (gradients,) = module.found
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert trainer.logged_metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_lsp_rows_are_learnt_too(models, traces):
    kept, dropped, _ = learnable(traces, fraction(0.6), ("cot", "a"))
    method = LSP(kept, fraction(0.6), ("cot", "a"))
    assert len(kept) > 4 and dropped
    _, terms, _ = own_loss(*models, method, [(0, index) for index in range(len(kept))], alpha=0.5)
    trainer = trainer_of()
    trainer.fit(CutRowModule(*models, micro_batch_size=2, alpha=0.5), loader(cut_rows(method)))
    assert trainer.logged_metrics["loss"].item() == pytest.approx(terms[0].item(), rel=1e-6)


def test_a_fit_learns_and_validates_over_all_tokens(models, method, tmp_path):
    rows = cut_rows(method)
    module = CutRowModule(*models, micro_batch_size=3, learning_rate=3e-3)
    trainer = trainer_of(max_epochs=6, max_steps=-1, default_root_dir=tmp_path)
    batch = CutRowCollator()(rows[9:])
    before = module.row_loss(module.student, batch).loss.item()
    # Three batches of unequal numbers of tokens.
    trainer.fit(module, loader(rows[:9], batch_size=5), loader(rows[9:], batch_size=2))
    after = module.row_loss(module.student, batch)
    logged = trainer.logged_metrics
    assert logged["val_loss"].item() == pytest.approx(after.loss.item(), rel=1e-5) and after.loss < 0.8 * before
    assert logged["val_divergence"].item() == pytest.approx(after.divergence.item(), rel=1e-5)
    assert logged["val_thinking_cross_entropy"].item() == pytest.approx(after.thinking.item(), rel=1e-5)
    assert trainer.global_step == 12


def test_a_checkpoint_holds_the_student_alone_and_loads(models, method, tmp_path, tokenizer):
    module = CutRowModule(*models, learning_rate=1e-2)
    trainer = trainer_of(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(module, loader(cut_rows(method)))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() == {f"student.{name}" for name in models[0].state_dict()}
    assert {name for name, _ in module.named_parameters()} == {f"student.{n}" for n, _ in models[0].named_parameters()}
    fresh = padded_model(tokenizer, seed=0)
    loaded = CutRowModule.load_from_checkpoint(path, student=fresh, teacher=models[1])
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


def test_the_teacher_stays_as_it_is(models, method):
    before = {name: value.clone() for name, value in models[1].state_dict().items()}
    trainer_of(max_steps=2).fit(CutRowModule(*models, learning_rate=1e-2), loader(cut_rows(method)))
    assert all(torch.equal(before[name], value) for name, value in models[1].state_dict().items())
    assert not models[1].training and models[0].training


def test_a_gradient_is_clipped_to_its_norm(models, method):
    module = Kept(*models, max_grad_norm=0.01)
    trainer = trainer_of()
    trainer.fit(module, loader(cut_rows(method)))
    (gradients,) = module.found
    assert torch.stack([g.norm() for g in gradients.values()]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert trainer.logged_metrics["grad_norm"] > 0.02


def test_a_scheduler_of_ones_own_is_stepped_once_a_batch(models, method):
    class Scheduled(CutRowModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)]

    module = Scheduled(*models, micro_batch_size=2, learning_rate=1e-3)
    trainer_of(max_steps=3).fit(module, loader(cut_rows(method), batch_size=4))
    assert module.lr_schedulers().get_last_lr() == [pytest.approx(1e-3 / 8)] * 2


@pytest.mark.parametrize("settings", [dict(accumulate_grad_batches=2), dict(gradient_clip_val=1.0)])
def test_lightnings_own_accumulation_and_clipping_are_refused_by_it(models, method, settings):
    with pytest.raises(lightning.pytorch.utilities.exceptions.MisconfigurationException, match=next(iter(settings))):
        trainer_of(**settings).fit(CutRowModule(*models), loader(cut_rows(method)))


def test_sizes_that_are_none_are_refused(models):
    with pytest.raises(InputError, match="micro_batch_size"):
        CutRowModule(*models, micro_batch_size=0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in ["lightning", "pytorch_lightning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "trsd.integrations.lightning_module")
    with pytest.raises(ImportError, match=r"pip install 'trsd\[lightning\]'"):
        importlib.import_module("trsd.integrations.lightning_module")


ON_TWO_RANKS = """
import torch
from conftest import REASONER, make_traces
from integration_cases import padded_model
from test_integrations_lightning import CutRowModule, loader, trainer_of
from torch.utils.data import DataLoader
from trsd.cuts import uniform
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.methods.trsd import TRSD
from trsd.models import load_tokenizer
from trsd.thinking import ThinkFormat

torch.set_num_threads(1)
tokenizer = load_tokenizer(REASONER)
think = ThinkFormat.of(tokenizer)
traces = make_traces(tokenizer, think, 7)
rows = cut_rows(TRSD(traces, think, uniform, seed=3, branches_per_trace=2, keep_thinking=True))

class SGD(CutRowModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)

class Uneven:
    # The eight first rows, of which one rank has five and the other three.
    def __init__(self, devices):
        self.devices = devices

    def __iter__(self):
        parts = [range(5), range(5, 8)] if self.devices == 2 else [range(8)]
        rank = torch.distributed.get_rank() if self.devices == 2 else 0
        yield from [list(parts[rank])] * 2

    def __len__(self):
        return 2

def run(devices, uneven=False):
    models = padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)
    settings = dict(devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=2)
    settings |= dict(use_distributed_sampler=not uneven)
    trainer = trainer_of(**settings)
    module = SGD(*models, micro_batch_size=2)
    batches = DataLoader(rows, collate_fn=CutRowCollator(), batch_sampler=Uneven(devices))
    batches = batches if uneven else loader(rows, batch_size=14 // devices)
    trainer.fit(module, batches, loader(rows[:5], batch_size=2))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, module.student.state_dict()

for uneven in (False, True):
    two, weights = run(2, uneven)
    one, wanted = run(1, uneven)
    assert one["loss"] > 0 and one["val_loss"] > 0
    for name, value in one.items():
        assert abs(two[name] - value) <= 1e-5 * abs(value) + 1e-7, (name, two[name], value)
    for name, value in wanted.items():
        assert torch.allclose(weights[name], value, atol=1e-6), name
print("the same")
"""


def test_rows_that_fill_up_the_ranks_are_validated_once(models, method):
    """Five rows on two ranks: the last batch of one of them holds the first row again."""
    rows, counts = cut_rows(method)[:5], []
    module = CutRowModule(*models)
    for rank in range(2):
        batches = loader(rows, batch_size=2, sampler=DistributedSampler(rows, 2, rank, shuffle=False))
        module.trainer = SimpleNamespace(val_dataloaders=batches)
        counts += [row_counts(module._without_repeats(batch, index)) for index, batch in enumerate(batches)]
    wanted = row_counts(CutRowCollator()(rows))
    assert sum(found.items for found in counts) == wanted.items
    assert sum(found.thinking for found in counts) == wanted.thinking


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one():
    tests = Path(__file__).parent
    paths = os.pathsep.join(str(path) for path in (tests, tests.parent, tests.parent / "kernels"))
    result = subprocess.run(
        [sys.executable, "-c", ON_TWO_RANKS],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert result.returncode == 0 and "the same" in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize(
    "strategy,precision,message",
    [("single", "16-mixed", "scaled gradients"), ("fsdp", "32-true", "FSDPStrategy: expected one device or DDP")],
)
def test_what_would_not_train_as_said_is_refused(models, strategy, precision, message):
    kinds = {"single": lambda: SingleDeviceStrategy(torch.device("cpu")), "fsdp": FSDPStrategy}
    module = CutRowModule(*models)
    module._trainer = SimpleNamespace(strategy=kinds[strategy](), precision=precision)
    with pytest.raises(InputError, match=message):
        module.on_fit_start()


def test_a_teacher_with_the_students_adapter_in_it_is_refused(models):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(models[0], peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="before an adapter is added"):
        CutRowModule(adapted, models[0])


def test_a_batch_that_runs_at_once_keeps_its_padding(method):
    batch = CutRowCollator(pad_to_multiple_of=64)(cut_rows(method))
    (whole,) = _micro_batches(batch, None)
    assert all(torch.equal(whole[name], batch[name]) for name in batch)
    parts = list(_micro_batches(batch, 5))
    assert all(part["input_ids"].shape[1] == part["attention_mask"].sum(1).max() for part in parts)
    assert sum(len(part["labels"]) for part in parts) == len(batch["labels"])


def test_terms_of_bf16_weights_are_added_in_fp32(models, method):
    module = CutRowModule(*models, learning_rate=0.0, micro_batch_size=2)
    trainer = trainer_of(precision="bf16-true")
    trainer.fit(module, loader(cut_rows(method)))
    parts = list(_micro_batches(CutRowCollator()(cut_rows(method)), 2))
    counts = RowCounts(*(sum(found) for found in zip(*map(row_counts, parts), strict=True)))
    wanted = sum(module.row_loss(module.student, part, counts).loss.item() for part in parts)
    assert trainer.logged_metrics["loss"].item() == pytest.approx(wanted, rel=1e-5)
