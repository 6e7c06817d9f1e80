"""Lengths of real reasoning and of real short solutions, in tokens, from data beside the checkout; none is kept here.

TRSD_BENCH_DATA names the folder, ``../shared/data`` of the checkout when unset. Where it is missing, what needs it is
not measured.
"""

import json
import os
import random
from pathlib import Path

from bench.measure import NotMeasured

SETS = {
    "AIME 2024 drafts": (Path("long_traces", "aime24_drafts.jsonl"), "response"),
    "GSM8K train solutions": (Path("gsm8k", "train.jsonl"), "answer"),
}
LONG, SHORT = SETS
MIXED = "both"


def data_folder() -> Path:
    return Path(os.environ.get("TRSD_BENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")


def token_lengths() -> dict[str, list[int]]:
    """Tokens of every text of each of ``SETS`` by Qwen3's tokenizer.

    Raises:
        NotMeasured: the data or its tokenizer is not there.
    """
    folder = data_folder()
    vocabulary = folder / "tokenizers" / "qwen3" / "tokenizer.json"
    for file in (vocabulary, *(folder / path for path, _ in SETS.values())):
        if not file.is_file():
            raise NotMeasured(f"no {file.relative_to(folder)} in the data folder (TRSD_BENCH_DATA)")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vocabulary))
    found = {}
    for name, (path, field) in SETS.items():
        texts = [json.loads(line)[field] for line in (folder / path).read_text(encoding="utf-8").splitlines()]
        found[name] = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return found


def sample(lengths: dict[str, list[int]], counts: dict[str, int], *, longest: int, seed: int = 0) -> list[int]:
    """So many of each set, of at most ``longest`` tokens, shuffled."""
    draws = random.Random(seed)
    found = []
    for name, count in counts.items():
        found += draws.sample([length for length in lengths[name] if length <= longest], count)
    draws.shuffle(found)
    return found
