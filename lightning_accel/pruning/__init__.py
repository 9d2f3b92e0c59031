"""Pruning: zero weights under masks, or remove channels, on a schedule."""
