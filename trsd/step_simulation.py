"""A training step on the meta device: what it would hold and do, from the trainer's own loop and without a GPU.

Models are built without content, the loop's forward and backward run over rows of the recipe's shape, and every tensor
that lives is counted (``step_meter.py``). So activations are those of transformers' own layers, of whatever
architecture. Attention stands in for a kernel that keeps query, key, value, output and log-sum-exp; the loss holds what
its plan declares.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from trsd.adapters import adapter_options, add_adapter
from trsd.batching import PackedBatch, pack_examples
from trsd.ceilings import Ceilings
from trsd.errors import InputError
from trsd.fp8 import to_fp8
from trsd.loop import Loop, StepRows
from trsd.loop_meter import ACTIVATIONS, LOSS_WORK, LoopMeter
from trsd.methods import Method, TeacherExamples
from trsd.models import refuse_unsupported
from trsd.optim import state_bytes
from trsd.placement import Placement
from trsd.recipe import ONLINE
from trsd.recomputation import recompute_activations
from trsd.step_meter import ATTENTION, OPTIMIZER, TEACHER, StepMeter
from trsd.teachers import AdapterOffTeacher, HiddenTargets, OnlineTeacher, Targets, Teacher
from trsd_kernels import PackedLayout, TeacherVectors, TopKTargets
from trsd_kernels.linear_ops import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES

SIMULATED_ATTENTION = "trsd_simulated"
ACTIVATION_PARTS = (ACTIVATIONS, LOSS_WORK)  # what no sharding of weights makes smaller
WEIGHTS, COPIES, STATE, TEACHER_WEIGHTS = "student weights", "bf16 copies of them", "optimizer state", "teacher"


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one optimizer step takes."""

    held: dict[str, int]
    """Bytes at the moment of the most, by part."""
    flops: dict[str, float]
    """Operations of the whole step by family, recomputed ones included."""
    seconds: dict[str, float]
    """At the device's ceilings: no step is faster."""
    num_traces: int
    num_tokens: int
    """Tokens the student runs in the step."""
    supervised_tokens: int
    num_rows: int
    """Packed rows."""
    largest_layer_bytes: int
    """Of the student's or teacher's largest layer in bf16."""
    head_bytes: int
    """Of the larger lm_head in bf16."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.held.values())


def build_on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of ``config`` without content."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    refuse_unsupported(model)
    model.set_attn_implementation(SIMULATED_ATTENTION)
    return model


class MetaPlacement(Placement):
    """A recipe's models on the meta device, counted as on ``target`` ("cuda" or "cpu")."""

    def __init__(self, recipe: Any, student_config: Any, teacher_config: Any, *, target: str) -> None:
        super().__init__(recipe, student_config, teacher_config, device="meta", target=target)
        self.target = target

    def attention_backend(self, config: Any, *, branches: bool) -> str:
        return "sdpa" if self.target == "cpu" else "triton"

    @property
    def compiler(self) -> str | Callable[..., Any]:
        from trsd.fused_meter import fused  # it imports much of torch's compiler

        return fused

    def compute(self) -> AbstractContextManager[Any]:
        return nullcontext()  # there is no autocast on meta; the meter knows what the products would take


def simulate_step(placement: MetaPlacement, method: Method, ceilings: Ceilings) -> StepCost:
    """The cost of one step that learns from all of the method's traces."""
    return _Simulation(placement, method, ceilings).run()


class _Simulation:
    """One step: the loop is the trainer's, its model and targets are without content."""

    def __init__(self, placement: MetaPlacement, method: Method, ceilings: Ceilings) -> None:
        self.placement, self.recipe = placement, placement.recipe
        if self.recipe.lora_base != "full":
            raise InputError(
                "lora_base: nf4 cannot be planned; plan lora_base full, which takes 1.44 bytes a weight more"
            )
        student = build_on_meta(
            placement.student_config, placement.reading_dtype if self.recipe.lora_rank else torch.float32
        )
        if self.recipe.lora_rank:
            with torch.device("meta"):
                add_adapter(student, self.recipe.lora_rank, seed=0, **adapter_options(self.recipe))
        if self.recipe.gradient_checkpointing:
            recompute_activations(student, self.recipe.gradient_checkpointing_policy, preserve_rng_state=False)
        self.student = student.train()
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.teacher, self.teacher_bytes = self._teacher(method)
        self.loop = Loop(placement, student, self.teacher, method)
        self.examples = method.examples([(0, index) for index in range(len(method.traces))])
        self.meter = LoopMeter(
            ceilings,
            on_gpu=placement.target == "cuda",
            bf16=placement.bf16,
            chunk_bytes=self._chunk_bytes(ceilings.memory),
            trained=self.trained,
        )
        if self.teacher is not None:
            self._count_apart(self.teacher)

    def _teacher(self, method: Method) -> tuple[Teacher | None, int]:
        """(the recipe's teacher, bytes of it that stay on the device)."""
        recipe, placement = self.recipe, self.placement
        if recipe.alpha == 0:
            return None, 0
        examples = TeacherExamples(method)
        running = {
            "max_tokens_per_batch": recipe.max_tokens_per_batch,
            "backend": placement.attention_backend(self.student.config, branches=False),
        }
        if recipe.teacher == "adapter_off":
            return AdapterOffTeacher(self.student, examples, **running), 0
        if recipe.teacher in ONLINE:
            model = build_on_meta(placement.teacher_config, placement.reading_dtype)
            if recipe.teacher == "online_fp8":
                to_fp8(model)
            return OnlineTeacher(model, examples, **running), _bytes_of(model)
        cached = _CachedOnMeta(placement, examples)
        return cached, cached.lm_head_weight.nbytes if recipe.teacher == "hidden_cache" else 0

    def run(self) -> StepCost:
        """See ``simulate_step``."""
        states = self._make_optimizer_states()
        batches = pack_examples(self.examples, self.recipe.max_tokens_per_batch, "meta")
        batches.sort(key=lambda batch: batch.num_tokens, reverse=True)
        num_items = sum(batch.num_items for batch in batches)
        num_thinking = sum(batch.num_thinking for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        resident = {
            WEIGHTS: _bytes_of(self.student),
            COPIES: self.loop.weights.num_bytes,
            STATE: states,
            TEACHER_WEIGHTS: self.teacher_bytes,
        }
        rows = batches[:2][::-1]  # a row runs beside the gradients of those before it, so of two the largest runs last
        if len(rows) == 2 and self._shape(rows[0]) == self._shape(rows[1]):
            rows = rows[1:]
            self._leave_gradients()
        step_rows = StepRows(rows, num_items, num_thinking, tokens)
        with self.meter:
            for batch in rows:
                self.loop._backward(batch, step_rows)
            if self.recipe.torch_compile and not self.meter.num_fused:
                raise InputError(f"torch_compile: torch {torch.__version__} does not show what it compiles")
            scale = tokens / sum(batch.num_tokens for batch in rows)
            self._optimizer_step()
        flops = {name: value * (1 if name == OPTIMIZER else scale) for name, value in self.meter.flops.items()}
        seconds = {name: value * (1 if name == OPTIMIZER else scale) for name, value in self.meter.seconds.items()}
        return StepCost(
            held=resident | self.meter.held,
            flops=flops,
            seconds=seconds,
            num_traces=len(self.loop.method.traces),
            num_tokens=tokens,
            supervised_tokens=num_items,
            num_rows=len(batches),
            largest_layer_bytes=2 * max(map(_largest_layer, self._models())),
            head_bytes=2 * max(model.get_output_embeddings().weight.numel() for model in self._models()),
        )

    def _make_optimizer_states(self) -> int:
        """Their bytes; AdamW makes them in its first step, so they are there in all others."""
        self._make_gradients()
        self.loop.optimizer.step()
        self.loop.optimizer.zero_grad()
        return state_bytes(self.loop.optimizer)

    def _leave_gradients(self) -> None:
        """What a row before would have left, without its time: one like it counts for both."""
        self._make_gradients()
        self.meter.hold_results(parameter.grad for parameter in self.trained)

    def _make_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)

    def _shape(self, batch: PackedBatch) -> tuple[Any, ...]:
        """What a row's cost hangs on, its targets' included."""
        layout, asked = batch.layout, dict.fromkeys(batch.trace_indices)
        traces = [] if self.teacher is None else [self.teacher.examples[index] for index in asked]
        return (
            *(part.tolist() for part in (layout.starts, layout.lengths, layout.trunks, layout.cuts)),
            *(len(labels) for labels in (batch.labels, batch.thinking_labels, batch.trace_indices)),
            *((example.num_tokens, len(example.labels)) for example in traces),
        )

    def _optimizer_step(self) -> None:
        """On a CPU with torch's temporaries; on a GPU one kernel, which reads and writes everything once."""
        with self.meter.family(OPTIMIZER):
            if self.placement.target == "cpu":
                self.loop.optimizer.step()
            else:
                moved = sum(7 * p.nbytes for p in self.trained)  # weight, gradient, two moments; three written
                refreshed = 3 * self.loop.weights.num_bytes  # fp32 read, bf16 written
                self.meter.add(OPTIMIZER, moved_bytes=moved + refreshed)
        self.loop.optimizer.zero_grad()

    def _models(self) -> list[PreTrainedModel]:
        return [self.student] + ([self.teacher.model] if isinstance(self.teacher, OnlineTeacher) else [])

    def _chunk_bytes(self, memory: float | None) -> int:
        """Working memory of the loss on the target."""
        if self.recipe.loss_chunk_bytes:
            return self.recipe.loss_chunk_bytes
        if self.placement.target == "cpu":
            return CPU_CHUNK_BYTES
        return CUDA_CHUNK_BYTES if memory is None else min(CUDA_CHUNK_BYTES, int(memory) // 16)

    def _count_apart(self, teacher: Teacher) -> None:
        """What the teacher does counts as the teacher's."""
        ask = teacher.targets

        def targets(trace_indices: Sequence[int]) -> Targets:
            with self.meter.family(TEACHER):
                return ask(trace_indices)

        teacher.targets = targets


def _bytes_of(model: torch.nn.Module) -> int:
    """Of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _largest_layer(model: PreTrainedModel) -> int:
    """Parameters of the largest layer."""
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)


class _CachedOnMeta:
    """Targets as a cache of the recipe's kind would hand them out."""

    def __init__(self, placement: MetaPlacement, examples: Sequence[Any]) -> None:
        recipe, config = placement.recipe, placement.teacher_config.get_text_config()
        self.recipe, self.placement, self.examples = recipe, placement, examples
        self.lm_head_weight = torch.empty(
            config.vocab_size, config.hidden_size, dtype=placement.reading_dtype, device="meta"
        )

    def targets(self, trace_indices: Sequence[int]) -> Targets:
        count = sum(len(self.examples[index].labels) for index in trace_indices)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(count, *shape, dtype=dtype, device="meta")

        kind, temperature = self.recipe.teacher, self.recipe.temperature
        if kind == "hidden_cache":
            return HiddenTargets(
                new(self.lm_head_weight.shape[1], dtype=self.lm_head_weight.dtype), self.lm_head_weight
            )
        if kind == "top_k_cache":
            k = self.recipe.teacher_top_k
            return TopKTargets(new(k, dtype=torch.int64), new(k), new(), temperature)
        hidden_size = self.placement.student_config.get_text_config().hidden_size
        return TeacherVectors(new(hidden_size), new(), new(), new(dtype=torch.int64), temperature)


class _Attention(torch.autograd.Function):
    """Output and log-sum-exp of a kernel that computes attention in one pass each way; without content."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pairs: int, gathered: int) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        copies = [x.new_empty(gathered, *x.shape[1:]) for x in (key, value)] if gathered else []
        ctx.save_for_backward(query, key, value, out, lse, *copies)
        ctx.pairs = pairs
        _count_attention(query, key, pairs, factor=1.0)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, lse, *_ = ctx.saved_tensors
        _ = torch.empty_like(lse)  # the kernels' row sums of out * grad_out
        _count_attention(query, key, ctx.pairs, factor=2.5)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _count_attention(query: Tensor, key: Tensor, pairs: int, *, factor: float) -> None:
    """Tell the meter that is counting, if any."""
    meters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, StepMeter)]
    if meters:
        moved = factor * (2 * query.nbytes + 2 * key.nbytes)
        meters[-1].add(ATTENTION, flops=factor * 4.0 * pairs * query.shape[1] * query.shape[2], moved_bytes=moved)


@torch.compiler.disable
def _simulated_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    packed_layout: PackedLayout,
    attention_backend: str,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; [1, num_tokens, num_heads, head_dim]."""
    if s_aux is not None:
        raise InputError("packed attention has no sink logits: choose another architecture")
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    lengths, cuts = packed_layout.lengths, packed_layout.cuts
    seen = lengths * cuts + lengths * (lengths + 1) // 2
    if sliding_window:
        seen = seen.clamp(max=lengths * sliding_window)
    pairs = int(seen.sum())
    # SDPA is called a segment at a time, on the keys that a branch shares and its own, side by side.
    gathered = int((lengths + cuts)[cuts > 0].sum()) if attention_backend == "sdpa" else 0
    return _Attention.apply(*flat, pairs, gathered)[None], None


AttentionInterface.register(SIMULATED_ATTENTION, _simulated_attention)
