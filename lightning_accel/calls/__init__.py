"""Calls of a network: from a batch to arguments of ``forward``, with their names, shapes and axes."""
