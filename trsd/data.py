"""User data as questions or traces: local jsonl / parquet or a Hugging Face data set, by its columns.

    messages                        a conversation; an assistant turn with thinking makes it a trace
    prompt + reasoning + answer     a trace as text (question or problem serve as prompt)
    prompt + response               the same, thinking and answer in one text (also where the answer has the tags);
                                    completion, the first of generations, generated_solution serve as response
    question + answer               a question with its reference answer; the teacher writes the trace
                                    (problem or prompt serve as question)
    conversations; input + output; prompt + llm_response
                                    rows of published corpora (``corpora.py``)
    prompt_ids, reasoning_ids, ...  a stored trace file

A row that cannot be used is dropped by a named reason and counted; a row that is malformed raises with its number.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trsd.benchmarks import hub_rows, is_hub_source, refuse_unknown_name
from trsd.corpora import THOUGHT_FIELDS, THOUGHT_TAGS, as_conversation, with_think_tags
from trsd.errors import InputError
from trsd.grading import extract_answer, grade, has_format
from trsd.metrics import say
from trsd.models import tokenizer_fingerprint
from trsd.paths import resolve_bundled
from trsd.thinking import ThinkFormat
from trsd.traces import FILE_TYPES, ID_FIELDS, Trace, content_key, read_rows, trace_from_row

NO_CLOSE = "no close tag: the thinking never ends"
NO_THINKING = "no thinking: neither a close tag nor a field such as reasoning_content"
NO_ANSWER = "answer of zero tokens"
SPECIAL_INSIDE = "special token inside the text"
TAG_INSIDE = "close tag inside the reasoning or the answer"
QUESTION_COLUMNS = ("question", "problem", "prompt")
RESPONSES = ("response", "completion", "generations", "generated_solution")
REFERENCES = ("answer", "gold", "final_answer", "solution", "ground_truth", "expected_answer")
# What a row of a question may hold beside it that looks as if it were meant, and is not read.
UNREAD = ("instruction", "thinking", "thoughts", "thought", "cot", "chain_of_thought", "reasoning_content", "rationale")
UNREAD += ("thinking_trajectories", "deepseek_thinking_trajectory", "gemini_thinking_trajectory")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt to be answered, with the reference answer when one is known."""

    id: str
    question: str
    messages: list[dict[str, str]]
    gold: str | None


@dataclass
class Loaded:
    """What a data source held."""

    questions: list[Question] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns that look like a part of the question or its reasoning and were not read, with their rows."""


def load_data(
    source: str,
    *,
    tokenizer: Any,
    think: ThinkFormat,
    max_rows: int | None = None,
    as_text: bool = False,
    asking: bool = False,
    adapt: Callable[[dict[str, Any], str], dict[str, Any] | str] | None = None,
) -> Loaded:
    """Read up to ``max_rows`` rows of ``source``; exact duplicates are dropped and counted.

    ``as_text``: stored traces of another tokenizer are read by their text, instead of being refused.
    ``asking``: questions are wanted, so thinking in a response or an answer is left aside.
    ``adapt``: makes (row, its name) a row of a known form, or a reason to drop it.
    """
    loaded, seen = Loaded(), set()
    reader = RowReader(tokenizer, think, as_text=as_text, asking=asking)
    for where, row in islice(source_rows(source), max_rows):
        row = adapt(row, where) if adapt else row
        item = row if isinstance(row, str) else reader.read(row, where=where)
        if isinstance(item, str):
            loaded.dropped[item] += 1
        elif item.id in seen:
            loaded.dropped["exact duplicate"] += 1
        else:
            seen.add(item.id)
            (loaded.traces if isinstance(item, Trace) else loaded.questions).append(item)
    loaded.unread = reader.unread
    if unread := describe_drops(loaded.unread):
        read = ", ".join(("reasoning", *RESPONSES))
        say(f"note: {source} has columns that are not read ({unread}): reasoning is read from {read}")
    if loaded.traces and loaded.questions:
        raise InputError(
            f"{source} mixes {len(loaded.traces)} rows with reasoning and {len(loaded.questions)} without: split them "
            "into two files, or generate traces for the latter first (python -m trsd.generate)"
        )
    if not loaded.traces and not loaded.questions:
        raise InputError(f"{source} holds no usable row ({describe_drops(loaded.dropped) or 'it is empty'})")
    return loaded


def describe_drops(dropped: Counter[str]) -> str:
    """``3 x reason, 1 x other reason``; empty when nothing was dropped."""
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())


def source_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a local file or, for a name that is no path, of a data set of the hub (``benchmarks.py``)."""
    path = Path(resolve_bundled(source))
    if path.is_file() or path.suffix.lower() in FILE_TYPES:
        return read_rows(path)
    if is_hub_source(source, taken=path.exists()):
        return hub_rows(source)
    if not path.exists() and path.name == source:
        refuse_unknown_name(source)
    return read_rows(path)


class RowReader:
    """Turns rows into questions or traces; the columns decide."""

    def __init__(self, tokenizer: Any, think: ThinkFormat, *, as_text: bool = False, asking: bool = False) -> None:
        self.as_text, self.asking = as_text, asking
        self.unread: Counter[str] = Counter()
        self._texts: dict[int, str] = {}
        self.tokenizer = tokenizer
        self.think = think
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        # A model's generation config may name further ones than its tokenizer; all are special.
        self.stop_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def read(self, row: dict[str, Any], *, where: str) -> Question | Trace | str:
        """A question, a trace, or the reason why the row is dropped; what it leaves unread is counted."""
        item = self._read(row, where=where)
        if not self.asking and (isinstance(item, Question) or item in (NO_CLOSE, NO_THINKING)):
            self.unread.update(self._unread(row, asked=isinstance(item, Question)))
        return item

    def _unread(self, row: dict[str, Any], *, asked: bool) -> set[str]:
        """Columns with a close tag or, beside a question, of a name in ``UNREAD``."""
        columns = {name: value if isinstance(value, list) else [value] for name, value in row.items()}
        found = {name for name, texts in columns.items() if any(map(self._closes, texts))} - {*QUESTION_COLUMNS}
        return found | {name for name in UNREAD if asked and row.get(name) is not None}

    def _read(self, row: dict[str, Any], *, where: str) -> Question | Trace | str:
        if "prompt_ids" in row:
            if self.as_text and row.get("tokenizer") != self.fingerprint:
                row = {
                    "prompt": row.get("question"),
                    **{name: row.get(name) for name in ("reasoning", "answer", "gold")},
                }
                return self._read(row, where=where)
            return self._stored(row, where=where)
        if "messages" in row:
            return self._messages(row, where=where)
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            messages = [*row["prompt"], *([] if self.asking else row["completion"])]
            return self._messages({**row, "messages": messages}, where=where)
        if (messages := as_conversation(row, where=where)) is not None:
            return self._messages({**row, "messages": messages}, where=where)
        names = [name for name in QUESTION_COLUMNS if name in row]
        if names:
            return self._named(row, names[0], others=names[1:], where=where)
        raise InputError(
            f"{where}: columns {sorted(row)} fit no known form; expected messages, or prompt + reasoning + answer, or "
            "question + answer, or conversations, or input + output"
        )

    def _named(self, row: dict[str, Any], name: str, *, others: list[str], where: str) -> Question | Trace | str:
        """A row whose column ``name`` is the question."""
        messages = [{"role": "user", "content": _text(row, name, where)}]
        if isinstance(row.get("generations"), list):
            row = {**row, "generations": next(iter(row["generations"]), None)}
        response = next((each for each in RESPONSES if row.get(each) is not None), None)
        if row.get("reasoning") is not None and not self._closes(row.get(response)):
            written = response or "answer"
            text = _text(row, written, where) if row.get(written) is not None else ""
            gold = self._reference({**row, written: None}, where)
            return self._trace(messages, _text(row, "reasoning", where), text, gold=gold)
        written = "answer" if self._closes(row.get("answer")) else response
        gold = self._reference({**row, written: None}, where)
        if self.asking or written is None:
            if not self.asking:
                self.unread.update(each for each in others if row.get(each) is not None)
            return self._question(messages, gold or self._reference({"answer": row.get("answer")}, where))
        messages.append({"role": "assistant", "content": _text(row, written, where)})
        return self._messages({"messages": messages, "gold": gold}, where=where)

    def _closes(self, text: Any) -> bool:
        """Whether ``text`` holds the close tag, the model's or a corpus's."""
        return isinstance(text, str) and any(tag in text for tag in (self.think.close_tag, THOUGHT_TAGS[1]))

    def _parts(self, text: str) -> tuple[str, str, str]:
        """(thinking, close tag, answer) of a response; without the tag all of it is thinking."""
        tags = {"open_tag": self.think.open_tag, "close_tag": self.think.close_tag}
        text = with_think_tags(text, **tags).strip().removeprefix(self.think.open_tag)
        return text.partition(self.think.close_tag)

    def _reference(self, row: dict[str, Any], where: str) -> str | None:
        """What the first of ``REFERENCES`` that has an answer states, behind its thinking; a blank one has none.

        A ``solution`` counts where it states its answer in a known form. Beside ``answer`` and ``gold``, what is no
        text (a list of several, in some data sets) is left aside.
        """
        for name in REFERENCES:
            value = row.get(name)
            if value is None or (name not in ("answer", "gold") and not _is_text(value)):
                continue
            text = _text(row, name, where)
            text = self._parts(text)[2] if self._closes(text) else text
            if text.strip() and (name != "solution" or has_format(text)):
                return extract_answer(text, whole_text=True)
        return None

    def _stored(self, row: dict[str, Any], *, where: str) -> Trace | str:
        trace = trace_from_row(row, where=where, tokenizer_fingerprint=self.fingerprint)
        highest = max(max(ids, default=0) for ids in (getattr(trace, name) for name in ID_FIELDS))
        if highest >= len(self.tokenizer):
            raise InputError(f"{where}: token {highest} is none of the tokenizer's {len(self.tokenizer)}")
        close = self.tokenizer.decode(trace.close_ids)
        if self.think.close_tag not in close:
            raise InputError(
                f"{where}: its thinking is closed by {close!r}, without the close_tag {self.think.close_tag!r}: "
                "give the tags that the trace was written with"
            )
        if trace.answer_ids[-1] not in self.stop_ids:
            raise InputError(
                f"{where}: its answer ends with {self.tokenizer.decode(trace.answer_ids[-1:])!r}, which is no stop "
                f"token such as {self.tokenizer.eos_token!r}: a model would never learn to stop; end answer_ids with it"
            )
        return trace if len(trace.answer_ids) > 1 else NO_ANSWER

    def _messages(self, row: dict[str, Any], *, where: str) -> Question | Trace | str:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise InputError(f"{where}: messages must be a list of objects with role and content")
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"{where}: every message needs a role and a content of text")
        gold = self._reference(row, where)
        if messages[-1]["role"] != "assistant":
            return self._question(messages, gold)
        before, last = messages[:-1], messages[-1]
        thoughts = [last[name] for name in THOUGHT_FIELDS if isinstance(last.get(name), str)]
        thought = next(filter(str.strip, thoughts), "")
        if thought or (thoughts and not self._closes(last["content"])):
            return self._trace(before, thought, last["content"], gold=gold)
        if not self._closes(last["content"]):
            opened = any(tag in last["content"] for tag in (self.think.open_tag, THOUGHT_TAGS[0]))
            return NO_CLOSE if opened else NO_THINKING
        reasoning, _, answer = self._parts(last["content"])
        return self._trace(before, reasoning, answer, gold=gold)

    def _question(self, messages: list[dict[str, str]], gold: str | None) -> Question | str:
        text = "\n".join(message["content"] for message in messages)
        if not text.strip():
            return "empty prompt"
        return Question(id=content_key(text, gold or ""), question=text, messages=messages, gold=gold)

    def _trace(
        self, messages: list[dict[str, str]], reasoning: str, answer: str, *, gold: str | None
    ) -> Question | Trace | str:
        question = self._question(messages, gold)
        if isinstance(question, str):
            return question
        reasoning = reasoning.strip("\n").removeprefix(self.think.open_tag).strip("\n")
        reasoning = "" if reasoning.isspace() else reasoning
        answer = answer.strip().removesuffix(self.tokenizer.eos_token).strip()
        if not answer:
            return NO_ANSWER
        if self.think.close_tag in reasoning + answer:
            return TAG_INSIDE
        special = set(self.tokenizer.all_special_tokens) - {self.think.open_tag, self.think.close_tag}
        if any(token in text for token in special for text in (reasoning, answer)):
            return SPECIAL_INSIDE

        reasoning_ids, close_ids, answer_ids = self._ids(reasoning, answer)
        return Trace(
            id=content_key(question.question, reasoning, answer),
            question=question.question,
            gold=gold,
            prompt_ids=self.think.prompt_ids(self.tokenizer, messages),
            reasoning_ids=reasoning_ids,
            close_ids=close_ids,
            answer_ids=[*answer_ids, self.tokenizer.eos_token_id],
            reasoning=reasoning,
            answer=answer,
            closed=True,
            correct=None if gold is None else grade(answer, gold),
            tokenizer=self.fingerprint,
        )

    def _ids(self, reasoning: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(reasoning, close, answer) as a model writes them: encoded as one text, and split as what a model wrote.

        Each is encoded by itself where nothing was thought, or where a whole part would be merged into the close.
        """

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

        if reasoning:
            ids = encode(reasoning + self.think.natural_close + answer)
            if fresh := [*{*ids} - self._texts.keys()]:
                texts = self.tokenizer.batch_decode([[i] for i in fresh], clean_up_tokenization_spaces=False)
                self._texts.update(zip(fresh, texts, strict=True))
            parts = self.think.split(ids, self._texts)
            if parts and all(parts):
                return parts
        return encode(reasoning), list(self.think.natural_close_ids), encode(answer)


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a text, or a number that is read as one."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not _is_text(value):
        raise InputError(f"{where}: {name} must be text, got {type(value).__name__}")
    value = str(value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name} holds half a character ({error}); mend or remove this row") from None
    return value
