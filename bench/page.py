"""The results page: ``python -m bench.page [RESULTS.json ...] [--output bench/RESULTS.md]``.

One Markdown page of tables, first figures and pictures from results files: those named, or the newest of each device in
bench/results. Everything on it is computed from the files; what was not measured is not on it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lines import TrainingLine
from bench.page_bars import branches, losses
from bench.page_curves import against_branches, against_fraction
from bench.page_figure import Picture
from bench.page_groups import setting_of, short_outcome
from bench.page_headlines import headlines
from bench.page_markdown import cell, table
from bench.record import HERE, PACKAGES, grouped, results_path
from bench.results_files import NotResults, Suite, Suites, by_device, newest_of_each_device, read_suites

FOLD_FROM = 17
INTRODUCTION = """\
# Benchmark results

Made from the results files by `make bench-page`. To measure anew: `make bench`, then `make bench-page`; on a machine
with a GPU, `make gpu`. Two results files are compared by `python -m bench.compare BEFORE.json AFTER.json`.

## How to read it

- A time is the median of its rounds, after a warm-up; **± %** is half the interquartile range, in percent of the
  median.
- A contender and its reference run in alternating order in one process, so that a machine that gets faster or slower
  moves both. A column **x ...** is the ratio to that reference: the first one of time, the second one of peak memory.
- **Peak memory**: on a GPU the most that torch's allocator had handed out; on a CPU the live tensors, counted at every
  operation, those inside the fused losses included. Each suite says what it counts. A dash is what was not measured or
  cannot be known.
- **off by** is the worst relative error of loss or output and of gradients against float64, at a small size in the
  same dtype. What is further off than its precision explains is refused, and not timed.
- "out of memory" is a result. What was not measured is listed with its reason.
"""
EXPLANATIONS = {
    "training": "A whole step: teacher, student, loss, backward, clipping, optimizer. f is the fraction of each "
    "sequence that is kept; `x reference` is against the first line of the same fraction. The peak is all that the "
    "contender would hold by itself; `plan GiB` and `plan ms` are "
    "what `trsd.plan` predicts, the latter as a floor. `recomputed`: activations were made again in the backward pass. "
    "MFU counts the models' operations, not those run again, against the maker's peak or, on a CPU, a large product's.",
    "trsd_step": "The student's part of a step. `x ours` is against branches, or against packed rows. The peak is "
    "beyond weights, gradients and inputs. A fill rate is the share of the rows' places that hold tokens.",
    "linear_distill": "The distillation loss alone, from hidden states to gradients. `x GEMMs` is against the bare "
    "matrix products, which no loss can do without. The peak is beyond the inputs; `grads GiB` is the gradients' part.",
    "attention": "Attention over one packed row. `x ours` is against our kernels over the same row, or SDPA on a CPU. "
    "The peak includes output and gradients; TFLOP/s count the visible pairs.",
    "decoding": "Questions thought about and answered, greedily. `x reference` is against what the group's name says; "
    "`rows` decode together.",
    "teacher_caches": "The teacher's targets on disk, beside plain files of the same tensors, as the groups say.",
    "checkpoints": "Checkpoints on disk, beside torch's own way to write and read the same tensors.",
    "overheads": "What the trainer does beside computing a step: `% of step` is how much longer a step takes for it, "
    "against what is promised. `reference` are the milliseconds of another way to do the same, as the groups say.",
    "ceilings": "What the device can do at best; `stated` is by its maker, where it is known.",
}
FACTS = ("device", "driver", "threads", "commit", "date", "python", "torch", *PACKAGES)
NOT_INSTALLED = "not installed"
PICTURES = (against_fraction, losses, branches, against_branches)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the page from the command line; results that cannot be used exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="results files; default: the newest of each device")
    folder = results_path("", "any").parent
    default = (HERE if folder == HERE / "results" else folder) / "RESULTS.md"
    parser.add_argument("--output", type=Path, default=default, help="pictures go to plots/ beside it")
    args = parser.parse_args(argv)
    if args.output.is_dir():
        parser.error(f"--output: {args.output} is a folder, expected a file")
    try:
        paths = args.results or newest_of_each_device(folder)
        files = {path: read_suites(path) for path in paths}
    except NotResults as error:
        parser.error(str(error))
    if not any(suite.lines for suites in files.values() for suite in suites.values()):
        parser.error(f"no results in {', '.join(map(str, paths)) or folder}: `make bench` measures")
    try:
        pictures = write_page(files, args.output)
    except OSError as error:
        parser.error(f"--output: {error.filename or args.output}: {error.strerror}")
    for path in files:
        print(f"from {path}")
    print(f"{args.output}, {len(pictures)} pictures")


def write_page(files: dict[Path, Suites], output: Path) -> list[Picture]:
    """The page at ``output`` and its pictures in plots/<device> beside it, which are returned."""
    parts, pictures = [INTRODUCTION], []
    for device, suites in sorted(by_device(list(files.values())).items(), key=_gpus_first):
        sources = [path for path, held in files.items() if any(suite in suites.values() for suite in held.values())]
        plots = output.parent / "plots" / results_path("", device).stem
        drawn = {
            name: [picture for draw in PICTURES for picture in draw(suite, plots)] for name, suite in suites.items()
        }
        parts.append(_device_part(device, suites, drawn, output, sources))
        pictures += [picture for found in drawn.values() for picture in found]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(parts), encoding="utf-8")
    return pictures


def _gpus_first(item: tuple[str, Suites]) -> tuple[bool, str]:
    """GPUs before CPUs, each by name."""
    return item[0].startswith("CPU"), item[0]


def _device_part(
    device: str, suites: Suites, pictures: dict[str, list[Picture]], output: Path, sources: Sequence[Path]
) -> str:
    """Environment, first figures, and every suite."""
    said = ", ".join(_linked(path, output) for path in sources)
    lines = [f"## {cell(device)}", "", f"From {said}.", "", *_environment_table(suites), ""]
    if found := headlines(suites):
        lines += ["### In short", "", *found, ""]
    order = [name for name in EXPLANATIONS if name in suites] + sorted(set(suites) - set(EXPLANATIONS))
    for name in order:
        lines += _suite_part(suites[name], pictures[name], output)
    return "\n".join(lines)


def _linked(path: Path, output: Path) -> str:
    """A link to what lies beside the page, elsewhere the name alone: pages hold no paths of the machine."""
    place = Path(os.path.relpath(path.resolve(), output.parent.resolve()))
    return f"`{path.name}`" if place.parts[0] == ".." else f"[{path.name}]({place.as_posix()})"


def _environment_table(suites: Suites) -> list[str]:
    """A row a fact, with its suites where they differ; packages that are not installed in one row."""
    facts = [*FACTS, *sorted({key for suite in suites.values() for key in suite.environment} - set(FACTS))]
    rows, missing = [], []
    for fact in facts:
        values: dict[str, list[str]] = {}
        for suite in suites.values():
            if fact in suite.environment:
                values.setdefault(suite.environment[fact], []).append(suite.name)
        if set(values) == {NOT_INSTALLED}:
            missing.append(fact)
        elif values:
            said = [value if len(values) == 1 else f"{value} ({', '.join(names)})" for value, names in values.items()]
            rows.append([fact, "; ".join(said)])
    if missing:
        rows.append([f"missing: {NOT_INSTALLED}", ", ".join(missing)])
    return table(["", "measured on"], rows, text_columns=2)


def _suite_part(suite: Suite, pictures: Sequence[Picture], output: Path) -> list[str]:
    """Title, explanation, pictures, and a table a group, the fractions of a setting together."""
    lines = [f"### {suite.name}: {cell(suite.title)}", ""]
    if suite.name in EXPLANATIONS:
        lines += [EXPLANATIONS[suite.name], ""]
    for picture in pictures:
        lines += [f"![{cell(picture.alt)}]({picture.path.relative_to(output.parent).as_posix()})", ""]
    for group, found in _tables_of(suite.lines).items():
        rows = _lines_table(found)
        if len(found) >= FOLD_FROM:
            rows = ["<details>", f"<summary>{len(found)} lines</summary>", "", *rows, "", "</details>"]
        lines += [f"**{cell(group)}**", "", *rows, ""]
        if reasons := _reasons(found):
            lines += [*reasons, ""]
    return lines


def _tables_of(lines: Sequence[Any]) -> dict[str, list[Any]]:
    """Lines by group; where a group differs from another in its fraction alone, both are one."""
    groups = grouped(list(lines))
    settings = [setting_of(found[0]) for found in groups.values()]
    tables: dict[str, list[Any]] = {}
    for group, found in groups.items():
        setting = setting_of(found[0])
        together = isinstance(found[0], TrainingLine) and settings.count(setting) > 1
        tables.setdefault(setting if together else group, []).extend(found)
    return tables


def _lines_table(lines: Sequence[Any]) -> list[str]:
    """The columns of the lines' kind; before them the fraction where it varies."""
    kinds = list(dict.fromkeys(type(line) for line in lines))
    text: list[str] = []
    for kind in kinds:
        found = [line for line in lines if type(line) is kind]
        by_fraction = kind is TrainingLine and len({line.fraction for line in found}) > 1
        if by_fraction:
            found.sort(key=lambda line: line.fraction)
        rows = []
        for line in found:
            cells = line.cells() if line.outcome == "ok" else (short_outcome(line),)
            cells += ("",) * (len(kind.columns) - len(cells))
            rows.append([*([f"{line.fraction:g}"] if by_fraction else []), line.contender, *cells])
        header = [*(["f"] if by_fraction else []), "", *kind.columns]
        text += [*([""] if text else []), *table(header, rows, text_columns=len(header) - len(kind.columns))]
    return text


def _reasons(lines: Sequence[Any]) -> list[str]:
    """Why lines have no figures, each reason once with its contenders."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if ":" in line.outcome:
            reasons.setdefault(line.outcome, []).append(line.contender)
    return [f"- {cell(', '.join(dict.fromkeys(names)))}: {cell(reason)}" for reason, names in reasons.items()]


if __name__ == "__main__":
    main()
