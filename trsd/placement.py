"""Where a recipe's models run and in what precision: all that the training loop asks of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from trsd.models import packed_attention_backend
from trsd.recipe import Recipe
from trsd.teacher_choice import with_teacher_kind


class Placement:
    """A recipe with the configs of its models, on a device."""

    def __init__(
        self, recipe: Recipe, student_config: Any, teacher_config: Any, *, device: str, target: str | None = None
    ) -> None:
        """Take the configs of student and teacher, the same one for self-distillation.

        Args:
            recipe: whose settings are followed.
            student_config, teacher_config: of transformers.
            device: "cuda", "cpu", or "meta", where shapes and bytes are known and nothing is computed.
            target: on "meta", the device that is meant.
        """
        self.student_config = student_config
        self.teacher_config = teacher_config
        self.device = device
        self.bf16 = (target or device) == "cuda" if recipe.bf16 is None else recipe.bf16
        self.recipe, self.teacher_reason = with_teacher_kind(
            recipe, student_config, teacher_config, dtype=self.reading_dtype
        )

    @cached_property
    def vocab_size(self) -> int:
        """Rows that both heads have; one may be padded further than the other."""
        return min(config.get_text_config().vocab_size for config in (self.student_config, self.teacher_config))

    @property
    def reading_dtype(self) -> torch.dtype:
        """Of weights that are only read, and so of a teacher's hidden states."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def attention_backend(self, config: Any, *, branches: bool) -> str:
        """The attention back end of the recipe for rows of a model with ``config``."""
        return packed_attention_backend(
            config,
            self.recipe.attn_implementation,
            device=self.device,
            dtype=self.reading_dtype,
            branches=branches,
            max_length=self.recipe.max_length,
        )

    @property
    def compiler(self) -> str | Callable[..., Any]:
        """Of the recipe's layers where they are compiled: a backend of ``torch.compile``."""
        return "inductor"

    def compute(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)
