"""Pruning: criteria that score weights, masks that zero them, and the callback that schedules both."""
