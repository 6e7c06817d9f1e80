"""The flags that every command with a decoder shares, and the decoder that they ask for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from trsd.decoding import Decoder, Progress
from trsd.engines import Sampling
from trsd.engines.arguments import EngineArguments, build_engine, check_engine
from trsd.errors import InputError
from trsd.thinking import ThinkFormat


@dataclass(frozen=True, kw_only=True)
class DecodingArguments(EngineArguments):
    """Which model writes, how much, and how it is drawn."""

    model: str = "bundled:reasoner"
    """Model folder, checkpoint, hub name or bundled model; with engine server its tokenizer and config are read."""
    max_samples: int | None = None
    """Use only so many rows of the data."""
    num_samples: int = 1
    """Samples per question; more than one needs a temperature."""
    max_thinking_tokens: int = 1024
    """Most reasoning tokens."""
    max_answer_tokens: int = 64
    """Most answer tokens behind the thinking."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    seed: int = 0
    """Sampling seed."""
    closer: str = "template"
    """What closes cut thinking: a preset's name or a text with the close tag; use the one trained with."""
    open_tag: str = "<think>"
    """The tag that opens thinking."""
    close_tag: str = "</think>"
    """The tag that ends thinking."""

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class Reader(NamedTuple):
    """What is needed to read questions, before any weights are loaded."""

    folder: Any
    tokenizer: Any
    think: ThinkFormat


def open_reader(args: DecodingArguments) -> Reader:
    """Folder, tokenizer and think format of the model that ``args`` name; raises for flags that mean nothing."""
    from trsd.models import load_tokenizer, model_folder  # not at the top: flags are read before models are thought of

    check_decoding(args)
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder)
    think = ThinkFormat.of(tokenizer, closer=args.closer, open_tag=args.open_tag, close_tag=args.close_tag)
    think.say_added_opener(tokenizer)
    return Reader(folder, tokenizer, think)


def open_decoder(args: DecodingArguments, reader: Reader, progress: Progress | None = None) -> Decoder:
    """The decoder that ``args`` ask for."""
    engine = build_engine(args, reader.folder, reader.tokenizer)
    return Decoder(engine, reader.tokenizer, reader.think, sampling=args.sampling(), progress=progress)


def check_decoding(args: DecodingArguments) -> None:
    """Raise InputError for flags that mean nothing, by field."""
    check_engine(args)
    for name in ("max_thinking_tokens", "max_answer_tokens", "max_samples", "num_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if not 0 <= args.temperature <= 100 or 0 < args.temperature < 1e-3:
        raise InputError(f"temperature: expected 0 (greedy) or 0.001 to 100, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"top_p: expected more than 0 and at most 1, got {args.top_p}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed: expected 0 to 2^63 - 1, got {args.seed}")
    if args.num_samples > 1 and args.temperature == 0:
        raise InputError(
            f"num_samples: expected 1, or more with a temperature above 0 (greedy samples are all alike), got "
            f"{args.num_samples} with temperature {args.temperature}"
        )
