"""Benchmarks: what the kernels take in time and memory, against the peers and against the floor."""
