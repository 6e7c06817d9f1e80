r"""P-ALIGN (arXiv 2601.10064): learn from the shortest sufficient prefix of a teacher's reasoning, completed anew.

    1. prefix       the first sentences of a trace's reasoning that a judge finds sufficient (``trsd/judging.py``)
    2. completion   the student continues from the prefix to the answer
    3. training     cross-entropy on ``prefix · close · completion`` after the prompt: supervised fine-tuning

This module is step 2. What it returns are traces of the usual form: the prefix as the whole reasoning, the completion
as the answer. Tags and close are the think format's, by default the model's own ``<think>``; the authors' released
outputs read ``<Begin_of_Draft>{prefix}<End_of_Draft>\n{completion}``, which open_tag and close_tag choose.

The paper's completion is "instruct": in a chat turn the student is shown question and prefix and told to continue. Ours
beside it: "close", the answer the student gives when its thinking is closed after the prefix, in the very context it
will be trained in. Completions that never end are dropped, wrong ones too where that is asked for (the paper keeps
both); a decoder of temperature 0.6, top-p 0.9 and repetition penalty 1.05 samples as the paper does.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from trsd.data import NO_ANSWER
from trsd.decoding import Decoder
from trsd.drafts import draft_prompt_ids
from trsd.generate import Filter
from trsd.generation import select_traces
from trsd.grading import check_grader, grade
from trsd.judging import Prefix, close_after
from trsd.models import tokenizer_fingerprint
from trsd.traces import Trace, content_key

Completion = Literal["instruct", "close"]


def complete_prefixes(
    decoder: Decoder,
    traces: Sequence[Trace],
    prefixes: Sequence[Prefix],
    *,
    completion: Completion,
    max_new_tokens: int,
    keep: Filter = "none",
) -> tuple[list[Trace], Counter[str]]:
    """(new traces, dropped by reason): every trace cut at its prefix and completed by the decoder's model.

    Args:
        decoder: the student's, with the sampling of the completions.
        traces: whose reasoning the prefixes were found in.
        prefixes: one for each trace; one that is not sufficient keeps the whole reasoning and is completed like it.
        completion: "instruct", and the prefix is followed by the think format's natural close; or "close", and it is
            followed by the closer, after which the completion was written. A whole reasoning keeps its own close.
        max_new_tokens: of a completion; one without EOS by then is dropped.
        keep: "correct_only" also drops what does not match the reference answer.
    """
    check_grader(trace.gold for trace in traces)
    drafts = [trace.reasoning_ids[: prefix.cut] for trace, prefix in zip(traces, prefixes, strict=True)]
    close_ids = decoder.think.natural_close_ids if completion == "instruct" else decoder.think.closer_ids
    closes = [close_after(trace, prefix.cut, close_ids) for trace, prefix in zip(traces, prefixes, strict=True)]
    if completion == "instruct":
        contexts = [
            draft_prompt_ids(decoder.think, decoder.tokenizer, trace.question, draft)
            for trace, draft in zip(traces, drafts, strict=True)
        ]
    else:
        contexts = [[*t.prompt_ids, *draft, *close] for t, draft, close in zip(traces, drafts, closes, strict=True)]
    written = decoder.complete(contexts, max_new_tokens=max_new_tokens)

    done, dropped = [], Counter()
    how = vars(decoder.sampling) | {"completion": completion, "max_new_tokens": max_new_tokens}
    fingerprint = tokenizer_fingerprint(decoder.tokenizer)
    for trace, prefix, draft, close, ids in zip(traces, prefixes, drafts, closes, written, strict=True):
        answer = decoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if reason := _unusable(decoder, ids, answer):
            dropped[reason] += 1
            continue
        reasoning = decoder.tokenizer.decode(draft, skip_special_tokens=False).strip("\n")
        done.append(
            Trace(
                id=content_key(trace.question, reasoning, answer),
                question=trace.question,
                gold=trace.gold,
                prompt_ids=trace.prompt_ids,
                reasoning_ids=draft,
                close_ids=close,
                answer_ids=ids,
                reasoning=reasoning,
                answer=answer,
                closed=prefix.sufficient or trace.closed,  # to end here is what the student is to learn
                correct=None if trace.gold is None else grade(answer, trace.gold, like=trace.answer),
                tokenizer=fingerprint,
                sampling=how | {"cut": prefix.cut, "sufficient": prefix.sufficient, "completed": trace.id},
            )
        )
    kept, filtered = select_traces(done, keep=keep)
    return kept, dropped + filtered


def _unusable(decoder: Decoder, ids: Sequence[int], answer: str) -> str | None:
    """Why a completion is dropped, or None."""
    if ids[-1] not in decoder.eos_ids:
        return "completion cut off by max_answer_tokens"
    if not answer:
        return NO_ANSWER
    if decoder.think.close_tag in decoder.tokenizer.decode(ids, skip_special_tokens=False):
        return "close tag inside the completion"
    return None
