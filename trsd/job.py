"""What every stage of a run shares: recipe, folder, tokenizer, think format, models, device and precision."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from trsd.adapters import adapter_options, add_adapter, check_adapter, load_adapter
from trsd.compiled_layers import require_compiler
from trsd.data import Question, describe_drops, load_data
from trsd.decoding import Decoder
from trsd.engines import Sampling, eos_ids_of
from trsd.engines.hf import HFEngine
from trsd.engines.ranked import RankedEngine
from trsd.errors import InputError
from trsd.evaluation import graded_questions
from trsd.grading import check_grader
from trsd.memory import out_of_memory_says, refuse_too_large, warn_of_training
from trsd.metrics import progress_bar
from trsd.models import (
    check_same_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    logit_options,
    model_folder,
    refuse_attention_dropout,
)
from trsd.nf4 import require_bitsandbytes
from trsd.optim import optimizer_class
from trsd.parallel import check_ranks
from trsd.placement import Placement
from trsd.ranks import Ranks
from trsd.recipe import Recipe
from trsd.recomputation import recompute_activations
from trsd.row_shards import MANIFEST
from trsd.run import RECIPE_FILE, TEACHER
from trsd.thinking import ThinkFormat, token_texts
from trsd.trackers import require_trackers


def with_teacher(recipe: Recipe) -> Recipe:
    """``recipe`` with a kind in the place of teacher=auto, which is printed; a resumed run keeps its own."""
    if recipe.teacher != "auto":
        return recipe
    stored = Path(recipe.output_dir or "") / RECIPE_FILE
    if recipe.resume_from_checkpoint and stored.exists():
        return replace(recipe, teacher=yaml.safe_load(stored.read_text(encoding="utf-8"))["teacher"])
    student = model_folder(recipe.model_name_or_path)
    placement = Placement(recipe, *_configs(recipe, (student, _teacher_folder(recipe, student))), device=_device())
    print(f"teacher: {placement.recipe.teacher} ({placement.teacher_reason})", flush=True)
    return placement.recipe


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _teacher_folder(recipe: Recipe, student: Path) -> Path:
    return model_folder(recipe.teacher_model_name_or_path) if recipe.teacher_model_name_or_path else student


def _configs(recipe: Recipe, folders: Sequence[Path]) -> list[Any]:
    return [load_config(folder, trust_remote_code=recipe.trust_remote_code) for folder in folders]


class Job(Placement):
    """Models and settings of one run."""

    def __init__(self, recipe: Recipe, output_dir: Path, ranks: Ranks | None = None) -> None:
        self.output_dir, self.ranks = output_dir, ranks or Ranks()
        self.student_folder = model_folder(recipe.model_name_or_path)
        teacher = recipe.teacher_model_name_or_path
        self.teacher_folder = _teacher_folder(recipe, self.student_folder)
        self.tokenizer = load_tokenizer(self.student_folder, trust_remote_code=recipe.trust_remote_code)
        if teacher:
            other = load_tokenizer(self.teacher_folder, trust_remote_code=recipe.trust_remote_code)
            check_same_tokenizer(self.tokenizer, other, student=self.student_folder, teacher=self.teacher_folder)
        super().__init__(recipe, *_configs(recipe, self.folders), device=_device())
        recipe = self.recipe
        check_ranks(self, self.ranks)
        self._check_models()
        if recipe.lora_base == "nf4":
            require_bitsandbytes()
        if recipe.torch_compile:
            require_compiler(self.device)
        require_trackers(recipe.report_to)
        optimizer_class(recipe.optim, on_gpu=self.device == "cuda")  # a missing package is said before any work
        if recipe.teacher == "online_fp8" and not self.bf16:
            raise InputError("teacher: online_fp8 takes a teacher that is read in bf16: add --bf16 True, or use online")
        if recipe.teacher == "top_k_cache" and recipe.teacher_top_k > self.vocab_size:
            raise InputError(f"teacher_top_k: expected at most the {self.vocab_size} tokens of the vocabulary")
        capped = "student_logit_softcap" in logit_options(self.student_config, "student")
        if recipe.teacher == "vector_cache" and capped:
            raise InputError(
                "teacher: vectors need logits that are linear in the hidden states, and this student caps them: use "
                "hidden_cache or top_k_cache"
            )
        self.think = ThinkFormat.of(
            self.tokenizer, closer=recipe.closer, open_tag=recipe.open_tag, close_tag=recipe.close_tag
        )
        self.think.say_added_opener(self.tokenizer)
        question = self.think.prompt_ids(self.tokenizer, [{"role": "user", "content": "?"}])
        self.check_ids([*question, *self.think.closer_ids, self.tokenizer.eos_token_id])

    def _check_models(self) -> None:
        """Raise for models that could not be loaded or trained, before any work is done for them."""
        recipe, alone = self.recipe, self.ranks.size == 1
        place = self.device if alone else "cpu"
        dtype = self.reading_dtype if recipe.lora_rank else torch.float32
        refuse_too_large(self.student_folder, dtype=dtype, device=place)
        if recipe.alpha and not (self.cache_folder / MANIFEST).exists():
            refuse_too_large(self.teacher_folder, dtype=self.reading_dtype, device=place)
            self.attention_backend(self.teacher_config, branches=False)
        self.attention_backend(self.student_config, branches=recipe.branches_per_trace > 1)
        refuse_attention_dropout(self.student_config)
        if alone:
            warn_of_training(self.student_folder, recipe, device=self.device)
        if recipe.lora_rank and not recipe.trust_remote_code:
            check_adapter(self.student_config, recipe.lora_target_modules)

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise InputError for a token that student or teacher has no row for: tokenizers may know more than models."""
        if (highest := max(ids)) >= self.vocab_size:
            raise InputError(
                f"token {highest} ({self.tokenizer.decode([highest])!r}) is none of the {self.vocab_size} that student "
                f"and teacher have, while their tokenizer knows {len(self.tokenizer)}: give the tokenizer that the "
                "models were trained with, or resize their embeddings"
            )

    @property
    def cache_folder(self) -> Path:
        """Where the recipe's teacher cache is, or will be."""
        return Path(self.recipe.teacher_cache_dir or self.output_dir / TEACHER).absolute()

    @cached_property
    def texts(self) -> list[str]:
        """The text of every token id of the larger vocabulary."""
        size = max(config.get_text_config().vocab_size for config in (self.student_config, self.teacher_config))
        return token_texts(self.tokenizer, size)

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.student_folder, self.teacher_folder

    @cached_property
    def evaluation_questions(self) -> list[Question] | None:
        """The questions to evaluate on; None when the recipe has no eval_data."""
        recipe = self.recipe
        if recipe.eval_data is None:
            return None
        loaded = load_data(
            recipe.eval_data, tokenizer=self.tokenizer, think=self.think, max_rows=recipe.max_eval_samples, asking=True
        )
        if drops := describe_drops(loaded.dropped):
            print(f"evaluation questions dropped: {drops}")
        questions = graded_questions(loaded)
        limit = getattr(self.student_config.get_text_config(), "max_position_embeddings", None)
        if limit and recipe.max_thinking_tokens + recipe.max_answer_tokens >= limit:
            raise InputError(
                f"max_thinking_tokens: {recipe.max_thinking_tokens} tokens of thinking and {recipe.max_answer_tokens} "
                f"of answer leave no room for the questions of eval_data, the model's context holds {limit}: lower "
                "max_thinking_tokens or max_answer_tokens"
            )
        check_grader(question.gold for question in questions)
        return questions

    def student(self, folder: Path | None = None) -> PreTrainedModel:
        """A trainable model, as it begins or as the checkpoint ``folder`` has it.

        What is trained is fp32; where bf16 is on the loop computes with bf16 copies. The weights under an adapter are
        only read, and in the precision for that.
        """
        if rank := self.recipe.lora_rank:
            model = self.reader(self.student_folder, sharded=self.ranks.size > 1)
            add_adapter(model, rank, seed=self.recipe.seed, **adapter_options(self.recipe))
            if folder:
                load_adapter(model, folder)
        else:
            model = self._load(folder or self.student_folder, torch.float32, sharded=self.ranks.size > 1)
        if self.recipe.gradient_checkpointing:
            recompute_activations(model, self.recipe.gradient_checkpointing_policy)
        # So that whoever serves the checkpoint stops where its answers were taught to end.
        model.generation_config.eos_token_id = eos_ids_of(model.generation_config, self.tokenizer)
        return model

    def teacher(self) -> PreTrainedModel:
        """The teacher, in the precision it is only read in."""
        return self.reader(self.teacher_folder)

    def reader(self, folder: Path, *, sharded: bool = False) -> PreTrainedModel:
        """A model that is only read; on the CPU where it will be ``sharded``."""
        return self._load(folder, self.reading_dtype, sharded=sharded)

    def _load(self, folder: Path, dtype: torch.dtype, *, sharded: bool = False) -> PreTrainedModel:
        device = "cpu" if sharded else self.device
        return load_model(folder, dtype=dtype, device=device, trust_remote_code=self.recipe.trust_remote_code)

    def decoder(
        self, model: PreTrainedModel, what: str, sampling: Sampling | None = None, *, alone: bool = False
    ) -> Decoder:
        """A decoder of ``model`` with this run's think format; of every rank together, or of this one ``alone``."""
        engine = HFEngine(model, self.tokenizer, batch_size=self.recipe.generation_batch_size)
        return Decoder(
            engine if alone or self.ranks.size == 1 else RankedEngine(engine, self.ranks),
            self.tokenizer,
            self.think,
            sampling=sampling,
            progress=progress_bar(what),
            texts=self.texts,
        )

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, a decoder may write: the precision of forward passes, and what to turn when memory runs out."""
        size = self.recipe.generation_batch_size
        with self.compute(), out_of_memory_says(f"lower --generation_batch_size (now {size}) or --max_thinking_tokens"):
            yield

    def sampling(self) -> Sampling:
        """How traces and completions are drawn."""
        recipe = self.recipe
        return Sampling(
            temperature=recipe.sampling_temperature,
            top_p=recipe.sampling_top_p,
            repetition_penalty=recipe.sampling_repetition_penalty,
            seed=recipe.seed,
        )
