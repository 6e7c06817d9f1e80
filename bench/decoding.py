"""What decoding is measured on: the bundled reasoner and questions, by ours and by transformers' own generate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import GenerationConfig

from bench.measure import Rounds, timed_fields
from trsd.data import load_data
from trsd.decoding import Decoder, Limits
from trsd.engines.hf import HFEngine
from trsd.models import load_for_decoding, load_tokenizer, model_folder, with_attention
from trsd.thinking import ThinkFormat

MODEL, QUESTIONS = "bundled:reasoner", "bundled:questions/evaluation.jsonl"
MAX_NEW_TOKENS = 320
# Thinking has a median of 174 tokens, and an answer that says what it has to takes 12.
BUDGETS = tuple(range(22, 177, 22))
LIMITS = Limits(max_thinking_tokens=MAX_NEW_TOKENS, max_answer_tokens=12)
ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """So many questions, so many rows together."""

    num_questions: int
    rows: int

    @cached_property
    def decoder(self) -> Decoder:
        """Ours."""
        folder = model_folder(MODEL)
        tokenizer = load_tokenizer(folder)
        engine = HFEngine(load_for_decoding(folder), tokenizer, batch_size=self.rows)
        return Decoder(engine, tokenizer, ThinkFormat.of(tokenizer))

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts of the bundled questions, lengths mixed as they come."""
        decoder = self.decoder
        loaded = load_data(QUESTIONS, tokenizer=decoder.tokenizer, think=decoder.think, max_rows=self.num_questions)
        return [decoder.think.prompt_ids(decoder.tokenizer, question.messages) for question in loaded.questions]

    def refilled(self) -> list[list[int]]:
        """Every prompt continued, rows refilled as they finish."""
        return self.decoder.complete(self.prompts, max_new_tokens=MAX_NEW_TOKENS)

    def padded(self) -> list[list[int]]:
        """The same by ``generate``: batches of similar prompts, padded, each as long as its longest row."""
        model, eos = self.decoder.engine.model, self.decoder.eos_ids
        pad = self.decoder.tokenizer.pad_token_id
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        written: dict[int, list[int]] = {}
        config = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=list(eos), pad_token_id=pad
        )
        with torch.no_grad(), with_attention(model, "sdpa"):
            for start in range(0, len(order), self.rows):
                batch = order[start : start + self.rows]
                length = len(self.prompts[batch[0]])
                ids = torch.full((len(batch), length), pad)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, length - len(self.prompts[i]) :] = torch.tensor(self.prompts[i])
                    mask[row, length - len(self.prompts[i]) :] = 1
                output = model.generate(
                    ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
                )
                for i, row in zip(batch, output[:, length:].tolist(), strict=True):
                    end = next((place for place, token in enumerate(row) if token in eos), len(row) - 1)
                    written[i] = row[: end + 1]
        return [written[i] for i in range(len(order))]

    def longest_budget(self) -> list[list[int]]:
        """Thinking up to the longest budget, and its answer."""
        return self._at(BUDGETS[-1:])

    def all_budgets(self) -> list[list[int]]:
        """Thinking once, and the answers at all budgets."""
        return self._at(BUDGETS)

    def each_budget_anew(self) -> list[list[int]]:
        """Thinking for every budget by itself."""
        return [ids for budget in BUDGETS for ids in self._at((budget,))]

    def _at(self, budgets: Sequence[int]) -> list[list[int]]:
        limits = Limits(max_thinking_tokens=budgets[-1], max_answer_tokens=LIMITS.max_answer_tokens)
        free, at = self.decoder.think_at_budgets(self.prompts, budgets, limits)
        thought = [answer.reasoning_ids for answer in free]
        return thought + [answer.answer_ids for answers in at.values() for answer in answers]


def take_turns(
    benchmark: Callable, work: Callable[[], list], reference: Callable[[], list], *, rounds: int = ROUNDS
) -> dict[str, object]:
    """The measured fields of a ``DecodingLine``, the reference's rounds in turn with the work's; both ran before."""
    on_gpu = torch.cuda.is_available()
    run, other = Rounds(work, on_gpu=on_gpu), Rounds(reference, on_gpu=on_gpu)
    benchmark.pedantic(run.once, setup=other.once, rounds=rounds)
    return timed_fields(run, other)
