"""Benchmarks: what the kernels take in time and memory, against the peers and against the floor."""

import time

STARTED = time.monotonic()  # before what takes long to import
