"""Operators that torch's exporter can't write, or that an engine computes differently, in terms of others.

Each module holds one family: functions that compute what the operator computes, in plain tensor operations, and ``RULES`` that
say which calls they replace. :mod:`~lightning_accel.onnx.translations.rewrite` applies them to a captured program.
"""
