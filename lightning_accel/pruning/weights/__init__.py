"""Weight pruning: masks over single weights, N:M patterns, blocks or channels."""
