"""What is kept of a whole sequence ``prompt | reasoning | close | answer`` (LSP, arXiv 2512.21002, section 3).

A truncation is a function Trace -> spans: ascending, disjoint [start, end) ranges of the sequence's tokens. What lies
outside never enters the model: the kept spans run one after the other as one sequence, from position 0. A new
truncation is one function here and one entry in ``build_truncation``.
"""

from collections.abc import Callable, Sequence

from trsd.derivations import first_derivation_tokens
from trsd.traces import Trace

Spans = tuple[tuple[int, int], ...]
Truncation = Callable[[Trace], Spans]
SIDES = ("left", "middle", "right")


def kept_length(length: int, share: float) -> int:
    """max(1, int(length * share)), as the authors' code counts."""
    return max(1, int(length * share))


def fraction(share: float, side: str = "left") -> Truncation:
    """One run of ``share`` of the tokens: the leading ones, those in the middle, or the last ones ("right")."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"keep_fraction: expected more than 0 and at most 1, got {share}")
    if side not in SIDES:
        raise ValueError(f"keep_side: expected one of {', '.join(SIDES)}, got {side!r}")

    def spans(trace: Trace) -> Spans:
        length = trace.num_tokens
        kept = kept_length(length, share)
        start = {"left": 0, "middle": (length - kept) // 2, "right": length - kept}[side]
        return ((start, start + kept),)

    return spans


def endpoints(share: float) -> Truncation:
    """``share`` of the tokens, one half from the beginning and one from the end."""
    whole = fraction(share)

    def spans(trace: Trace) -> Spans:
        ((_, kept),) = whole(trace)
        if kept == trace.num_tokens:
            return ((0, kept),)
        head = (kept + 1) // 2
        tail = (trace.num_tokens - (kept - head), trace.num_tokens)
        return ((0, head), tail) if kept > head else ((0, head),)

    return spans


def first_derivation(texts: Sequence[str]) -> Truncation:
    """Everything up to the first derivation of the final answer; the whole sequence where none is found.

    Args:
        texts: ``token_texts`` of the tokenizer.
    """

    def spans(trace: Trace) -> Spans:
        found = first_derivation_tokens(trace, texts)
        return ((0, trace.num_tokens if found is None else len(trace.prompt_ids) + found),)

    return spans


def build_truncation(name: str, *, share: float, side: str, texts: Sequence[str]) -> Truncation:
    """The truncation a recipe names."""
    truncations: dict[str, Callable[[], Truncation]] = {
        "fraction": lambda: fraction(share, side),
        "endpoints": lambda: endpoints(share),
        "first_derivation": lambda: first_derivation(texts),
    }
    if name not in truncations:
        raise ValueError(f"truncation: expected one of {', '.join(truncations)}, got {name!r}")
    return truncations[name]()
