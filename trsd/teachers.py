"""Teacher targets: the teacher's final hidden states at the positions that predict a trace's answer tokens.

Together with the teacher's lm_head they give its exact distribution at hidden_size numbers a token instead of
vocab_size. ``OnlineTeacher`` computes them at every step; ``HiddenCache`` once, in safetensors shards on disk, so that
no teacher body is in memory while the student trains. Both answer the same two questions: ``hidden_states(traces)``
and ``lm_head_weight``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import pack_examples
from trsd.errors import InputError
from trsd.methods.trsd import full_example
from trsd.models import packed_hidden_states
from trsd.traces import Trace

TRACES_PER_SHARD = 512
HEAD_FILE = "lm_head.safetensors"


class Teacher(Protocol):
    """What the loop asks of a teacher."""

    lm_head_weight: Tensor  # [vocab_size, teacher_hidden_size]

    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        """Target rows of the traces, one after the other: [sum of their answer lengths, teacher_hidden_size].

        A trace may be asked for several times.
        """
        ...


class OnlineTeacher:
    """A frozen model that runs the whole traces whenever their targets are asked for."""

    def __init__(
        self, model: PreTrainedModel, traces: Sequence[Trace], *, max_tokens_per_batch: int, backend: str = "auto"
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.traces = traces
        self.backend = backend
        self.max_tokens = max_tokens_per_batch
        self.lm_head_weight = model.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        parts: dict[int, Tensor] = {}
        examples = [full_example(self.traces[index], index) for index in dict.fromkeys(trace_indices)]
        for batch in pack_examples(examples, self.max_tokens, self.model.device):
            hidden = packed_hidden_states(self.model, batch.input_ids, batch.layout, backend=self.backend)[batch.rows]
            lengths = [len(self.traces[index].answer_ids) for index in batch.trace_indices]
            parts.update(zip(batch.trace_indices, hidden.split(lengths), strict=True))
        return torch.cat([parts[index] for index in trace_indices])


def cache_fingerprint(
    *, teacher_weights: str, tokenizer: str, closer: str, dtype: torch.dtype, traces: Sequence[Trace]
) -> dict[str, str]:
    """Everything a cached target depends on, by name, so that a mismatch can say what changed."""
    digest = hashlib.sha256()
    for trace in traces:
        digest.update(json.dumps([trace.prompt_ids, trace.reasoning_ids, trace.close_ids, trace.answer_ids]).encode())
    return {
        "teacher_weights": teacher_weights,
        "tokenizer": tokenizer,
        "closer": closer,
        "dtype": str(dtype),
        "traces": digest.hexdigest()[:16],
    }


def build_cache(
    folder: Path,
    teacher: OnlineTeacher,
    *,
    fingerprint: dict[str, str],
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the targets of all the teacher's traces and store them in ``folder``, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        num_traces = len(teacher.traces)
        for start in range(0, num_traces, TRACES_PER_SHARD):
            indices = range(start, min(start + TRACES_PER_SHARD, num_traces))
            hidden = teacher.hidden_states(indices).to(dtype).cpu().contiguous()
            save_file({"hidden_states": hidden}, temporary / _shard_name(start // TRACES_PER_SHARD))
            if progress:
                progress(indices.stop, num_traces)
        save_file({"weight": teacher.lm_head_weight.to(dtype).cpu().contiguous()}, temporary / HEAD_FILE)
        manifest = {"fingerprint": fingerprint, "num_traces": num_traces, "traces_per_shard": TRACES_PER_SHARD}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shard_name(number: int) -> str:
    return f"hidden-{number:05d}.safetensors"


class HiddenCache:
    """Targets read from ``folder``, a slice of a memory-mapped shard per trace."""

    def __init__(
        self, folder: Path, traces: Sequence[Trace], *, fingerprint: dict[str, str], device: torch.device | str
    ) -> None:
        """Raises InputError when the cache was made from anything else than ``fingerprint`` says."""
        manifest = read_manifest(folder)
        changed = [name for name, value in fingerprint.items() if manifest["fingerprint"].get(name) != value]
        if changed:
            raise InputError(
                f"the teacher cache {folder} was made with other {', '.join(changed)}: delete the folder and it is "
                "computed again, or go back to what it was made with"
            )
        self.device = device
        self.traces_per_shard = manifest["traces_per_shard"]
        lengths = torch.tensor([len(trace.answer_ids) for trace in traces])
        self._ends = [part.cumsum(0).tolist() for part in lengths.split(self.traces_per_shard)]
        self._shards = [
            safe_open(folder / _shard_name(number), framework="pt").get_slice("hidden_states")
            for number in range(len(self._ends))
        ]
        for number, (shard, ends) in enumerate(zip(self._shards, self._ends, strict=True)):
            if shard.get_shape()[0] != ends[-1]:
                raise InputError(
                    f"{folder / _shard_name(number)} holds {shard.get_shape()[0]} rows, its traces need {ends[-1]}: "
                    "delete the cache folder and it is computed again"
                )
        with safe_open(folder / HEAD_FILE, framework="pt") as head:
            self.lm_head_weight = head.get_tensor("weight").to(device)

    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        return torch.cat([self._of(index) for index in trace_indices]).to(self.device)

    def _of(self, trace_index: int) -> Tensor:
        shard, place = divmod(trace_index, self.traces_per_shard)
        ends = self._ends[shard]
        return self._shards[shard][(ends[place - 1] if place else 0) : ends[place]]


def read_manifest(folder: Path) -> dict:
    """The cache's manifest; InputError when the folder is no complete cache."""
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{folder} is no complete teacher cache ({error}): delete it and it is computed again"
        ) from None
