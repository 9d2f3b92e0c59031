"""Distillation: losses, and the module that trains a student beside a frozen teacher."""
