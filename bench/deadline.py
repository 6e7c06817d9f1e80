"""When measuring has to end."""

import time

TIME_IS_UP = "TRSD_BENCH_SECONDS have passed"


class Deadline:
    """Some seconds from ``start`` on, or an interrupt before; called, it says whether it has passed."""

    def __init__(self, seconds: float = float("inf"), start: float | None = None) -> None:
        self._end = (time.monotonic() if start is None else start) + seconds

    def __call__(self) -> bool:
        return self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        """Until then; negative afterwards."""
        return self._end - time.monotonic()

    @property
    def interrupted(self) -> bool:
        """Whether somebody wants everything to end."""
        return self._end == float("-inf")

    def is_now(self) -> None:
        """Let what was measured until now be all, as at an interrupt."""
        self._end = float("-inf")
