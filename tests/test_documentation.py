"""What the tests of the documentation read out of Markdown and of shell text."""

import pytest
from documentation import anchors, commands_of, links, read, spans
from test_docs import said

PAGE = """# A page

Text with `code` and ``a ` tick``, a [link](other.md#there), ![picture](p.png) and `[none](none.md)`.

```bash
ls  # first
```

## What `it` says: *more*, or 2 of them?
## Twice
## Twice

1. A list

   ```python
   if True:
       print(1)  # 1
   ```

[named]: https://example.org
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr("documentation.ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_have_their_language_line_and_text_without_the_indentation_of_a_list(page):
    first, second = read(page)[0]
    assert (first.language, first.place, first.text) == ("bash", "page.md:6", "ls  # first\n")
    assert (second.language, second.line, second.text) == ("python", 16, "if True:\n    print(1)  # 1\n")


def test_spans_and_links_are_those_outside_of_code(page):
    assert [text for _, text in spans(page)] == ["code", "a ` tick", "[none](none.md)", "it"]
    assert [target for _, target in links(page)] == ["other.md#there", "p.png", "https://example.org"]


def test_anchors_are_githubs(page):
    assert anchors(page) == {"a-page", "what-it-says-more-or-2-of-them", "twice", "twice-1"}


def test_a_fence_that_is_never_closed_is_an_error(page):
    page = page.with_name("open.md")
    page.write_text("```bash\nls\n")
    with pytest.raises(AssertionError, match=r"open.md:1: this fence is never closed"):
        read(page)


@pytest.mark.parametrize(
    "text,words",
    [
        ("a --b 1 \\\n  --c '2 3'  # why\n", [("a", "--b", "1", "--c", "2 3")]),
        ("A=1 b='x y' run it > file 2>&1 &\n", [("run", "it")]),
        ("one && two; three | four\n", [("one",), ("two",), ("three",), ("four",)]),
        ("for i in $(seq 0 7); do go $i; done\n", [("for", "i", "in", "$"), ("seq", "0", "7"), ("go", "$i")]),
        ("port=$((8000 + i))\nrun --url http://a:1,http://b:2\n", [("run", "--url", "http://a:1,http://b:2")]),
        ("#!/bin/bash\n#SBATCH --nodes=2\n\n", []),
        ("pip install -e '.[a,b]'\n", [("pip", "install", "-e", ".[a,b]")]),
    ],
)
def test_shell_text_is_taken_apart_into_its_commands(text, words):
    assert [command.words for command in commands_of(text, "page:1")] == words


def test_commands_know_their_lines():
    assert [command.place for command in commands_of("a \\\n b\nc\n", "page:10")] == ["page:10", "page:12"]


@pytest.mark.parametrize("text", ["a 'b\n", "cat <<EOF\n"])
def test_shell_text_that_cannot_be_taken_apart_is_refused_with_its_place(text):
    with pytest.raises(ValueError, match="page:1: "):
        commands_of(text, "page:1")


@pytest.mark.parametrize(
    "claim,printed,holds",
    [("3", "3\n", True), ("3", "4\n", False), ("0.12...", "0.1234\n", True), ("0.12...", "10.123\n", False)],
)
def test_a_comment_claims_what_is_printed(claim, printed, holds):
    assert bool(said(claim, printed)) == holds
