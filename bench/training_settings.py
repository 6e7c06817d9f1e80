"""What the whole-step benchmark trains: pairs of models, sequence lengths, fractions, and traces with branches.

Weights and tokens are random; lengths and their sections are the paper's (``trsd.planning.SHARES``).
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, Qwen3Config

from trsd.model_shapes import SHAPES
from trsd.step_simulation import build_on_meta


def small_qwen3(hidden_size: int, num_layers: int) -> Qwen3Config:
    """A Qwen3 for a CPU, whose vocabulary is as large beside its layers as a real one's."""
    return Qwen3Config(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,  # so that distributions are far enough from uniform for a wrong loss to show
        tie_word_embeddings=True,
        use_cache=False,
    )


CPU_SHAPES = {"small teacher": lambda: small_qwen3(192, 4), "small student": lambda: small_qwen3(128, 3)}


def config_named(name: str) -> PreTrainedConfig:
    """A known shape, or a small one for a CPU."""
    return (SHAPES | CPU_SHAPES)[name]()


class Pair(NamedTuple):
    """Teacher and student, and what a step learns from."""

    teacher: str
    student: str
    length: int
    """Tokens of a whole sequence."""
    num_sequences: int
    fractions: tuple[float, ...]
    """Shares of each sequence that are kept, in the order of measuring."""

    @property
    def name(self) -> str:
        return f"{self.teacher} -> {self.student}, {self.num_sequences} sequences of {self.length} tokens"

    def group(self, fraction: float) -> str:
        """The lines that are measured in turn."""
        return f"{self.name}, f = {fraction:g}"


class Branches(NamedTuple):
    """A model that learns from itself (TRSD) at several cuts of a trace."""

    model: str
    reasoning_length: int
    num_cuts: int
    answer_length: int
    num_traces: int = 1
    prompt_length: int = 64

    @property
    def name(self) -> str:
        return (
            f"{self.model} of itself, {self.num_traces} x {self.reasoning_length} reasoning tokens, "
            f"{self.num_cuts} even cuts, answers of {self.answer_length}"
        )


# One half and the whole first: the targets are about them.
ALL_FRACTIONS = (0.5, 1.0, 0.3, 0.7, 0.1, 0.9, 0.2, 0.4, 0.6, 0.8)
GPU_PAIRS = (
    Pair("Qwen3-8B", "Qwen3-4B", 4096, 2, ALL_FRACTIONS),
    Pair("Qwen3-8B", "Qwen3-1.7B", 4096, 2, (0.5, 1.0, 0.25, 0.75)),
)
GPU_BRANCHES = (Branches("Qwen3-4B", 8192, 8, 256), Branches("Qwen3-1.7B", 8192, 8, 256))
CPU_PAIRS = (Pair("small teacher", "small student", 256, 2, (0.5, 1.0, 0.25, 0.75)),)
CPU_BRANCHES = (Branches("small student", 256, 8, 16, num_traces=2, prompt_length=16),)

STUDENT_BYTES, TEACHER_BYTES = 18, 2  # a parameter: weights, copies, moments and gradients; weights
SHARE_OF_MODELS = 0.8  # of the memory; the rest is what steps make


def those_that_fit(pairs: tuple[Pair, ...], branches: tuple[Branches, ...]) -> tuple[tuple[Pair, ...], list[Branches]]:
    """The pairs whose models leave room for steps on this GPU, all where none does; and the first such branches."""
    room = SHARE_OF_MODELS * torch.cuda.get_device_properties(0).total_memory
    fitting = tuple(pair for pair in pairs if held_by(pair.student, pair.teacher) < room)
    return fitting or pairs, [each for each in branches if held_by(each.model, each.model) < room][:1] or [branches[-1]]


def held_by(student: str, teacher: str) -> int:
    """Bytes of a pair's models while a student with fp32 weights is trained."""
    shares = ((student, STUDENT_BYTES), (teacher, TEACHER_BYTES))
    return sum(each * build_on_meta(config_named(name), torch.bfloat16).num_parameters() for name, each in shares)
