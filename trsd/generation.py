"""The work of ``trsd.generate``: questions into traces, by any engine (``trsd/engines``).

What is written is split at the close tag, graded against the reference answer where there is one, and stored as a
``Trace`` file. Every finished trace goes at once to a journal beside the output (``journal.py``).
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from trsd.data import NO_ANSWER, NO_CLOSE, Question, describe_drops, load_data
from trsd.decoding import Answer, Decoder, Limits
from trsd.decoding_arguments import Reader, as_trained, open_decoder, open_reader
from trsd.errors import InputError
from trsd.generate import Filter, GenerateArguments
from trsd.grading import check_grader, grade
from trsd.journal import Journal
from trsd.metrics import Throughput
from trsd.models import tokenizer_fingerprint, weights_fingerprint
from trsd.traces import Trace, check_trace_path, content_key, write_traces


def generate_traces(
    decoder: Decoder,
    questions: Sequence[Question],
    *,
    max_thinking_tokens: int,
    max_answer_tokens: int,
    close_unfinished: bool = False,
) -> tuple[list[Trace], Counter[str]]:
    """(traces, dropped by reason): let the decoder's model think about and answer every question."""
    check_grader(question.gold for question in questions)
    limits = Limits(max_thinking_tokens=max_thinking_tokens, max_answer_tokens=max_answer_tokens)
    writer = TraceWriter(decoder, limits, close_unfinished=close_unfinished)
    fitting, dropped = writer.fitting(questions)
    written = writer.write([questions[place] for place in fitting], [0] * len(fitting))
    found = {place: result for place, result, _ in written}
    traces = [found[place] for place in range(len(fitting)) if isinstance(found[place], Trace)]
    return traces, dropped + Counter(reason for reason in found.values() if isinstance(reason, str))


class TraceWriter:
    """Makes traces of questions."""

    def __init__(self, decoder: Decoder, limits: Limits, *, close_unfinished: bool) -> None:
        self.decoder = decoder
        self.limits = limits
        self.close_unfinished = close_unfinished
        self.fingerprint = tokenizer_fingerprint(decoder.tokenizer)

    def fitting(self, questions: Sequence[Question]) -> tuple[list[int], Counter[str]]:
        """(places of the questions that the model's context can hold with what may be written, dropped by reason)."""
        room = self.decoder.room(self.limits)
        if room is not None and room < 1:
            raise InputError(
                f"max_thinking_tokens: {self.limits.max_thinking_tokens} tokens of thinking and "
                f"{self.limits.max_answer_tokens} of answer leave no room for a prompt, the model's context holds "
                f"{self.decoder.engine.context_limit}"
            )
        places = [p for p, question in enumerate(questions) if room is None or len(self._prompt(question)) <= room]
        left_out = len(questions) - len(places)
        reason = f"prompt of more than {room} tokens: thinking and answer would not fit the model's context"
        return places, Counter({reason: left_out} if left_out else {})

    def write(self, questions: Sequence[Question], samples: Sequence[int]) -> Iterator[tuple[int, Trace | str, int]]:
        """(place, trace or why there is none, tokens written) of every question, which has to fit, as they finish.

        ``samples`` number the draws of a question.
        """
        prompts = [self._prompt(question) for question in questions]
        stream = self.decoder.stream(prompts, samples, self.limits, close_unfinished=self.close_unfinished)
        for place, answer in stream:
            result = self._result(questions[place], prompts[place], answer, samples[place])
            yield place, result, len(answer.reasoning_ids) + len(answer.close_ids) + len(answer.answer_ids)

    def _prompt(self, question: Question) -> list[int]:
        return self.decoder.think.prompt_ids(self.decoder.tokenizer, question.messages)

    def _result(self, question: Question, prompt: list[int], answer: Answer, sample: int) -> Trace | str:
        if reason := unusable(answer, self.decoder.eos_ids):
            return reason
        tokenizer = self.decoder.tokenizer
        text = tokenizer.decode(answer.answer_ids, skip_special_tokens=True).strip()
        reasoning = tokenizer.decode(answer.reasoning_ids, skip_special_tokens=False).strip("\n")
        return Trace(
            id=content_key(question.question, reasoning, text),
            question=question.question,
            gold=question.gold,
            prompt_ids=prompt,
            reasoning_ids=answer.reasoning_ids,
            close_ids=answer.close_ids,
            answer_ids=answer.answer_ids,
            reasoning=reasoning,
            answer=text,
            closed=answer.closed,
            correct=None if question.gold is None else grade(text, question.gold),
            tokenizer=self.fingerprint,
            sampling=vars(self.decoder.sampling) | vars(self.limits) | {"sample": sample},
        )


def select_traces(
    traces: Sequence[Trace], *, keep: Filter, max_length: int | None = None, closer_length: int = 0
) -> tuple[list[Trace], Counter[str]]:
    """(kept, dropped by reason): the filter, and at most ``max_length`` tokens (with a closer) where it is given."""
    kept, dropped = [], Counter()
    for trace in traces:
        if keep == "correct_only" and trace.correct is not True:
            dropped["wrong answer" if trace.correct is False else "no reference answer to compare with"] += 1
        elif max_length is not None and trace.num_tokens + closer_length > max_length:
            dropped[f"longer than max_length={max_length}"] += 1
        elif not trace.reasoning_ids:
            dropped["empty reasoning"] += 1
        else:
            kept.append(trace)
    return kept, dropped


def unusable(answer: Answer, eos_ids: Sequence[int]) -> str | None:
    """Why nothing can be learnt from ``answer``, or None."""
    if not answer.close_ids:
        return f"{NO_CLOSE} (within max_thinking_tokens; --close_unfinished True closes such traces)"
    if not answer.answer_ids or answer.answer_ids[0] in eos_ids:
        return NO_ANSWER
    if not answer.finished:
        return "answer cut off by max_answer_tokens"
    return None


def run(args: GenerateArguments) -> None:
    """Load, generate what the journal does not hold yet, store, and say what was dropped."""
    check_trace_path(args.output)
    if args.output.exists():
        raise InputError(f"{args.output} exists already: choose another --output, or move it away")
    start = time.perf_counter()
    args = as_trained(args)
    reader = open_reader(args)
    loaded = load_data(
        args.data, tokenizer=reader.tokenizer, think=reader.think, max_rows=args.max_samples, asking=True
    )
    if loaded.traces:
        raise InputError(f"{args.data} already holds reasoning: nothing to generate")
    check_grader(question.gold for question in loaded.questions)
    wanted = {
        content_key(question.id, str(sample)): (question, sample)
        for question in loaded.questions
        for sample in range(args.num_samples)
    }
    journal = Journal(args.output.with_name(f"{args.output.name}.journal"), _settings(args, reader))
    with closing(journal):
        dropped = loaded.dropped + _fill(journal, args, reader, wanted)
        try:
            kept = write_traces(args.output, _chosen(journal, list(wanted), args.filter, dropped))
        except OSError as error:
            raise InputError(f"{args.output} cannot be written: {error}\n{_kept(journal, wanted)}") from None
        others = len(journal) - sum(key in journal for key in wanted)
        if not kept:
            args.output.unlink()
            if not others and not any("trace" in row for _, row in journal.rows(list(wanted))):
                journal.remove()  # or other settings would be refused for rows that nobody can use
            raise InputError(f"no trace is left; dropped: {describe_drops(dropped)}")
        if not others:
            journal.remove()
    print(f"{kept} traces in {args.output}, {time.perf_counter() - start:.0f} s")
    if others:
        print(
            f"note: {journal.folder} holds {others} rows of questions or samples that were not asked for now, and "
            "stays: move the output away and give their data to go on with them, or remove the folder"
        )
    if drops := describe_drops(dropped):
        print(f"dropped: {drops}")


def _settings(args: GenerateArguments, reader: Reader) -> dict[str, Any]:
    """What a trace depends on beside its question: rows made otherwise do not belong into one file."""
    weights = args.served_model or args.model if args.engine == "server" else weights_fingerprint(reader.folder)
    names = ("max_thinking_tokens", "max_answer_tokens", "close_unfinished", "open_tag", "close_tag")
    return {
        "engine": args.engine,
        "vllm_args": args.vllm_args,
        "device": "cuda" if torch.cuda.is_available() and args.engine != "server" else "cpu",
        "weights": weights,
        "tokenizer": tokenizer_fingerprint(reader.tokenizer),
        "chat_template": content_key(str(reader.tokenizer.chat_template)),
        "closer": reader.think.closer,
        **asdict(args.sampling()),
        **{name: getattr(args, name) for name in names},
    }


def _fill(
    journal: Journal, args: GenerateArguments, reader: Reader, wanted: dict[str, tuple[Question, int]]
) -> Counter[str]:
    """Write what the journal misses of ``wanted``, (question, sample) by key; what does not fit, by reason."""
    keys = [key for key in wanted if key not in journal]
    if len(keys) < len(wanted):
        print(f"going on with {args.output}: {len(wanted) - len(keys)} of {len(wanted)} are written", flush=True)
    if not keys:
        return Counter()
    limits = Limits(max_thinking_tokens=args.max_thinking_tokens, max_answer_tokens=args.max_answer_tokens)
    writer = TraceWriter(open_decoder(args, reader), limits, close_unfinished=args.close_unfinished)
    fitting, dropped = writer.fitting([wanted[key][0] for key in keys])
    if not fitting:
        return dropped
    keys = [keys[place] for place in fitting]
    questions, samples = zip(*(wanted[key] for key in keys), strict=True)
    said = Throughput("traces", len(keys))
    stream = writer.write(questions, samples)
    try:
        with closing(stream):
            for place, result, num_tokens in stream:
                row = {"trace": asdict(result)} if isinstance(result, Trace) else {"dropped": result}
                journal.add(keys[place], row)
                said.add(num_tokens)
    except (InputError, OSError) as error:
        raise InputError(f"{error}\n{_kept(journal, wanted)}") from None
    except KeyboardInterrupt:
        print(f"\nstopped; {_kept(journal, wanted)}", file=sys.stderr)
        raise SystemExit(130) from None
    said.close()
    return dropped


def _kept(journal: Journal, wanted: dict[str, Any]) -> str:
    if not len(journal):
        return "nothing was written yet"
    return f"{len(journal)} of {len(wanted)} are kept in {journal.folder}: the same command goes on from there"


def _chosen(journal: Journal, keys: Sequence[str], keep: Filter, dropped: Counter[str]) -> Iterator[Trace]:
    """The journal's traces in the order of ``keys``, less those that the filter drops, which are counted."""
    seen = set()
    for _, row in journal.rows(keys):
        if "dropped" in row:
            dropped[row["dropped"]] += 1
            continue
        trace = Trace(**row["trace"])
        if trace.id in seen:
            dropped["the same text as another sample"] += 1
            continue
        seen.add(trace.id)
        kept, reasons = select_traces([trace], keep=keep)
        dropped.update(reasons)
        yield from kept
