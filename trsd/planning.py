"""A recipe over traces that do not exist yet: its method, its step's cost, its cache, and settings that take less."""

from collections.abc import Sequence
from typing import Any

from trsd.ceilings import Ceilings
from trsd.cuts import build_policy
from trsd.errors import InputError
from trsd.methods import Method
from trsd.methods.lsp import LSP
from trsd.methods.trsd import TRSD
from trsd.model_shapes import config_of
from trsd.planned_lengths import CLOSER
from trsd.recipe import ONLINE, Recipe
from trsd.step_simulation import MetaPlacement, StepCost, simulate_step
from trsd.teacher_cache import bytes_per_row, cache_layout
from trsd.thinking import ThinkFormat
from trsd.traces import Trace
from trsd.truncation import build_truncation

THINK = ThinkFormat(open_tag="", close_tag="", closer="", closer_ids=CLOSER, natural_close_ids=CLOSER)
SMALL_CHUNK = 2**29
CACHES = ("hidden_cache", "top_k_cache", "vector_cache")


def planned_traces(count: int, lengths: tuple[int, int, int]) -> list[Trace]:
    """Traces of these lengths without any text."""
    prompt, reasoning, answer = lengths
    shared = dict(question="", gold=None, reasoning="", answer="", closed=True, correct=None, tokenizer="")
    return [
        Trace(
            id=f"trace-{index}",
            prompt_ids=[1] * prompt,
            reasoning_ids=[1] * (reasoning - len(CLOSER)),
            close_ids=list(CLOSER),
            answer_ids=[1] * answer,
            **shared,
        )
        for index in range(count)
    ]


def planned_method(recipe: Recipe, traces: Sequence[Trace]) -> Method:
    """The recipe's method; what only real text can decide is as if it were drawn evenly, or kept whole."""
    if recipe.method == "trsd":
        cut = recipe.cut if recipe.cut in ("uniform", "log_uniform", "fractions", "budgets") else "uniform"
        policy = build_policy(
            cut, cut_fractions=recipe.cut_fractions, cut_budgets=recipe.cut_budgets, anchor=recipe.anchor_share
        )
        return TRSD(
            traces,
            THINK,
            policy,
            seed=recipe.seed,
            branches_per_trace=recipe.branches_per_trace,
            max_tokens=recipe.max_tokens_per_batch,
            keep_thinking=recipe.thinking_weight > 0,
        )
    name, share = recipe.truncation, recipe.keep_fraction or 1.0
    if name == "first_derivation":
        name, share = "fraction", 1.0
    truncation = build_truncation(name, share=share, side=recipe.keep_side, texts=())
    return LSP(traces, truncation, tuple((recipe.loss_sections or "cot+a").split("+")))


def placement_of(recipe: Recipe, *, target: str) -> MetaPlacement:
    """The recipe's models without content."""
    student = config_of(recipe.model_name_or_path)
    teacher = config_of(recipe.teacher_model_name_or_path) if recipe.teacher_model_name_or_path else student
    return MetaPlacement(recipe, student, teacher, target=target)


def step_cost(recipe: Recipe, traces: Sequence[Trace], ceilings: Ceilings, *, target: str) -> StepCost:
    """What a step of ``recipe`` takes that learns from these traces."""
    placement = placement_of(recipe, target=target)
    for config in (placement.student_config, placement.teacher_config):
        if getattr(config.get_text_config(), "num_experts", 0) or getattr(config, "num_local_experts", 0):
            raise InputError(
                f"{config.model_type}: which experts run is not known without content: it cannot be planned"
            )
    try:
        return simulate_step(placement, planned_method(recipe, traces), ceilings)
    except (RuntimeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{recipe.model_name_or_path}: it cannot be planned: {reason}") from error


def alternatives(recipe: Recipe, *, target: str) -> list[dict[str, Any]]:
    """Settings that take less memory, or use more of it for less time; each by itself."""
    found: list[dict[str, Any]] = []
    if recipe.teacher in ONLINE and recipe.alpha:
        found.append({"teacher": "hidden_cache"})
    if target == "cuda" and (recipe.loss_chunk_bytes is None or recipe.loss_chunk_bytes > SMALL_CHUNK):
        found.append({"loss_chunk_bytes": SMALL_CHUNK})
    if recipe.max_tokens_per_batch > recipe.max_length:
        found.append({"max_tokens_per_batch": recipe.max_length})
    if not recipe.torch_compile:
        found.append({"torch_compile": True})
    found.append({"gradient_checkpointing": not recipe.gradient_checkpointing})
    if recipe.lora_rank is None:
        found.append({"lora_rank": 16})
    return found


def together(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that takes less memory at once: without an adapter, and with one."""
    less = {name: value for change in changes for name, value in change.items() if value is not False}
    whole = {name: value for name, value in less.items() if name != "lora_rank"}
    return [change for change in ([whole, less] if less != whole else [whole]) if len(change) > 1]


def cache_bytes_per_trace(recipe: Recipe, traces: Sequence[Trace], *, target: str) -> float:
    """Bytes on disk of a trace's targets; 0 where nothing is kept."""
    if not recipe.alpha or recipe.teacher not in CACHES:
        return 0.0
    labels = planned_method(recipe, traces).teacher_example(0).labels
    return bytes_per_row(cache_layout(placement_of(recipe, target=target))) * len(labels)
