"""The documentation as data: blocks, code spans, links and headings of Markdown files, commands of shell text."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
CONTROL = {"do", "then", "else", "!", "{", "}", "done", "fi"}  # words of the shell that a command may stand behind
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line, counted from 1."""
    language: str
    text: str

    @property
    def place(self) -> str:
        """For messages: page and line."""
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A simple command of the shell, without its redirections and its pipe."""

    place: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """As one would type it."""
        return shlex.join(self.words)


def name_of(page: Path) -> str:
    """A page's path from the repository's root."""
    return page.relative_to(ROOT).as_posix()


@cache
def pages() -> list[Path]:
    """All Markdown files of the repository."""
    folders = [ROOT / name for name in ("docs", "trsd", "kernels", "bench", "tests")]
    return sorted(ROOT.glob("*.md")) + sorted(path for folder in folders for path in folder.rglob("*.md"))


@cache
def read(page: Path) -> tuple[list[Block], str]:
    """(fenced blocks, the text with an empty line for every line of them) of a page."""
    blocks, prose, opened = [], [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        found = FENCE.match(line)
        if opened is None and found:
            opened = number, found, []
            prose.append("")
        elif opened is None:
            prose.append(line)
        elif found and found[2].startswith(opened[1][2]) and not found[3].strip():
            first, fence, inside = opened
            indent = len(fence[1])
            text = "".join(f"{each[indent:] if each[:indent].isspace() else each}\n" for each in inside)
            blocks.append(Block(page, first + 1, fence[3].strip(), text))
            opened = None
            prose.append("")
        else:
            opened[2].append(line)
            prose.append("")
    assert opened is None, f"{name_of(page)}:{opened and opened[0]}: this fence is never closed"
    return blocks, "\n".join(prose)


def blocks(*languages: str, of: Path | None = None) -> list[Block]:
    """The blocks of some languages, of one page or of all."""
    chosen = pages() if of is None else [of]
    return [block for page in chosen for block in read(page)[0] if block.language in languages]


def spans(page: Path) -> list[tuple[str, str]]:
    """(place, text) of every code span outside fences, line ends as blanks."""
    text, found = read(page)[1], []
    for match in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", text, flags=re.DOTALL):
        if "\n\n" not in match[2]:
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{name_of(page)}:{line}", " ".join(match[2].split())))
    return found


def _without_code(text: str) -> str:
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", lambda match: "x" * len(match[0]), text)


def links(page: Path) -> list[tuple[str, str]]:
    """(place, target) of every link and picture of a page."""
    text = _without_code(read(page)[1])
    patterns = (
        r"\]\(\s*<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)",
        r"^\[[^\]]+\]:\s*(\S+)",
        r"<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"",
    )
    return [
        (f"{name_of(page)}:{text.count(chr(10), 0, match.start()) + 1}", match[1])
        for pattern in patterns
        for match in re.finditer(pattern, text, flags=re.MULTILINE)
    ]


def anchors(page: Path) -> set[str]:
    """What a link may name behind ``#``: GitHub's names of the headings."""
    found: dict[str, int] = {}
    for match in re.finditer(r"^#{1,6}\s+(.+?)\s*#*$", read(page)[1], flags=re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = found.get(slug, -1) + 1
        found[slug] = count
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def commands_of(text: str, place: str) -> list[Command]:
    """The simple commands of shell text, those inside ``$( )``, pipes and loops too; comments are left out."""
    page, _, line = place.partition(":")
    first, found = int(line or 1), []
    logical = text.replace("\\\n", "\0").split("\n")
    for each in logical:
        where = f"{page}:{first}"
        first += each.count("\0") + 1
        each = each.replace("\0", " ")
        if "<<" in each:
            raise ValueError(f"{where}: here-documents are not understood here: {each}")
        found += [Command(where, words) for words in _simple_commands(each, where)]
    return found


def _simple_commands(line: str, where: str) -> list[tuple[str, ...]]:
    line = re.sub(r"\$\(\(.*?\)\)", "0", line)  # arithmetic
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise ValueError(f"{where}: no command line ({error}): {line}") from None
    found, words, skip = [], [], False
    for token in [*tokens, ";"]:
        if token and set(token) <= set("<>&") and set(token) & set("<>"):
            skip = True  # the file of a redirection
            if words and words[-1].isdigit():
                words.pop()
        elif token and set(token) <= set("();|&"):
            found.append(tuple(words))
            words, skip = [], False
        elif skip:
            skip = False
        else:
            words.append(token)
    return [words for words in map(_without_lead, found) if words]


def _without_lead(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command without control words and assignments before it."""
    while words and (words[0] in CONTROL or ASSIGNMENT.match(words[0])):
        words = words[1:]
    return words
