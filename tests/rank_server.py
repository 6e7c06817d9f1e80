"""Runs of several ranks for the tests: forks them after the imports, which take seconds, and says how each ended.

Reads a line of JSON for each run, of the trainer ``{"words": [...], "num_ranks": 2, "accident": "nan", "seconds": 60}``
or of a test module's function ``{"function": ["module", "name"], "arguments": [...], "num_ranks": 2}``. It computes
nothing itself, so its children may.
"""

import errno
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import bare_reports
import matplotlib.pyplot  # noqa: F401 - here, not in every child
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forked import run_and_exit

from trsd import checkpoint, prepare, train, training
from trsd.checkpoint import Checkpointer
from trsd.interruption import SAME_SECONDS
from trsd.loop import Loop

AT_STEP = 2  # of accidents: during the third step, to the last rank


def signalled(module, name, number=signal.SIGTERM):
    """Let the process get a signal when ``module.name`` is called."""
    true = getattr(module, name)

    def called(*arguments, **options):
        setattr(module, name, true)  # once
        os.kill(os.getpid(), number)
        return true(*arguments, **options)

    setattr(module, name, called)


def no_room():
    """Let rank 0's saves of the second and third step find no room on the disk."""
    true, calls = shutil.disk_usage, []

    def disk_usage(path):
        found = true(path)
        if Path(path).name != "run":
            return found
        calls.append(path)  # the teacher's cache asks first
        return found if len(calls) not in (3, 4) else found._replace(free=0)

    checkpoint.shutil.disk_usage = disk_usage


def full_disk():
    """Let rank 1's shards of the second step's checkpoint not be written."""
    true = dcp.HuggingFaceStorageWriter.write_data

    def write_data(self, *arguments, **options):
        if os.environ.get("RANK") == "1" and "checkpoint-2." in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(self, *arguments, **options)

    dcp.HuggingFaceStorageWriter.write_data = write_data


def other_traces():
    """Let rank 1 see another file than rank 0."""
    if os.environ.get("RANK") == "1":
        training.file_sha256 = lambda path: "another"


def no_folder():
    """Let rank 0 fail to make the folder of the second step's checkpoint."""
    true = Path.mkdir

    def mkdir(self, *arguments, **options):
        if "checkpoint-2." in str(self):
            raise OSError(errno.EROFS, "Read-only file system")
        return true(self, *arguments, **options)

    Path.mkdir = mkdir


ELSEWHERE = {
    "no folder": no_folder,
    "no room": no_room,
    "full disk": full_disk,
    "other traces": other_traces,
    "hang up in a save": lambda: signalled(Checkpointer, "save", signal.SIGHUP),
    "term in evaluation": lambda: signalled(training, "evaluate"),
    "interrupt in generation": lambda: signalled(prepare, "generate_traces", signal.SIGINT),
    "term in a save": lambda: signalled(Checkpointer, "save"),
}


def accident(kind):
    """What befalls the last rank amid its third step, or wherever the kind says."""
    if kind in ELSEWHERE:
        ELSEWHERE[kind]()
        return
    true = Loop._backward

    def backward(self, batch, rows, **options):
        totals = true(self, batch, rows, **options)
        if self.step_number != AT_STEP or self.ranks.rank != self.ranks.size - 1:
            return totals
        if kind == "nan":
            for parameter in self.model.parameters():
                local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                local.fill_(float("nan"))
        elif kind == "nan loss":
            totals = totals * float("nan")
        elif kind == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind.startswith("term"):
            os.kill(os.getpid(), signal.SIGTERM)
            if kind == "term twice":
                os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes it on: the same one
                time.sleep(SAME_SECONDS + 0.1)
                os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif kind == "hang":
            time.sleep(1000)
        return totals

    step = Loop.step

    def counted(self, number, **options):
        self.step_number = number
        return step(self, number, **options)

    Loop._backward, Loop.step = backward, counted


def rank_main(rank, request, port):
    """The life of one rank."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores both
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if request["num_ranks"] > 1:
        size = str(request["num_ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "function" in request:
        module, name = request["function"]
        getattr(importlib.import_module(module), name)(*request["arguments"])
        if dist.is_initialized():
            dist.barrier()  # no rank leaves while another still talks to it
        return
    bare_reports.leave_out()
    if request.get("accident"):
        accident(request["accident"])
    train.main(request["words"])


def run(request):
    """Exit code (negative: a signal; None: it had to be killed) and output of every rank, and the seconds it took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(request["num_ranks"])]
        children = {}
        for rank, log in enumerate(logs):
            if (pid := os.fork()) == 0:
                run_and_exit(partial(rank_main, rank, request, port), log)
            children[pid] = rank
        began, codes = time.monotonic(), dict.fromkeys(children.values())
        while children and time.monotonic() - began < request.get("seconds", 120):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        texts = [log.read_text() if log.exists() else "" for log in logs]
    return {"codes": list(codes.values()), "logs": texts, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    gc.freeze()  # the children's collections need not look at what was imported
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
