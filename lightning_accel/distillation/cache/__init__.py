"""Teacher outputs, computed once for each sample and stored on disk."""
