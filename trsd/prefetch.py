"""What the next step needs, made while this one runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """``make(step)``, one step ahead in a thread of its own; what is made depends on the step's number alone."""

    def __init__(self, make: Callable[[int], T], num_steps: int) -> None:
        self._make, self._num_steps = make, num_steps
        on_gpu = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="prefetch",
            # A new thread begins on the first GPU, whichever this process works on.
            initializer=torch.cuda.set_device if on_gpu else None,
            initargs=(torch.cuda.current_device(),) if on_gpu else (),
        )
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """What ``step`` needs; its successor is begun. What went wrong in the thread is raised here."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != step:
            if ahead is not None:
                ahead[1].cancel()
            ahead = step, self._thread.submit(self._make, step)
        found = ahead[1].result()
        if step + 1 < self._num_steps:
            self._ahead = step + 1, self._thread.submit(self._make, step + 1)
        return found
