"""Generation by all ranks of a run: each writes its share of the scripts, and all get every result."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from trsd.engines import Engine, Sampling, Script
from trsd.ranks import Ranks

T = TypeVar("T")


class RankedEngine:
    """An engine on every rank, each with the same model; all ranks must run the same scripts in the same order."""

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self.engine, self.ranks = engine, ranks
        self.eos_ids, self.context_limit = engine.eos_ids, engine.context_limit
        self.vocab_size, self.dtype = engine.vocab_size, engine.dtype

    def run(self, scripts: Sequence[Script[T]], sampling: Sampling) -> Iterator[tuple[int, T]]:
        """As ``Engine``; results come when every rank has finished."""
        places = range(self.ranks.rank, len(scripts), self.ranks.size)
        mine = [(places[index], found) for index, found in self.engine.run([scripts[p] for p in places], sampling)]
        everything = (item for part in self.ranks.everyone(mine) for item in part)
        yield from sorted(everything, key=lambda item: item[0])
