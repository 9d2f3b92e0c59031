"""Benchmarking: interleaved measurement of the runtime variants of a network, and their comparison."""
