"""Packages that are imported without what they have to say of themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# transformers and peft import these where they are installed. At every start they name the libraries of theirs that
# were built for another Python, another GPU, or are kept on a hub; torch 2.11 says that there is no Triton.
TALKATIVE = ("torchao", "torch.utils._pytree", "torch.utils.flop_counter", "bitsandbytes")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Of these packages errors alone are heard as long as the context lasts."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
