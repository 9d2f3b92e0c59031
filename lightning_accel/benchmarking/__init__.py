"""Benchmarking: interleaved measurement of several ways to run a network, and the report of it."""
