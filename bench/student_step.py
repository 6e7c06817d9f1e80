"""The student's part of a training step: body, distillation loss on the answers, backward; no optimizer.

Rows are packed by the trainer's own ``trsd.batching``; the teacher's hidden states and head are random. One step runs
its passes one after the other and their gradients add up: packed rows, or padded batches as they are run where nothing
is packed.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.measure import Rounds, forget, timed_fields
from bench.step_settings import BUNDLED, CHECKPOINTED_CHUNK_BYTES
from trsd.batching import Example, PackedBatch, pack_examples
from trsd.model_shapes import config_of
from trsd.models import PACKED_ATTENTION, load_model, model_folder, packed_attention_backend, packed_hidden_states
from trsd.recomputation import keep_activations, recompute_activations, recomputes
from trsd_kernels import FusedLinearDistillation

LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def build_model(name: str, device: str) -> PreTrainedModel:
    """A shape of ``trsd.model_shapes`` with random bf16 weights on ``device``, or the bundled reasoner in fp32."""
    if name == BUNDLED:
        return load_model(model_folder(name), dtype=torch.float32, device=device)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model


def set_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    if wanted:
        recompute_activations(model, "full")
    else:
        keep_activations(model)


class RandomTeacher:
    """Random targets, the same for all cuts of a trace, and a random head."""

    def __init__(self, model: PreTrainedModel, answer_lengths: Sequence[int]) -> None:
        weight = model.get_output_embeddings().weight
        generator = torch.Generator(device=weight.device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=weight.device, dtype=weight.dtype)

        self.lm_head_weight = normal(*weight.shape) * weight.shape[1] ** -0.5
        self._rows = [normal(length, weight.shape[1]) for length in answer_lengths]

    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        """Target rows of the traces, one after the other."""
        return torch.cat([self._rows[index] for index in trace_indices])


class Pass(Protocol):
    """What goes through the model at once."""

    attention: str
    labels: Tensor  # [num_labels]
    weights: Tensor  # [num_labels] fp32
    trace_indices: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that run, padding included."""
        ...

    def answer_states(self, model: PreTrainedModel) -> Tensor:
        """Hidden states that predict the labels, [num_labels, hidden_size]."""
        ...


class PackedPass:
    """A packed row, as the trainer runs it."""

    attention = PACKED_ATTENTION

    def __init__(self, batch: PackedBatch, model: PreTrainedModel) -> None:
        self.batch, self.num_tokens = batch, batch.num_tokens
        self.labels, self.weights, self.trace_indices = batch.labels, batch.weights, batch.trace_indices
        self.backend = packed_attention_backend(
            model.config, "auto", device=model.device, dtype=model.dtype, branches=batch.layout.has_branches
        )

    def answer_states(self, model: PreTrainedModel) -> Tensor:
        hidden = packed_hidden_states(model, self.batch.input_ids, self.batch.layout, backend=self.backend)
        return hidden[self.batch.rows]


class PaddedPass:
    """Examples padded on the right to the longest, through SDPA with an attention mask."""

    attention = "sdpa"

    def __init__(self, examples: Sequence[Example], device: str) -> None:
        longest = max(len(example.input_ids) for example in examples)
        self.num_tokens = longest * len(examples)
        self.input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        self.mask = torch.zeros_like(self.input_ids)
        rows = []
        for index, example in enumerate(examples):
            length = len(example.input_ids)
            self.input_ids[index, :length] = torch.tensor(example.input_ids)
            self.mask[index, :length] = 1
            rows += range(index * longest + length - len(example.labels), index * longest + length)
        self.input_ids, self.mask = self.input_ids.to(device), self.mask.to(device)
        self.rows = torch.tensor(rows, device=device)
        self.labels = torch.tensor([label for example in examples for label in example.labels], device=device)
        self.weights = torch.ones(len(rows), device=device)
        self.trace_indices = tuple(example.trace_index for example in examples)

    def answer_states(self, model: PreTrainedModel) -> Tensor:
        output = model.get_decoder()(input_ids=self.input_ids, attention_mask=self.mask, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[self.rows]


class Step(Rounds):
    """One training step without its optimizer, timed."""

    def __init__(self, model: PreTrainedModel, teacher: RandomTeacher, passes: Sequence[Pass]) -> None:
        super().__init__(self.forward_and_backward, on_gpu=model.device.type == "cuda")
        self.model, self.teacher, self.passes = model, teacher, passes
        self.num_items = sum(float(each.weights.sum()) for each in passes)
        chunk_bytes = CHECKPOINTED_CHUNK_BYTES if recomputes(model) and self.on_gpu else None
        self.distill = FusedLinearDistillation(alpha=1.0, chunk_bytes=chunk_bytes)
        self.loss = torch.zeros(())

    @property
    def num_tokens(self) -> int:
        return sum(each.num_tokens for each in self.passes)

    def forward_and_backward(self) -> None:
        head, losses = self.model.get_output_embeddings().weight, []
        self.model.train()  # or nothing is recomputed
        for each in self.passes:
            if self.model.config._attn_implementation != each.attention:
                self.model.set_attn_implementation(each.attention)
            out = self.distill(
                *(each.answer_states(self.model), head),
                *(self.teacher.hidden_states(each.trace_indices), self.teacher.lm_head_weight, each.labels),
                token_weights=each.weights,
                num_items_in_batch=self.num_items,
            )
            out.loss.backward()
            losses.append(out.loss.detach())
        self.loss = torch.stack(losses).sum()

    def clean_up(self) -> None:
        self.model.zero_grad()

    def peak_bytes(self) -> int | None:
        """Most bytes live beyond weights, inputs and gradients, which are there before."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super().peak_bytes()

    def fields(self) -> dict[str, object]:
        """What a ``StepLine`` says beside times and memory."""
        return dict(
            num_tokens=self.num_tokens,
            supervised_tokens=round(self.num_items),
            passes=len(self.passes),
            loss_value=float(self.loss),
        )


def packed_passes(examples: Sequence[Example], max_tokens: int, model: PreTrainedModel) -> list[PackedPass]:
    """The examples in rows of at most ``max_tokens`` tokens."""
    return [PackedPass(batch, model) for batch in pack_examples(examples, max_tokens, model.device)]


def peak_where_it_fits(step: Step) -> int | None:
    """The step's peak memory; None where there is not enough."""
    try:
        return step.peak_bytes()
    except torch.OutOfMemoryError:
        return None


def largest_rows_that_fit(
    examples: Sequence[Example], max_tokens: int, make: Callable[[Sequence[Example], int], Step]
) -> tuple[Step, int, int]:
    """(step, its peak bytes, tokens of a row): rows are halved until the step fits in memory."""
    longest = max(example.num_tokens for example in examples)
    while True:
        step = make(examples, max_tokens)
        peak = peak_where_it_fits(step)
        if peak is not None:
            return step, peak, max_tokens
        step.clean_up()
        del step
        forget()
        if max_tokens <= longest:
            raise torch.OutOfMemoryError(f"not even rows of {max_tokens} tokens fit")
        max_tokens = max(longest, max_tokens // 2)


def in_turn(
    benchmark: Callable, steps: Sequence[Step], peaks: Sequence[int | None], rounds: int
) -> list[dict[str, object]]:
    """The measured fields of each step; the first is the reference. Taking their peaks has warmed them up."""
    ours, *others = steps

    def run_others() -> None:
        for step in others:
            step.once()

    benchmark.pedantic(ours.once, setup=run_others, rounds=rounds)
    tolerance = LOSS_TOLERANCE[ours.model.dtype]
    for step in others:
        torch.testing.assert_close(step.loss, ours.loss, rtol=tolerance, atol=0.0)
    return [
        timed_fields(step, ours) | dict(peak_bytes=peak, reference_peak_bytes=peaks[0], **step.fields())
        for step, peak in zip(steps, peaks, strict=True)
    ]
