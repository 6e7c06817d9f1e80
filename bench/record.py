"""Results: the lines of every suite in one JSON file a device and day, and as aligned tables."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

HERE = Path(__file__).parent
GIB = 2**30
PACKAGES = (
    *("triton", "transformers", "trl", "liger-kernel", "fla-core", "quack-kernels", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-4"),
)


class Line(Protocol):
    """What one contender did, a frozen dataclass (``lines.py``); what was not measured is None."""

    group: str
    """What the line may be compared with."""
    contender: str
    outcome: str
    """"ok", or why there is nothing else."""
    columns: ClassVar[tuple[str, ...]]

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        ...

    def extra(self) -> dict[str, Any]:
        """For pytest-benchmark's ``extra_info``."""
        ...


LineKind = TypeVar("LineKind", bound=Line)


class Results:
    """A suite's lines as they come; the file is written anew after each, so that a crash loses none.

    What else the file holds stays: other suites, and of this one what was measured in the same environment, by the same
    commit, and is not measured again.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title
        self.environment = environment()
        self.path = results_path("", self.environment["device"], self.environment["date"])
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self._write()

    def amend(self, line: LineKind, **fields: object) -> LineKind:
        """Put more into a line that was added before; returns what it is now."""
        self.lines[self.lines.index(line)] = line = replace(line, **fields)
        self._write()
        return line

    def _write(self) -> None:
        suites = suites_in(self.path)
        lines = [stored(each) for each in self.lines]
        before = suites.get(self.name, {})
        if before.get("environment") == self.environment:
            again = {(each.group, each.contender) for each in self.lines}
            lines += [each for each in before["lines"] if (each["group"], each["contender"]) not in again]
        suites[self.name] = {"title": self.title, "environment": self.environment, "lines": lines}
        write_json(self.path, {"suites": suites})

    def find(self, **wanted: object) -> Line | None:
        """The first line with these fields that was measured, if any."""
        for line in self.lines:
            if line.outcome == "ok" and all(getattr(line, name, None) == value for name, value in wanted.items()):
                return line
        return None

    def table(self) -> str:
        """Every line under its group, groups in the order in which they began."""
        width = max((len(line.contender) for line in self.lines), default=0) + 2
        text = []
        for group, lines in grouped(self.lines).items():
            text += ["", group, _row("", lines[0].columns, width)]
            for line in lines:
                cells = line.cells() if line.outcome == "ok" else ()
                text.append(_row(line.contender, cells, width) if cells else f"{line.contender:<{width}}{line.outcome}")
        return "\n".join(text)


def suites_in(path: Path) -> dict[str, Any]:
    """The suites of a results file; a damaged one is set aside, and said, so that what is measured now is kept."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["suites"])
    except (ValueError, KeyError, TypeError):
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        warnings.warn(f"{path} is no results file: set aside as {aside.name}", stacklevel=2)
        return {}


def stored(line: Line) -> dict[str, Any]:
    """A line as JSON holds it; ``lines.read_line`` reads it back."""
    return {"kind": type(line).__name__} | {entry.name: getattr(line, entry.name) for entry in fields(line)}


def grouped(lines: list[Line]) -> dict[str, list[Line]]:
    """Lines by their group, groups in the order in which they began."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    return groups


def _row(name: str, cells: tuple[str, ...], width: int) -> str:
    return f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells)


def shown(value: float | None, digits: int) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.{digits}f}"


def write_json(path: Path, content: dict[str, object]) -> None:
    """Written beside and renamed, so that what reads it never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def results_path(name: str, device: str, date: str | None = None) -> Path:
    """``[<name>-]<device>[-<date>].json`` in bench/results, or in the folder TRSD_BENCH_RESULTS names."""
    folder = Path(os.environ.get("TRSD_BENCH_RESULTS") or HERE / "results")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / ("-".join(filter(None, (name, slug, date))) + ".json")


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "driver": _driver(),
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """The processor's name."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return f"CPU {name}"


def _driver() -> str:
    """The GPU driver's version."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return "none" if not torch.cuda.is_available() else "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


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
