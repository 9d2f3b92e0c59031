"""Teacher outputs computed once for each sample and kept on disk."""
