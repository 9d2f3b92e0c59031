"""Bulk inference: files in, Parquet out, nothing lost and nothing twice."""
