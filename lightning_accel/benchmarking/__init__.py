"""Benchmarking: interleaved measurement of several runtime variants of a network, and the report of it."""
