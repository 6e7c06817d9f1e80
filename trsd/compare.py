"""Two models on the same questions: ``python -m trsd.compare A B``.

A and B are evaluation.json files of ``trsd.evaluate`` or folders that hold one; of a training run, RUN/eval/before.json
and RUN/eval/after.json, and RUN alone stands for the latter. For unconstrained thinking and every common budget the
table shows both accuracies, how much more accurate B is, that difference's 95 % interval over questions and
the p-value of a paired sign-flip test (``statistics.py``). Questions are paired by their ids, since hard and easy
questions are so to both models: the difference is known better than either accuracy. Mean tokens are known over all
questions of an evaluation alone, so there are none where some are left out. With an output folder the same as a page
(``comparison_page.py``).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from trsd.command import run_command
from trsd.comparison_page import write_comparison
from trsd.errors import InputError
from trsd.files import check_free_of_evaluations, write_json, write_text
from trsd.statistics import paired_difference

WITHIN = ("evaluation.json", "eval/after.json")
HOW = ("max_thinking_tokens", "max_answer_tokens", "closer", "sampling", "num_samples")
REMEDY = "evaluate again with this version of python -m trsd.evaluate and --output_dir"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of an evaluation: unconstrained thinking, or a budget."""

    name: str
    tokens: int | None
    """The budget; None where there is none."""
    correct: dict[str, list[bool]]
    """The samples of every question, by its id."""
    mean_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a file says of one model."""

    path: Path
    model: str
    ids: list[str]
    settings: list[Setting]
    """The one without a budget first."""
    how: dict[str, Any]
    """What beside the model decides the results."""
    stored: dict[str, Any]
    """The file itself."""


def read_evaluation(path: Path) -> Evaluation:
    """The per-question results of a file or of the folder that holds it; raises for a file without them."""
    path = _file_of(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file ({error})") from None
    if not isinstance(stored, dict) or "question_ids" not in stored:
        raise InputError(f"{path} holds no question_ids, so its questions cannot be paired: {REMEDY}")
    ids = stored["question_ids"]
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{path}: question_ids must be a list of different texts: {REMEDY}")
    # Graded responses have no budgets: their one row is the file itself.
    budgets = stored.get("budgets", [])
    if not isinstance(budgets, list):
        raise InputError(f"{path}: budgets must be a list, one entry each, and is {budgets!r}: {REMEDY}")
    rows = [stored.get("unconstrained", stored), *budgets]
    return Evaluation(
        path=path,
        model=str(stored.get("model", stored.get("data", path))),
        ids=ids,
        settings=[_setting(row, ids, path) for row in rows],
        how={name: stored[name] for name in HOW if name in stored},
        stored=stored,
    )


def _file_of(path: Path) -> Path:
    """The file that ``path`` is, or that the folder ``path`` holds."""
    if not path.is_dir():
        return path
    inside = [path / name for name in WITHIN if (path / name).is_file()]
    if not inside:
        raise InputError(f"{path} holds neither {' nor '.join(WITHIN)}: give a folder of an evaluation or a run")
    return inside[0]


def _setting(row: Any, ids: Sequence[str], path: Path) -> Setting:
    name = str(row.get("budget", "free")) if isinstance(row, dict) else "?"
    correct = row.get("correct") if isinstance(row, dict) else None
    if correct is None:
        raise InputError(f"{path}: row {name} holds no per-question results (correct): {REMEDY}")
    if not isinstance(correct, list) or len(correct) != len(ids) or not all(map(_are_samples, correct)):
        raise InputError(
            f"{path}: correct of row {name} must hold a list of true and false for each of {len(ids)} questions: "
            + REMEDY
        )
    return Setting(
        name=name,
        tokens=row.get("tokens"),
        correct=dict(zip(ids, correct, strict=True)),
        mean_tokens=row.get("mean_tokens"),
    )


def _are_samples(samples: Any) -> bool:
    return isinstance(samples, list) and len(samples) > 0 and all(isinstance(right, bool) for right in samples)


def compare(first: Evaluation, second: Evaluation, *, common: bool = False) -> dict[str, Any]:
    """Both models at every setting that they share.

    Args:
        first, second: what ``read_evaluation`` read.
        common: pair the questions that both have, instead of refusing evaluations of other questions.

    Returns:
        A json-ready dict: ``first`` and ``second`` (``file`` and ``model``), ``num_questions``, ``num_left_out`` of
        each, ``made_otherwise`` (settings in which the two evaluations differ), ``not_shared`` (budgets that one of
        them has alone), and ``rows``: ``setting``, ``tokens`` (the budgets of both), ``accuracy`` and ``mean_tokens``
        (of both), and what ``statistics.paired_difference`` says.
    """
    theirs = set(second.ids)
    ids = [i for i in first.ids if i in theirs]
    left_out = [len(first.ids) - len(ids), len(second.ids) - len(ids)]
    if not ids or (any(left_out) and not common):
        raise InputError(
            f"{first.path} and {second.path} share {len(ids)} questions; {left_out[0]} are in the first alone, "
            f"{left_out[1]} in the second: evaluate both on the same data"
            + (", or give --common True to compare on what they share" if ids else "")
        )
    rows, paired = [], []
    for one, other in shared_settings(first.settings, second.settings):
        paired += [one, other]
        samples = [[setting.correct[i] for i in ids] for setting in (one, other)]
        rows.append(
            {
                "setting": one.name,
                "tokens": [one.tokens, other.tokens],
                "accuracy": [sum(sum(s) / len(s) for s in side) / len(ids) for side in samples],
                "mean_tokens": [None if out else s.mean_tokens for s, out in zip((one, other), left_out, strict=True)],
                **paired_difference(*samples),
            }
        )
    return {
        "first": {"file": str(first.path), "model": first.model},
        "second": {"file": str(second.path), "model": second.model},
        "num_questions": len(ids),
        "num_left_out": left_out,
        "made_otherwise": {
            name: [first.how.get(name), second.how.get(name)]
            for name in HOW
            if first.how.get(name) != second.how.get(name)
        },
        "not_shared": [
            [s.name for s in side if s.name not in {row["setting"] for row in rows} and s not in paired]
            for side in (first.settings, second.settings)
        ],
        "rows": rows,
    }


def shared_settings(first: Sequence[Setting], second: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """The settings of the same name, and those whose budgets are the same number of tokens under other names."""
    by_name = {setting.name: setting for setting in second}
    by_tokens = {setting.tokens: setting for setting in second if setting.tokens is not None}
    pairs = [(one, by_name.get(one.name) or by_tokens.get(one.tokens)) for one in first]
    return [(one, other) for one, other in pairs if other is not None]


def table(comparison: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [
        f"A  {comparison['first']['model']}  ({comparison['first']['file']})",
        f"B  {comparison['second']['model']}  ({comparison['second']['file']})",
        f"{'budget':<10} {'tokens':>11}  {'A':>6}  {'B':>6}  {'B - A':>7}  {'[95 % interval]':<16}  {'p-value':>7}  "
        f"{'differing':>9}  {'mean tokens of A, B':>20}",
    ]
    for row in comparison["rows"]:
        budgets = "/".join(f"{count}" for count in dict.fromkeys(row["tokens"]) if count is not None)
        means = ", ".join("-" if mean is None else f"{mean:,.0f}" for mean in row["mean_tokens"])
        one, other = row["accuracy"]
        lines.append(
            f"{row['setting']:<10} {budgets:>11}  {one:>6.3f}  {other:>6.3f}  {row['difference']:>+7.3f}  "
            f"{'[{low:+.3f}, {high:+.3f}]'.format(**row):<16}  {row['p_value']:>7.2g}  {row['num_differing']:>9}  "
            f"{means:>20}"
        )
    return "\n".join([*lines, *notes(comparison)])


def notes(comparison: dict[str, Any]) -> list[str]:
    """What a reader of the rows must know, a sentence each."""
    lines = [f"{comparison['num_questions']} questions, paired"]
    if any(comparison["num_left_out"]):
        one, other = comparison["num_left_out"]
        lines.append(f"left out: {one} questions of A and {other} of B that the other does not have")
    for name, (one, other) in comparison["made_otherwise"].items():
        lines.append(f"warning: {name} differs, {one} and {other}: the difference is not the models' alone")
    for letter, names in zip("AB", comparison["not_shared"], strict=True):
        if names:
            lines.append(f"only {letter} has the budgets {', '.join(names)}")
    if any(len(set(row["tokens"])) > 1 for row in comparison["rows"]):
        lines.append(
            "budgets of other lengths are percents of each model's own thinking: --percent_of makes them equal"
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Compare two evaluations of the same questions."""

    first: Annotated[Path, tyro.conf.Positional]
    """evaluation.json of model A, or the folder that holds it."""
    second: Annotated[Path, tyro.conf.Positional]
    """evaluation.json of model B, or the folder that holds it."""
    common: bool = False
    """Compare on the questions that both have, where they were not evaluated on the same."""
    output_dir: Path | None = None
    """Where comparison.html, comparison.json, table.txt and a picture of both curves go; left out, only the table is
    printed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare from the command line; input that cannot be used exits with code 2."""
    run_command(CompareArguments, run, prog="python -m trsd.compare", argv=argv)


def run(args: CompareArguments) -> None:
    """Read, compare, print and store."""
    if args.output_dir:
        check_free_of_evaluations(args.output_dir)
    first, second = read_evaluation(args.first), read_evaluation(args.second)
    comparison = compare(first, second, common=args.common)
    text = table(comparison)
    print(text)
    if args.output_dir:
        write_json(args.output_dir / "comparison.json", comparison)
        write_text(args.output_dir / "table.txt", text + "\n")
        page = write_comparison(args.output_dir, comparison, notes(comparison), first.stored, second.stored)
        print(f"written to {args.output_dir}: look at {page}")


if __name__ == "__main__":
    main()
