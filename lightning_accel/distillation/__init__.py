"""Distillation: train a student with the outputs and features of a frozen teacher."""
