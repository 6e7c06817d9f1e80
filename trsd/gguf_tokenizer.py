"""A byte-level BPE tokenizer as llama.cpp reads it: tokens, their types, merges, and the name of its pre-tokenizer.

llama.cpp knows pre-tokenizers, the patterns that cut a text before any merge, by name alone. ``cuts`` makes the
tokenizer that llama.cpp would be under a name: the same merges behind its patterns, each applied to the pieces that the
ones before left. A name fits where this writes the same tokens as the real one on texts that are hard to cut alike.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from trsd.errors import InputError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """What llama.cpp (src/llama-vocab.cpp) does under a name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token stays one, whatever the merges say."""


PRE_TOKENIZERS = {
    "qwen2": PreTokenizer((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)),
    "llama-bpe": PreTokenizer((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
}
HARD_TEXTS = (
    "Hello, world!  Two spaces,   three, and\ttabs\t\tand a trailing one ",
    "line\nbreaks\n\nin\r\n a row\n \n  indented\n\n\n and three;\n    return x[i+1]  # code\n",
    "3 33 333 3333 33333 1,234.56 3.14e-10 7*8=56 (a+b)^2 x_1 2nd ½ ² Ⅷ ١٢٣",
    "I'm you're he'll WE'VE it's IT'S 'twas 'something quoted' don't O'Neill's",
    "$100 50% #1 @home a/b\\c <tag> {x: [1, 2]} ... ?!?! -- \u2014 \u201cquotes\u201d \\boxed{42}",
    "na\u00efve caf\u00e9 \u00dcbergr\u00f6\u00dfe \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac "
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea \u0639\u0631\u0628\u064a\u0629 "
    "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f680 \U0001f636\u200d\U0001f32b\ufe0f emoji\u00a0no-break \u3000wide",
)


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer goes into a GGUF file."""

    tokens: list[str]
    types: list[int]
    """``gguf.TokenType`` of each."""
    merges: list[str]
    pre_tokenizer: str
    adds_bos: bool


def vocabulary_of(
    tokenizer: Any, vocab_size: int, *, tags: Sequence[str] = (), pre_tokenizer: str | None, texts: Sequence[str]
) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    Args:
        tokenizer: a fast one, byte-level BPE.
        vocab_size: rows of the model's embedding; ids that the tokenizer does not know become unused tokens.
        tags: tokens that are part of what a model says, and so are shown, whatever the tokenizer calls them.
        pre_tokenizer: llama.cpp's name; None to find it.
        texts: that a given name must write as the tokenizer does, beside ``HARD_TEXTS`` where it is to be found.

    Raises:
        InputError: another kind of tokenizer, or no name, or not the given one, writes the same tokens.
    """
    from gguf import TokenType

    state = _state(tokenizer)
    known = {token: i for token, i in tokenizer.get_vocab().items() if i < vocab_size}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in known.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for entry in state["added_tokens"]:
        if entry["id"] < vocab_size:
            hidden = entry["special"] and entry["content"] not in tags
            types[entry["id"]] = int(TokenType.CONTROL if hidden else TokenType.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    begun = tokenizer("a").input_ids[:1]
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre_tokenizer=_chosen(tokenizer, pre_tokenizer, texts),
        adds_bos=tokenizer.bos_token_id is not None and begun == [tokenizer.bos_token_id],
    )


def cuts(tokenizer: Any, name: str) -> Tokenizer:
    """The tokenizer that llama.cpp makes of ``tokenizer`` under the pre-tokenizer ``name``."""
    known = PRE_TOKENIZERS[name]
    state = _state(tokenizer)
    state["model"]["ignore_merges"] = known.ignore_merges
    made = Tokenizer.from_str(json.dumps(state | {"normalizer": None, "pre_tokenizer": None, "post_processor": None}))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.patterns]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


def first_difference(tokenizer: Any, name: str, texts: Iterable[str]) -> str | None:
    """The first of ``texts`` that llama.cpp would write in other tokens under ``name``; None without one."""
    theirs = cuts(tokenizer, name)
    for text in texts:
        if theirs.encode(text, add_special_tokens=False).ids != tokenizer(text, add_special_tokens=False).input_ids:
            return text
    return None


def _state(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as JSON; refuses one that is no byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model", {})
    odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk")
    byte_level = (state.get("decoder") or {}).get("type") == "ByteLevel"
    if model.get("type") != "BPE" or not byte_level or any(model.get(name) for name in odd):
        raise InputError(
            "the tokenizer is no byte-level BPE, the only kind that is exported here: use llama.cpp's own "
            "convert_hf_to_gguf.py"
        )
    return state


def _chosen(tokenizer: Any, name: str | None, texts: Sequence[str]) -> str:
    if name is None:
        for known in PRE_TOKENIZERS:
            if first_difference(tokenizer, known, [*HARD_TEXTS, *texts]) is None:
                return known
        raise InputError(
            f"none of llama.cpp's pre-tokenizers {', '.join(PRE_TOKENIZERS)} cuts every text as this tokenizer does. "
            "Where yours are simple enough, name one and give them: --pre_tokenizer qwen2 --texts FILE.jsonl; it is "
            "refused unless it writes all of them in the same tokens"
        )
    if not texts:
        raise InputError(f"texts: expected a file of texts on which pre_tokenizer {name} is to be checked")
    text = first_difference(tokenizer, name, texts)
    if text is not None:
        theirs = cuts(tokenizer, name).encode(text, add_special_tokens=False).tokens
        ours = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        raise InputError(
            f"pre_tokenizer {name} writes {text[:60]!r} in other tokens: from token {place} on "
            f"{theirs[place : place + 5]} where the tokenizer has {ours[place : place + 5]}"
        )
    return name
