"""The training step: packed batches, each normalised by the step's own count of supervised tokens."""

import math
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import PackedBatch, TraceStream, pack_examples
from trsd.flops import FlopCounter, head_flops
from trsd.guards import clip_gradients
from trsd.methods import Method
from trsd.models import logit_options, packed_hidden_states
from trsd.objective import Objective
from trsd.optim import build_optimizer, learning_rate_factor, set_learning_rate
from trsd.placement import Placement
from trsd.teacher_cache import HiddenCache
from trsd.teachers import OnlineTeacher, Teacher
from trsd.working_weights import WorkingWeights
from trsd_kernels import FusedLinearDistillation, LinearDistillationOutput, fill_rate


class Loop:
    """Optimizer steps of one model; a step is a function of its number and the state so far."""

    def __init__(self, placement: Placement, model: PreTrainedModel, teacher: Teacher | None, method: Method) -> None:
        recipe = placement.recipe
        self.placement, self.model, self.teacher, self.method = placement, model, teacher, method
        num_traces = len(method.traces)
        self.stream = TraceStream(num_traces, batch_size=recipe.train_batch_size, seed=recipe.seed)
        self.num_steps = recipe.max_steps or math.ceil(recipe.num_train_epochs * num_traces / recipe.train_batch_size)
        self.optimizer = build_optimizer(
            model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, name=recipe.optim
        )
        student_logits = logit_options(model.config, "student")
        self.objective = Objective(
            vocab_size=placement.vocab_size,
            chunk_bytes=recipe.loss_chunk_bytes,
            alpha=recipe.alpha,
            divergence=recipe.divergence,
            beta=recipe.beta,
            temperature=recipe.temperature,
            **student_logits,
            **logit_options(placement.teacher_config, "teacher"),
        )
        self.keep_thinking = FusedLinearDistillation(alpha=0.0, chunk_bytes=recipe.loss_chunk_bytes, **student_logits)
        self.backend = placement.attention_backend(model, branches=recipe.branches_per_trace > 1)
        self.head = model.get_output_embeddings().weight
        self.weights = WorkingWeights(model, torch.bfloat16 if placement.bf16 else None)
        self.flops = FlopCounter(model)
        self.teacher_flops = FlopCounter(teacher.model) if isinstance(teacher, OnlineTeacher) else None

    def step(self, step: int) -> dict[str, float]:
        """Run optimizer step ``step`` (from 0) and return its metrics."""
        start = time.perf_counter()
        recipe = self.placement.recipe
        factor = learning_rate_factor(
            recipe.lr_scheduler_type, step, num_steps=self.num_steps, warmup_ratio=recipe.warmup_ratio
        )
        set_learning_rate(self.optimizer, recipe.learning_rate * factor)
        members = self.stream.step(step)
        examples = self.method.examples(members)
        batches = pack_examples(examples, recipe.max_tokens_per_batch, self.placement.device)
        self.weights.refresh()
        num_items = sum(batch.num_items for batch in batches)
        self.model.train()
        num_thinking = sum(batch.num_thinking for batch in batches)
        totals = sum(self._backward(batch, num_items, num_thinking) for batch in batches)
        loss, cross_entropy, divergence, thinking = totals.tolist()
        norm = clip_gradients(self.model.parameters(), recipe.max_grad_norm, step=step + 1, loss=loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        num_tokens = sum(batch.num_tokens for batch in batches)
        return {
            "step": step + 1,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "thinking_cross_entropy": thinking,
            "grad_norm": norm,
            "learning_rate": recipe.learning_rate * factor,
            "step_seconds": seconds,
            "tokens": num_tokens,
            "supervised_tokens": num_items,
            "packed_rows": len(batches),
            "fill_rate": fill_rate([batch.num_tokens for batch in batches], len(batches), recipe.max_tokens_per_batch),
            "tokens_per_second": num_tokens / seconds,
            "teraflops": self._flops(batches) / 1e12,
        }

    def _flops(self, batches: list[PackedBatch]) -> float:
        """Operations of the student, of a teacher that runs beside it, and of the teacher's head."""
        total = self.flops.training(batches, recomputed=self.placement.recipe.gradient_checkpointing)
        if isinstance(self.teacher, OnlineTeacher | HiddenCache):
            total += head_flops(self.teacher.lm_head_weight.numel(), sum(len(batch.labels) for batch in batches))
        if self.teacher_flops is None:
            return total
        # Each row asks for its traces' targets, and a trace that is in two rows runs twice.
        seen = [self.teacher.examples[index] for batch in batches for index in sorted(set(batch.trace_indices))]
        return total + self.teacher_flops.reading(seen)

    def _backward(self, batch: PackedBatch, num_items: int, num_thinking: int) -> Tensor:
        """Add the gradients of one packed row; returns its [loss, cross-entropy, divergence, thinking]."""
        with self.weights.in_use():
            loss, out, thinking = self._forward(batch, num_items, num_thinking)
            loss.backward()
        return torch.stack([loss.detach(), out.cross_entropy, out.divergence, thinking.detach()])

    def _forward(
        self, batch: PackedBatch, num_items: int, num_thinking: int
    ) -> tuple[Tensor, LinearDistillationOutput, Tensor]:
        """(loss, the objective's output, cross-entropy of the thinking shown) of one packed row."""
        hidden = packed_hidden_states(self.model, batch.input_ids, batch.layout, backend=self.backend)
        with self.placement.compute():  # for the head, whose gradient stays fp32
            targets = None if self.teacher is None else self.teacher.targets(batch.trace_indices)
            out = self.objective(
                hidden[batch.rows],
                self.head,
                targets,
                batch.labels,
                token_weights=batch.weights,
                num_items_in_batch=num_items,
            )
            thinking = self.keep_thinking(
                *(hidden[batch.thinking_rows], self.head, None, None, batch.thinking_labels),
                token_weights=batch.thinking_weights,
                num_items_in_batch=num_thinking,
            ).loss
        return out.loss + self.placement.recipe.thinking_weight * thinking, out, thinking
