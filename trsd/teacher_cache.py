"""Teacher targets on disk: computed once, for any number of epochs and runs, with no teacher in memory meanwhile.

Three kinds, by what they keep of each target row (docs/teacher-targets.md says when to use which):

    hidden states   the teacher's final hidden states, and its lm_head once: exact
    top k           its k most probable tokens and the mass of the rest: a lower bound of the divergence
    vectors         p_T W_s of a student head W_s that is frozen: the forward KL, exact

What a row holds is said once, by its layout: name -> (dtype, shape of a row).
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trsd.batching import Example
from trsd.placement import Placement
from trsd.row_builder import build_shards
from trsd.row_shards import RowShards
from trsd.teachers import HiddenTargets, OnlineTeacher
from trsd_kernels import TeacherVectors, TopKTargets, teacher_vectors, top_k_targets

HEAD_FILE = "lm_head.safetensors"

RowLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None] | None


def hidden_layout(hidden_size: int, dtype: torch.dtype) -> RowLayout:
    """A row of a hidden cache of a teacher of ``hidden_size``."""
    return {"hidden_states": (dtype, (hidden_size,))}


def top_k_layout(k: int) -> RowLayout:
    """A row of a top-k cache."""
    return {"token_ids": (torch.int32, (k,)), "log_probs": (torch.float32, (k,)), "tail_log_mass": (torch.float32, ())}


def vector_layout(hidden_size: int) -> RowLayout:
    """A row of a vector cache for a student of ``hidden_size``.

    In fp32, since the gradient is the difference of two vectors that nearly cancel where student and teacher agree:
    bf16 would leave its rounding of them as the gradient.
    """
    scalars = {"entropy": (torch.float32, ()), "top_token": (torch.int32, ())}
    return {"vectors": (torch.float32, (hidden_size,)), **scalars}


def cache_layout(placement: Placement) -> RowLayout:
    """What the cache of a recipe, ``placement``'s, holds of a token."""
    recipe = placement.recipe
    if recipe.teacher == "top_k_cache":
        return top_k_layout(recipe.teacher_top_k)
    if recipe.teacher == "vector_cache":
        return vector_layout(placement.student_config.get_text_config().hidden_size)
    return hidden_layout(placement.teacher_config.get_text_config().hidden_size, placement.reading_dtype)


def bytes_per_row(layout: RowLayout) -> int:
    """Of all tensors together."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def cache_fingerprint(
    *, kind: str, teacher_weights: str, tokenizer: str, dtype: torch.dtype, examples: Sequence[Example], **options: Any
) -> dict[str, str]:
    """Everything a cached target depends on, by name, so that a mismatch can say what changed."""
    digest = hashlib.sha256()
    for example in examples:
        ids, rows = example.input_ids, [] if example.rows is None else example.rows
        digest.update(array("q", [len(ids), len(example.labels), example.rows is None, *ids, *rows]))
    return {
        "kind": kind,
        "teacher_weights": teacher_weights,
        "tokenizer": tokenizer,
        "dtype": str(dtype),
        "traces": digest.hexdigest()[:16],
        **{name: str(value) for name, value in options.items()},
    }


def build_hidden_cache(
    folder: Path, teacher: OnlineTeacher, *, fingerprint: dict[str, str], dtype: torch.dtype, progress: Progress = None
) -> None:
    """Store the hidden states of all the teacher's target rows, and its lm_head, in ``folder``.

    Args:
        folder: of the cache; what an earlier build left beside it is gone on with (``row_builder.py``).
        teacher: whose targets are kept.
        fingerprint: of ``cache_fingerprint``.
        dtype: exact where the teacher computes its hidden states in it.
        progress: is told (done, total) traces.

    Raises:
        InputError: as ``build_shards``.
    """
    head = {"weight": teacher.lm_head_weight.to(dtype).cpu().contiguous()}
    layout = hidden_layout(head["weight"].shape[1], dtype)
    _build(
        folder,
        teacher,
        layout,
        lambda hidden: {"hidden_states": hidden},
        fingerprint=fingerprint,
        files={HEAD_FILE: head},
        progress=progress,
    )


def build_top_k_cache(
    folder: Path,
    teacher: OnlineTeacher,
    *,
    k: int,
    vocab_size: int,
    fingerprint: dict[str, str],
    progress: Progress = None,
    **options: Any,
) -> None:
    """Store each target row's ``k`` most probable tokens and the mass of the rest in ``folder``.

    Args:
        k: tokens a row.
        vocab_size: of the tokens that count; a teacher's head may be padded beyond the student's.
        **options: temperature and logit options of the teacher, as ``trsd_kernels.top_k_targets`` takes them.
        others: as in ``build_hidden_cache``.

    Raises:
        InputError: as ``build_shards``.
    """
    head = teacher.lm_head_weight[:vocab_size]

    def rows_of(hidden: Tensor) -> dict[str, Tensor]:
        return _named(top_k_layout(k), top_k_targets(hidden, head, k, **options))

    _build(folder, teacher, top_k_layout(k), rows_of, fingerprint=fingerprint, progress=progress)


def build_vector_cache(
    folder: Path,
    teacher: OnlineTeacher,
    *,
    student_lm_head_weight: Tensor,  # [at least vocab_size, student_hidden_size]
    vocab_size: int,
    fingerprint: dict[str, str],
    progress: Progress = None,
    **options: Any,
) -> None:
    """Store each target row's p_T @ student_lm_head_weight in ``folder``: for a student whose head stays what it is.

    Args:
        vocab_size: of the tokens that count; either head may be padded beyond it.
        **options: temperature and logit options of the teacher, as ``trsd_kernels.teacher_vectors`` takes them.
        others: as in ``build_hidden_cache``.

    Raises:
        InputError: as ``build_shards``.
    """
    layout = vector_layout(student_lm_head_weight.shape[1])
    heads = teacher.lm_head_weight[:vocab_size], student_lm_head_weight[:vocab_size]

    def rows_of(hidden: Tensor) -> dict[str, Tensor]:
        return _named(layout, teacher_vectors(hidden, *heads, **options))

    _build(folder, teacher, layout, rows_of, fingerprint=fingerprint, progress=progress)


def _named(layout: RowLayout, targets: TopKTargets | TeacherVectors) -> dict[str, Tensor]:
    return {name: getattr(targets, name) for name in layout}


def _build(
    folder: Path,
    teacher: OnlineTeacher,
    layout: RowLayout,
    rows_of: Callable[[Tensor], dict[str, Tensor]],
    *,
    fingerprint: dict[str, str],
    files: dict[str, dict[str, Tensor]] | None = None,
    progress: Progress,
) -> None:
    lengths = [len(example.labels) for example in teacher.examples]

    def make(indices: range) -> dict[str, Tensor]:
        ends = torch.tensor([lengths[index] for index in indices]).cumsum(0).tolist()
        found = {name: torch.empty(ends[-1], *shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        # Off the device a packed row at a time: the rows of many long traces would fill it.
        for index, rows in teacher.each(indices, rows_of):
            end = ends[index - indices.start]
            for name, tensor in found.items():
                tensor[end - lengths[index] : end] = rows[name]
        return found

    build_shards(
        folder,
        fingerprint=fingerprint,
        rows_per_trace=lengths,
        bytes_per_row=bytes_per_row(layout),
        make=make,
        files=files or {},
        progress=progress,
    )


class HiddenCache:
    """Hidden states that ``build_hidden_cache`` stored."""

    def __init__(self, folder: Path, *, fingerprint: dict[str, str], device: torch.device | str) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        self.device = device
        self._shards = RowShards(folder, ("hidden_states",), fingerprint=fingerprint)
        self.lm_head_weight = self._shards.files[HEAD_FILE].whole("weight").to(device)

    def targets(self, trace_indices: Sequence[int]) -> HiddenTargets:
        (hidden,) = self._shards.rows(trace_indices)
        return HiddenTargets(hidden.to(self.device), self.lm_head_weight)


class TopKCache:
    """Most probable tokens that ``build_top_k_cache`` stored."""

    def __init__(
        self, folder: Path, *, temperature: float, fingerprint: dict[str, str], device: torch.device | str
    ) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        self.device = device
        self.temperature = temperature
        self._shards = RowShards(folder, ("token_ids", "log_probs", "tail_log_mass"), fingerprint=fingerprint)

    def targets(self, trace_indices: Sequence[int]) -> TopKTargets:
        ids, log_probs, tail = (tensor.to(self.device) for tensor in self._shards.rows(trace_indices))
        return TopKTargets(ids.long(), log_probs, tail, self.temperature)


class VectorCache:
    """Vectors for a frozen student head that ``build_vector_cache`` stored."""

    def __init__(
        self, folder: Path, *, temperature: float, fingerprint: dict[str, str], device: torch.device | str
    ) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        self.device = device
        self.temperature = temperature
        self._shards = RowShards(folder, ("vectors", "entropy", "top_token"), fingerprint=fingerprint)

    def targets(self, trace_indices: Sequence[int]) -> TeacherVectors:
        vectors, entropy, top = (tensor.to(self.device) for tensor in self._shards.rows(trace_indices))
        return TeacherVectors(vectors, entropy, torch.zeros_like(entropy), top.long(), self.temperature)
