"""What a set of traces is made of, the work of ``trsd.analyze``.

The data analysis of "Distilling the Essence" (arXiv 2512.21002), on any traces: token shares of prompt, CoT and answer
(its Table 2), where in the CoT the final answer is first derived, self-reflection cues, coverage; with a student also
the Rank-Surprisal Ratio (``selection.py``), with a judge a model's opinion on the first derivation beside the finder's.
"""

import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from trsd.analysis_plots import plot_analysis
from trsd.analysis_summary import markdown, quartiles, summarize, summarize_ratios
from trsd.analyze import AnalyzeArguments
from trsd.data import describe_drops
from trsd.derivation_judge import DerivationJudge
from trsd.errors import InputError
from trsd.files import check_folder, write_json, write_text
from trsd.metrics import progress_bar
from trsd.models import load_for_decoding, load_tokenizer, model_folder, tokenizer_fingerprint
from trsd.paths import resolve_bundled
from trsd.selection import RankSurprisal, rank_surprisal
from trsd.sentences import split_sentences
from trsd.thinking import ThinkFormat, token_texts
from trsd.trace_measures import Measures, measure_trace
from trsd.traces import Trace
from trsd.worked_rows import load_traces


def run(args: AnalyzeArguments) -> dict[str, Any]:
    """Load, measure, print and store; returns what analysis.json holds."""
    start = time.perf_counter()
    for name in ("max_samples", "max_tokens_per_batch", "judge_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(args, name)}")
    if args.judge_model and args.judge_url is None:
        raise InputError("judge_model: only judge_url reads it: set that, or leave judge_model out")
    for name in ("analysis.json", "analysis.md", "measures.jsonl"):
        if (args.output_dir / name).resolve() == Path(args.data).resolve():
            raise InputError(f"{args.output_dir / name} would overwrite the data: choose another output_dir")
    check_folder(args.output_dir)
    judge = None
    if args.judge_url is not None:
        judge = DerivationJudge(url=args.judge_url, model=args.judge_model, timeout_seconds=args.judge_timeout)
    name = args.tokenizer or args.student
    if name is None:
        raise InputError("name the traces' tokenizer: --tokenizer (or --student for its own)")
    tokenizer = load_tokenizer(tokenizer_folder(name))
    texts = token_texts(tokenizer, len(tokenizer))
    think = ThinkFormat.of(tokenizer, open_tag=args.open_tag, close_tag=args.close_tag)
    loaded = load_traces(
        args.data, tokenizer=tokenizer, think=think, solutions=args.solutions, max_rows=args.max_samples
    )
    dropped = describe_drops(loaded.dropped) or "none"
    print(f"{len(loaded.traces)} traces; dropped: {dropped}")
    bar = progress_bar("measure")
    measures = []
    for trace in loaded.traces:
        measures.append(measure_trace(trace, texts))
        bar(len(measures), len(loaded.traces))
    summary = {"data": args.data, "tokenizer": name, "dropped": dict(loaded.dropped), "dropped_text": dropped}
    summary |= summarize(measures)
    rows = [one.as_row() for one in measures]
    if args.student is not None:
        summary["rank_surprisal"] = _add_ratios(rows, args, loaded.traces)
    if judge is not None:
        _store(args.output_dir, summary, rows, measures)  # a server that fails costs its verdicts alone
        summary["judge"] = _add_verdicts(rows, judge, loaded.traces, measures, texts, args.judge_samples)
    summary["seconds"] = round(time.perf_counter() - start, 1)
    _store(args.output_dir, summary, rows, measures)
    print(markdown(summary))
    print(f"{summary['seconds']:.0f} s, written to {args.output_dir}")
    return summary


def tokenizer_folder(name: str) -> Path:
    """A folder with a tokenizer, which need hold no model, or a model's by name."""
    path = Path(resolve_bundled(name))
    return path if (path / "tokenizer_config.json").exists() else model_folder(name)


def _store(folder: Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]], measures: Sequence[Measures]) -> None:
    write_json(folder / "analysis.json", summary)
    write_text(folder / "analysis.md", markdown(summary))
    write_text(folder / "measures.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    plot_analysis(summary, measures, folder / "analysis.png")


def _add_ratios(rows: list[dict[str, Any]], args: AnalyzeArguments, traces: Sequence[Trace]) -> dict[str, Any]:
    """Put every trace's Rank-Surprisal Ratio under the student into its row; returns the data set's."""
    folder = model_folder(args.student)
    if tokenizer_fingerprint(load_tokenizer(folder)) != traces[0].tokenizer:
        raise InputError(
            f"student {args.student} has another tokenizer than {args.tokenizer}, whose ids the traces are: leave "
            "--tokenizer out for traces that come as text, or choose a student of the same family"
        )
    model = load_for_decoding(folder)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fitting = [index for index, trace in enumerate(traces) if context is None or trace.num_tokens <= context]
    found = rank_surprisal(
        model,
        [traces[index] for index in fitting],
        max_tokens_per_batch=args.max_tokens_per_batch,
        progress=progress_bar("rank and surprisal"),
    )
    ratios: dict[int, RankSurprisal] = dict(zip(fitting, found, strict=True))
    for index, row in enumerate(rows):
        one = ratios.get(index)
        row |= {
            "rank_surprisal_ratio": one and one.ratio,
            "mean_rank": one and one.mean_rank,
            "mean_nll": one and one.mean_nll,
        }
    return summarize_ratios(found, student=args.student, num_too_long=len(traces) - len(fitting))


def _add_verdicts(
    rows: list[dict[str, Any]],
    judge: DerivationJudge,
    traces: Sequence[Trace],
    measures: Sequence[Measures],
    texts: Sequence[str],
    num_samples: int,
) -> dict[str, Any]:
    """Put the judge's sentence, and the finder's, into the rows; returns how they agree. Sentences count from 1."""
    bar = progress_bar("judge")
    asked = [index for index, one in enumerate(measures) if one.answer is not None][:num_samples]
    pairs, positions, problems = [], [], {}
    for done, index in enumerate(asked, start=1):
        pieces = [texts[i] for i in traces[index].reasoning_ids]
        sentences = split_sentences("".join(pieces))
        ends, token_ends = list(accumulate(map(len, sentences))), list(accumulate(map(len, pieces)))
        found = measures[index].derivation_tokens
        # A token that ends a sentence may begin the next one: what counts is where the derivation's last token begins.
        finder = 0 if found is None else bisect_left(ends, token_ends[found - 2] + 1 if found > 1 else 1) + 1
        verdict = judge.first_derivation(traces[index].question, measures[index].answer, sentences)
        rows[index] |= {"finder_sentence": finder, "judge_sentence": verdict.sentence, "num_sentences": len(sentences)}
        if verdict.sentence is None:
            problems[verdict.problem] = problems.get(verdict.problem, 0) + 1
        else:
            pairs.append((finder, verdict.sentence))
            if verdict.sentence:
                positions.append(ends[verdict.sentence - 1] / ends[-1])
        bar(done, len(asked))
    return {
        "model": judge.model,
        "num_asked": len(asked),
        "num_readable": len(pairs),
        "num_same": sum(finder == said for finder, said in pairs),
        "num_within_one": sum(
            finder == said or (abs(finder - said) == 1 and finder * said > 0) for finder, said in pairs
        ),
        "num_none": sum(said == 0 for _, said in pairs),
        "in_cot": quartiles(positions),
        "problems": problems,
    }
