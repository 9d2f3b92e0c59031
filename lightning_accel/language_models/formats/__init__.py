"""File formats of language models, all written from the same integers, and read back to compare them."""
