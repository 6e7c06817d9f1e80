"""What a run learns from: traces read or generated, selected, and made into what the method needs.

They land in the run's folder and are made once: ``traces/train.jsonl`` (for palign made from ``given.jsonl``, with the
judge's verdicts in ``judgements.jsonl``). ``prepare_teacher.py`` goes on with the teacher's targets.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from trsd.cuts import build_policy
from trsd.data import describe_drops, load_data
from trsd.drafts import INSTRUCTION
from trsd.errors import InputError
from trsd.files import write_json
from trsd.generation import generate_traces, select_traces
from trsd.grading import extract_answer
from trsd.job import Job
from trsd.judging import (
    SELF_JUDGE_MAX_NEW_TOKENS,
    SELF_JUDGE_PROMPT,
    AnswerJudge,
    Judge,
    Ledger,
    Prefix,
    SelfJudge,
    find_prefixes,
    summarize_prefixes,
)
from trsd.methods import Method
from trsd.methods.lsp import LSP, learnable
from trsd.methods.palign import complete_prefixes
from trsd.methods.trsd import TRSD
from trsd.models import tokenizer_fingerprint, weights_fingerprint
from trsd.sentences import sentence_token_ends
from trsd.traces import ID_FIELDS, Trace, read_traces, write_traces
from trsd.truncation import Truncation, build_truncation


def prepare_traces(job: Job) -> list[Trace]:
    """The run's traces, read from its trace file, which is written first when it is not there yet."""
    folder = job.output_dir / "traces"
    if job.recipe.method == "palign":
        given = _stored(job, folder / "given.jsonl", folder / "given.dropped.json", lambda: _given_traces(job))
        _describe(given, json.loads((folder / "given.dropped.json").read_text()), what="to complete")
        return _reported(job, folder, lambda: _completed(job, given))
    return _reported(job, folder, lambda: _learnable(job, *_given_traces(job)))


def share_traces(job: Job, folder: Path) -> tuple[Path, list[Trace]]:
    """(file, traces): the recipe's traces as data that several runs can take; made when it is not there yet."""
    path = folder / "traces.jsonl"
    return path, _stored(job, path, folder / "dropped.json", lambda: _given_traces(job))


def _reported(job: Job, folder: Path, make: Callable[[], tuple[list[Trace], Counter[str]]]) -> list[Trace]:
    traces = _stored(job, folder / "train.jsonl", folder / "dropped.json", make)
    _describe(traces, json.loads((folder / "dropped.json").read_text()))
    return traces


def _stored(job: Job, path: Path, drops: Path, make: Callable[[], tuple[list[Trace], Counter[str]]]) -> list[Trace]:
    """The traces of ``path``, which are made and written, with why others were dropped, when it is not there yet.

    All ranks make them together and rank 0 writes; where the student judges or completes, rank 0 makes them alone.
    """
    alone = job.recipe.method == "palign"
    with job.ranks.main_first() if alone else nullcontext():
        if (job.ranks.is_main and not path.exists()) if alone else not job.ranks.told(path.exists()):
            traces, dropped = make()
            if not traces:
                raise InputError(
                    f"{job.recipe.data}: no trace is left to learn from; dropped: {describe_drops(dropped) or 'none'}"
                )
            if job.ranks.is_main:
                write_json(drops, dropped)
                write_traces(path, traces)
    job.ranks.wait()
    traces = read_traces(path, tokenizer_fingerprint=tokenizer_fingerprint(job.tokenizer))
    job.check_ids(max(getattr(trace, name), default=0) for trace in traces for name in ID_FIELDS)
    return traces


def _describe(traces: Sequence[Trace], dropped: dict[str, int], what: str = "") -> None:
    lengths = sorted(len(trace.reasoning_ids) for trace in traces)
    what = f" {what}" if what else ""
    print(
        f"        {len(traces)} traces{what}, reasoning tokens: median {lengths[len(lengths) // 2]}, "
        f"longest {lengths[-1]}"
    )
    if sum(dropped.values()) > len(traces):
        print("warning: more traces were dropped than kept; see the reasons below", file=sys.stderr)
    print("        dropped: " + (", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "none"))


def _given_traces(job: Job) -> tuple[list[Trace], Counter[str]]:
    """(traces, dropped by reason): those in the recipe's data, or the teacher's for its questions."""
    recipe, start = job.recipe, time.perf_counter()
    loaded = load_data(
        recipe.data,
        tokenizer=job.tokenizer,
        think=job.think,
        max_rows=recipe.max_train_samples,
        as_text=recipe.method in ("sft", "palign"),
    )
    traces, dropped = loaded.traces, loaded.dropped
    if loaded.questions:
        with job.generating():
            traces, unusable = generate_traces(
                job.decoder(job.teacher(), "traces", job.sampling(), alone=recipe.method == "palign"),
                loaded.questions,
                max_thinking_tokens=recipe.max_thinking_tokens,
                max_answer_tokens=recipe.max_answer_tokens,
                close_unfinished=recipe.close_unfinished,
            )
        dropped += unusable
    traces, unwanted = select_traces(
        traces, keep=recipe.filter, max_length=recipe.max_length, closer_length=len(job.think.closer_ids)
    )
    if recipe.method == "palign" or recipe.cut == "judged":
        traces, unjudged = _judgeable(job, traces)
        unwanted += unjudged
    how = "generated" if loaded.questions else "read"
    print(f"traces: {len(traces)} {how} in {time.perf_counter() - start:.0f} s", flush=True)
    return traces, dropped + unwanted


def _judgeable(job: Job, traces: list[Trace]) -> tuple[list[Trace], Counter[str]]:
    """(traces that judge and completion can work on, dropped by reason): the longest prefix is all the reasoning."""
    recipe, config = job.recipe, job.student_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or float("inf")
    asked = (
        SELF_JUDGE_PROMPT + INSTRUCTION
        if recipe.judge == "self" or (recipe.method == "palign" and recipe.completion == "instruct")
        else ""
    )
    room = max(recipe.max_answer_tokens, SELF_JUDGE_MAX_NEW_TOKENS if recipe.judge == "self" else 0)
    room += len(job.tokenizer(asked).input_ids) + len(job.think.closer_ids) + 32
    no_room = f"no room for judge and completion in a context of {limit} (lower max_answer_tokens or max_length)"
    kept, dropped = [], Counter()
    for trace in traces:
        if recipe.judge == "answer" and not (trace.gold or extract_answer(trace.answer)):
            dropped["no answer to judge by"] += 1
        elif trace.num_tokens - len(trace.answer_ids) + room > limit:
            dropped[no_room] += 1
        else:
            kept.append(trace)
    return kept, dropped


def _learnable(job: Job, traces: list[Trace], dropped: Counter[str]) -> tuple[list[Trace], Counter[str]]:
    """Those of which the recipe's truncation leaves something to learn."""
    if job.recipe.method not in ("lsp", "sft"):
        return traces, dropped
    kept, unlearnable, lost = learnable(traces, truncation(job), sections(job))
    for name, count in lost.items():
        end = ": they do not show how to end" if name == "a" else ""
        print(f"        the cut leaves nothing of section {name} in {count} of {len(traces)} traces{end}")
    return kept, dropped + unlearnable


def _student_judge(job: Job) -> Judge:
    decoder = job.decoder(job.reader(job.student_folder), "judge", alone=True)
    weights = weights_fingerprint(job.student_folder)
    if job.recipe.judge == "self":
        return SelfJudge(decoder, weights=weights)
    return AnswerJudge(decoder, job.recipe.max_answer_tokens, weights=weights)


def sufficient_prefixes(job: Job, traces: Sequence[Trace]) -> list[Prefix]:
    """Each trace's shortest sufficient prefix by the recipe's judge; what was asked before is not asked again."""
    start = time.perf_counter()
    ledger = Ledger(job.output_dir / "traces" / "judgements.jsonl")
    ends = [sentence_token_ends(trace.reasoning_ids, job.texts) for trace in traces]
    with job.generating():
        prefixes = find_prefixes(traces, _student_judge(job), ends, ledger=ledger)
    found = summarize_prefixes(prefixes)
    write_json(job.output_dir / "traces" / "prefixes.json", vars(found))
    print(f"{found}\n        {time.perf_counter() - start:.0f} s", flush=True)
    if not found.num_sufficient:
        print("warning: no prefix was found sufficient; every trace stays whole", file=sys.stderr)
    return prefixes


def _completed(job: Job, traces: list[Trace]) -> tuple[list[Trace], Counter[str]]:
    """(completed traces, dropped by reason): what P-ALIGN learns."""
    recipe, prefixes = job.recipe, sufficient_prefixes(job, traces)
    with job.generating():
        completed, dropped = complete_prefixes(
            job.decoder(job.reader(job.student_folder), "completions", job.sampling(), alone=True),
            traces,
            prefixes,
            completion=recipe.completion,
            max_new_tokens=recipe.max_answer_tokens,
            keep=recipe.filter,
        )
    kept, too_long = select_traces(completed, keep="none", max_length=recipe.max_length)
    return kept, dropped + too_long


def truncation(job: Job) -> Truncation:
    """What the recipe keeps of each sequence; all of it where the method does not cut."""
    recipe = job.recipe
    texts = job.texts if recipe.truncation == "first_derivation" else ()  # seconds, for a large vocabulary
    return build_truncation(recipe.truncation, share=recipe.keep_fraction or 1.0, side=recipe.keep_side, texts=texts)


def sections(job: Job) -> tuple[str, ...]:
    """The sections that the recipe learns."""
    return tuple((job.recipe.loss_sections or "cot+a").split("+"))


def build_method(job: Job, traces: Sequence[Trace]) -> Method:
    """The recipe's method over the run's traces."""
    recipe = job.recipe
    if recipe.method != "trsd":
        return LSP(traces, truncation(job), sections(job))
    judged = {}
    if recipe.cut == "judged":
        prefixes = job.ranks.told(sufficient_prefixes(job, traces) if job.ranks.is_main else None)
        judged = {trace.id: prefix.cut for trace, prefix in zip(traces, prefixes, strict=True)}
    policy = build_policy(
        recipe.cut,
        cut_fractions=recipe.cut_fractions,
        cut_budgets=recipe.cut_budgets,
        texts=job.texts if recipe.cut == "first_derivation" else (),
        judged_cuts=judged,
        anchor=recipe.anchor_share,
    )
    return TRSD(
        traces,
        job.think,
        policy,
        seed=recipe.seed,
        branches_per_trace=recipe.branches_per_trace,
        max_tokens=recipe.max_tokens_per_batch,
        snap_texts=job.texts if recipe.snap_to_sentence else None,
        keep_thinking=recipe.thinking_weight > 0,
    )
