"""A ``LightningModule`` that distils rows of ``cut_rows``, with the loss of this package's own trainer.

A batch of the DataLoader is one optimizer step. Lightning's ``accumulate_grad_batches`` would divide the loss of each
micro-batch by their number, but the loss is a mean over the step's tokens, and thinking has a count of its own; no
micro-batch knows either beforehand. So the module optimizes by itself: it counts the whole batch, over all ranks, and
runs it ``micro_batch_size`` rows at a time. Their gradients add up to that of the whole batch, however unequal their
numbers of tokens.

``Trainer(accumulate_grad_batches=..., gradient_clip_val=...)`` are refused by Lightning for such a module: use the
DataLoader's ``batch_size`` with ``micro_batch_size``, and ``max_grad_norm``. Runs on one device or by DDP.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.integrations.row_loss import RowCounts, RowLoss, TermMeans, learn_only, row_counts
from trsd.optim import build_optimizer

try:
    from lightning import LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError:
    try:
        from pytorch_lightning import LightningModule
        from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
    except ImportError:
        raise ImportError("trsd.integrations.lightning_module needs Lightning: pip install 'trsd[lightning]'") from None


class CutRowModule(LightningModule):
    """A student that learns from a frozen teacher; batches are those of ``CutRowCollator``.

    Its parameters, state and checkpoints are the student's alone, as ``student.*``. A checkpoint is loaded with
    ``CutRowModule.load_from_checkpoint(path, student=..., teacher=...)``; ``module.student.save_pretrained`` writes a
    Hugging Face folder.

    Logged each step: loss, cross_entropy, divergence, thinking_cross_entropy and grad_norm. Of validation: the same
    terms and the loss as ``val_*``, means over all its tokens.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        micro_batch_size: int | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        thinking_weight: float = 1.0,
        **options: Any,
    ) -> None:
        """Take the models and the options of a run.

        Args:
            student: trained, in place.
            teacher: of the student's tokenizer; None with ``alpha`` 0.
            micro_batch_size: rows that run together; None: all of a batch. Changes memory and speed, never the loss.
            learning_rate, weight_decay: of AdamW; override ``configure_optimizers`` for another optimizer, or for a
                scheduler, which is stepped once a batch.
            max_grad_norm: to which the gradient is clipped; ``math.inf`` leaves it.
            thinking_weight: of the cross-entropy of rows' thinking labels.
            **options: of ``RowLoss``: alpha, divergence, beta, temperature, vocab_size, chunk_bytes, ...

        Raises:
            InputError: what ``RowLoss`` refuses, or sizes that are none.
        """
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise InputError(f"micro_batch_size: expected 1 or more rows, got {micro_batch_size}")
        self.automatic_optimization = False
        self.row_loss = RowLoss(student, teacher, thinking_weight=thinking_weight, **options)
        self.student = student.train()
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._validated = TermMeans()

    def configure_optimizers(self) -> Any:
        """AdamW; matrices decay, norms and biases do not."""
        return build_optimizer(self.student, learning_rate=self.learning_rate, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Refuse what would not train as said."""
        if not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            name = type(self.trainer.strategy).__name__
            raise InputError(
                f"strategy {name}: expected one device or DDP; for weights in shards torchrun -m trsd.train"
            )
        if self.trainer.precision == "16-mixed":
            raise InputError("precision 16-mixed: its scaled gradients would be clipped; use bf16-mixed or 32")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step on ``batch``."""
        optimizer = self.optimizers()
        counts = RowCounts(*self._over_ranks(torch.stack(row_counts(batch))))
        optimizer.zero_grad()
        totals = torch.zeros(4, dtype=torch.float32, device=self.device)
        parts = list(_micro_batches(batch, self.micro_batch_size))
        for number, rows in enumerate(parts, start=1):
            # Gradients go to the other ranks once, with the last rows: how many parts a rank has is its own affair.
            with nullcontext() if number == len(parts) else self._unshared():
                terms = self.row_loss(self.student, rows, counts)
                self.manual_backward(terms.loss * self.trainer.world_size)  # DDP takes the mean over ranks
            totals += torch.stack(terms).detach()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        optimizer.step()
        self._step_schedulers()
        names = ("loss", "cross_entropy", "divergence", "thinking_cross_entropy")
        found = dict(zip(names, self._over_ranks(totals), strict=True)) | {"grad_norm": norm}
        self.log_dict(found, prog_bar=True, batch_size=len(batch["labels"]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the terms of ``batch``."""
        batch = self._without_repeats(batch, batch_idx)
        self._validated.add(self.row_loss(self.student, batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens of the epoch."""
        means = self._validated.take(self._over_ranks)
        means["loss"] = self.row_loss.of_means(**means)
        self.log_dict({f"val_{name}": value for name, value in means.items()}, prog_bar=True, sync_dist=True)

    def _without_repeats(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Leave out the rows that a DistributedSampler takes a second time where they do not divide by the ranks."""
        loader, rows = self.trainer.val_dataloaders, len(batch["labels"])
        loader = loader[0] if isinstance(loader, list) else loader
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return batch
        mine = batch_idx * loader.batch_size + torch.arange(rows, device=batch["labels"].device)
        return learn_only(batch, mine * sampler.num_replicas + sampler.rank < len(sampler.dataset))

    def _unshared(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    def _step_schedulers(self) -> None:
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()


def _micro_batches(batch: Mapping[str, Tensor], size: int | None) -> Iterator[dict[str, Tensor]]:
    """Some rows at a time, without the columns in which all of them are padding; None: the batch as it is."""
    if size is None:
        yield dict(batch)
        return
    for start in range(0, len(batch["labels"]), size):
        rows = {name: column[start:][:size] for name, column in batch.items()}
        for name in ("", "teacher_"):
            longest = int(rows[f"{name}attention_mask"].sum(1).max())
            for column in rows:
                if column.startswith("teacher_") == bool(name):
                    rows[column] = rows[column][:, :longest]
        yield rows
