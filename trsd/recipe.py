"""The recipe: every setting of a run in one strict dataclass, and what contradicts itself in one.

How it is read from YAML and flags: ``recipe_file.py``.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from trsd.trackers import tracker_problems

TeacherKind = Literal["auto", "hidden_cache", "top_k_cache", "vector_cache", "online", "online_fp8", "adapter_off"]
Optim = Literal["adamw_torch", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit"]
AttentionBackend = Literal["auto", "triton", "flash_attn_4", "flash_attn_3", "flash_attn_2", "torch", "sdpa"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Distil a reasoning model from partial chains of thought."""

    model_name_or_path: str = "bundled:reasoner"
    """The student: a model folder, a hub name, or a bundled model."""
    teacher_model_name_or_path: str | None = None
    """The teacher; left out, a frozen copy of the student (lsp wants a larger one)."""
    data: str = "bundled:questions/train.jsonl"
    """Training data: a .jsonl or .parquet file, or a hub data set; docs/data.md tells the columns."""
    eval_data: str | None = None
    """Questions to evaluate on before and after training; left out, there is no evaluation."""
    output_dir: str | None = None
    """Where the run is kept; left out, runs/<recipe>-<time>."""
    method: Literal["trsd", "lsp", "palign", "sft"] = "trsd"
    """trsd: the answer's distribution given the whole trace, from a cut one. lsp: a larger teacher's distributions on a
    part of each trace. palign: the shortest sufficient prefix and the student's own completion. sft: traces as text."""
    max_train_samples: int | None = None
    """Use only so many rows of the training data."""
    max_eval_samples: int | None = None
    """Use only so many rows of the evaluation data."""
    validation_samples: int | None = None
    """So many traces are held out, not learnt from; their loss is measured at every checkpoint, and the checkpoint of
    the least is kept (best.json)."""
    trust_remote_code: bool = False
    """Allow model folders to run their own Python code."""

    max_thinking_tokens: int = 4096
    """Most reasoning tokens the teacher writes for a trace, and the unconstrained evaluation allows."""
    max_answer_tokens: int = 512
    """Most tokens of an answer, after the thinking is closed."""
    sampling_temperature: float = 0.0
    """Temperature when the teacher writes traces, or the student completes prefixes; 0 is greedy."""
    sampling_top_p: float = 1.0
    """Nucleus mass when the teacher writes traces, or the student completes prefixes."""
    sampling_repetition_penalty: float = 1.0
    """Penalty on tokens written before, when the teacher writes traces or the student completes prefixes."""
    generation_batch_size: int = 128
    """Sequences decoded together."""
    close_unfinished: bool = False
    """Close thinking that has no close tag (limit reached, or EOS) with the closer, instead of dropping the trace."""
    filter: Literal["none", "correct_only"] = "none"
    """Which traces, and which completions of palign, to learn from."""

    cut: Literal["uniform", "log_uniform", "fractions", "budgets", "first_derivation", "judged"] = "uniform"
    """trsd: where the reasoning is cut: at a drawn share or scale of it, at one of some shares or token counts, behind
    the first derivation of the answer, or behind the shortest prefix that a judge finds sufficient."""
    cut_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    """trsd: shares of the reasoning kept, for cut=fractions."""
    cut_budgets: tuple[int, ...] = (64, 256, 1024)
    """trsd: reasoning tokens kept, for cut=budgets."""
    snap_to_sentence: bool = False
    """trsd: move each cut back to the last sentence end."""
    branches_per_trace: int = 1
    """trsd: at how many places each trace is cut in one step; the cuts share the trace's forward pass."""
    anchor_share: float = 0.2
    """trsd: share of examples that keep the whole reasoning (f = 1)."""
    thinking_weight: float = 1.0
    """trsd: weight of cross-entropy on the reasoning shown, which keeps unconstrained behaviour; 0: answers only."""
    truncation: Literal["fraction", "endpoints", "first_derivation"] = "fraction"
    """lsp, sft: what is kept of each sequence: a run of tokens, both ends, or all up to the first derivation."""
    keep_fraction: float | None = None
    """lsp, sft: share of a sequence's tokens that is kept, more than 0 and at most 1; left out, 0.5 for lsp, else 1."""
    keep_side: Literal["left", "middle", "right"] = "left"
    """lsp, sft: which part of the sequence truncation=fraction keeps."""
    loss_sections: Literal["a", "p+a", "cot", "cot+a", "p+cot", "p+cot+a"] | None = None
    """lsp, sft: sections learnt, of prompt, chain of thought and answer; left out, p+cot+a for lsp, cot+a for sft."""
    judge: Literal["self", "answer"] = "self"
    """Who says that a prefix suffices (palign, cut=judged): the student, when asked, or its answer to the prefix."""
    completion: Literal["instruct", "close"] = "instruct"
    """palign: the student is asked to continue from the prefix, or the prefix is closed and it answers."""
    closer: str = "template"
    """What closes a cut trace: template, qwen3_early_stop, anytime, or a text that holds the close tag."""
    open_tag: str = "<think>"
    """The tag that opens thinking."""
    close_tag: str = "</think>"
    """The tag that ends thinking."""

    teacher: TeacherKind = "auto"
    """Kept on disk: hidden_cache, the teacher's final hidden states; top_k_cache, its most probable tokens and the mass
    of the rest; vector_cache, what a frozen lm_head needs for forward_kl (with lora_rank). Run at every step: online, a
    model of its own; online_fp8, the same with its layers in 8 bits, not exact; adapter_off, the student without its
    adapter (with lora_rank). auto: hidden_cache, or with lora_rank vector_cache where that takes fewer bytes."""
    teacher_top_k: int = 64
    """Tokens a row of teacher=top_k_cache."""
    teacher_cache_dir: str | None = None
    """Folder of a teacher cache, which several runs may share; left out, teacher/ in output_dir."""
    lora_rank: int | None = None
    """Train an adapter (LoRA) of this rank on linear layers instead of the weights; left out, all weights learn."""
    lora_alpha: int | None = None
    """The adapter counts lora_alpha / lora_rank; left out, lora_alpha is twice lora_rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Linear layers of the body that get an adapter, such as q_proj,v_proj; left out, all of them."""
    lora_base: Literal["full", "nf4"] = "full"
    """The frozen weights under the adapter: full, as they are read; nf4, the body's layers in 4 bits (QLoRA)."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """trsd, lsp: divergence between the teacher's and the student's distributions."""
    alpha: float | None = None
    """Share of the divergence in the loss, the rest is cross-entropy; left out, 1 for trsd, 0.5 for lsp, else 0."""
    beta: float = 0.5
    """Weight of the teacher in the jsd mixture; 0 is forward and 1 reverse KL."""
    temperature: float = 1.0
    """Temperature of both distributions inside the divergence (not of sampling)."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "onecycle", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps that warm up."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices; norms and biases never decay."""
    optim: Optim = "adamw_torch"
    """AdamW with moments in fp32 (adamw_torch), in 8 or 4 bits by torchao (adamw_torch_8bit, adamw_torch_4bit), or in 8
    bits by bitsandbytes (adamw_bnb_8bit)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: int = 0
    """Steps in a row that may be left out for a spike of loss or gradient, or for NaN; 0: spikes are counted, NaN stops
    the run."""
    num_train_epochs: float = 1.0
    """Passes over the traces, when max_steps is left out."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    train_batch_size: int = 64
    """Traces per optimizer step."""
    max_tokens_per_batch: int = 16384
    """Tokens in one packed row; a step that needs more rows accumulates their gradients."""
    max_length: int = 8192
    """Longer traces are dropped and counted."""
    attn_implementation: AttentionBackend = "auto"
    """Attention of packed rows: auto takes the best that is installed and can; triton is ours, sdpa runs everywhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    gradient_checkpointing_policy: Literal["full", "selective"] = "full"
    """What is recomputed: whole layers, or (selective) all but products and attention, which takes more memory and
    little time."""
    torch_compile: bool = False
    """Compile the layers: fewer kernels and fewer activations kept, after a wait of up to a minute or two at the first
    steps."""
    shard_group_size: int | None = None
    """Under torchrun: ranks that share one copy of the weights, replicated over the rest; left out, all ranks."""
    vocab_parallel: bool = False
    """Under torchrun: no rank holds a whole lm_head; each computes the loss of all ranks' tokens on its part of the
    vocabulary. For large vocabularies; the student's lm_head must not be tied."""
    cpu_offload: bool = False
    """Under torchrun: weights, gradients and optimizer state stay in the CPU's memory. Slow, for models that fit no
    other way."""
    loss_chunk_bytes: int | None = None
    """Working memory of the loss; left out, up to 2.5 GiB on a GPU and 64 MiB on a CPU. Less is slower."""
    bf16: bool | None = None
    """Compute in bf16 over fp32 weights; left out: on a GPU yes, on a CPU no."""
    seed: int = 0
    """Seed of sampling, cuts and order."""

    eval_budgets: tuple[str, ...] = ("0%", "25%", "50%", "75%", "100%")
    """Thinking budgets to evaluate: tokens, or percent of the median thinking of the student as it came."""
    logging_steps: int = 10
    """A line is printed every so many steps; metrics.jsonl gets every step."""
    save_steps: int | None = None
    """A checkpoint every so many steps; the last step always has one."""
    timeout_seconds: int = 1800
    """A step, or a wait for another rank, that takes longer ends the run and prints where every thread is."""
    save_total_limit: int | None = None
    """Only so many checkpoints are kept, the newest and the best always; left out, all."""
    report_to: tuple[str, ...] = ()
    """Where figures go beside metrics.jsonl: tensorboard, wandb, trackio, or none."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder of output_dir."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as ``field: what to do``; empty when all is well."""
        found = []
        for name in ("anchor_share", "beta", "warmup_ratio", "sampling_top_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                found.append(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in (
            "max_thinking_tokens",
            "max_answer_tokens",
            "generation_batch_size",
            "train_batch_size",
            "branches_per_trace",
            "max_length",
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "max_steps",
            "max_train_samples",
            "max_eval_samples",
            "validation_samples",
            "loss_chunk_bytes",
            "teacher_top_k",
            "lora_rank",
            "shard_group_size",
            "timeout_seconds",
            "lora_alpha",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}: expected at least 1, got {value}")
        if self.timeout_seconds > LONGEST_TIMEOUT:
            found.append(f"timeout_seconds: expected at most a year, {LONGEST_TIMEOUT}, got {self.timeout_seconds}")
        if self.max_skipped_steps < 0:
            found.append(f"max_skipped_steps: expected 0 or more, got {self.max_skipped_steps}")
        for name in ("thinking_weight", "weight_decay", "sampling_temperature"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                found.append(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed: expected 0 to 2^63 - 1, got {self.seed}")
        if self.sampling_top_p == 0:
            found.append("sampling_top_p: expected more than 0, got 0")
        for name in (
            "temperature",
            "learning_rate",
            "max_grad_norm",
            "num_train_epochs",
            "sampling_repetition_penalty",
        ):
            if not 0.0 < getattr(self, name) < float("inf"):
                found.append(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.max_tokens_per_batch < self.max_length:
            found.append(
                f"max_tokens_per_batch: {self.max_tokens_per_batch} cannot hold a trace of max_length "
                f"{self.max_length}: raise the former or lower the latter"
            )
        if self.cut == "fractions" and not (self.cut_fractions and all(0 <= f <= 1 for f in self.cut_fractions)):
            found.append(f"cut_fractions: expected numbers from 0 to 1, got {self.cut_fractions}")
        if self.cut == "budgets" and not (self.cut_budgets and all(b >= 0 for b in self.cut_budgets)):
            found.append(f"cut_budgets: expected token counts, got {self.cut_budgets}")
        found += [f"eval_budgets: {error}" for error in budget_problems(self.eval_budgets, self.max_thinking_tokens)]
        if self.lora_rank is None:
            said = [name for name in ("lora_alpha", "lora_target_modules") if getattr(self, name)]
            said += ["lora_base"] if self.lora_base != "full" else []
            found += [f"{name}: there is no adapter without lora_rank: set it, or leave {name} out" for name in said]
        if self.gradient_checkpointing_policy == "selective" and not self.gradient_checkpointing:
            found.append("gradient_checkpointing_policy: without gradient_checkpointing nothing is recomputed: set it")
        if self.gradient_checkpointing_policy == "selective" and self.torch_compile:
            found.append(
                "gradient_checkpointing_policy: with torch_compile layers recompute what is cheap by themselves: leave "
                "gradient_checkpointing out, or the policy, for whole layers"
            )
        if self.resume_from_checkpoint and not self.output_dir:
            found.append("resume_from_checkpoint: say which run with output_dir")
        found += tracker_problems(self.report_to)
        return found + method_problems(self) + teacher_problems(self)


LONGEST_TIMEOUT = 365 * 24 * 60 * 60
ONLINE = ("online", "online_fp8")
CACHE_OF_ALL = "hidden_cache"  # the kind that every divergence, head and student can learn from
# What a method makes of a field that is left out.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "trsd": {"alpha": 1.0},
    "lsp": {"alpha": 0.5, "keep_fraction": 0.5, "loss_sections": "p+cot+a"},
    "palign": {"alpha": 0.0},
    "sft": {"alpha": 0.0, "keep_fraction": 1.0, "loss_sections": "cot+a"},
}
# Fields that only some methods read, and those methods.
METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cut", "cut_fractions", "cut_budgets", "snap_to_sentence"), ("trsd",)),
    **dict.fromkeys(("branches_per_trace", "anchor_share", "thinking_weight"), ("trsd",)),
    **dict.fromkeys(("truncation", "keep_fraction", "keep_side", "loss_sections"), ("lsp", "sft")),
    **dict.fromkeys(("divergence", "beta", "temperature"), ("trsd", "lsp")),
    **dict.fromkeys(("teacher", "teacher_top_k", "teacher_cache_dir"), ("trsd", "lsp")),
    "judge": ("palign", "trsd"),
    "completion": ("palign",),
}


# Fields that are read under certain values of others alone: whether they are, and what that takes.
READ_WITH: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "cut_fractions": (lambda recipe: recipe.cut == "fractions", "cut fractions"),
    "cut_budgets": (lambda recipe: recipe.cut == "budgets", "cut budgets"),
    "judge": (lambda recipe: recipe.method == "palign" or recipe.cut == "judged", "cut judged"),
    "beta": (lambda recipe: recipe.divergence == "jsd", "divergence jsd"),
    "teacher_top_k": (lambda recipe: recipe.teacher == "top_k_cache", "teacher top_k_cache"),
    "sampling_top_p": (lambda recipe: recipe.sampling_temperature > 0, "a sampling_temperature above 0"),
    "eval_budgets": (lambda recipe: recipe.eval_data is not None, "eval_data"),
}


def unread_problems(recipe: Recipe, names: Collection[str]) -> list[str]:
    """What is wrong with setting the fields ``names``: that ``recipe`` reads some of them nowhere."""
    return [
        f"{name}: only {takes} reads it: set that, or leave {name} out"
        for name, (is_read, takes) in READ_WITH.items()
        if name in names and not is_read(recipe) and getattr(recipe, name) != getattr(Recipe(), name)
    ]


def with_method_defaults(recipe: Recipe) -> Recipe:
    """``recipe`` with what its method says to fields that were left out."""
    defaults = METHOD_DEFAULTS[recipe.method].items()
    recipe = replace(recipe, **{name: value for name, value in defaults if getattr(recipe, name) is None})
    if recipe.teacher == "auto" and (recipe.lora_rank is None or recipe.alpha == 0):
        return replace(recipe, teacher=CACHE_OF_ALL)  # which is decided without the models
    return recipe


def belongs_to_a_method(name: str) -> bool:
    """Whether a field means something, or something else, by the method: another method starts without it."""
    return name in METHOD_FIELDS or any(name in defaults for defaults in METHOD_DEFAULTS.values())


def method_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the fields that one method has and another has not."""
    found, method = [], recipe.method
    recipe = with_method_defaults(recipe)
    for entry in fields(Recipe):
        methods = METHOD_FIELDS.get(entry.name, (method,))
        value = getattr(recipe, entry.name)
        said = value != entry.default and not (entry.name == "teacher" and value == CACHE_OF_ALL)
        if method not in methods and said:
            found.append(
                f"{entry.name}: method {method} does not read it (methods that do: {', '.join(methods)}): leave it out"
            )
    if not 0.0 <= recipe.alpha <= 1.0:
        found.append(f"alpha: expected 0 to 1, got {recipe.alpha}")
    if method in ("sft", "palign") and recipe.alpha != 0:
        found.append(f"alpha: method {method} learns text without a teacher, expected 0, got {recipe.alpha}")
    if method in ("lsp", "sft") and not 0.0 < recipe.keep_fraction <= 1.0:
        found.append(f"keep_fraction: expected more than 0 and at most 1, got {recipe.keep_fraction}")
    itself = recipe.teacher_model_name_or_path or recipe.teacher == "adapter_off"
    if method == "lsp" and recipe.alpha > 0 and not itself:
        found.append(
            "teacher_model_name_or_path: lsp learns from a larger teacher: name one, or use method sft for text alone"
        )
    if recipe.truncation == "endpoints" and recipe.keep_side != "left":
        found.append(f"keep_side: truncation endpoints keeps both ends, leave out {recipe.keep_side!r}")
    if recipe.truncation == "first_derivation" and (recipe.keep_side != "left" or recipe.keep_fraction not in (0.5, 1)):
        found.append("keep_fraction, keep_side: truncation first_derivation decides by itself: leave them out")
    return found


def teacher_problems(recipe: Recipe) -> list[str]:
    """What is wrong with where the teacher's targets come from."""
    found, teacher = [], recipe.teacher
    if teacher in ("vector_cache", "adapter_off") and recipe.lora_rank is None:
        why = "the lm_head would move" if teacher == "vector_cache" else "there is no adapter"
        found.append(f"teacher: {teacher} needs lora_rank, without it {why}: set it, or use hidden_cache")
    if teacher == "vector_cache" and recipe.divergence != "forward_kl":
        found.append(
            f"teacher: vector_cache holds the forward KL only, got divergence {recipe.divergence}: use hidden_cache"
        )
    if teacher == "adapter_off" and recipe.teacher_model_name_or_path:
        found.append(
            "teacher_model_name_or_path: with teacher adapter_off the student itself is the teacher: leave it out"
        )
    if teacher == "adapter_off" and recipe.lora_base != "full":
        found.append(f"teacher: adapter_off would be the student in {recipe.lora_base}: use hidden_cache or online")
    if teacher in (*ONLINE, "adapter_off") and recipe.teacher_cache_dir:
        found.append(f"teacher_cache_dir: teacher {teacher} keeps nothing on disk: leave it out")
    return found


def budget_problems(budgets: tuple[str, ...], max_thinking_tokens: int) -> list[str]:
    """What is wrong with a list of ``64`` or ``50%`` budgets."""
    bad = [text for text in budgets if not re.fullmatch(r"\d{1,6}(\.\d+)?%|\d{1,9}", text)]
    if bad:
        return [f"expected token counts or percents such as 64 or 50%, got {', '.join(bad)}"]
    above = [text for text in budgets if not text.endswith("%") and int(text) > max_thinking_tokens]
    if above:
        return [f"expected at most max_thinking_tokens {max_thinking_tokens}, got {', '.join(above)}: raise the former"]
    return []


def resolve_budgets(budgets: tuple[str, ...], median_thinking_tokens: float) -> dict[str, int]:
    """Token counts of ``budgets``, percents taken of the median thinking length."""
    return {
        text: round(float(text[:-1]) / 100 * median_thinking_tokens) if text.endswith("%") else int(text)
        for text in budgets
    }
