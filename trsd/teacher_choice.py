"""Which targets a recipe of teacher=auto learns from: those of fewer bytes, where both kinds give the same loss.

A row of hidden states takes the teacher's width, in the precision it is read in; a row of vectors the student's width
in fp32 (``teacher_cache.py``). Where vectors are smaller they save more than disk: the teacher's lm_head is neither in
memory nor multiplied with at any step. They hold for one student's frozen head alone, so they are never chosen for a
folder that several runs may share.
"""

from dataclasses import replace
from typing import Any

import torch

from trsd.recipe import CACHE_OF_ALL, Recipe


def with_teacher_kind(
    recipe: Recipe, student_config: Any, teacher_config: Any, *, dtype: torch.dtype
) -> tuple[Recipe, str]:
    """(``recipe`` with a kind of teacher in the place of auto, why that one; empty where nothing was chosen).

    Args:
        recipe: of the run.
        student_config, teacher_config: of transformers.
        dtype: of weights that are only read, and so of a teacher's hidden states.
    """
    if recipe.teacher != "auto":
        return recipe, ""
    if recipe.lora_rank is None or recipe.alpha == 0:
        return replace(recipe, teacher=CACHE_OF_ALL), ""
    # Here, for caches are made for a placement, which asks for this choice.
    from trsd.models import logit_options
    from trsd.teacher_cache import bytes_per_row, hidden_layout, vector_layout

    sizes = [config.get_text_config().hidden_size for config in (teacher_config, student_config)]
    hidden, vectors = bytes_per_row(hidden_layout(sizes[0], dtype)), bytes_per_row(vector_layout(sizes[1]))
    if recipe.divergence != "forward_kl":
        return replace(recipe, teacher=CACHE_OF_ALL), f"vectors hold no {recipe.divergence}"
    if "student_logit_softcap" in logit_options(student_config, "student"):
        return replace(recipe, teacher=CACHE_OF_ALL), "the student caps its logits, which vectors cannot follow"
    if recipe.teacher_cache_dir:
        return replace(recipe, teacher=CACHE_OF_ALL), "other students may share teacher_cache_dir"
    kind = "vector_cache" if vectors < hidden else CACHE_OF_ALL
    return replace(recipe, teacher=kind), f"{vectors:,} bytes a token in vectors, {hidden:,} in hidden states"
