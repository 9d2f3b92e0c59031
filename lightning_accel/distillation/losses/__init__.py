"""Distillation losses, one family in each file."""
