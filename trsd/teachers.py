"""Teacher targets: what the teacher says at the positions where the student learns.

What the teacher runs of a trace is an ``Example`` of the method, whose rows are the target rows: the whole trace for
TRSD, the kept tokens for LSP. Its final hidden states there, with its lm_head, give its exact distribution at
hidden_size numbers a token instead of vocab_size. ``OnlineTeacher`` computes them at every step; ``HiddenCache`` keeps
them, and ``TopKCache`` each row's most probable tokens with the mass of the rest, in safetensors shards on disk, so
that no teacher is in memory while the student trains. All answer one question: ``targets(traces)``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import Example, pack_examples
from trsd.errors import InputError
from trsd.models import packed_hidden_states
from trsd_kernels import TopKTargets, top_k_targets

TRACES_PER_SHARD = 128
HEAD_FILE = "lm_head.safetensors"
STALE = "delete the folder and it is computed again"


class HiddenTargets(NamedTuple):
    """A teacher's distributions as what its lm_head makes of these states."""

    hidden_states: Tensor
    """[num_rows, teacher_hidden_size]"""
    lm_head_weight: Tensor
    """[vocab_size, teacher_hidden_size]"""


class Teacher(Protocol):
    """What the loop asks of a teacher."""

    def targets(self, trace_indices: Sequence[int]) -> HiddenTargets | TopKTargets:
        """Target rows of the traces, one after the other. A trace may be asked for several times."""
        ...


class OnlineTeacher:
    """A frozen model that runs its examples, one per trace, whenever their targets are asked for."""

    def __init__(
        self, model: PreTrainedModel, examples: Sequence[Example], *, max_tokens_per_batch: int, backend: str = "auto"
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.examples = examples
        self.backend = backend
        self.max_tokens = max_tokens_per_batch
        self.lm_head_weight = model.get_output_embeddings().weight.detach()

    def targets(self, trace_indices: Sequence[int]) -> HiddenTargets:
        return HiddenTargets(self.hidden_states(trace_indices), self.lm_head_weight)

    @torch.no_grad()
    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        """Final hidden states at the target rows of the traces, [num_rows, teacher_hidden_size]."""
        parts = dict(self.each(trace_indices, lambda hidden: {"hidden": hidden}))
        return torch.cat([parts[index]["hidden"] for index in trace_indices])

    @torch.no_grad()
    def each(
        self, trace_indices: Sequence[int], rows_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(trace, what ``rows_of`` makes of its hidden states), once for each trace, a packed row at a time."""
        examples = [self.examples[index] for index in dict.fromkeys(trace_indices)]
        lengths = {example.trace_index: len(example.labels) for example in examples}
        for batch in pack_examples(examples, self.max_tokens, self.model.device):
            hidden = packed_hidden_states(self.model, batch.input_ids, batch.layout, backend=self.backend)[batch.rows]
            tensors, counts = rows_of(hidden), [lengths[index] for index in batch.trace_indices]
            pieces = {name: tensor.split(counts) for name, tensor in tensors.items()}
            for place, index in enumerate(batch.trace_indices):
                yield index, {name: piece[place] for name, piece in pieces.items()}


def cache_fingerprint(
    *, kind: str, teacher_weights: str, tokenizer: str, dtype: torch.dtype, examples: Sequence[Example], **options: Any
) -> dict[str, str]:
    """Everything a cached target depends on, by name, so that a mismatch can say what changed."""
    digest = hashlib.sha256()
    for example in examples:
        rows = None if example.rows is None else list(example.rows)
        digest.update(json.dumps([example.input_ids, rows, len(example.labels)]).encode())
    return {
        "kind": kind,
        "teacher_weights": teacher_weights,
        "tokenizer": tokenizer,
        "dtype": str(dtype),
        "traces": digest.hexdigest()[:16],
        **{name: str(value) for name, value in options.items()},
    }


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``folder`` at the end, and is gone when anything raises."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    folder: Path,
    teacher: OnlineTeacher,
    fingerprint: dict[str, str],
    rows_of: Callable[[Tensor], dict[str, Tensor]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Every shard's tensors, made from its hidden states, and the manifest."""
    num_traces, num_rows = len(teacher.examples), []
    for start in range(0, num_traces, TRACES_PER_SHARD):
        indices = range(start, min(start + TRACES_PER_SHARD, num_traces))
        # Off the device a packed row at a time: the rows of many long traces would fill it.
        found = teacher.each(indices, lambda hidden: {name: part.cpu() for name, part in rows_of(hidden).items()})
        parts = [part for _, part in sorted(found, key=itemgetter(0))]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        save_file(tensors, folder / _shard_name(start // TRACES_PER_SHARD))
        num_rows += [len(next(iter(part.values()))) for part in parts]
        if progress:
            progress(indices.stop, num_traces)
    manifest = {"fingerprint": fingerprint, "rows_per_trace": num_rows, "traces_per_shard": TRACES_PER_SHARD}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def build_hidden_cache(
    folder: Path,
    teacher: OnlineTeacher,
    *,
    fingerprint: dict[str, str],
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the hidden states of all the teacher's target rows, and its lm_head, in ``folder``, whole or not at all."""
    with _written_whole(folder) as temporary:
        _write_shards(temporary, teacher, fingerprint, lambda hidden: {"hidden_states": hidden.to(dtype)}, progress)
        save_file({"weight": teacher.lm_head_weight.to(dtype).cpu().contiguous()}, temporary / HEAD_FILE)


def build_top_k_cache(
    folder: Path,
    teacher: OnlineTeacher,
    *,
    k: int,
    vocab_size: int,
    fingerprint: dict[str, str],
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> None:
    """Store each target row's ``k`` most probable tokens and the mass of the rest in ``folder``, whole or not at all.

    Args:
        folder: of the cache.
        teacher: whose targets are kept.
        k: tokens a row.
        vocab_size: of the tokens that count; a teacher's head may be padded beyond the student's.
        fingerprint: of ``cache_fingerprint``.
        progress: is told (done, total).
        **options: temperature and logit options of the teacher, as ``trsd_kernels.top_k_targets`` takes them.
    """
    head = teacher.lm_head_weight[:vocab_size]

    def rows_of(hidden: Tensor) -> dict[str, Tensor]:
        ids, log_probs, tail, _ = top_k_targets(hidden, head, k, **options)
        return {"token_ids": ids.int(), "log_probs": log_probs.float(), "tail_log_mass": tail.float()}

    with _written_whole(folder) as temporary:
        _write_shards(temporary, teacher, fingerprint, rows_of, progress)


def _shard_name(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


class _Shards:
    """Rows of tensors read from a cache's ``folder``, a slice of a memory-mapped shard per trace."""

    def __init__(self, folder: Path, names: Sequence[str], fingerprint: dict[str, str]):
        manifest = read_manifest(folder)
        stored = manifest["fingerprint"]
        changed = sorted(name for name in {*fingerprint, *stored} if stored.get(name) != fingerprint.get(name))
        if changed:
            raise InputError(
                f"the teacher cache {folder} was made with other {', '.join(changed)}: {STALE}, or go back to what it "
                "was made with"
            )
        self.names = names
        self.traces_per_shard = manifest["traces_per_shard"]
        lengths = torch.tensor(manifest["rows_per_trace"])
        self._ends = [part.cumsum(0).tolist() for part in lengths.split(self.traces_per_shard)]
        self._shards = []
        for number, ends in enumerate(self._ends):
            path = folder / _shard_name(number)
            opened = safe_open(path, framework="pt")
            shard = {name: opened.get_slice(name) for name in names}
            rows = {name: part.get_shape()[0] for name, part in shard.items()}
            if set(rows.values()) != {ends[-1]}:
                raise InputError(f"{path} holds {max(rows.values())} rows, its traces need {ends[-1]}: {STALE}")
            self._shards.append(shard)

    def rows(self, trace_indices: Sequence[int]) -> list[Tensor]:
        """Each named tensor's rows of the traces."""
        parts = [self._of(index) for index in trace_indices]
        return [torch.cat([part[name] for part in parts]) for name in self.names]

    def _of(self, trace_index: int) -> dict[str, Tensor]:
        shard, place = divmod(trace_index, self.traces_per_shard)
        ends = self._ends[shard]
        span = slice(ends[place - 1] if place else 0, ends[place])
        return {name: part[span] for name, part in self._shards[shard].items()}


class HiddenCache:
    """Hidden states that ``build_hidden_cache`` stored."""

    def __init__(self, folder: Path, *, fingerprint: dict[str, str], device: torch.device | str) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        self.device = device
        self._shards = _Shards(folder, ("hidden_states",), fingerprint)
        with safe_open(folder / HEAD_FILE, framework="pt") as head:
            self.lm_head_weight = head.get_tensor("weight").to(device)

    def targets(self, trace_indices: Sequence[int]) -> HiddenTargets:
        (hidden,) = self._shards.rows(trace_indices)
        return HiddenTargets(hidden.to(self.device), self.lm_head_weight)


class TopKCache:
    """Most probable tokens that ``build_top_k_cache`` stored."""

    def __init__(
        self,
        folder: Path,
        *,
        temperature: float,
        fingerprint: dict[str, str],
        device: torch.device | str,
    ) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        self.device = device
        self.temperature = temperature
        self._shards = _Shards(folder, ("token_ids", "log_probs", "tail_log_mass"), fingerprint)

    def targets(self, trace_indices: Sequence[int]) -> TopKTargets:
        ids, log_probs, tail = (tensor.to(self.device) for tensor in self._shards.rows(trace_indices))
        return TopKTargets(ids.long(), log_probs, tail, self.temperature)


def read_manifest(folder: Path) -> dict:
    """The cache's manifest; InputError when the folder is no complete cache."""
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{folder} is no complete teacher cache ({error}): delete it and it is computed again"
        ) from None
