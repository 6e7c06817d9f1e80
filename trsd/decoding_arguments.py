"""The flags that every command with a decoder shares, and the decoder that they ask for."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from trsd.decoding import Decoder, Progress
from trsd.engines import Sampling
from trsd.engines.arguments import EngineArguments, build_engine, check_engine
from trsd.errors import InputError
from trsd.paths import BUNDLED
from trsd.recipe import Recipe
from trsd.thinking import ThinkFormat

# What is left out and no card says: the tags of most reasoning models, and training's own limits.
DEFAULTS = {
    "max_thinking_tokens": Recipe.max_thinking_tokens,
    "max_answer_tokens": Recipe.max_answer_tokens,
    "closer": Recipe.closer,
    "open_tag": Recipe.open_tag,
    "close_tag": Recipe.close_tag,
}
OF_BUNDLED = DEFAULTS | {"max_thinking_tokens": 320, "max_answer_tokens": 32}


@dataclass(frozen=True, kw_only=True)
class DecodingArguments(EngineArguments):
    """Which model writes, how much, and how it is drawn."""

    model: Annotated[str, tyro.conf.arg(aliases=["--model_name_or_path"])] = "bundled:reasoner"
    """Model folder, checkpoint, hub name or bundled model; with engine server its tokenizer and config are read."""
    max_samples: int | None = None
    """Use only so many rows of the data."""
    num_samples: int = 1
    """Samples per question; more than one needs a temperature."""
    max_thinking_tokens: int | None = None
    """Most reasoning tokens; left out, what the model's card says it was trained with, else 4096 (bundled ones 320)."""
    max_answer_tokens: int | None = None
    """Most answer tokens behind the thinking; left out, as the card says, else 512 (bundled ones 32)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    seed: int = 0
    """Sampling seed."""
    closer: str | None = None
    """What closes cut thinking: a preset's name or a text with the close tag; left out, as the card says, else what the
    chat template writes."""
    open_tag: str | None = None
    """The tag that opens thinking; left out, as the card says, else <think>."""
    close_tag: str | None = None
    """The tag that ends thinking; left out, as the card says, else </think>."""

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


Arguments = TypeVar("Arguments", bound=DecodingArguments)


def as_trained(args: Arguments) -> Arguments:
    """``args`` with what was left out of limits, closer and tags, from the model's card where it has one; it is said.

    A model must be asked as it was trained: with another closer or other limits its figures are another's.
    """
    from trsd.model_card import serving_facts  # not at the top: flags are read before models are thought of
    from trsd.models import model_folder

    check_decoding(args)
    missing = [name for name in DEFAULTS if getattr(args, name) is None]
    if not missing:
        return args
    facts, source = serving_facts(model_folder(args.model)), "from the model's card"
    if facts is None and args.model.startswith(BUNDLED):
        facts, source = OF_BUNDLED, "as in the demo"
    elif facts is None:
        facts, source = DEFAULTS, "by default, for no card of the model says"
    found = {name: facts[name] for name in missing}
    if said := [f"{name} {value!r}" for name, value in found.items() if value != DEFAULTS[name] or "max" in name]:
        print(f"{source}: {', '.join(said)}", flush=True)
    return replace(args, **found)


class Reader(NamedTuple):
    """What is needed to read questions, before any weights are loaded."""

    folder: Any
    tokenizer: Any
    think: ThinkFormat


def open_reader(args: DecodingArguments) -> Reader:
    """Folder, tokenizer and think format of the model that ``args``, of which nothing is left out, name."""
    from trsd.models import load_tokenizer, model_folder

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
    if args.top_p != 1 and args.temperature == 0:
        raise InputError("top_p: only a temperature above 0 reads it: set that, or leave top_p out")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed: expected 0 to 2^63 - 1, got {args.seed}")
    if args.num_samples > 1 and args.temperature == 0:
        raise InputError(
            f"num_samples: expected 1, or more with a temperature above 0 (greedy samples are all alike), got "
            f"{args.num_samples} with temperature {args.temperature}"
        )
