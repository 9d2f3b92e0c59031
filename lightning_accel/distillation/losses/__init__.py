"""Distillation losses. Each file is one family; ``base`` holds what they share."""
