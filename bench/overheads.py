"""The trainer beside its step: a loop on the bundled reasoner as the demo has it, and what is timed of it.

Its traces are worked problems, cut as in the demo, its teacher's targets are on disk, a step learns from 64 traces.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.step_settings import BUNDLED
from bench.transfers import Transfer
from trsd.checkpoint import Checkpointer
from trsd.cuts import build_policy
from trsd.data import load_data
from trsd.demo.problems import as_row, draw_problems
from trsd.guards import WINDOW, StepGuard
from trsd.loop import Loop
from trsd.manifest import verify
from trsd.methods import TeacherExamples
from trsd.methods.trsd import TRSD
from trsd.models import load_config, load_model, load_tokenizer, model_folder
from trsd.placement import Placement
from trsd.recipe import Recipe, with_method_defaults
from trsd.teacher_cache import HiddenCache, build_hidden_cache
from trsd.teachers import OnlineTeacher
from trsd.thinking import ThinkFormat
from trsd.traces import Trace

BATCH_SIZE = 64
NAME = f"{BUNDLED}, {BATCH_SIZE} traces a step"


# What of the demo's recipe matters to a step; the weights stay what they are.
RECIPE = with_method_defaults(
    Recipe(
        cut="fractions",
        cut_fractions=(0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
        learning_rate=0.0,
        max_steps=1000,
        train_batch_size=BATCH_SIZE,
        max_tokens_per_batch=4096,
        max_length=512,
    )
)


def worked_traces(folder: Path, tokenizer: Any, think: ThinkFormat) -> list[Trace]:
    """Problems with their solutions, as training data is read."""
    data = folder / "problems.jsonl"
    rows = [as_row(problem, solution=True) for problem in islice(draw_problems("train", seed=0), BATCH_SIZE)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(str(data), tokenizer=tokenizer, think=think).traces


class Trainer:
    """A loop that takes its steps, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, device = folder, "cuda" if torch.cuda.is_available() else "cpu"
        model_path = model_folder(BUNDLED)
        self.tokenizer, config = load_tokenizer(model_path), load_config(model_path)
        think = ThinkFormat.of(self.tokenizer)
        policy = build_policy(RECIPE.cut, cut_fractions=RECIPE.cut_fractions, anchor=RECIPE.anchor_share)
        traces = worked_traces(folder, self.tokenizer, think)
        method = TRSD(traces, think, policy, seed=0, max_tokens=RECIPE.max_tokens_per_batch, keep_thinking=True)
        placement = Placement(RECIPE, config, config, device=device)
        student = load_model(model_path, dtype=torch.float32, device=device)
        self.loop = Loop(placement, student, self._cached_teacher(placement, method), method)
        self.metrics: list[dict[str, float]] = []
        self._next = 0
        self.step()  # which has no rows made ahead, and warms up
        self.metrics.clear()

    def _cached_teacher(self, placement: Placement, method: TRSD) -> HiddenCache:
        """The student as it is, its hidden states on disk."""
        dtype, device = placement.reading_dtype, placement.device
        model = load_model(model_folder(BUNDLED), dtype=dtype, device=device)
        online = OnlineTeacher(
            model,
            TeacherExamples(method),
            max_tokens_per_batch=RECIPE.max_tokens_per_batch,
            backend=placement.attention_backend(model.config, branches=False),
        )
        build_hidden_cache(self.folder / "teacher", online, fingerprint={}, dtype=dtype)
        return HiddenCache(self.folder / "teacher", fingerprint={}, device=device)

    def step(self) -> None:
        """The next one."""
        self.metrics.append(self.loop.step(self._next))
        self._next += 1

    @property
    def step_milliseconds(self) -> float:
        """Median; of three steps where none was asked for."""
        while len(self.metrics) < 3:
            self.step()
        return 1000 * statistics.median(row["step_seconds"] for row in self.metrics)

    def rows_when_needed(self) -> Transfer:
        """Making a step's rows, another step's each time."""
        steps = iter(range(500, 1000))
        return Transfer(lambda: self.loop.rows_of(next(steps)), check=lambda rows: _refuse_empty(rows.num_tokens))

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Of no step, as large as those that are scaled down."""
        generator = torch.Generator().manual_seed(0)
        parameters = [parameter for parameter in self.loop.model.parameters() if parameter.requires_grad]
        return [torch.randn(each.shape, generator=generator).to(each.device) for each in parameters]

    def guarded(self) -> Transfer:
        """What comes before the optimizer's step, with as many steps behind it as the guard looks at."""
        guard, numbers = StepGuard(1.0), iter(range(1, 10_000))
        norm = float(torch.nn.utils.get_total_norm(self.gradients))
        guard.restore(guard.state() | {"losses": [1.0] * WINDOW, "norms": [norm] * WINDOW})
        return self._scaling(lambda: guard.admit(self.loop.model.parameters(), step=next(numbers), loss=1.0))

    def clipped(self) -> Transfer:
        """The same by torch alone."""
        return self._scaling(lambda: torch.nn.utils.clip_grad_norm_(self.loop.model.parameters(), 1.0))

    def _scaling(self, work: Callable[[], object]) -> Transfer:
        self._fill()
        return Transfer(work, check=lambda _: self._refuse_unscaled(), undo=self._fill)

    def _fill(self) -> None:
        for parameter, gradient in zip(self.loop.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient.clone()

    def _refuse_unscaled(self) -> None:
        norm = float(torch.nn.utils.get_total_norm([each.grad for each in self.loop.model.parameters()]))
        if not 0.999 < norm < 1.001:
            raise ValueError(f"gradients of norm {norm}, expected 1")

    def save(self, *, to_disk: bool) -> Transfer:
        """A checkpoint: what the loop waits for, or until the disk has it."""
        folder = self.folder / f"saved-{to_disk}"
        folder.mkdir()
        checkpointer = Checkpointer(folder, self.tokenizer, card=lambda step: "# A checkpoint to be measured\n")
        state = {"model": self.loop.model, "optimizer": self.loop.optimizer, "trainer": {}}

        def save() -> None:
            checkpointer.save(1, **state)
            if to_disk:
                checkpointer.wait()

        def undo() -> None:
            shutil.rmtree(checkpointer.wait())

        return Transfer(save, check=lambda _: verify(checkpointer.wait()), undo=undo)


def _refuse_empty(num_tokens: int) -> None:
    if not num_tokens:
        raise ValueError("a step without tokens")
