"""The training step: packed batches, each normalised by the step's own count of supervised tokens.

Of several ranks each runs its share of a step's rows; gradients and metrics are sums over all of them, so the ranks'
number changes a step by rounding only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import PackedBatch, TraceStream, pack_examples
from trsd.compiled_layers import CompiledLayers
from trsd.engines import stream_seed
from trsd.flops import FlopCounter, head_flops
from trsd.guards import StepGuard
from trsd.methods import Method
from trsd.models import logit_options
from trsd.objective import Objective
from trsd.optim import build_optimizer, learning_rate_factor, rounded_up, set_learning_rate
from trsd.parallel import last_row, refuse_kept_in_fp32, shard_student
from trsd.placement import Placement
from trsd.prefetch import Prefetcher
from trsd.ranks import Ranks
from trsd.sharded_heads import ShardedHeadsObjective, head_rows, keep_head_rows
from trsd.student_loss import StudentLoss
from trsd.teacher_cache import HiddenCache
from trsd.teachers import OnlineTeacher, Teacher
from trsd.working_weights import WorkingWeights
from trsd_kernels import fill_rate


class StepRows(NamedTuple):
    """What one rank runs in a step, and the counts of the whole step."""

    batches: list[PackedBatch]
    """Of this rank."""
    num_items: int
    num_thinking: int
    num_tokens: int


class Loop:
    """Optimizer steps of one model; a step is a function of its number and the state so far."""

    def __init__(
        self,
        placement: Placement,
        model: PreTrainedModel,
        teacher: Teacher | None,
        method: Method,
        ranks: Ranks | None = None,
        *,
        held_out: Sequence[int] = (),
    ) -> None:
        """Take the parts of a run; with several ``ranks`` the model is sharded over them, in place.

        Traces that are ``held_out`` are not learnt from; ``validation.py`` measures their loss.
        """
        recipe, ranks = placement.recipe, ranks or Ranks(device=placement.device)
        self.placement, self.model, self.teacher, self.method, self.ranks = placement, model, teacher, method, ranks
        batch_size = recipe.train_batch_size
        self.held_out = held_out
        self.stream = TraceStream(len(method.traces), batch_size=batch_size, seed=recipe.seed, held_out=held_out)
        self.num_steps = recipe.max_steps or rounded_up(recipe.num_train_epochs * self.stream.num_traces / batch_size)
        self.backend = placement.attention_backend(model.config, branches=recipe.branches_per_trace > 1)
        self.student = self._student()
        self.flops = FlopCounter(model)
        self.teacher_head = teacher.lm_head_weight.numel() if isinstance(teacher, OnlineTeacher | HiddenCache) else 0
        self.teacher_flops = FlopCounter(teacher.model) if isinstance(teacher, OnlineTeacher) else None
        dtype = torch.bfloat16 if placement.bf16 else None
        if recipe.vocab_parallel:
            rows = head_rows(len(model.get_output_embeddings().weight), placement.vocab_size, ranks)
            keep_head_rows(teacher, rows)
        if ranks.size > 1:
            refuse_kept_in_fp32(model, dtype)
            mesh = ranks.mesh(recipe.shard_group_size)
            shard_student(
                self.student,
                mesh,
                dtype=dtype,
                cpu_offload=recipe.cpu_offload,
                vocab_parallel=recipe.vocab_parallel,
            )
        self.weights = WorkingWeights(model, dtype, copied=ranks.size == 1)
        readers = [teacher.model] if isinstance(teacher, OnlineTeacher) else []
        self.layers = CompiledLayers([model, *readers] if recipe.torch_compile else [], placement.compiler)
        self.optimizer = build_optimizer(
            model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, name=recipe.optim
        )
        self.guard = StepGuard(recipe.max_grad_norm, max_skipped_steps=recipe.max_skipped_steps)
        self.prefetcher = Prefetcher(self.rows_of, self.num_steps)

    def _student(self) -> StudentLoss:
        """The model with the recipe's loss."""
        recipe, placement = self.placement.recipe, self.placement
        student_logits = logit_options(self.model.config, "student")
        make = partial(ShardedHeadsObjective, self.ranks) if recipe.vocab_parallel else Objective
        shared = {"vocab_size": placement.vocab_size, "chunk_bytes": recipe.loss_chunk_bytes, **student_logits}
        objective = make(
            alpha=recipe.alpha,
            divergence=recipe.divergence,
            beta=recipe.beta,
            temperature=recipe.temperature,
            **shared,
            **logit_options(placement.teacher_config, "teacher"),
        )
        return StudentLoss(
            self.model,
            objective,
            make(alpha=0.0, **shared),
            thinking_weight=recipe.thinking_weight,
            backend=self.backend,
            compute=placement.compute,
            num_sharers=self.ranks.size if recipe.vocab_parallel else 1,
        )

    def rows_of(self, step: int) -> StepRows:
        """What this rank runs in ``step``: of the same step always the same."""
        return self.packed(self.stream.step(step))

    def packed(self, members: Sequence[tuple[int, int]]) -> StepRows:
        """What this rank runs of (epoch, trace index) pairs."""
        examples = self.method.examples(members)
        batches = pack_examples(
            examples,
            self.placement.recipe.max_tokens_per_batch,
            self.placement.device,
            num_ranks=self.ranks.size,
            rank=self.ranks.rank,
        )
        return StepRows(
            batches,
            num_items=sum(example.num_items for example in examples),
            num_thinking=sum(example.num_thinking for example in examples),
            num_tokens=sum(example.num_tokens for example in examples),
        )

    def step(self, step: int, *, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Run optimizer step ``step`` (from 0) and return its metrics.

        ``interrupted``: whether this rank was asked to stop; the metric of that name says so of any rank.
        """
        start = time.perf_counter()
        recipe = self.placement.recipe
        factor = learning_rate_factor(
            recipe.lr_scheduler_type, step, num_steps=self.num_steps, warmup_ratio=recipe.warmup_ratio
        )
        set_learning_rate(self.optimizer, recipe.learning_rate * factor)
        # Ranks draw apart, and each as in a run that was never resumed.
        torch.manual_seed(stream_seed(recipe.seed, "step", step, self.ranks.rank))
        rows = self.prefetcher.take(step)
        waited = time.perf_counter() - start
        self.weights.refresh()
        self.model.train()
        totals = sum(self._backward(batch, rows, is_last=batch is rows.batches[-1]) for batch in rows.batches)
        mine = torch.tensor([self._flops(rows.batches) / 1e12, interrupted()], dtype=torch.float64)
        found = self.ranks.total(torch.cat([totals.double(), mine.to(totals.device)]))
        loss, cross_entropy, divergence, thinking, teraflops, num_interrupted = found.tolist()
        verdict = self.guard.admit(self.model.parameters(), step=step + 1, loss=loss)
        if not verdict.is_skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        seconds, num_rows = time.perf_counter() - start, len(rows.batches) * self.ranks.size
        return {
            "step": step + 1,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "thinking_cross_entropy": thinking,
            "grad_norm": verdict.norm,
            "spike": verdict.is_spike,
            "skipped": verdict.is_skipped,
            "interrupted": num_interrupted > 0,
            "learning_rate": recipe.learning_rate * factor,
            "step_seconds": seconds,
            "data_seconds": waited,
            "tokens": rows.num_tokens,
            "supervised_tokens": rows.num_items,
            "packed_rows": num_rows,
            "fill_rate": fill_rate([rows.num_tokens], num_rows, recipe.max_tokens_per_batch),
            "tokens_per_second": rows.num_tokens / seconds,
            "teraflops": teraflops,
        }

    def _flops(self, batches: list[PackedBatch]) -> float:
        """Operations of the student, of a teacher that runs beside it, and of the teacher's head, on this rank."""
        recipe = self.placement.recipe
        again = recipe.gradient_checkpointing and recipe.gradient_checkpointing_policy == "full"
        total = self.flops.training(batches, recomputed=again)
        total += head_flops(self.teacher_head, sum(len(batch.labels) for batch in batches))
        if self.teacher_flops is None:
            return total
        # Each row asks for its traces' targets, and a trace that is in two rows runs twice.
        seen = [self.teacher.examples[index] for batch in batches for index in sorted(set(batch.trace_indices))]
        return total + self.teacher_flops.reading(seen)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, rows may run forward and backward: the working weights are in use, and compiled layers."""
        with self.weights.in_use(), self.layers.in_use():
            yield

    def forward(self, batch: PackedBatch, rows: StepRows) -> tuple[Tensor, Tensor]:
        """What ``StudentLoss`` makes of one packed row of ``rows``, inside ``at_work`` alone."""
        targets = None if self.teacher is None else self.teacher.targets
        return self.student(batch, rows.num_items, rows.num_thinking, targets)

    def _backward(self, batch: PackedBatch, rows: StepRows, *, is_last: bool = True) -> Tensor:
        """Add the gradients of one packed row; returns its [loss, cross-entropy, divergence, thinking]."""
        last_row(self.student, is_last)
        with self.at_work():
            loss, terms = self.forward(batch, rows)
            loss.backward()
        return terms
