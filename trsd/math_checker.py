"""Whether two LaTeX expressions are equal, judged by math-verify in a process of its own, within a time limit.

Answers come from a model, so comparing them may take for ever (``9^{9^{9^9}}``) or all memory, inside code that no
exception and no alarm of this process reaches. The process below (``python -m trsd.math_checker``; it imports neither
torch nor another module of this package) loads math-verify once and forks; the child reads one JSON line a request and
may use so much processor time. The kernel ends it where it takes more, the request stays undecided, and another child
is forked. Memory is limited too: what does not fit is not equal. Both end with their parent, however that ends: a timer
runs while the child works, and its standard input closes while it waits.

Only math-verify's LaTeX grammar is used. Its reading of plain expressions goes through sympy's ``parse_expr``, which
evaluates the text as Python; so does sympy with every number it reads. In the process, that evaluation is replaced by
one that makes numbers and symbols of literals and can do nothing else, so that no text runs.
"""

import ast
import atexit
import contextlib
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any

TIME_LIMIT_SECONDS = 5.0
"""Processor time of one comparison. Of 500 competition answers the slowest takes 0.3 s."""
MEMORY_LIMIT_BYTES = 2**30
"""Address space of the process; math-verify itself takes 0.2 GiB."""
WALL_TIME_FACTOR = 4
"""How much longer than its processor time a comparison may take on a busy machine before the process is given up."""
CACHE_SIZE = 2**16
"""Verdicts that are remembered; samples of one question often state the same answer."""
START_SECONDS = 120.0
"""Within which the process has to be ready; importing math-verify takes 0.5 s on an idle machine."""

_COMPARES = re.compile(r"[<>≤≥]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![A-Za-z])")


class MathChecker:
    """Compares expressions one at a time, from any thread; the process is started by the first request."""

    def __init__(self, *, seconds: float = TIME_LIMIT_SECONDS, memory_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        """Take the processor time of one comparison and the address space of the process."""
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self.num_undecided = 0
        """Comparisons that passed the time limit, each time they were asked for."""
        self._verdict = lru_cache(maxsize=CACHE_SIZE)(self._compare)
        self._num_asked = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, reference: str) -> bool | None:
        """Whether the expression ``answer`` equals ``reference``; None when that could not be decided within limits.

        Raises:
            ImportError: math-verify is not installed.
            ChildProcessError: the process cannot be started.
        """
        verdict = self._verdict(answer, reference)
        if verdict is None:
            with self._lock:
                self.num_undecided += 1
                first = self.num_undecided == 1
            if first:
                warnings.warn(
                    f"an answer could not be compared within {self.seconds:g} s of processor time, so it counts as "
                    f"wrong, as will others like it: {answer[:80]!r}",
                    stacklevel=3,
                )
        return verdict

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    def _compare(self, answer: str, reference: str) -> bool | None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._process = self._start()
            try:
                return self._ask(self._process, answer, reference)
            except BaseException as error:  # interrupted, or the process has died
                self._end()
                if not isinstance(error, OSError):
                    raise
                return None

    def _ask(self, process: subprocess.Popen[bytes], answer: str, reference: str) -> bool | None:
        """The verdict of ``process``; raises ``OSError`` when it died or gave none in time."""
        self._num_asked += 1
        process.stdin.write(json.dumps([self._num_asked, answer, reference]).encode() + b"\n")
        process.stdin.flush()  # shorter than a pipe holds, so this does not wait
        deadline = time.monotonic() + WALL_TIME_FACTOR * self.seconds
        while line := _read_line(process.stdout, deadline):
            number, verdict = json.loads(line)
            # None: a child died, most likely of this request; if of nothing, the reply comes yet, and is passed over.
            if number in (self._num_asked, None):
                return verdict
        raise TimeoutError(f"no verdict within {WALL_TIME_FACTOR * self.seconds:g} s")

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing these answers needs math-verify: pip install 'trsd[eval]'")
        # The same packages as here, whatever put them on the path; and a session of its own, since Ctrl-C at the
        # terminal is for the parent, which may have answers to grade before it stops.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trsd.math_checker", str(self.seconds), str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        said = _read_line(process.stdout, time.monotonic() + START_SECONDS)
        if said != b'"ready"\n':
            _kill(process)
            reason = json.loads(said) if said else f"it ended, or said nothing for {START_SECONDS:g} s"
            command = f"python -m trsd.math_checker {self.seconds} {self.memory_bytes}"
            raise ChildProcessError(f"the process that compares expressions did not start ({reason}): try {command}")
        return process

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    """One line, or nothing where none comes before the deadline (of ``time.monotonic``) or at all."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return b""
            byte = os.read(stream.fileno(), 1)  # no more: what follows belongs to another request
            if not byte:
                return b""
            line += byte
    return line


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session, so that its child goes with it
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not written yet has nowhere to go
            stream.close()


_shared = MathChecker()


def shared_checker() -> MathChecker:
    """The checker of this process."""
    return _shared


def _renew_after_fork() -> None:
    """A forked process shares pipes and perhaps a held lock with its parent: it gets a checker of its own."""
    global _shared
    _shared = MathChecker(seconds=_shared.seconds, memory_bytes=_shared.memory_bytes)


atexit.register(lambda: _shared.close())
os.register_at_fork(after_in_child=_renew_after_fork)


def main() -> None:
    """Answer requests until standard input closes: a line [number, answer, reference] by a line [number, verdict]."""
    import resource

    seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    try:
        compare = _load_comparison()
        compare(r"\frac{1}{2}", "0.5")  # what the first comparison builds and imports, every child then has
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the child, in whatever code it is
    print('"ready"', flush=True)
    while True:
        child = os.fork()
        if child == 0:
            _serve(compare, seconds)
            return
        _, status = os.waitpid(child, 0)
        if status == 0:  # standard input has closed
            return
        print("[null, null]", flush=True)


def _serve(compare: Callable[[str, str], bool], seconds: float) -> None:
    for line in sys.stdin:
        number, answer, reference = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        equal = compare(answer, reference)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([number, equal]), flush=True)


def evaluate_literal(code: str, *_: dict[str, Any]) -> Any:
    """What sympy's parser evaluates for a number or a name, such as ``Integer (14 )``; anything else raises."""
    import sympy

    call = ast.parse(code.strip(), mode="eval").body
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("Integer", "Float", "Symbol")
        and not call.keywords
        and all(isinstance(argument, ast.Constant) for argument in call.args)
    ):
        raise ValueError("expected a number or a name: text is not evaluated here")
    return getattr(sympy, call.func.id)(*(argument.value for argument in call.args))


def _load_comparison() -> Callable[[str, str], bool]:
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # otherwise imported by the first comparison, and evaluates its own names
    from math_verify import LatexExtractionConfig, parse, verify

    sympy.parsing.sympy_parser.eval_expr = evaluate_literal
    grammar = [LatexExtractionConfig()]

    def compare(answer: str, reference: str) -> bool:
        # Their own time limits are alarms, which do not end what runs in C.
        parsed = [parse(f"${text}$", grammar, parsing_timeout=None) for text in (reference, answer)]
        if verify(*parsed, timeout_seconds=None):
            return True
        # "-2 <= x <= 7" is "x in [-2, 7]", and "[-2, 7]" for short, but of no other variable.
        names = [set().union(*(getattr(form, "free_symbols", ()) for form in forms)) for forms in parsed]
        if not _COMPARES.search(answer + reference) or (all(names) and names[0] != names[1]):
            return False
        return bool(verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None))

    return compare


if __name__ == "__main__":
    main()
