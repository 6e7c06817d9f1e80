"""Teacher rows on disk by the trainer's own code: random ones, which take no teacher's time, and a teacher's."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.transfers import Tensors, Transfer, refuse_unlike, remove
from trsd.batching import Example
from trsd.models import load_for_decoding, model_folder, packed_attention_backend
from trsd.row_builder import build_shards
from trsd.teacher_cache import (
    HEAD_FILE,
    HiddenCache,
    RowLayout,
    TopKCache,
    VectorCache,
    build_hidden_cache,
    bytes_per_row,
    hidden_layout,
    top_k_layout,
    vector_layout,
)
from trsd.teachers import OnlineTeacher

BUNDLED = "bundled:reasoner"
TOP_K = 64
FINGERPRINT = {"kind": "random rows"}


class Sizes(NamedTuple):
    """How many traces, of which lengths, and what the models are like."""

    hidden_size: int
    """Of teacher and student."""
    dtype: torch.dtype
    """That the teacher computes its hidden states in."""
    num_traces: int
    shortest: int
    """Rows of a trace."""
    longest: int
    step_traces: int
    """Traces of a training step."""

    @property
    def rows_per_trace(self) -> list[int]:
        draws = random.Random(0)
        return [draws.randint(self.shortest, self.longest) for _ in range(self.num_traces)]

    @property
    def step(self) -> list[int]:
        """Some of the traces, in random order."""
        return random.Random(1).sample(range(self.num_traces), self.step_traces)


@dataclass(frozen=True)
class Kind:
    """One kind of teacher targets: what a row holds, and the trainer's way to read it."""

    name: str
    layout: RowLayout
    open: Callable[..., HiddenCache | TopKCache | VectorCache]


def kinds_of(hidden_size: int, dtype: torch.dtype) -> tuple[Kind, ...]:
    """Every kind, for a teacher and a student of one ``hidden_size``, the teacher computing in ``dtype``."""
    return (
        Kind("hidden states", hidden_layout(hidden_size, dtype), HiddenCache),
        Kind(f"top {TOP_K}", top_k_layout(TOP_K), partial(TopKCache, temperature=1.0)),
        Kind("vectors", vector_layout(hidden_size), partial(VectorCache, temperature=1.0)),
    )


class RandomRows:
    """Random rows of one kind for every trace: what a teacher would have said, without the time it takes to say it."""

    def __init__(self, kind: Kind, rows_per_trace: Sequence[int], *, device: str = "cpu") -> None:
        self.kind, self.rows_per_trace, self.device = kind, rows_per_trace, device
        self._ends = list(accumulate(rows_per_trace))
        draws = torch.Generator().manual_seed(0)
        self.tensors = {name: self._draw(*layout, draws) for name, layout in kind.layout.items()}

    def _draw(self, dtype: torch.dtype, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
        shape = (self._ends[-1], *shape)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=draws).to(dtype)
        return torch.randint(2**31, shape, generator=draws, dtype=dtype)

    def rows_of(self, traces: Iterable[int]) -> int:
        """How many rows these traces have."""
        return sum(self.rows_per_trace[index] for index in traces)

    def bytes_of(self, traces: Iterable[int]) -> int:
        """Bytes that these traces' rows take on disk, headers not counted."""
        return self.rows_of(traces) * bytes_per_row(self.kind.layout)

    def of(self, traces: Iterable[int]) -> Tensors:
        """Rows of these traces, one after the other."""
        places = [slice(self._ends[index] - self.rows_per_trace[index], self._ends[index]) for index in traces]
        return {name: torch.cat([tensor[place] for place in places]) for name, tensor in self.tensors.items()}

    def build(self, folder: Path) -> None:
        """Write the store, unless it is there."""
        width = next(iter(self.tensors.values())).shape[1]
        build_shards(
            folder,
            fingerprint=FINGERPRINT,
            rows_per_trace=self.rows_per_trace,
            bytes_per_row=bytes_per_row(self.kind.layout),
            make=self._part,
            files={HEAD_FILE: {"weight": torch.zeros(1, width)}} if self.kind.open is HiddenCache else {},
        )

    def _part(self, traces: range) -> Tensors:
        first = self._ends[traces.start] - self.rows_per_trace[traces.start]
        return {name: tensor[first : self._ends[traces[-1]]] for name, tensor in self.tensors.items()}

    def reader(self, folder: Path) -> Callable[[Sequence[int]], Tensors]:
        """Opens the store in ``folder``; returns what reads traces' rows as the trainer does."""
        cache = self.kind.open(folder, fingerprint=FINGERPRINT, device=self.device)

        def read(traces: Sequence[int]) -> Tensors:
            targets = cache.targets(traces)
            return {name: getattr(targets, name) for name in self.kind.layout}

        return read

    def check(self, got: Tensors, traces: Sequence[int]) -> None:
        """Raise ValueError unless ``got`` is these traces' rows, to the bit."""
        # The trainer widens token ids as it reads them.
        wanted = {
            name: tensor.long() if tensor.dtype == torch.int32 else tensor for name, tensor in self.of(traces).items()
        }
        refuse_unlike(got, wanted)


def store_write(rows: RandomRows, folder: Path) -> Transfer:
    """The whole store written, as the trainer does."""
    everything = range(len(rows.rows_per_trace))
    return Transfer(
        lambda: rows.build(folder),
        check=lambda _: rows.check(rows.reader(folder)(everything), everything),
        undo=partial(remove, folder),
    )


def store_read(rows: RandomRows, folder: Path, traces: Sequence[int], *, open_anew: bool) -> Transfer:
    """Rows of ``traces`` from the store in ``folder``, opened once, or anew so that every file's sha256 is checked."""
    rows.build(folder)
    read = None if open_anew else rows.reader(folder)
    return Transfer(
        lambda: (read or rows.reader(folder))(traces),
        check=lambda got: rows.check(got, traces),
    )


class BundledTeacher:
    """The bundled reasoner as the teacher of random sequences, at each of their tokens."""

    def __init__(self, rows_per_trace: Sequence[int], *, max_tokens: int) -> None:
        """Take so many sequences, and run at most ``max_tokens`` tokens at once."""
        model = load_for_decoding(model_folder(BUNDLED))
        draws, examples = random.Random(0), []
        for index, count in enumerate(rows_per_trace):
            ids = [draws.randrange(model.config.vocab_size) for _ in range(count + 1)]
            examples.append(Example(trace_index=index, input_ids=ids[:-1], labels=ids[1:]))
        backend = packed_attention_backend(model.config, "auto", device=model.device, dtype=model.dtype, branches=False)
        self.teacher = OnlineTeacher(model, examples, max_tokens_per_batch=max_tokens, backend=backend)
        self.traces = range(len(examples))

    def hidden_states(self) -> Tensors:
        """What is to be kept, on the CPU."""
        return {"hidden_states": self.teacher.hidden_states(self.traces).cpu()}

    def cached(self, folder: Path) -> Transfer:
        """Computed and written, as the trainer does."""

        def check(_: None) -> None:
            hidden = HiddenCache(folder, fingerprint=FINGERPRINT, device="cpu").targets(self.traces).hidden_states
            refuse_unlike({"hidden_states": hidden}, self.hidden_states())

        def build() -> None:
            build_hidden_cache(folder, self.teacher, fingerprint=FINGERPRINT, dtype=self.teacher.model.dtype)

        return Transfer(build, check=check, undo=partial(remove, folder))

    def plainly_saved(self, path: Path) -> Transfer:
        """Computed and written as one safetensors file."""
        return Transfer(
            lambda: save_file(self.hidden_states(), path),
            check=lambda _: refuse_unlike(load_file(path), self.hidden_states()),
            undo=partial(remove, path),
        )
