"""Where a run's figures go beside metrics.jsonl: ``--report_to tensorboard,wandb,trackio``.

A tracker gets the recipe, every step's figures and the accuracy of both evaluations, from rank 0. A resumed run goes on
in the same tracker's run. A tracker that fails is said once and left out; training goes on.
"""

import sys
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from trsd.files import write_text

PROJECT = "trsd"
KEY_FILE = "tracker_key"
NONE = "none"


class Tracker(Protocol):
    """One of them."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, output_dir: Path, config: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What lay beyond the resumed step is not shown.
        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        if not first_step:
            self._writer.add_text("recipe", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """Weights & Biases, and trackio, which has its interface."""

    def __init__(self, module: Any, **options: Any) -> None:
        self._module = module
        module.init(project=PROJECT, resume="allow", **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


def _wandb(output_dir: Path, config: dict[str, Any], first_step: int) -> Tracker:
    import wandb

    key = _key_of(output_dir, first_step)
    return _Hosted(wandb, id=key, name=output_dir.name, dir=str(output_dir), config=config)


def _trackio(output_dir: Path, config: dict[str, Any], first_step: int) -> Tracker:
    import trackio

    key = _key_of(output_dir, first_step)  # trackio goes on with a run by its name, and other folders are called alike
    return _Hosted(trackio, name=f"{output_dir.name}-{key}", config=config)


def _key_of(output_dir: Path, first_step: int) -> str:
    """What names the run to a service: drawn when it begins, and kept in its folder for when it goes on."""
    path = output_dir / KEY_FILE
    if first_step and path.exists():
        return path.read_text(encoding="utf-8").strip()
    key = uuid.uuid4().hex[:12]
    write_text(path, key + "\n")
    return key


KINDS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def tracker_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of a recipe."""
    unknown = [name for name in names if name not in KINDS and name != NONE]
    if unknown:
        return [f"report_to: expected {', '.join([NONE, *KINDS])}, got {', '.join(unknown)}"]
    return ["report_to: none stands alone"] if NONE in names and len(names) > 1 else []


def require_trackers(names: Sequence[str]) -> None:
    """Raise ImportError, before any work, where the package of one is not installed."""
    if missing := [name for name in names if name in KINDS and not _is_installed(name)]:
        raise ImportError(f"report_to {', '.join(missing)} needs a package: pip install 'trsd[tracking]'")


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder here, such as wandb makes, has no origin


class Trackers:
    """All that a run reports to; a context that closes them."""

    def __init__(self, names: Sequence[str], output_dir: Path, config: dict[str, Any], *, first_step: int) -> None:
        """Open those of ``names`` for the run in ``output_dir``, which goes on behind ``first_step``."""
        self._open: dict[str, Tracker] = {}
        for name in names:
            if name in KINDS:
                self._try(name, lambda name=name: KINDS[name](output_dir, config, first_step))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Figures of a step; what is no number stays out."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, numbers))

    def _try(self, name: str, call: Callable[[], Tracker | None]) -> None:
        try:
            if opened := call():
                self._open[name] = opened
        except Exception as error:  # whatever a service does, training is worth more
            self._open.pop(name, None)
            print(f"warning: {name} fails ({error}): nothing more is reported to it", file=sys.stderr)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)


def evaluation_figures(result: dict[str, Any] | None) -> dict[str, float]:
    """Of an evaluation, what a tracker plots: area, free accuracy and thinking tokens, accuracy by budget."""
    if result is None:
        return {}
    free = result["unconstrained"]
    found = {"eval/accuracy_free": free["accuracy"], "eval/thinking_tokens_free": free["mean_thinking_tokens"]}
    if result["auc"] is not None:
        found["eval/area_under_curve"] = result["auc"]
    return found | {f"eval/accuracy_at_{row['budget']}": row["accuracy"] for row in result["budgets"]}
