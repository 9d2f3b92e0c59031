"""Captured graphs: where fake-quantization is inserted, and how it becomes integers."""
