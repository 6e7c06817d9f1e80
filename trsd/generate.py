"""Teacher traces: ``python -m trsd.generate --model MODEL --data QUESTIONS --output traces.jsonl``.

The model thinks and answers by itself; what it writes is split at the close tag, graded against the reference answer
where there is one, and stored as a ``Trace`` file. Traces that cannot be used are dropped, counted by reason.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trsd.command import run_command
from trsd.data import NO_ANSWER, NO_CLOSE, Question, describe_drops, load_data
from trsd.decoding import Answer, Decoder, Sampling, check_decoding
from trsd.errors import InputError
from trsd.grading import check_grader, grade
from trsd.metrics import progress_bar
from trsd.models import (
    load_for_decoding,
    load_tokenizer,
    model_folder,
    tokenizer_fingerprint,
)
from trsd.thinking import ThinkFormat
from trsd.traces import Trace, check_trace_path, content_key, write_traces

Filter = Literal["none", "correct_only"]


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
    prompts = [decoder.think.prompt_ids(decoder.tokenizer, question.messages) for question in questions]
    answers = decoder.think_and_answer(
        prompts, max_thinking_tokens=max_thinking_tokens, max_answer_tokens=max_answer_tokens
    )
    if close_unfinished:
        open_ones = [index for index, answer in enumerate(answers) if not answer.closed]
        forced = decoder.answer_after(
            [prompts[index] for index in open_ones],
            [answers[index].reasoning_ids for index in open_ones],
            max_answer_tokens=max_answer_tokens,
        )
        for index, answer in zip(open_ones, forced, strict=True):
            answers[index] = answer

    fingerprint, traces, dropped = tokenizer_fingerprint(decoder.tokenizer), [], Counter()
    sampling = vars(decoder.sampling) | {
        "max_thinking_tokens": max_thinking_tokens,
        "max_answer_tokens": max_answer_tokens,
    }
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        reason = unusable(answer, decoder.eos_ids)
        if reason is None:
            traces.append(_trace(question, prompt, answer, decoder.tokenizer, fingerprint, sampling))
        else:
            dropped[reason] += 1
    return traces, dropped


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


def _trace(
    question: Question, prompt: list[int], answer: Answer, tokenizer: Any, fingerprint: str, sampling: dict[str, Any]
) -> Trace:
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
        tokenizer=fingerprint,
        sampling=sampling,
    )


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Let a model think about and answer questions, and store its traces."""

    model: str = "bundled:reasoner"
    """Model folder, hub name or bundled model."""
    data: str = "bundled:questions/train.jsonl"
    """Questions: .jsonl, .parquet or a hub data set."""
    output: Path
    """The trace file to write, .jsonl or .parquet."""
    max_samples: int | None = None
    """Use only so many rows of the data."""
    max_thinking_tokens: int = 1024
    """Most reasoning tokens."""
    max_answer_tokens: int = 64
    """Most answer tokens after the thinking."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    seed: int = 0
    """Sampling seed."""
    batch_size: int = 128
    """Sequences decoded together."""
    close_unfinished: bool = False
    """Close thinking that has no close tag (limit reached, or EOS) with the closer, instead of dropping the trace."""
    filter: Filter = "none"
    """Which traces to keep."""
    closer: str = "template"
    """What closes unfinished thinking: a preset's name or a text with the close tag."""
    open_tag: str = "<think>"
    """The tag that opens thinking."""
    close_tag: str = "</think>"
    """The tag that ends thinking."""


def main(argv: list[str] | None = None) -> None:
    """Generate traces from the command line; input that cannot be used exits with code 2."""
    run_command(GenerateArguments, run, prog="python -m trsd.generate", argv=argv)


def run(args: GenerateArguments) -> None:
    """Load, generate, store, and say what was dropped."""
    check_trace_path(args.output)
    check_decoding(args)
    if args.output.exists():
        raise InputError(f"{args.output} exists already: choose another --output, or move it away")
    start = time.perf_counter()
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder)
    think = ThinkFormat.of(tokenizer, closer=args.closer, open_tag=args.open_tag, close_tag=args.close_tag)
    loaded = load_data(args.data, tokenizer=tokenizer, think=think, max_rows=args.max_samples)
    if loaded.traces:
        raise InputError(f"{args.data} already holds reasoning: nothing to generate")
    decoder = Decoder(
        load_for_decoding(folder),
        tokenizer,
        think,
        batch_size=args.batch_size,
        sampling=Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed),
        progress=progress_bar("generate"),
    )
    traces, dropped = generate_traces(
        decoder,
        loaded.questions,
        max_thinking_tokens=args.max_thinking_tokens,
        max_answer_tokens=args.max_answer_tokens,
        close_unfinished=args.close_unfinished,
    )
    traces, filtered = select_traces(traces, keep=args.filter)
    if not traces:
        raise InputError(f"no trace is left; dropped: {describe_drops(loaded.dropped + dropped + filtered)}")
    write_traces(args.output, traces)
    print(f"{len(traces)} traces in {args.output}, {time.perf_counter() - start:.0f} s")
    if drops := describe_drops(loaded.dropped + dropped + filtered):
        print(f"dropped: {drops}")


if __name__ == "__main__":
    main()
