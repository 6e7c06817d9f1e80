"""Accuracy against the share of each sequence kept: ``python -m trsd.sweep --config demo-lsp --fractions 0.1,0.5,1.0``.

Trains and evaluates the recipe once for every fraction and side, from the same start on the same traces, and writes
what LSP's paper (arXiv 2512.21002) shows of it: the curve with its knee, retention, left against right, tokens, step
time, memory and operations, and loss gaps (``sweep_report.py``). Every run is a process of its own, so that its peak
memory is its own. What is finished is not run again; what was interrupted goes on.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from trsd.engines import Sampling
from trsd.errors import InputError, message_of
from trsd.evaluate import evaluate
from trsd.files import write_json, write_text
from trsd.job import Job
from trsd.launch import refuse_ranks
from trsd.memory import OutOfMemory
from trsd.methods.lsp import learnable
from trsd.metrics import read_metrics
from trsd.models import quieten_transformers
from trsd.prepare import sections, share_traces
from trsd.recipe import Recipe
from trsd.recipe_file import fail, names_a_job, parse_recipe, recipe_as_yaml
from trsd.run import FREE_TO_CHANGE, RECIPE_FILE, discard_unbegun
from trsd.sweep_report import write_sweep
from trsd.truncation import SIDES, build_truncation

FRACTIONS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"
SWEEP = "sweep.yaml"
TOTALS = "totals.json"
EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a sweep."""

    fraction: float
    side: str

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.side}-{self.fraction:g}"


def settings_of(fractions: Sequence[float], sides: Sequence[str]) -> list[Setting]:
    """Every fraction on every side; the whole sequence once, for it has no sides."""
    shares = [share for share in sorted(set(fractions)) if share < 1]
    found = [Setting(fraction=share, side=side) for side in dict.fromkeys(sides) for share in shares]
    whole = [Setting(fraction=1.0, side="left")] if 1.0 in fractions else []
    return found + whole


def run_recipe(recipe: Recipe, setting: Setting, folder: Path, traces: Path) -> Recipe:
    """The recipe of one point: its traces are there already, and it is evaluated afterwards."""
    return replace(
        recipe,
        data=str(traces),
        max_train_samples=None,
        eval_data=None,
        output_dir=str(folder),
        keep_fraction=setting.fraction,
        keep_side=setting.side,
        resume_from_checkpoint=None,
    )


def check_same_sweep(recipe: Recipe, output_dir: Path) -> None:
    """Raise when ``output_dir`` holds a sweep of another recipe or data; else keep the recipe there."""
    path = output_dir / SWEEP
    if path.exists():
        _refuse_changes(path, replace(recipe, keep_fraction=None, keep_side="left"))
    write_text(path, recipe_as_yaml(replace(recipe, keep_fraction=None, keep_side="left")))


def _refuse_changes(path: Path, recipe: Recipe) -> None:
    stored, wanted = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(recipe_as_yaml(recipe))
    changed = sorted(k for k in wanted if k not in FREE_TO_CHANGE and stored.get(k) != wanted[k])
    if changed:
        raise InputError(f"{path.parent} was made with other {', '.join(changed)}: choose another output_dir")


def train_setting(recipe: Recipe, folder: Path, log: Path) -> None:
    """Train ``recipe`` in a process of its own unless that is done; InputError with the log's end where it fails."""
    begun = (folder / RECIPE_FILE).exists()
    if begun:
        _refuse_changes(folder / RECIPE_FILE, recipe)
    if (folder / TOTALS).exists():
        return
    config = log.with_suffix(".yaml")
    write_text(config, recipe_as_yaml(recipe))
    resume = ["--resume_from_checkpoint", "latest"] if begun else []
    with log.open("a") as stream:
        command = [sys.executable, "-m", "trsd.train", "--config", str(config), *resume]
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        end = "\n".join(log.read_text().splitlines()[-5:])
        raise InputError(f"training {folder.name} ended with exit code {code}; the end of {log}:\n{end}")


def newest_checkpoint(folder: Path) -> Path:
    """The last checkpoint of a finished run."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


class Evaluator:
    """Evaluates model folders on the recipe's questions, each once."""

    def __init__(self, job: Job, *, num_samples: int, sampling: Sampling) -> None:
        self.job, self.num_samples, self.sampling = job, num_samples, sampling
        self.questions = job.evaluation_questions

    def __call__(self, model_folder: Path, path: Path) -> dict[str, Any]:
        """The evaluation of ``model_folder``, read from ``path`` or made and written there."""
        settings = {"num_samples": self.num_samples, "sampling": asdict(self.sampling)}
        if path.exists():
            result = json.loads(path.read_text())
            if any(result[name] != value for name, value in settings.items()):
                raise InputError(f"{path} was evaluated with other samples: delete it, or give the same options")
            return result
        recipe, job = self.job.recipe, self.job
        decoder = job.decoder(job.reader(model_folder), f"evaluate {path.parent.name}", self.sampling)
        with job.generating():
            result = evaluate(
                decoder,
                self.questions,
                recipe.eval_budgets,
                max_thinking_tokens=recipe.max_thinking_tokens,
                max_answer_tokens=recipe.max_answer_tokens,
                num_samples=self.num_samples,
            )
        write_json(path, result)
        return result


def point(setting: Setting, folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What a finished run says of its setting."""
    metrics, totals = read_metrics(folder / "metrics.jsonl"), json.loads((folder / TOTALS).read_text())
    seconds = sorted(row["step_seconds"] for row in metrics)
    return {
        "fraction": setting.fraction,
        "side": setting.side,
        **{name: evaluation["unconstrained"][name] for name in ACCURACY},
        "num_steps": len(metrics),
        "tokens_per_step": sum(row["tokens"] for row in metrics) / len(metrics),
        "step_seconds": seconds[len(seconds) // 2],
        "peak_memory_gib": totals.get("peak_gpu_memory_gib", totals["peak_memory_gib"]),
        "teraflops_per_step": sum(row["teraflops"] for row in metrics) / len(metrics),
        "losses": [row["loss"] for row in metrics],
    }


ACCURACY = ("accuracy", "low", "high", "accuracy_of_whole_text", "termination_rate", "mean_thinking_tokens")


def sweep(
    recipe: Recipe,
    output_dir: Path,
    settings: Sequence[Setting],
    *,
    num_samples: int = 1,
    sampling: Sampling | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and evaluate every setting under ``output_dir``, and write the report; returns what it shows.

    Raises:
        InputError: a recipe that cannot be swept, a run that failed, or an ``output_dir`` of another recipe.
    """
    if recipe.method not in ("lsp", "sft") or recipe.truncation == "first_derivation":
        raise InputError("a sweep needs method lsp or sft and a truncation with a fraction")
    if recipe.truncation == "endpoints" and {setting.side for setting in settings} != {"left"}:
        raise InputError("truncation endpoints keeps both ends: leave --sides out")
    if recipe.teacher_cache_dir:
        raise InputError("teacher_cache_dir: every fraction has targets of its own: leave it out of a sweep")
    if recipe.eval_data is None:
        raise InputError("a sweep needs eval_data: questions with reference answers")
    job = Job(replace(recipe, output_dir=str(output_dir)), output_dir)
    evaluator = Evaluator(job, num_samples=num_samples, sampling=sampling or Sampling())
    check_same_sweep(recipe, output_dir)
    try:
        traces, shared = share_traces(job, output_dir)
    except (InputError, OSError, ImportError):
        discard_unbegun(output_dir, {SWEEP})
        raise
    before = evaluator(job.student_folder, output_dir / "before" / EVALUATION)
    points = []
    for number, setting in enumerate(settings, start=1):
        folder = output_dir / setting.name
        truncation = build_truncation(recipe.truncation, share=setting.fraction, side=setting.side, texts=())
        if not learnable(shared, truncation, sections(job))[0]:
            say(f"{number}/{len(settings)}  {setting.name:<10}  left out: the cut leaves nothing to learn")
            continue
        one = run_recipe(recipe, setting, folder, traces)
        train_setting(one, folder, output_dir / f"{setting.name}.log")
        points.append(point(setting, folder, evaluator(newest_checkpoint(folder), folder / EVALUATION)))
        found = points[-1]
        say(
            f"{number}/{len(settings)}  {setting.name:<10}  accuracy {found['accuracy']:.3f}  "
            f"ends by itself {found['termination_rate']:.0%}  {found['tokens_per_step']:,.0f} tokens  "
            f"{found['step_seconds']:.2f} s a step"
        )
    if not points:
        raise InputError("no fraction leaves anything to learn: choose larger ones or other loss_sections")
    return write_sweep(output_dir, recipe, points, before["unconstrained"])


def main(argv: list[str] | None = None) -> None:
    """Sweep from the command line; input that cannot be used exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m trsd.sweep",
        description="Train and evaluate a recipe at several fractions of each sequence. Flags of python -m trsd.train "
        "(--config, --max_steps, --dry_run, ...) are taken too, and the recipe needs eval_data. Without --config, "
        "--method, a model or data it is demo-lsp. Ten fractions are ten trainings and eleven evaluations.",
        allow_abbrev=False,
    )
    parser.add_argument("--fractions", default=FRACTIONS, help=f"shares kept, comma-separated; default {FRACTIONS}")
    parser.add_argument("--sides", default="left", help="of left, middle, right, comma-separated; default left")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs and report go; resumed if it exists")
    parser.add_argument("--num_samples", type=int, default=1, help="samples per evaluation question")
    parser.add_argument("--temperature_eval", type=float, default=0.0, help="of those samples; 0 is greedy")
    parser.add_argument("--top_p_eval", type=float, default=1.0, help="nucleus mass of those samples")
    own, rest = parser.parse_known_args(argv)
    if not names_a_job(rest) and not {"--config", "--method"} & {word.split("=")[0] for word in rest}:
        rest = ["--config", "demo-lsp", *rest]
    recipe, _, dry_run = parse_recipe(rest)
    try:
        fractions = [float(text) for text in own.fractions.split(",")]
    except ValueError:
        fail(f"--fractions: expected numbers such as 0.1,0.5, got {own.fractions!r}")
    if bad := [share for share in fractions if not 0 < share <= 1]:
        fail(f"--fractions: expected more than 0 and at most 1, got {bad}")
    sides = [side.strip() for side in own.sides.split(",")]
    if unknown := set(sides) - set(SIDES):
        fail(f"--sides: expected some of {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    if own.num_samples < 1 or (own.num_samples > 1 and own.temperature_eval == 0):
        fail("--num_samples: expected at least 1, and more than 1 only with --temperature_eval: greedy ones are equal")
    if own.temperature_eval < 0 or not 0 < own.top_p_eval <= 1:
        fail("--temperature_eval, --top_p_eval: expected 0 or more, and more than 0 up to 1")
    settings = settings_of(fractions, sides)
    if len({setting.name for setting in settings}) < len(settings):
        fail(f"--fractions: some are too close to tell apart by name: {own.fractions}")
    if dry_run:
        print("\n".join(setting.name for setting in settings) + f"\n\n{recipe_as_yaml(recipe)}", end="")
        return
    quieten_transformers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the run in progress too
    sampling = Sampling(temperature=own.temperature_eval, top_p=own.top_p_eval, seed=recipe.seed)
    try:
        refuse_ranks("python -m trsd.sweep")
        sweep(recipe, own.output_dir, settings, num_samples=own.num_samples, sampling=sampling)
    except (InputError, OSError, ImportError) as error:
        fail(message_of(error))
    except OutOfMemory as error:
        sys.exit(f"error: {error}")
    print(f"written to {own.output_dir}: sweep.md, sweep.png, sweep.json")


if __name__ == "__main__":
    main()
