"""The loss of traces that are held out: which ones, and the training objective on them, without learning.

Their cuts are those of their first epoch, always the same, so that the losses of two steps can be compared. The sum
over their rows is normalised by their own count of supervised tokens, as a step's loss is by the step's.
"""

import random
from collections.abc import Callable

import torch

from trsd.errors import InputError
from trsd.loop import Loop
from trsd.parallel import give_back
from trsd.recipe import Recipe


def held_out_traces(recipe: Recipe, num_traces: int) -> tuple[int, ...]:
    """Indices of the recipe's ``validation_samples`` of ``num_traces``, drawn by its seed; ascending.

    Raises:
        InputError: no trace is left to learn from.
    """
    wanted = recipe.validation_samples or 0
    if wanted and wanted >= num_traces:
        raise InputError(
            f"validation_samples: {wanted} held out of {num_traces} traces leave none to learn from: expected at most "
            f"{num_traces - 1}; lower it, or give more data"
        )
    # Named apart from the epochs' orders, which the same seed draws.
    return tuple(sorted(random.Random(f"{recipe.seed}:held out").sample(range(num_traces), wanted)))


@torch.no_grad()
def validation_loss(loop: Loop, *, beat: Callable[[], None] = lambda: None) -> float:
    """The loss of ``loop``'s held-out traces as its weights are now; all ranks must ask. Training is not touched.

    ``beat`` is called before each row.
    """
    rows = loop.packed([(0, index) for index in loop.held_out])
    loop.weights.refresh()
    was_training = loop.model.training
    loop.model.eval()
    try:
        with loop.at_work():
            terms = []
            for batch in rows.batches:
                beat()
                terms.append(loop.forward(batch, rows)[1])
    finally:
        loop.model.train(was_training)
        give_back(loop.student)
    return float(loop.ranks.total(torch.stack(terms).double().sum(0))[0])
