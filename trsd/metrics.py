"""Metrics: every step as a line of metrics.jsonl, some as a line on the screen."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from trsd.files import write_text


class MetricsLog:
    """Appends steps to ``path``; on a resumed run what lay beyond the resumed step is dropped first."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path, self._failed = path, False
        kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= first_step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._stream = path.open("a")

    def write(self, **values: float) -> None:
        """Append one step; what cannot be written is said once, and training goes on."""
        try:
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()
        except OSError as error:
            if not self._failed:
                print(f"warning: {self._path} cannot be written ({error}): steps are missing there", file=sys.stderr)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what was buffered and could not be written was said before
            self._stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All steps of a metrics.jsonl."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # a line torn by a crash; its step is run again
            rows.append(json.loads(line))
    return rows


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A callback (done, total) that draws a bar on a terminal and stays silent elsewhere."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    bars: list[tqdm] = []

    def update(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(desc=what, total=total, leave=False))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars.pop().close()

    return update


class Throughput:
    """Rows and tokens of a long job: a bar on a terminal, elsewhere a line every ``every_seconds``."""

    def __init__(self, what: str, total: int, *, every_seconds: float = 30.0) -> None:
        self.what, self.total, self.every_seconds = what, total, every_seconds
        self.rows = self.tokens = 0
        self._start = self._said = time.perf_counter()
        self._bar = tqdm(desc=what, total=total, leave=False) if sys.stderr.isatty() else None

    def add(self, tokens: int) -> None:
        """Count one row."""
        self.rows += 1
        self.tokens += tokens
        now = time.perf_counter()
        if self._bar:
            self._bar.update()
            self._bar.set_postfix_str(f"{self._rate(now):,.0f} tokens/s", refresh=False)
        elif now - self._said >= self.every_seconds:
            self._said = now
            print(self._line(now), flush=True)

    def close(self) -> None:
        """Say what it came to."""
        if self._bar:
            self._bar.close()
        print(self._line(time.perf_counter()), flush=True)

    def _rate(self, now: float) -> float:
        return self.tokens / max(now - self._start, 1e-9)

    def _line(self, now: float) -> str:
        minutes, seconds = divmod(round((now - self._start) / self.rows * (self.total - self.rows)), 60)
        eta = f", eta {minutes}:{seconds:02d}" if self.rows < self.total else ""
        return f"{self.what}: {self.rows} of {self.total}, {self._rate(now):,.0f} tokens/s{eta}"


class Pace:
    """How long steps take; the first, which may have compiled or warmed up, counts only until there is another."""

    def __init__(self) -> None:
        self._since = self._now = time.perf_counter()
        self._steps = 0

    def step_done(self) -> None:
        """Count one step, which ends now."""
        self._steps += 1
        if self._steps == 2:
            self._since = self._now
        self._now = time.perf_counter()

    def remaining(self, num_steps: int) -> float:
        """Seconds that so many more steps will take, after at least one."""
        return (self._now - self._since) / max(1, self._steps - 1) * num_steps


def say(text: str) -> None:
    """Print a line, above any bar that is being drawn."""
    tqdm.write(text)
    sys.stdout.flush()


def step_line(step: int, num_steps: int, values: dict[str, float], *, remaining_seconds: float) -> str:
    """The printed line of one step."""
    minutes, seconds = divmod(round(remaining_seconds), 60)
    return (
        f"step {step:>{len(str(num_steps))}}/{num_steps}  loss {values['loss']:.4f}  "
        f"grad_norm {values['grad_norm']:.2f}  lr {values['learning_rate']:.1e}  "
        f"{values['step_seconds']:.2f} s  {values['tokens_per_second']:,.0f} tokens/s  eta {minutes}:{seconds:02d}"
    )
