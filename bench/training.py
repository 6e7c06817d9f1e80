"""Whole training steps on shared models: ours in its forms, and the LSP reference.

Student, optimizer and teacher are built once and lent to every contender, so that contenders can run in turn on one
GPU; their learning rate is 0, so that nobody changes what the others find. A contender's peak is what it would hold by
itself: its own share of the weights, and all that its step makes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.attention import even_cuts
from bench.lsp_reference import PAD_TO, LSPReference
from bench.measure import NotMeasured, Rounds
from bench.step_settings import THINK, random_trace
from bench.student_step import set_checkpointing
from bench.training_settings import Branches, Pair, config_named
from trsd.batching import Example, pack_examples
from trsd.flops import FlopCounter, head_flops
from trsd.fp8 import to_fp8
from trsd.loop import Loop
from trsd.methods import Method, TeacherExamples
from trsd.methods.lsp import LSP, SECTIONS
from trsd.methods.trsd import branched_examples, cut_example, full_example
from trsd.models import PACKED_ATTENTION
from trsd.optim import build_optimizer
from trsd.placement import Placement
from trsd.planned_lengths import CLOSER, shared_lengths
from trsd.recipe import Recipe, with_method_defaults
from trsd.step_simulation import build_on_meta
from trsd.teacher_cache import HiddenCache, build_hidden_cache
from trsd.teachers import OnlineTeacher, Teacher
from trsd.traces import Trace
from trsd.truncation import fraction, kept_length
from trsd.working_weights import WorkingWeights

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ENTRIES = 512


class Shared:
    """What all contenders of a pair work on."""

    def __init__(self, student: str, teacher: str | None, device: str) -> None:
        """Build the models with random weights: the student in fp32, the teacher as it is read; None: of itself."""
        self.device, self.on_gpu = device, device == "cuda"
        self.student_config = config_named(student)
        self.teacher_config = config_named(teacher or student)
        self.student = build(self.student_config, torch.float32, device)
        self.teacher = build(self.teacher_config, self.reading_dtype, device, seed=1).requires_grad_(False).eval()
        self.optimizer = build_optimizer(self.student, learning_rate=0.0, weight_decay=0.0)
        self.weights = WorkingWeights(self.student, torch.bfloat16 if self.on_gpu else None)
        self._fp8: PreTrainedModel | None = None
        for parameter in self.student.parameters():  # so that the optimizer's state is there before any step
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def reading_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def fp8_teacher(self) -> PreTrainedModel:
        """A second teacher, its layers in 8 bits.

        Raises:
            NotMeasured: it cannot be had here.
        """
        if not self.on_gpu or torch.cuda.get_device_capability() < (9, 0):
            raise NotMeasured("needs a GPU of compute capability 9.0")
        if self._fp8 is None:
            self._fp8 = build(self.teacher_config, torch.bfloat16, self.device).requires_grad_(False).eval()
            self._fp8.load_state_dict(self.teacher.state_dict())
            to_fp8(self._fp8)
        return self._fp8

    def forget_fp8(self) -> None:
        """Give back what the second teacher takes."""
        self._fp8 = None

    def forget_teacher(self) -> None:
        """Give back the teacher's weights, once its targets are on disk."""
        self.teacher = build_on_meta(self.teacher_config, self.reading_dtype)

    def held_by_training(self) -> int:
        """Bytes of the student, its copies and its optimizer's state."""
        states = self.optimizer.state.values()
        state = sum(x.nbytes for each in states for x in each.values() if isinstance(x, torch.Tensor) and x.ndim)
        return bytes_of(self.student) + self.weights.num_bytes + state


def build(config: Any, dtype: torch.dtype, device: str, *, seed: int = 0) -> PreTrainedModel:
    """A model with random weights for packed rows; of one shape, other weights for another seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model


def bytes_of(model: PreTrainedModel) -> int:
    """Of its parameters and of what stands beside them, tied ones once."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


class TrainingStep(Rounds, ABC):
    """One contender's whole step; the first run of it is its check."""

    def __init__(self, shared: Shared, *, recomputed: bool, held: int, compiled: bool = False) -> None:
        super().__init__(self._run, on_gpu=shared.on_gpu)
        self.shared, self.recomputed, self.held, self.compiled = shared, recomputed, held, compiled
        self.loss = self.norm = 0.0
        self.gradient: torch.Tensor | None = None
        """Of the first run, which is not timed: some entries of every tensor, in units of its own size."""

    @abstractmethod
    def step(self) -> tuple[float, float]:
        """(loss as cross-entropy and divergence, gradient norm)."""

    def _run(self) -> None:
        set_checkpointing(self.shared.student, self.recomputed)
        if self.gradient is not None:
            self.loss, self.norm = self.step()
            return
        hook = self.shared.optimizer.register_step_pre_hook(lambda *_: self._keep_gradient())
        try:
            self.loss, self.norm = self.step()
        finally:
            hook.remove()

    def _keep_gradient(self) -> None:
        gradients = [parameter.grad.flatten() for parameter in self.shared.student.parameters()]
        entries = [
            g[:: max(1, g.numel() // ENTRIES)][:ENTRIES] * g.numel() ** 0.5 / (g.norm() + 1e-30) for g in gradients
        ]
        self.gradient = torch.cat(entries).cpu()

    def clean_up(self) -> None:
        self.shared.optimizer.zero_grad()

    def peak_bytes(self) -> int | None:
        """All that the contender holds at its fullest."""
        peak = super().peak_bytes()
        return None if peak is None else peak + self.held + self.shared.held_by_training()

    def _peak_bytes_on_a_cpu(self) -> int | None:
        return None if self.compiled else super()._peak_bytes_on_a_cpu()  # torch's dispatcher sees no compiled code


class Reference(TrainingStep):
    """The LSP step."""

    def __init__(
        self, shared: Shared, sequences: Sequence[torch.Tensor], *, best: bool, recomputed: bool, compiled: bool
    ) -> None:
        super().__init__(shared, recomputed=recomputed, held=bytes_of(shared.teacher), compiled=compiled)
        models = (shared.student, shared.teacher, shared.optimizer, shared.weights)
        compiler = "inductor" if compiled else None
        self.reference = LSPReference(*models, sequences, pad_to=1 if best else PAD_TO, compiler=compiler)
        self.num_tokens = sum(map(len, sequences))
        self._entropy: float | None = None

    def step(self) -> tuple[float, float]:
        with sdpa(self.shared):
            loss, norm = self.reference.step()
            if self._entropy is None:  # of the first run, which is not timed
                self._entropy = self.reference.entropy_share()
        return loss - self._entropy, norm


@contextmanager
def sdpa(shared: Shared) -> Iterator[None]:
    """Inside, both models run through torch's attention."""
    models = (shared.student, shared.teacher)
    for model in models:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for model in models:
            model.set_attn_implementation(PACKED_ATTENTION)


class Ours(TrainingStep):
    """A step of the trainer's own loop."""

    def __init__(
        self,
        shared: Shared,
        recipe: Recipe,
        method: Method,
        teacher: Teacher,
        *,
        recomputed: bool,
        held: int,
        compiled: bool = False,
    ) -> None:
        super().__init__(shared, recomputed=recomputed, held=held, compiled=compiled)
        self.recipe = replace(recipe, gradient_checkpointing=recomputed, torch_compile=compiled)
        placement = Placement(self.recipe, shared.student_config, shared.teacher_config, device=shared.device)
        self.loop = Loop(placement, shared.student, teacher, method)
        self.loop.optimizer, self.loop.weights = shared.optimizer, shared.weights
        self.loop.stream.step = lambda step: [(0, index) for index in range(len(method.traces))]
        self.num_tokens = 0

    def step(self) -> tuple[float, float]:
        metrics = self.loop.step(0)
        self.num_tokens = metrics["tokens"]
        return metrics["loss"], metrics["grad_norm"]


def lsp_recipe(pair: Pair, keep_fraction: float, *, row_tokens: int, chunk_bytes: int | None = None) -> Recipe:
    """The paper's loss on the leading part, in rows of ``row_tokens``."""
    return with_method_defaults(
        Recipe(
            method="lsp",
            keep_fraction=keep_fraction,
            teacher="online",
            learning_rate=0.0,
            train_batch_size=pair.num_sequences,
            max_tokens_per_batch=row_tokens,
            max_length=pair.length,
            loss_chunk_bytes=chunk_bytes,
        )
    )


def traces_of(pair: Pair, vocab_size: int) -> list[Trace]:
    """Random traces with the paper's sections."""
    generator = torch.Generator().manual_seed(0)
    prompt, reasoning, answer = shared_lengths(pair.length)
    found = []
    for index in range(pair.num_sequences):
        ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (prompt, reasoning, answer)]
        found.append(random_trace(index, ids[0], ids[1][: reasoning - len(CLOSER)], ids[2]))
    return found


def whole_ids(trace: Trace) -> list[int]:
    """The trace as one sequence."""
    return [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]


class PairSteps:
    """Makes the contenders of one pair at one fraction."""

    def __init__(self, pair: Pair, keep_fraction: float, shared: Shared, folder: Path) -> None:
        self.pair, self.keep_fraction, self.shared, self.folder = pair, keep_fraction, shared, folder
        self.traces = traces_of(pair, shared.student_config.vocab_size)
        self.method = LSP(self.traces, fraction(keep_fraction), SECTIONS)

    def sequences(self, keep_fraction: float) -> list[torch.Tensor]:
        """The kept tokens of every trace."""
        found = []
        for trace in self.traces:
            ids = whole_ids(trace)
            found.append(torch.tensor(ids[: kept_length(len(ids), keep_fraction)], device=self.shared.device))
        return found

    def reference(
        self, *, best: bool, recomputed: bool, keep_fraction: float | None = None, compiled: bool = False
    ) -> Reference:
        sequences = self.sequences(keep_fraction or self.keep_fraction)
        return Reference(self.shared, sequences, best=best, recomputed=recomputed, compiled=compiled)

    def online(self, *, recomputed: bool, lean: bool = False, fp8: bool = False, compiled: bool = False) -> Ours:
        """Ours with a teacher that runs beside; ``lean``: a row a sequence, and small chunks of the loss."""
        model = self.shared.fp8_teacher if fp8 else self.shared.teacher
        row = self.pair.length if lean else self.pair.length * self.pair.num_sequences
        recipe = lsp_recipe(self.pair, self.keep_fraction, row_tokens=row, chunk_bytes=2**29 if lean else None)
        teacher = OnlineTeacher(model, TeacherExamples(self.method), max_tokens_per_batch=row)
        how = dict(recomputed=recomputed, held=bytes_of(model), compiled=compiled)
        return Ours(self.shared, recipe, self.method, teacher, **how)

    def cached(self, *, recomputed: bool, compiled: bool = False) -> Ours:
        """Ours with the teacher's hidden states from disk."""
        row = self.pair.length * self.pair.num_sequences
        fingerprint = {"fraction": str(self.keep_fraction)}
        folder = self.folder / f"cache-{self.keep_fraction}"
        if not folder.exists():
            online = OnlineTeacher(self.shared.teacher, TeacherExamples(self.method), max_tokens_per_batch=row)
            build_hidden_cache(folder, online, fingerprint=fingerprint, dtype=self.shared.reading_dtype)
        cache = HiddenCache(folder, fingerprint=fingerprint, device=self.shared.device)
        recipe = lsp_recipe(self.pair, self.keep_fraction, row_tokens=row)
        how = dict(recomputed=recomputed, held=cache.lm_head_weight.nbytes, compiled=compiled)
        return Ours(self.shared, recipe, self.method, cache, **how)

    def flops(self, *, teacher: bool) -> float:
        """Operations the step asks for: the student's three passes, the loss, and the teacher's one if it runs."""
        return step_flops(self.shared, self.method.examples([(0, i) for i in range(len(self.traces))]), teacher=teacher)


def step_flops(shared: Shared, examples: Sequence[Example], *, teacher: bool, read: Sequence[Example] = ()) -> float:
    """As the trainer counts them, nothing recomputed; ``read``: what the teacher runs, where that is something else."""
    limit = max(sum(example.num_tokens for example in examples), 1)
    batches = pack_examples(examples, limit, "cpu")
    total = FlopCounter(shared.student).training(batches, recomputed=False)
    total += head_flops(shared.teacher.get_output_embeddings().weight.numel(), sum(len(b.labels) for b in batches))
    return total + (FlopCounter(shared.teacher).reading(read or examples) if teacher else 0.0)


class FixedExamples:
    """A method whose examples are always these; the teacher sees whole traces."""

    def __init__(self, traces: Sequence[Trace], make: Callable[[Trace, int], list[Example]]) -> None:
        self.traces = traces
        self._examples = [example for index, trace in enumerate(traces) for example in make(trace, index)]

    def teacher_example(self, trace_index: int) -> Example:
        return full_example(self.traces[trace_index], trace_index)

    def examples(self, members: Sequence[tuple[int, int]]) -> list[Example]:
        return [replace(example, thinking_start=0, thinking_labels=[]) for example in self._examples]


class BranchSteps:
    """Makes the contenders of one ``Branches`` setting: the model of itself, its targets from disk."""

    def __init__(self, branches: Branches, shared: Shared, folder: Path) -> None:
        self.branches, self.shared = branches, shared
        generator = torch.Generator().manual_seed(0)
        lengths = (branches.prompt_length, branches.reasoning_length, branches.answer_length)
        vocab_size = shared.student_config.vocab_size
        self.traces = [
            random_trace(i, *(torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths))
            for i in range(branches.num_traces)
        ]
        cuts = even_cuts(branches.reasoning_length, branches.num_cuts)
        self.methods = {
            "branches": FixedExamples(self.traces, lambda trace, i: branched_examples(trace, i, cuts, THINK)),
            "separate": FixedExamples(self.traces, lambda trace, i: [cut_example(trace, i, c, THINK) for c in cuts]),
            "whole": FixedExamples(self.traces, lambda trace, i: [full_example(trace, i)]),
        }
        self.folder = folder / "cache-branches"
        whole = TeacherExamples(self.methods["whole"])
        teacher = OnlineTeacher(shared.teacher, whole, max_tokens_per_batch=max(t.num_tokens for t in self.traces))
        build_hidden_cache(self.folder, teacher, fingerprint={}, dtype=shared.reading_dtype)
        del teacher
        shared.forget_teacher()

    def ours(self, form: str, *, recomputed: bool) -> Ours:
        """A step over "branches", "separate" sequences, or the "whole" ones alone; as many rows as they need."""
        method = self.methods[form]
        longest = max(example.num_tokens for example in self.methods["branches"].examples([]))
        recipe = with_method_defaults(
            Recipe(
                teacher="hidden_cache",
                thinking_weight=0.0,
                learning_rate=0.0,
                train_batch_size=len(self.traces),
                branches_per_trace=self.branches.num_cuts if form == "branches" else 1,
                max_tokens_per_batch=longest * len(self.traces),
                max_length=longest,
                loss_chunk_bytes=2**29 if recomputed else None,
            )
        )
        cache = HiddenCache(self.folder, fingerprint={}, device=self.shared.device)
        held = cache.lm_head_weight.nbytes
        return Ours(self.shared, recipe, method, cache, recomputed=recomputed, held=held)

    def flops(self, form: str) -> float:
        """Operations the step asks for."""
        return step_flops(self.shared, self.methods[form].examples([]), teacher=False)
