"""Results of a benchmark: lines in memory, a JSON file of them, an aligned table."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Line:
    """One contender at one shape; what was not measured is None."""

    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    dtype: str
    loss: str
    head: str
    """"trained" or "frozen"."""
    contender: str
    outcome: str = "ok"
    milliseconds: float | None = None
    """Median of forward and backward."""
    bare_gemms_milliseconds: float | None = None
    """Median of the bare products, run in turn with this line."""
    rounds: int = 0
    peak_bytes: int | None = None
    """Beyond the inputs, gradients included."""
    bare_gemms_peak_bytes: int | None = None
    gradient_bytes: int | None = None
    loss_value: float | None = None

    @property
    def time_ratio(self) -> float | None:
        """Times the bare products' median."""
        return self.milliseconds and self.milliseconds / self.bare_gemms_milliseconds

    @property
    def memory_ratio(self) -> float | None:
        """Times the bare products' peak."""
        return self.peak_bytes and self.peak_bytes / self.bare_gemms_peak_bytes


class Results:
    """Lines as they come; the file is written anew after each, so that a crash loses none."""

    def __init__(self, name: str) -> None:
        self.environment = environment()
        self.path = results_path(name, self.environment["device"], self.environment["date"])
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        lines = [dataclasses.asdict(each) for each in self.lines]
        write_json(self.path, {"environment": self.environment, "lines": lines})

    def find(self, num_tokens: int, loss: str, head: str, contender: str) -> Line | None:
        """The line of these names that was measured, if any."""
        wanted = (num_tokens, loss, head, contender)
        for line in self.lines:
            if (line.num_tokens, line.loss, line.head, line.contender) == wanted and line.outcome == "ok":
                return line
        return None

    def table(self) -> str:
        """Every line, grouped by what it may be compared with."""
        header = ("", "ms", "x GEMMs", "peak GiB", "x GEMMs", "grads GiB", "loss", "rounds")
        text, previous = [], None
        for line in sorted(self.lines, key=lambda line: (line.num_tokens, line.vocab_size, line.loss, line.head)):
            group = (
                f"{line.num_tokens} tokens, {line.vocab_size} vocabulary, "
                f"{line.student_hidden_size} <- {line.teacher_hidden_size}, {line.dtype}, {line.loss}, {line.head} head"
            )
            if group != previous:
                text += ["", group, _row(header)]
                previous = group
            text.append(_row(_cells(line)) if line.outcome == "ok" else f"{line.contender:<26}{line.outcome}")
        return "\n".join(text)


def _row(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<26}" + "".join(f"{cell:>10}" for cell in cells[1:])


def _cells(line: Line) -> tuple[str, ...]:
    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return (
        line.contender,
        shown(line.milliseconds, 2),
        shown(line.time_ratio, 2),
        shown(line.peak_bytes and line.peak_bytes / GIB, 3),
        shown(line.memory_ratio, 2),
        shown(line.gradient_bytes and line.gradient_bytes / GIB, 3),
        shown(line.loss_value, 4),
        str(line.rounds),
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def results_path(name: str, device: str, date: str | None = None) -> Path:
    """``<name>-<device>[-<date>].json`` in bench/results, or in the folder TRSD_BENCH_RESULTS names."""
    folder = Path(os.environ.get("TRSD_BENCH_RESULTS") or HERE / "results")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / ("-".join(filter(None, (name, slug, date))) + ".json")


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "trl", "liger-kernel")},
    }


def _processor() -> str:
    """The processor's name."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return f"CPU {name}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The checkout's commit; GIT_COMMIT where there is no git."""
    try:
        command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT", "unknown")
