"""Commands and what reads them: a pipe that is closed, a terminal of another encoding, Ctrl-C."""

import importlib
import io
import os
import py_compile
import sys
from contextlib import contextmanager, redirect_stdout

import pytest

from trsd.__main__ import COMMANDS
from trsd.flags import parse_flags
from trsd.terminal import at_a_terminal

WORDS = {"sweep": ["--output_dir"]}


@contextmanager
def closed_pipe():
    """Inside, standard output is a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", closefd=False) as stream, redirect_stdout(stream):
        yield stream
    os.close(writing)


@pytest.mark.parametrize("length", [10, 100_000], ids=["at the end", "while it writes"])
def test_work_goes_on_when_nobody_reads_any_more(length):
    done = []
    with closed_pipe() as stream:
        with at_a_terminal():
            for step in range(3):
                print("x" * length)
                done.append(step)
        assert done == [0, 1, 2] and sys.stdout is stream


@pytest.mark.parametrize("command", COMMANDS)
def test_help_may_be_cut_off_by_its_reader(command):
    with closed_pipe(), pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"trsd.{command}").main(["--help"])
    assert exit_.value.code == 0


def help_of(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"trsd.{command}").main(["--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "cache", "plan", "generate", "evaluate"])
def test_help_fits_a_terminal_of_80_but_for_the_sentence_it_begins_with(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    usage, _, sentence, *rest = help_of(command, capsys).splitlines()
    assert sentence.endswith(".") and max(map(len, [usage, *rest])) == 80


@pytest.mark.parametrize(
    ("command", "in_one_line"),
    [("train", "distributions on a part of each trace. palign:"), ("compare", "only the table is printed.")],
)
def test_a_sentence_of_help_is_broken_where_the_terminal_is_full(command, in_one_line, monkeypatch, capsys):
    """Not where the docstring that it comes from is."""
    monkeypatch.setenv("COLUMNS", "100")
    assert in_one_line in help_of(command, capsys)


def test_flags_are_read_where_a_program_is_installed_without_its_source(tmp_path, monkeypatch):
    source = tmp_path / "sourceless.py"
    source.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Flags:\n    steps: int = 1\n    'How many.'\n"
    )
    py_compile.compile(str(source), cfile=str(tmp_path / "sourceless.pyc"))
    source.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    flags = importlib.import_module("sourceless").Flags
    assert parse_flags(flags, ["--steps", "3"], prog="program").steps == 3


@pytest.mark.parametrize(("asked", "coloured"), [(None, True), ("", True), ("1", False)])
def test_no_color_is_heeded(asked, coloured, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked is not None:
        monkeypatch.setenv("NO_COLOR", asked)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert ("\x1b[" in help_of("merge", capsys)) == coloured
    assert os.environ["TERM"] == "xterm"


def test_what_a_terminal_cannot_show_is_written_in_its_code():
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, encoding="ascii")
    with redirect_stdout(terminal), at_a_terminal():
        print("¿Cuántos?")
    assert shown.getvalue() == rb"\xbfCu\xe1ntos?" + b"\n"


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "trsd.train.parse_recipe"),
        ("cache", "trsd.cache.parse_recipe"),
        ("plan", "trsd.plan.parse"),
        ("sweep", "trsd.sweep.parse_recipe"),
        ("merge", "trsd.command.parse_flags"),
        ("report", "trsd.report.write_report"),
    ],
)
def test_ctrl_c_ends_a_command_with_a_word(monkeypatch, capsys, tmp_path, command, place):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    (tmp_path / "recipe.yaml").touch()
    takes_a_folder = command in ("report", "sweep")
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"trsd.{command}").main([*WORDS.get(command, []), *[str(tmp_path)] * takes_a_folder])
    assert exit_.value.code == 130 and capsys.readouterr().err == "\nstopped\n"
