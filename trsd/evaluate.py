"""Accuracy against thinking budget: ``python -m trsd.evaluate --model MODEL --data QUESTIONS --budgets 0,64,50%``.

Every question is thought about once, freely; at each budget the thinking is cut there, closed with the closer and
answered (``decoding.py``). Reported per budget: accuracy with an interval over questions, pass@k
(``statistics.py``), how often the close was forced, how often no answer or none in a known form was found, how often
the answer ended by itself, and tokens used; and which samples were right, for ``python -m trsd.compare``.

``--direct_baseline True`` adds the baseline of the curve: the same cut thinking, shown as a draft to the model's
non-thinking mode (``drafts.py``). ``--exit_confidence 0.95`` adds early exit: thinking ends at the first budget where a
trial answer is that confident.

``--responses FILE`` grades responses that were written elsewhere instead (``responses.py``), and ``--compare A B``
shows two evaluations beside each other (``compare.py``).
"""

from dataclasses import dataclass, fields
from pathlib import Path

from trsd import compare
from trsd.command import at_work, run_command
from trsd.decoding_arguments import DEFAULTS, DecodingArguments
from trsd.errors import InputError
from trsd.responses import grade_file


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(DecodingArguments):
    """Measure accuracy against thinking budget, or grade responses that were written elsewhere."""

    responses: Path | None = None
    """Grade these instead of a model: .jsonl or .parquet rows of problem or question, answer and response."""
    compare: tuple[Path, Path] | None = None
    """Compare two evaluations instead: two words, each an evaluation.json, its folder, or the folder of a run."""
    data: str = "bundled:questions/evaluation.jsonl"
    """Questions with reference answers: .jsonl, .parquet, a hub data set, or the short name of a benchmark."""
    budgets: tuple[str, ...] = ("0%", "25%", "50%", "75%", "100%")
    """Thinking budgets: tokens, or percent of the median unconstrained thinking; '' for unconstrained alone."""
    output_dir: Path | None = None
    """Where evaluation.json, table.txt and curve.png go, of --compare comparison.html and what is in it; left out, only
    the table is printed."""
    percent_of: float | None = None
    """Token count that percents are taken of, to give two models the same budgets; left out, this model's median."""
    direct_baseline: bool = False
    """Also show the cut thinking as a draft to the model's non-thinking mode."""
    exit_confidence: float | None = None
    """Also end thinking at the first budget where a trial answer ends and is so confident: the geometric mean of its
    tokens' probabilities, 0 to 1."""


def main(argv: list[str] | None = None) -> None:
    """Evaluate from the command line; input that cannot be used exits with code 2."""
    run_command(EvaluateArguments, run, prog="python -m trsd.evaluate", argv=argv)


def run(args: EvaluateArguments) -> None:
    """Compare, grade, or measure a model."""
    if args.compare:
        if unused := _given_beside(args, {"compare", "output_dir"}):
            raise InputError(f"--compare reads two evaluations and makes none: leave out {', '.join(unused)}")
        compare.run(compare.CompareArguments(first=args.compare[0], second=args.compare[1], output_dir=args.output_dir))
        return
    if args.responses:
        if unused := _given_beside(args, {"responses", "output_dir", "open_tag", "close_tag"}):
            raise InputError(f"--responses loads no model and writes nothing new: leave out {', '.join(unused)}")
        tags = {name: getattr(args, name) or DEFAULTS[name] for name in ("open_tag", "close_tag")}
        grade_file(args.responses, **tags, output_dir=args.output_dir)
        return
    with at_work(args):
        from trsd import evaluation

        evaluation.run(args)


def _given_beside(args: EvaluateArguments, used: set[str]) -> list[str]:
    """Flags that were given and that are none of ``used``."""
    names = [entry.name for entry in fields(args) if getattr(args, entry.name) != entry.default]
    return [f"--{name}" for name in names if name not in used]


if __name__ == "__main__":
    main()
