"""A transformers model in this process: up to ``batch_size`` rows decode together, each refilled when it finishes.

A script runs in one slot (``slots.py``), which goes back to where the next continuation departs from what stands there:
answers at many budgets cost their own tokens alone, in the order of their length. Slots without a script of their own
take such continuations over, with a copy of what they share.

A continuation draws from its own seed, one number a token, so what runs beside it changes nothing but rounding.
"""

import inspect
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trsd.engines import Continuation, Sampling, Script, T, Written, eos_ids_of
from trsd.engines.scripts import Task
from trsd.engines.slots import SLOT_ATTENTION, Slots, common_length
from trsd.models import logit_options, with_attention

PREFILL_TOKENS = 4096  # new tokens in one forward pass of contexts, and the most of one row
SHORT_FEED = 4  # tokens that a row takes one at a time, beside the others' next tokens
LONGEST_DRAFT = 512  # tokens that may be guessed of a continuation, ...
LONGEST_GUESS = 32  # ... in one forward pass
WRONG_DRAFTS = 2  # guesses without a right token after which a draft is given up
FIRST_GUESSES, WORTH_GUESSING = 256, 0.4  # tokens guessed, and the share that must be right, to go on guessing at all


@dataclass
class _Wish:
    """A continuation and whose it is."""

    task: Task
    number: int
    """Its place in what the script yielded."""
    continuation: Continuation


@dataclass
class _Row:
    """A slot at work: ``tokens`` are those whose keys it holds, ``feed`` those it is to run next."""

    tokens: list[int] = field(default_factory=list)
    feed: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """What may follow, because the slot wrote it to another wish of the same script."""
    drafting: bool = False
    """The draft may follow right behind the feed."""
    wrong_drafts: int = 0
    last_ids: list[int] = field(default_factory=list)
    wish: _Wish | None = None
    backlog: list[_Wish] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    _random: random.Random = field(default_factory=random.Random)
    _draws: list[float] = field(default_factory=list)

    def take(self, wish: _Wish, draft: Sequence[int] = ()) -> None:
        """Begin a continuation, from what the slot already holds of its context; the last token is run in any case."""
        context = list(wish.continuation.context_ids)
        shared = min(common_length(self.tokens, context), len(context) - 1)
        self.tokens, self.feed = context[:shared], context[shared:]
        self.wish, self.ids, self.log_probs = wish, [], []
        self._random, self._draws = random.Random(wish.continuation.seed), []
        draft = list(draft) if len(draft) <= LONGEST_DRAFT else []
        begun = max((n for n in range(1, len(draft)) if context[-n:] == draft[:n]), default=0)
        self.draft, self.drafting, self.wrong_drafts = draft[begun:], True, 0

    @property
    def guess(self) -> list[int]:
        """Tokens to run behind the feed, in the hope that they are what is written."""
        if not self.drafting or self.wish is None:
            return []
        return self.draft[: min(LONGEST_GUESS, self.wish.continuation.max_new_tokens - len(self.ids) - 1)]

    def draws(self, count: int) -> list[float]:
        """The uniform numbers of the next ``count`` tokens; a token has the same one however it comes about."""
        start = len(self.ids)
        while len(self._draws) < start + count:
            self._draws.append(self._random.random())
        return self._draws[start : start + count]

    def write(self, tokens: Sequence[int], log_probs: Sequence[float], eos_ids: Sequence[int]) -> bool:
        """Add what follows the feed, as far as the draft was right, and one token more; whether that ends it."""
        wanted, self.feed = self.wish.continuation, []
        guessed, right = self.draft[: len(tokens) - 1], 0
        for place, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
            self.ids.append(token)
            self.log_probs.append(log_prob)
            if token in eos_ids or token in wanted.stop_ids or len(self.ids) == wanted.max_new_tokens:
                return True
            if place == len(guessed) or token != guessed[place]:
                break
            right += 1
            self.tokens.append(token)
        self.feed = [self.ids[-1]]
        self._align(right, len(guessed))
        return False

    def _align(self, right: int, guessed: int) -> None:
        """Go on in the draft behind the token that was just written, if it stands there; give up a draft that errs."""
        if guessed:
            self.wrong_drafts = 0 if right else self.wrong_drafts + 1
        rest, last = self.draft[right:] if self.wrong_drafts < WRONG_DRAFTS else [], self.ids[-1]
        self.drafting = last in rest
        self.draft = rest[rest.index(last) + 1 :] if self.drafting else rest


class HFEngine:
    """Continuous batches of one model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int = 128) -> None:
        """Take a model that ``trsd.models.load_model`` made; ``batch_size`` rows are decoded together."""
        config = model.config.get_text_config()
        self.model = model
        self.batch_size = batch_size
        self.eos_ids = eos_ids_of(model.generation_config, tokenizer)
        self.context_limit = _context_limit(config)
        self.vocab_size = config.vocab_size
        self.dtype = str(model.dtype)
        taken = inspect.signature(model.get_decoder().forward).parameters
        self.cache_argument = "cache" if "cache" in taken else "past_key_values"  # which 5.24 renames

    def run(self, scripts: Sequence[Script[T]], sampling: Sampling) -> Iterator[tuple[int, T]]:
        """(place, result) of every script, as they finish."""
        with torch.inference_mode(), with_attention(self.model, SLOT_ATTENTION):
            batch = _Batch(self, scripts, sampling)
        while True:
            # Left between results: whoever takes them may run the model otherwise, or leave.
            with torch.inference_mode(), with_attention(self.model, SLOT_ATTENTION):
                while not batch.finished and batch.rows:
                    batch.advance()
            if not batch.finished:
                return
            while batch.finished:
                yield batch.finished.popleft()


class _Batch:
    """The rows of one ``run``: slot i belongs to ``rows[i]``."""

    def __init__(self, engine: HFEngine, scripts: Sequence[Script[Any]], sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.device = engine.model.device
        self.slots = Slots(engine.batch_size)
        self.rows: list[_Row] = []
        self.finished: deque[tuple[int, Any]] = deque()
        self.num_guessed = self.num_right = 0
        self.waiting = deque(Task(place, script) for place, script in enumerate(scripts))
        self.seen = torch.zeros(0, engine.vocab_size, dtype=torch.bool, device=self.device)  # for a repetition penalty
        options = logit_options(engine.model.config, "model")
        self.scale, self.softcap = options.get("model_logit_scale", 1.0), options.get("model_logit_softcap")
        self._refill()

    def advance(self) -> None:
        """Run the next tokens of all rows, and give those that finished something new to do."""
        long = [i for i, row in enumerate(self.rows) if len(row.feed) + len(row.guess) > SHORT_FEED]
        # One forward pass for several contexts: rows wait for company while others have something to write.
        if len(long) * 16 >= len(self.rows):
            self._run_many(long)
        else:
            self._run_one(set(long))
        self._refill()

    def _run_many(self, indices: list[int]) -> None:
        """Run what the rows are to be fed and their drafts: rows of similar length, PREFILL_TOKENS at a time."""
        indices = sorted(indices, key=self._length)
        while indices:
            group = [indices.pop(0)]
            most = min(PREFILL_TOKENS // (len(group) + 1), 3 * self._length(group[0]) + 8)
            while indices and self._length(indices[0]) <= most:
                group.append(indices.pop(0))
                most = min(PREFILL_TOKENS // (len(group) + 1), most)
            new = self._length(group[-1])
            ids = torch.zeros(len(group), new, dtype=torch.long)
            starts, ends, takers = [], [], []
            for place, i in enumerate(group):
                row = self.rows[i]
                starts.append(len(row.tokens))
                fed = (row.feed + row.guess)[:new]
                ids[place, : len(fed)] = torch.tensor(fed)
                ends.append(len(row.tokens) + len(fed) - 1)
                end = min(len(row.feed), new)
                row.tokens += row.feed[:end]
                row.feed = row.feed[end:]
                if not row.feed:
                    takers.append((i, place, range(end - 1, len(fed))))
            hidden = self._forward(ids, torch.tensor(starts)[:, None] + torch.arange(new), torch.tensor(group), ends)
            if takers:
                wanted = [(place, at) for _, place, span in takers for at in span]
                rows, places = torch.tensor(wanted, device=self.device).T
                self._write(hidden[rows, places], [(i, len(span)) for i, _, span in takers])

    def _length(self, index: int) -> int:
        row = self.rows[index]
        return min(len(row.feed) + len(row.guess), PREFILL_TOKENS)

    def _run_one(self, unready: set[int]) -> None:
        """Run one token of every row; those in ``unready`` run one that counts for nothing."""
        ids = torch.tensor([[0 if i in unready else row.feed[0]] for i, row in enumerate(self.rows)])
        positions = torch.tensor([[len(row.tokens)] for row in self.rows])
        hidden = self._forward(ids, positions, None)[:, 0]
        writing = []
        for i, row in enumerate(self.rows):
            if i not in unready:
                row.tokens.append(row.feed.pop(0))
                if not row.feed:
                    writing.append(i)
        if writing:
            whole = len(writing) == len(self.rows)
            hidden = hidden if whole else hidden[torch.tensor(writing, device=self.device)]
            self._write(hidden, [(i, 1) for i in writing])

    def _write(self, hidden: Tensor, counts: Sequence[tuple[int, int]]) -> None:
        """Draw tokens from ``hidden`` [num_tokens, hidden_size], so many for each row, and let the rows take them."""
        start = 0
        for part in self._parts(counts):
            end = start + sum(count for _, count in part)
            self._take(part, *self._draw(hidden[start:end], part))
            start = end

    def _parts(self, counts: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """``counts`` in parts that ask for no more logits at once than a batch without guesses would."""
        part: list[tuple[int, int]] = []
        most, num_tokens = max(self.engine.batch_size, LONGEST_GUESS), 0
        for i, count in counts:
            if part and num_tokens + count > most:
                yield part
                part, num_tokens = [], 0
            part.append((i, count))
            num_tokens += count
        if part:
            yield part

    def _take(self, counts: Sequence[tuple[int, int]], tokens: list[int], log_probs: list[float]) -> None:
        start = 0
        for i, count in counts:
            row, span = self.rows[i], slice(start, start + count)
            start, before = start + count, len(row.ids)
            ended = row.write(tokens[span], log_probs[span], self.engine.eos_ids)
            self.num_guessed += count - 1
            self.num_right += len(row.ids) - before - 1
            if ended:
                self._deliver(row)

    def _forward(self, ids: Tensor, positions: Tensor, rows: Tensor | None, ends: Sequence[int] = ()) -> Tensor:
        """Final hidden states, [num_rows, num_new, hidden_size]; padding stands behind the ``ends`` of its rows."""
        seen = int(positions.max()) + 1
        self.slots.reserve(len(self.rows), seen)
        told = positions if not ends else positions.minimum(torch.tensor(ends)[:, None])  # some models count no further
        positions = positions.to(self.device)
        self.slots.begin(None if rows is None else rows.to(self.device), positions, seen)
        return (
            self.engine.model.get_decoder()(
                input_ids=ids.to(self.device),
                position_ids=told.to(self.device),
                use_cache=True,
                slots=self.slots,
                **{self.engine.cache_argument: self.slots},
            )
        ).last_hidden_state

    def _draw(self, hidden: Tensor, counts: Sequence[tuple[int, int]]) -> tuple[list[int], list[float]]:
        """The token at each place and its log-probability under the model."""
        own = functional.linear(hidden, self.engine.model.get_output_embeddings().weight).float()
        if self.scale != 1:
            own = own * self.scale
        if self.softcap:
            own = self.softcap * torch.tanh(own / self.softcap)
        sampling, logits = self.sampling, own
        if sampling.repetition_penalty != 1:
            rows = torch.tensor([i for i, _ in counts], device=self.device)
            penalised = torch.where(own < 0, own * sampling.repetition_penalty, own / sampling.repetition_penalty)
            logits = torch.where(self._seen_by(rows), penalised, own)
        if sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            draws = [number for i, count in counts for number in self.rows[i].draws(count)]
            draws = torch.tensor(draws, dtype=torch.float64, device=self.device)
            tokens = draw_tokens(logits / sampling.temperature, sampling.top_p, draws)
        if sampling.repetition_penalty != 1:
            self.seen[rows, tokens] = True
        log_probs = own.gather(1, tokens[:, None])[:, 0] - own.logsumexp(-1)
        return tokens.tolist(), log_probs.tolist()

    def _seen_by(self, rows: Tensor) -> Tensor:
        """Tokens in each row's context, [num_rows, vocab_size] bool."""
        if len(self.seen) < len(self.rows):
            grown = self.seen.new_zeros(len(self.rows), self.seen.shape[1])
            grown[: len(self.seen)] = self.seen
            self.seen = grown
        for i in rows.tolist():
            if not self.rows[i].ids:  # a new continuation
                self.seen[i] = False
                self.seen[i, torch.tensor(self.rows[i].tokens, device=self.device)] = True
        return self.seen[rows]

    def _deliver(self, row: _Row) -> None:
        """Hand what the row wrote to its script, which goes on in this row when it has all it waited for."""
        wish, row.wish, row.feed, row.draft, row.last_ids = row.wish, None, [], [], row.ids
        if wish.task.deliver(wish.number, Written(row.ids, row.log_probs)):
            row.backlog, row.last_ids = self._next_of(wish.task), []

    def _next_of(self, task: Task) -> list[_Wish]:
        """What the script wants next; nothing when it has finished, which is noted."""
        wanted, result = task.move_on(self.engine.context_limit)
        if not wanted:
            self.finished.append((task.place, result))
        return [_Wish(task, number, continuation) for number, continuation in enumerate(wanted)]

    def _refill(self) -> None:
        """Give every row without a wish one: of its own script, of a new one, or another's; rows without any go."""
        for row in self.rows:
            if row.wish is None and row.backlog:
                # From the longest: what is shared with the shorter ones then stays in the slot.
                shared = [common_length(row.tokens, wish.continuation.context_ids) for wish in row.backlog]
                row.take(row.backlog.pop(shared.index(max(shared))), self._draft_of(row))
        index = 0
        while index < len(self.rows):
            row = self.rows[index]
            if row.wish or self._start(row) or self._take_over(index):
                index += 1
            else:
                self._drop(index)
        while len(self.rows) < self.engine.batch_size:
            self.rows.append(_Row())
            if not self._start(self.rows[-1]) and not self._take_over(len(self.rows) - 1):
                self.rows.pop()
                return

    def _start(self, row: _Row) -> bool:
        """Begin the next script that wants anything in ``row``."""
        while self.waiting:
            row.backlog = self._next_of(self.waiting.popleft())
            if row.backlog:
                row.tokens, row.last_ids = [], []
                row.take(row.backlog.pop(0))
                return True
        return False

    def _take_over(self, index: int) -> bool:
        """Take a wish that waits in another row, the one that shares least with it: that row keeps the longest."""
        source = max(range(len(self.rows)), key=lambda i: len(self.rows[i].backlog))
        home, row = self.rows[source], self.rows[index]
        if not home.backlog:
            return False
        shared = [common_length(home.tokens, wish.continuation.context_ids) for wish in home.backlog]
        wish = home.backlog.pop(shared.index(min(shared)))
        self.slots.reserve(len(self.rows), 0)
        row.tokens = home.tokens[: min(shared)]
        self.slots.copy(source, index, len(row.tokens))
        row.take(wish, self._draft_of(home))
        return True

    def _draft_of(self, row: _Row) -> list[int]:
        """What may be written again. None under a repetition penalty, where a token hangs on those before it."""
        vain = self.num_guessed > FIRST_GUESSES and self.num_right < WORTH_GUESSING * self.num_guessed
        return [] if vain or self.sampling.repetition_penalty != 1 else row.last_ids

    def _drop(self, index: int) -> None:
        """Remove a row; the last one moves into its slot, so that rows stay side by side."""
        last = self.rows.pop()
        if index < len(self.rows):
            self.slots.copy(len(self.rows), index, len(last.tokens))
            if len(self.seen) > len(self.rows):
                self.seen[index] = self.seen[len(self.rows)]
            self.rows[index] = last


def draw_tokens(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at ``draws``.

    Args:
        logits: [num_rows, vocab_size].
        top_p: the most probable tokens that together reach this mass are drawn from; at least one.
        draws: [num_rows] float64 in [0, 1).

    Returns:
        [num_rows] int64.
    """
    probs = logits.double().softmax(-1)
    if top_p == 1:
        cumulative = probs.cumsum(-1)
        order = None
    else:
        probs, order = probs.sort(-1, descending=True)
        cumulative = probs.cumsum(-1)
        cumulative = torch.where(cumulative - probs < top_p, cumulative, 0).cummax(-1).values
    places = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    places = places.clamp(max=logits.shape[1] - 1)
    return (places if order is None else order.gather(1, places))[:, 0]


def _context_limit(config: Any) -> int | None:
    """Most tokens of a row: what the config says, less where rotary embeddings change with the longest row."""
    limit = getattr(config, "max_position_embeddings", None)
    found = getattr(config, "rope_parameters", None) or {}
    for parameters in (found, *(part for part in found.values() if isinstance(part, dict))):
        kind, original = parameters.get("rope_type"), parameters.get("original_max_position_embeddings")
        if kind in ("longrope", "dynamic") and limit and original and original < limit:
            print(
                f"note: the model's {kind} rotary embeddings change beyond {original} tokens, for every row that runs "
                f"beside a longer one: rows end there, not at {limit} (--engine vllm goes on)",
                file=sys.stderr,
            )
            limit = original
    return limit
