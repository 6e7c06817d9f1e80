"""Runs of a recipe that keep other shares of each sequence: the work of ``trsd.sweep``, a process for each run."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from trsd.engines import Sampling
from trsd.errors import InputError
from trsd.evaluation import evaluate
from trsd.files import write_json, write_text
from trsd.job import Job
from trsd.methods.lsp import learnable
from trsd.metrics import read_metrics
from trsd.prepare import sections, share_traces
from trsd.recipe import Recipe
from trsd.recipe_file import recipe_as_yaml
from trsd.run import FREE_TO_CHANGE, RECIPE_FILE, discard_unbegun
from trsd.sweep import Setting
from trsd.sweep_report import write_sweep
from trsd.totals import TOTALS, training_peak_gib
from trsd.truncation import build_truncation

SWEEP = "sweep.yaml"
EVALUATION = "evaluation.json"


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
        "peak_memory_gib": training_peak_gib(totals)[0],
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
