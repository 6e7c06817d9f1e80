"""Results files read back: suites with their lines, and the newest file of each device."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lines import read_line


class NotResults(ValueError):
    """A file that cannot be read as results; its text names the file."""


@dataclass(frozen=True)
class Suite:
    """One suite of one results file."""

    name: str
    title: str
    environment: dict[str, str]
    lines: list[Any]

    @property
    def measured(self) -> list[Any]:
        """The lines that hold figures."""
        return [line for line in self.lines if line.outcome == "ok"]


Suites = dict[str, Suite]


def read_suites(path: Path) -> Suites:
    """The suites of one file, by name.

    Raises:
        NotResults: no such file, no JSON, or JSON of another kind.
    """
    content = _load(path)
    if not _holds_suites(content):
        raise NotResults(f'{path}: expected {{"suites": {{...}}}}, as `make bench` writes it')
    suites = {}
    for name, values in content["suites"].items():
        try:
            lines = [read_line(each) for each in values["lines"]]
            environment = {key: str(value) for key, value in values["environment"].items()}
            environment["device"], environment["date"]
            suites[name] = Suite(name, values["title"], environment, lines)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotResults(f"{path}: suite {name!r}: {type(error).__name__}: {error}") from error
    return suites


def newest_of_each_device(folder: Path) -> list[Path]:
    """Of the results files in ``folder`` the newest of each device, devices by name; other JSON files are passed over.

    Raises:
        NotResults: one of the files is broken.
    """
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if not _holds_suites(_load(path)) or not (suites := read_suites(path)):
            continue
        device = next(iter(suites.values())).environment["device"]
        date = max(suite.environment["date"] for suite in suites.values())
        newest[device] = max(newest.get(device, ("", path)), (date, path))
    return [newest[device][1] for device in sorted(newest)]


def by_device(files: list[Suites]) -> dict[str, Suites]:
    """Suites of several files by their device; of a suite that a device has twice the newer one, or else the later."""
    devices: dict[str, Suites] = {}
    for suite in (suite for suites in files for suite in suites.values()):
        there = devices.setdefault(suite.environment["device"], {})
        before = there.get(suite.name)
        if before is None or before.environment["date"] <= suite.environment["date"]:
            there[suite.name] = suite
    return devices


def _load(path: Path) -> Any:
    """What a file holds as JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise NotResults(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise NotResults(f"{path}: not JSON: {error}") from error


def _holds_suites(content: Any) -> bool:
    """Whether it is of this format."""
    return isinstance(content, dict) and isinstance(content.get("suites"), dict)
