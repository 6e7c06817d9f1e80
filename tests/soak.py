"""Runs that are killed again and again: ``python tests/soak.py training --rounds 200``.

``training``: a tiny run is killed (-9) at random moments, half of them within a save, and resumed until it ends, then
another one; what each has come to is compared, bit for bit, with a run that nobody disturbed. ``saves``: only saves,
each step twice, and after every kill the newest checkpoint must verify.

A round is a process forked after the imports, which take seconds. That is sound because the process that forks computes
nothing: it has one thread, and torch's pools begin in the children.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bare_reports
import torch
from conftest import losses, make_tiny_model, make_traces
from forked import run_and_exit
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trsd import train, training
from trsd.checkpoint import Checkpointer
from trsd.checkpoint_folders import checkpoints, newest_whole, step_of, sweep
from trsd.manifest import verify
from trsd.optim import build_optimizer
from trsd.thinking import ThinkFormat
from trsd.traces import write_traces

REASONER = Path(training.__file__).parent / "demo" / "reasoner"
NUM_STEPS = 12
WITHIN_A_SAVE = 0.06  # seconds; about as long as one takes


class Child:
    """A forked process that runs ``call``; what it prints goes to ``log``."""

    def __init__(self, call: Callable[[], None], log: Path) -> None:
        self.log, self.status, self.pid = log, None, os.fork()
        if self.pid == 0:
            run_and_exit(call, log)

    def ended(self) -> bool:
        """Whether it has ended; raises unless with exit code 0."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        if self.status:
            raise SystemExit(f"a child ended with status {self.status}:\n{self.log.read_text()[-4000:]}")
        return self.status is not None

    def wait(self) -> None:
        """Until it has ended."""
        while not self.ended():
            time.sleep(0.005)

    def kill_after(self, seconds: float, *, once: Callable[[], bool] = lambda: True) -> bool:
        """Kill it so long after ``once`` holds; False when it ended by itself before."""
        until = None
        while until is None or time.monotonic() < until:
            if self.ended():
                return False
            if until is None and once():
                until = time.monotonic() + seconds
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return True


def half_written(folder: Path) -> list[Path]:
    """The hidden folders of checkpoints."""
    return list(folder.glob(".checkpoint-*"))


def prepare(folder: Path) -> None:
    """The tiny model and its traces."""
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    make_tiny_model(tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    write_traces(folder / "traces.jsonl", make_traces(tokenizer, ThinkFormat.of(tokenizer), 10))


def run_training(folder: Path, output_dir: Path, **flags: object) -> None:
    """The trainer's command, resuming where there is something to resume."""
    bare_reports.leave_out()
    sizes = dict(train_batch_size=4, max_tokens_per_batch=512, max_length=512, max_steps=NUM_STEPS)
    made = dict(model_name_or_path=folder / "tiny", data=folder / "traces.jsonl", output_dir=output_dir)
    flags = made | sizes | flags
    if (output_dir / "recipe.yaml").exists():
        flags["resume_from_checkpoint"] = "latest"
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    train.main([*words, "--learning_rate", "1e-3"])


def refuse_difference(one: Path, other: Path) -> None:
    """End the program unless two runs have the same losses and the same last checkpoint, bit for bit."""
    if losses(one) != losses(other) or len(losses(one)) != NUM_STEPS:
        raise SystemExit(f"losses differ:\n{losses(one)}\n{losses(other)}")
    for name in ("model.safetensors", "state/optimizer.safetensors", "state/random.safetensors"):
        left, right = (load_file(folder / f"checkpoint-{NUM_STEPS}" / name) for folder in (one, other))
        if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
            raise SystemExit(f"{name} differs")


def soak_training(folder: Path, rounds: int, seconds: float, seed: int) -> str:
    """Kill ``rounds`` times, for at most ``seconds``; returns what was done."""
    rng, log = random.Random(seed), folder / "log.txt"
    Child(lambda: prepare(folder), log).wait()
    start = time.monotonic()
    Child(lambda: run_training(folder, folder / "undisturbed"), log).wait()
    whole = time.monotonic() - start
    kills = runs = saves = 0
    while kills < rounds and time.monotonic() - start < seconds:
        output_dir = folder / f"run-{runs}"
        killed = True
        while killed:
            flags = dict(save_steps=rng.choice((1, 2)))
            if rng.random() < 0.5:
                flags["save_total_limit"] = 2
            child = Child(lambda output_dir=output_dir, flags=flags: run_training(folder, output_dir, **flags), log)
            if kills >= rounds or time.monotonic() - start >= seconds:
                child.wait()
                killed = False
            elif rng.random() < 0.5:
                killed = child.kill_after(rng.uniform(0, whole))
            else:
                before = set(half_written(output_dir))
                begun = lambda output_dir=output_dir, before=before: set(half_written(output_dir)) - before  # noqa: E731
                killed = child.kill_after(rng.uniform(0, WITHIN_A_SAVE), once=begun)
            kills += killed
            saves += killed and bool(half_written(output_dir))
        runs += 1
        Child(lambda output_dir=output_dir: refuse_difference(output_dir, folder / "undisturbed"), log).wait()
    took = time.monotonic() - start
    return f"{kills} kills, {saves} of them within a save, {runs} runs equal to the undisturbed one, {took:.0f} s"


def save_for_ever(folder: Path, tokenizer: Any) -> None:
    """Checkpoints of a model that changes, each step twice, from the newest one on."""
    model = make_tiny_model(tokenizer)
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    checkpointer = Checkpointer(folder, tokenizer, save_total_limit=3, card=lambda step: f"# Step {step}\n")
    sweep(folder)
    newest = newest_whole(folder)
    for count in range(10**6):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        step = (step_of(newest) if newest else 1) + count // 2
        checkpointer.save(step, model=model, optimizer=optimizer, trainer={})


def soak_saves(folder: Path, rounds: int, seed: int) -> str:
    """Kill ``rounds`` savers, each within a save; returns what was done."""
    rng, log, output_dir = random.Random(seed), folder / "log.txt", folder / "saves"
    output_dir.mkdir()
    last = half = 0
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    for _ in range(rounds):
        known = rng.randint(1, 6)  # which of its hidden folders is the one
        seen: set[Path] = set()

        def begun(seen: set[Path] = seen, known: int = known) -> bool:
            with suppress(FileNotFoundError):
                seen.update(path / str(path.stat().st_ino) for path in half_written(output_dir))
            return len(seen) >= known

        Child(lambda: save_for_ever(output_dir, tokenizer), log).kill_after(rng.uniform(0, WITHIN_A_SAVE), once=begun)
        half += bool(half_written(output_dir))
        sweep(output_dir)
        if half_written(output_dir):
            raise SystemExit(f"left after a sweep: {half_written(output_dir)}")
        if found := checkpoints(output_dir):
            verify(found[-1])
        if last and (not found or step_of(found[-1]) < last):
            raise SystemExit(f"checkpoint-{last} was lost")
        last = step_of(found[-1]) if found else 0
    return f"{rounds} kills, {half} of them left half a checkpoint; the newest is checkpoint-{last} and verifies"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("training", "saves"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1800.0, help="training: no kill after so long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        if args.what == "training":
            print(soak_training(Path(name), args.rounds, args.seconds, args.seed))
        else:
            print(soak_saves(Path(name), args.rounds, args.seed))


if __name__ == "__main__":
    main()
