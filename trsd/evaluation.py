"""The accuracy-budget curve of a model, the work of ``trsd.evaluate``.

Every question is thought about once, freely; at each budget the thinking is cut there, closed with the closer and
answered (``decoding.py``).
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from trsd.data import Loaded, Question, describe_drops, load_data
from trsd.decoding import Answer, Decoder, Limits
from trsd.decoding_arguments import as_trained, open_decoder, open_reader
from trsd.drafts import INSTRUCTION, draft_prompt_ids
from trsd.errors import InputError
from trsd.evaluate import EvaluateArguments
from trsd.evaluation_table import table
from trsd.files import check_free_of_evaluations, write_json, write_text
from trsd.grading import check_grader, extract_answer, grade, has_format, last_boxed, num_undecided
from trsd.metrics import progress_bar
from trsd.plots import plot_curves
from trsd.recipe import budget_problems, resolve_budgets
from trsd.statistics import accuracy_figures, area_under_curve

NUM_EXAMPLES = 24


def evaluate(
    decoder: Decoder,
    questions: Sequence[Question],
    budgets: tuple[str, ...],
    *,
    max_thinking_tokens: int,
    max_answer_tokens: int,
    num_samples: int = 1,
    median_thinking_tokens: float | None = None,
    direct_baseline: bool = False,
    exit_confidence: float | None = None,
) -> dict[str, Any]:
    """The accuracy-budget curve of the decoder's model.

    Args:
        decoder: model, tokenizer, think format and sampling.
        questions: each with a reference answer.
        budgets: ``64`` or ``50%`` of ``median_thinking_tokens``, which defaults to this model's own; none of them
            measures unconstrained thinking alone. A percent is at most ``max_thinking_tokens``.
        max_thinking_tokens: limit of the unconstrained thinking.
        max_answer_tokens: answer allowance at every budget.
        num_samples: samples per question; use more than one only with a temperature above 0.
        median_thinking_tokens: what percents are taken of, so that two models meet the same budgets in tokens.
        direct_baseline: also answer the cut thinking in the non-thinking mode.
        exit_confidence: also let thinking end at the first budget whose answer is so confident.

    Returns:
        A json-ready dict: ``question_ids``, ``unconstrained`` (see ``measure`` and ``measure_thinking``), ``budgets``
        (one ``measure`` each), ``auc`` (None for fewer than two budgets), ``examples``; where they were asked for
        ``direct`` (``budgets`` and ``auc``) and ``early_exit`` (a ``measure`` and what the exits cost);
        ``num_undecided``, pairs of answer and reference that could not be compared within the limits, counted wrong.
    """
    check_grader(question.gold for question in questions)
    if found := budget_problems(budgets, max_thinking_tokens):
        raise InputError(f"budgets: {found[0]}")
    limits = Limits(max_thinking_tokens=max_thinking_tokens, max_answer_tokens=max_answer_tokens)
    repeated = [question for question in questions for _ in range(num_samples)]
    prompts = [decoder.think.prompt_ids(decoder.tokenizer, question.messages) for question in repeated]
    turn = len(decoder.tokenizer(INSTRUCTION).input_ids) if direct_baseline else 0
    _check_room(decoder, repeated, prompts, limits, turn)
    if exit_confidence is not None and not decoder.gives_confidence(prompts[0]):
        raise InputError("exit_confidence: this engine gives no log-probabilities to be confident by: leave it out")
    undecided = num_undecided()
    median, rows, free, answers = _think(decoder, prompts, budgets, limits, median_thinking_tokens)

    def measured(found: Sequence[Answer]) -> dict[str, Any]:
        return measure(found, repeated, decoder.tokenizer, num_samples)

    def curve_of(found: dict[int, list[Answer]]) -> dict[str, Any]:
        curve = [{"budget": text, "tokens": count} | measured(found[count]) for text, count in rows]
        area = area_under_curve([row["tokens"] for row in curve], [row["accuracy"] for row in curve])
        return {"budgets": curve, "auc": area}

    result = {
        "num_questions": len(questions),
        "num_samples": num_samples,
        "question_ids": [question.id for question in questions],
        "closer": decoder.think.closer,
        "sampling": vars(decoder.sampling),
        "max_thinking_tokens": max_thinking_tokens,
        "max_answer_tokens": max_answer_tokens,
        "percent_of": median,
        "unconstrained": measured(free) | measure_thinking(free, repeated, decoder.tokenizer, num_samples),
        **curve_of(answers),
        "examples": [
            _example(index, repeated, free, answers, rows, decoder.tokenizer)
            for index in range(0, min(NUM_EXAMPLES * num_samples, len(repeated)), num_samples)
        ],
    }
    if direct_baseline:
        direct = answer_directly(decoder, repeated, free, [count for _, count in rows], max_answer_tokens)
        result["direct"] = curve_of(direct)
    if exit_confidence is not None:
        early = decoder.answer_early(prompts, [count for _, count in rows], exit_confidence, limits)
        result["early_exit"] = {"confidence": exit_confidence} | measured(early) | _exits(early)
    return result | {"num_undecided": num_undecided() - undecided}


def _exits(early: Sequence[Answer]) -> dict[str, float]:
    return {
        "mean_thinking_tokens": float(np.mean([len(answer.reasoning_ids) for answer in early])),
        "mean_tried_tokens": float(np.mean([answer.tried_tokens for answer in early])),
    }


def _check_room(
    decoder: Decoder, questions: Sequence[Question], prompts: Sequence[Sequence[int]], limits: Limits, turn: int
) -> None:
    """Raise before anything is written when a question does not fit the model's context; none may be left out.

    ``turn``: tokens that a draft takes beside the question and itself.
    """
    room = decoder.room(limits)
    room = None if room is None else max(0, room - turn)
    for question, prompt in zip(questions, prompts, strict=True):
        if room is not None and len(prompt) > room:
            raise InputError(
                f"the question {question.question[:60]!r} has a prompt of {len(prompt)} tokens, and with "
                f"max_thinking_tokens {limits.max_thinking_tokens} and max_answer_tokens {limits.max_answer_tokens} a "
                f"context of {decoder.engine.context_limit} has room for {room}: lower one of them, or leave it out"
            )


def _think(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    budgets: tuple[str, ...],
    limits: Limits,
    median: float | None,
) -> tuple[float, list[tuple[str, int]], list[Answer], dict[int, list[Answer]]]:
    """(what percents are of, budgets in ascending order with their tokens, free answers, answers by budget)."""

    def rows(median: float) -> list[tuple[str, int]]:
        resolved = resolve_budgets(budgets, median).items()
        return sorted(((text, min(count, limits.max_thinking_tokens)) for text, count in resolved), key=itemgetter(1))

    if median is not None or not any(text.endswith("%") for text in budgets):
        tokens = rows(median or 0.0)
        free, answers = decoder.think_at_budgets(prompts, sorted({count for _, count in tokens}), limits)
        own = float(np.median([len(answer.reasoning_ids) for answer in free]))
        return own if median is None else median, tokens, free, answers
    free = decoder.think_and_answer(prompts, **vars(limits))
    median = float(np.median([len(answer.reasoning_ids) for answer in free]))
    tokens = rows(median)
    counts = sorted({count for _, count in tokens})
    answers = decoder.answers_at_budgets(prompts, free, counts, max_answer_tokens=limits.max_answer_tokens)
    return median, tokens, free, answers


def answer_directly(
    decoder: Decoder,
    questions: Sequence[Question],
    free: Sequence[Answer],
    budgets: Sequence[int],
    max_answer_tokens: int,
) -> dict[int, list[Answer]]:
    """The baseline: at each budget the thinking so far as a draft, answered in the non-thinking mode.

    Thinking that ended within the budget keeps its own answer, as on the curve itself; at budget 0 there is no draft,
    and the question alone is answered.
    """
    think, tokenizer = decoder.think, decoder.tokenizer
    places, contexts = [], []
    for budget in dict.fromkeys(budgets):
        for index, (question, answer) in enumerate(zip(questions, free, strict=True)):
            if not answer.ends_within(budget):
                places.append((budget, index))
                draft = answer.reasoning_ids[:budget]
                contexts.append(
                    draft_prompt_ids(think, tokenizer, question.question, draft)
                    if draft
                    else think.direct_prompt_ids(tokenizer, question.messages)
                )
    written = decoder.complete(contexts, max_new_tokens=max_answer_tokens)
    found = {budget: list(free) for budget in budgets}
    for (budget, index), ids in zip(places, written, strict=True):
        found[budget][index] = Answer(
            reasoning_ids=free[index].reasoning_ids[:budget],
            close_ids=[],
            answer_ids=ids,
            closed=False,
            finished=ids[-1] in decoder.eos_ids,
        )
    return found


def measure(
    answers: Sequence[Answer], questions: Sequence[Question], tokenizer: Any, num_samples: int
) -> dict[str, Any]:
    """Accuracy, rates and tokens of one set of answers, the samples of a question standing together.

    Returns:
        ``accuracy``, ``low``, ``high`` and ``pass_at`` (see ``statistics.accuracy_figures``), ``correct`` (a list of
        samples for each question), rates, and ``mean_tokens``. ``no_box_rate`` is the share of answers without a closed
        box, ``format_failure_rate`` of those in no known form, of which a last number may be taken, and
        ``no_answer_rate`` of those in which nothing is found.
    """
    texts = [tokenizer.decode(answer.answer_ids, skip_special_tokens=True) for answer in answers]
    correct = _graded(texts, questions, num_samples)
    return {
        **accuracy_figures(correct),
        "correct": correct,
        "forced_close_rate": float(np.mean([bool(a.close_ids) and not a.closed for a in answers])),
        "no_answer_rate": float(np.mean([extract_answer(text) is None for text in texts])),
        "format_failure_rate": float(np.mean([not has_format(text) for text in texts])),
        "no_box_rate": float(np.mean([last_boxed(text) is None for text in texts])),
        "termination_rate": float(np.mean([answer.finished for answer in answers])),
        "mean_tokens": float(np.mean([len(a.reasoning_ids) + len(a.close_ids) + len(a.answer_ids) for a in answers])),
    }


def measure_thinking(
    free: Sequence[Answer], questions: Sequence[Question], tokenizer: Any, num_samples: int
) -> dict[str, Any]:
    """What is asked of unconstrained thinking alone.

    Returns:
        ``unclosed_rate``, the share of thinking that did not end by itself: it has no answer, so it counts wrong in
        ``accuracy``. ``accuracy_of_whole_text`` grades reasoning and answer as one text, since a model that never
        learnt to close states its answer all the same; a box in the reasoning counts there before an answer without
        one. And the mean and median length of the thinking, and the length of each sample.
    """
    lengths = [len(answer.reasoning_ids) for answer in free]
    texts = [
        "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer.reasoning_ids, answer.answer_ids))
        for answer in free
    ]
    whole = accuracy_figures(_graded(texts, questions, num_samples))
    return {
        "unclosed_rate": float(np.mean([not answer.closed for answer in free])),
        "accuracy_of_whole_text": whole["accuracy"],
        "mean_thinking_tokens": float(np.mean(lengths)),
        "median_thinking_tokens": float(np.median(lengths)),
        "thinking_lengths": lengths,
    }


def _graded(texts: Sequence[str], questions: Sequence[Question], num_samples: int) -> list[list[bool]]:
    correct = [grade(text, question.gold) for text, question in zip(texts, questions, strict=True)]
    return [correct[start : start + num_samples] for start in range(0, len(correct), num_samples)]


def _example(
    index: int,
    questions: Sequence[Question],
    free: Sequence[Answer],
    answers: dict[int, list[Answer]],
    rows: Sequence[tuple[str, int]],
    tokenizer: Any,
) -> dict[str, Any]:
    """One question with what was thought and answered, as text."""

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    gold = questions[index].gold
    return {
        "question": questions[index].question,
        "gold": gold,
        "reasoning": text(free[index].reasoning_ids),
        "answer": text(free[index].answer_ids),
        "correct": grade(text(free[index].answer_ids), gold),
        "thinking_tokens": len(free[index].reasoning_ids),
        "at_budgets": [
            {
                "budget": name,
                "tokens": count,
                "reasoning": text(answers[count][index].reasoning_ids),
                "answer": text(answers[count][index].answer_ids),
                "correct": grade(text(answers[count][index].answer_ids), gold),
            }
            for name, count in rows
        ],
    }


def graded_questions(loaded: Loaded) -> list[Question]:
    """The questions of a data source, all of which must have a reference answer."""
    questions = loaded.questions
    if loaded.traces:
        raise InputError("evaluation data holds traces: expected rows with question and answer")
    without = [question for question in questions if question.gold is None]
    if without or not questions:
        raise InputError(
            f"evaluation needs questions with a reference answer; {len(without)} of {len(questions)} have none"
            + (f", the first: {without[0].question[:80]!r}" if without else "")
        )
    return questions


def _check(args: EvaluateArguments) -> None:
    """Raise InputError for what cannot be measured as it is asked for."""
    if args.percent_of is not None and not 0 < args.percent_of < float("inf"):
        raise InputError(f"percent_of: expected a positive number of tokens, got {args.percent_of}")
    if args.percent_of is not None and not any(budget.endswith("%") for budget in args.budgets):
        raise InputError("percent_of: budgets in percent are of it, and there are none: leave it out")
    if args.exit_confidence is not None and not 0 <= args.exit_confidence <= 1:
        raise InputError(f"exit_confidence: expected 0 to 1, got {args.exit_confidence}")
    if not args.budgets and (args.direct_baseline or args.exit_confidence is not None):
        raise InputError("direct_baseline, exit_confidence: both are measured at budgets, and there are none")
    if found := budget_problems(args.budgets, args.max_thinking_tokens):
        raise InputError(f"budgets: {found[0]}")


def run(args: EvaluateArguments) -> None:
    """Load, evaluate, print and store."""
    if args.output_dir:
        check_free_of_evaluations(args.output_dir)
    args = as_trained(args)
    _check(args)
    reader = open_reader(args)
    loaded = load_data(
        args.data, tokenizer=reader.tokenizer, think=reader.think, max_rows=args.max_samples, asking=True
    )
    questions = graded_questions(loaded)
    check_grader(question.gold for question in questions)
    if drops := describe_drops(loaded.dropped):
        print(f"dropped: {drops}")
    result = {"model": args.model, "data": args.data, "engine": args.engine} | evaluate(
        open_decoder(args, reader, progress_bar("evaluate")),
        questions,
        args.budgets,
        max_thinking_tokens=args.max_thinking_tokens,
        max_answer_tokens=args.max_answer_tokens,
        num_samples=args.num_samples,
        median_thinking_tokens=args.percent_of,
        direct_baseline=args.direct_baseline,
        exit_confidence=args.exit_confidence,
    )
    print(table(result))
    if args.output_dir:
        write_json(args.output_dir / "evaluation.json", result)
        write_text(args.output_dir / "table.txt", table(result) + "\n")
        if result["budgets"]:
            curves = {args.model: result}
            if "direct" in result:
                curves["draft, non-thinking mode"] = result["direct"]
            plot_curves(curves, args.output_dir / "curve.png")
        print(f"written to {args.output_dir}")
