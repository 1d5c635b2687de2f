"""Benchmarks: each measures adapterops and its peers in one run, interleaved, and checks every output."""
