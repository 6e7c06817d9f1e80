"""Budget-forced decoding (s1, arXiv 2501.19393): think up to a budget, append the closer, let the model answer.

A question is thought about once. Its answer at a budget b is the natural one when the thinking ended by itself within
b tokens, else the continuation of ``prompt | reasoning[:b] | closer``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from trsd.errors import InputError
from trsd.models import plain_attention
from trsd.thinking import ThinkFormat, token_texts

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; ``temperature`` 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    """Divides the positive logits of every token that stands in the context (and multiplies the negative ones)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and the thinking it followed."""

    reasoning_ids: list[int]
    close_ids: list[int]
    """Empty when the thinking never ended and nothing closed it."""
    answer_ids: list[int]
    closed: bool
    """The thinking ended by itself."""
    finished: bool
    """The answer ended with EOS."""


@contextmanager
def _own_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the folder's generation_config.json (a repetition penalty, a top-k) adds nothing to ``Sampling``."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens after which ``model`` has finished: its tokenizer's EOS and those of its generation config."""
    eos = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([eos] if isinstance(eos, int) else eos or [])})


def check_decoding(args: Any) -> None:
    """Raise for decoding settings of a command line that mean nothing, by field."""
    for name in ("max_thinking_tokens", "max_answer_tokens", "batch_size", "max_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if not 0 <= args.temperature <= 100 or 0 < args.temperature < 1e-3:
        raise InputError(f"temperature: expected 0 (greedy) or 0.001 to 100, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"top_p: expected more than 0 and at most 1, got {args.top_p}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed: expected 0 to 2^63 - 1, got {args.seed}")


class Decoder:
    """Batched decoding with one model, tokenizer and think format."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        think: ThinkFormat,
        *,
        batch_size: int = 128,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Take a model and how it is to write; ``texts`` are its ``token_texts``, where they are at hand."""
        self.model = model
        self.tokenizer = tokenizer
        self.think = think
        self.batch_size = batch_size
        self.sampling = sampling or Sampling()
        self.progress = progress
        self.texts = texts or token_texts(tokenizer, model.config.get_text_config().vocab_size)
        self.eos_ids = stop_ids(model, tokenizer)

    @property
    def context_limit(self) -> int | None:
        """Most tokens the model can hold, prompt and continuation together; None when its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def think_and_answer(
        self, prompts: Sequence[Sequence[int]], *, max_thinking_tokens: int, max_answer_tokens: int
    ) -> list[Answer]:
        """Let the model think and answer freely; thinking that passes its limit stays without close and answer."""
        close = max(len(self.think.natural_close_ids), len(self.think.closer_ids))
        written = self.complete(prompts, max_new_tokens=max_thinking_tokens + close + max_answer_tokens)
        return [self._split(ids, max_thinking_tokens, max_answer_tokens) for ids in written]

    def answer_after(
        self, prompts: Sequence[Sequence[int]], reasonings: Sequence[Sequence[int]], *, max_answer_tokens: int
    ) -> list[Answer]:
        """Close each (already cut) reasoning with the closer and let the model answer."""
        closer = list(self.think.closer_ids)
        contexts = [[*prompt, *reasoning, *closer] for prompt, reasoning in zip(prompts, reasonings, strict=True)]
        written = self.complete(contexts, max_new_tokens=max_answer_tokens)
        return [
            Answer(
                reasoning_ids=list(reasoning),
                close_ids=closer,
                answer_ids=ids,
                closed=False,
                finished=ids[-1] in self.eos_ids,
            )
            for reasoning, ids in zip(reasonings, written, strict=True)
        ]

    def answers_at_budgets(
        self,
        prompts: Sequence[Sequence[int]],
        free: Sequence[Answer],
        budgets: Sequence[int],
        *,
        max_answer_tokens: int,
    ) -> dict[int, list[Answer]]:
        """The answer of every question at every budget, from its free thinking ``free``."""
        forced = [
            (budget, index)
            for budget in budgets
            for index, answer in enumerate(free)
            if not (answer.closed and len(answer.reasoning_ids) <= budget)
        ]
        answers = self.answer_after(
            [prompts[index] for _, index in forced],
            [free[index].reasoning_ids[:budget] for budget, index in forced],
            max_answer_tokens=max_answer_tokens,
        )
        at_budgets = {budget: list(free) for budget in budgets}
        for (budget, index), answer in zip(forced, answers, strict=True):
            at_budgets[budget][index] = answer
        return at_budgets

    @torch.no_grad()
    def complete(self, contexts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """What the model writes after each context, up to and with EOS, in the order of ``contexts``."""
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        written: list[list[int]] = [[] for _ in contexts]
        limit = self.context_limit
        if order and limit and len(contexts[order[0]]) + max_new_tokens > limit:
            raise InputError(
                f"the longest prompt has {len(contexts[order[0]])} tokens and {max_new_tokens} may follow, but the "
                f"model's context holds {limit}: lower max_thinking_tokens or max_answer_tokens, or leave that row out"
            )
        torch.manual_seed(self.sampling.seed)
        with plain_attention(self.model), _own_generation_defaults(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                texts = self._generate([contexts[i] for i in batch], max_new_tokens)
                for index, ids in zip(batch, texts, strict=True):
                    written[index] = ids
                if self.progress:
                    self.progress(min(start + self.batch_size, len(order)), len(order))
        return written

    def _split(self, ids: list[int], max_thinking_tokens: int, max_answer_tokens: int) -> Answer:
        parts = self.think.split(ids, self.texts)
        if parts is None or len(parts[0]) > max_thinking_tokens:
            reasoning = [i for i in ids[:max_thinking_tokens] if i not in self.eos_ids]
            return Answer(reasoning_ids=reasoning, close_ids=[], answer_ids=[], closed=False, finished=False)
        reasoning, close, answer = parts
        answer = answer[:max_answer_tokens]
        finished = bool(answer) and answer[-1] in self.eos_ids
        return Answer(reasoning_ids=reasoning, close_ids=close, answer_ids=answer, closed=True, finished=finished)

    def _generate(self, contexts: list[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        length, device = len(contexts[0]), self.model.device
        # Left padding, so that all rows continue at the right edge; with a row's own first token, because a repetition
        # penalty looks at padding too, and the pad token may be EOS.
        input_ids = torch.tensor([context[0] for context in contexts])[:, None].repeat(1, length)
        mask = torch.zeros_like(input_ids)
        for row, context in enumerate(contexts):
            input_ids[row, length - len(context) :] = torch.tensor(context)
            mask[row, length - len(context) :] = 1
        greedy = self.sampling.temperature == 0
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else self.sampling.temperature,
            top_p=None if greedy else self.sampling.top_p,
            top_k=None if greedy else 0,
            repetition_penalty=self.sampling.repetition_penalty,
            eos_token_id=self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.model.generate(input_ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [self._up_to_eos(row) for row in output[:, length:].tolist()]

    def _up_to_eos(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids) - 1)
        return ids[: end + 1]
